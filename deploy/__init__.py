"""How Bide gets onto machines."""
