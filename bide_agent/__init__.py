"""The other end: what sits beside an agent. Imports nothing else of this repository."""

from bide_agent.agent import Agent, running
from bide_agent.options import Options

__all__ = ["Agent", "Options", "running"]
