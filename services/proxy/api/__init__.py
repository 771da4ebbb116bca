"""The routes of proxy: parse, call, render. `door.py` is the table of them."""
