"""The other end: what sits beside an agent. Imports nothing else of this repository.

`serve` and `hosted` put an agent around a handler of yours. `Agent` and `running` are the small one for trials, which
echoes and misbehaves when asked to.
"""

from bide_agent.agent import Agent, running
from bide_agent.options import Options
from bide_agent.runtime.host import Host, hosted, serve
from bide_agent.runtime.session import Session
from bide_agent.runtime.words import Answer, Asked, Checkpoint, Failed, Message

__all__ = [
    "Agent",
    "Answer",
    "Asked",
    "Checkpoint",
    "Failed",
    "Host",
    "Message",
    "Options",
    "Session",
    "hosted",
    "running",
    "serve",
]
