"""How long a turn may take that nobody ends: what is let go then is let go because nothing ended it (policies §2)."""

from __future__ import annotations

from dataclasses import dataclass

from services.proxy.decide import Workspace, said_s
from services.proxy.settings import Settings
from shared.settings import TURN_SLACK_S


@dataclass(slots=True)  # not frozen: one is made for each message, and freezing makes that three times as dear
class Bounds:
    """Of one workspace, as its settings are now."""

    longest_s: float
    """From its begin."""
    grace_s: float
    """What a session has for ending."""


def bounds_of(workspace: Workspace, settings: Settings) -> Bounds:
    """Its own times, else ours."""
    ceiling_s = said_s(workspace, "session_ceiling_s", settings.session_ceiling_s)
    grace_s = said_s(workspace, "checkpoint_grace_s", settings.checkpoint_grace_s)
    grace_s += said_s(workspace, "stop_grace_s", settings.stop_grace_s)
    return Bounds(ceiling_s + grace_s + TURN_SLACK_S if ceiling_s else settings.forward_max_s, grace_s)
