"""The end of sessions: what is seen of them, the loop that takes their steps, and what people may ask of them."""

from services.scheduler.sessions.loop import Sessions
from services.scheduler.sessions.telling import Turn, tell
from services.scheduler.sessions.verbs import VERBS, command, show

__all__ = ["VERBS", "Sessions", "Turn", "command", "show", "tell"]
