"""liveness: decides who is dead, and restarts them.

It owns the evidence about each agent and the restart drivers; it alone can kill.
"""
