"""What liveness does by the clock: it looks at agents, and it says again, counts and forgets."""
