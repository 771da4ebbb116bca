"""The other end: what sits beside an agent. Imports nothing else of this repository."""
