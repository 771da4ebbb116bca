"""What liveness decides, as pure functions: evidence in; verdict, reason and new state out (policies §6)."""
