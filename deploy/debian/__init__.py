"""Trying the front door in a new Debian: `fresh.sh` makes it, `front_door.py` runs inside."""
