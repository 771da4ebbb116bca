"""What an operator may turn in scheduler."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.scheduler.decide import Pace, Rules
from shared.settings import SharedSettings


class Settings(SharedSettings):
    """Settings of scheduler; a field `lease_s` here is `BIDE_SCHEDULER_LEASE_S`."""

    claim_rows: int = Field(default=500, ge=1, le=5000)
    """Schedules that one transaction fires."""
    look_s: float = Field(default=5.0, gt=0, le=60)
    """The longest sleep between two looks at what is due: so late is a schedule whose replica died after an edit."""
    schedules_max: int = Field(default=1000, ge=1)
    """Schedules that one workspace may have."""
    retention_days: int = Field(default=90, ge=1)
    """How long a fire is shown after it ended."""
    audit_days: int = Field(default=365, ge=1)
    """How long it is remembered who changed which schedule."""

    # Sessions. Those with the name of a workspace's setting are what holds where a workspace says nothing else.
    session_min_s: float = Field(default=600.0, ge=0)
    """How long a session runs before a tick that waits asks it to make room."""
    tick_preempts: Literal["ticks", "all", "none"] = "ticks"
    """Which sessions such a tick asks: those that a tick began and foreign ones, all, or none."""
    tick_preempt_after_s: float = Field(default=900.0, ge=0)
    """How long a tick waits, at the most, before it does; a shorter period of its schedule is enough."""
    critical_preempt_after_s: float = Field(default=60.0, ge=0)
    """How long a session runs before a CRITICAL message that waits asks it to make room."""
    session_note_s: float = Field(default=1.0, ge=0)
    """Sessions shorter than this are not noted. Above the clocks' skew, or one may be thought gone for a moment."""
    session_repeat_s: float = Field(default=10.0, gt=0)
    """How often a directive or a stop is said again."""
    gate_s: float = Field(default=120.0, gt=0)
    """How long a gate stays closed when no scheduler says so again."""
    gate_repeat_s: float = Field(default=5.0, gt=0)
    """How often that is said; well below gate_s."""

    @property
    def rules(self) -> Rules:
        """What holds where a workspace says nothing else."""
        return Rules(
            ceiling_s=self.session_ceiling_s,
            checkpoint_grace_s=self.checkpoint_grace_s,
            stop_grace_s=self.stop_grace_s,
            session_min_s=self.session_min_s,
            tick_preempts=self.tick_preempts,
            tick_preempt_after_s=self.tick_preempt_after_s,
            critical_preempt_after_s=self.critical_preempt_after_s,
        )

    @property
    def pace(self) -> Pace:
        return Pace(
            repeat_s=self.session_repeat_s,
            gate_s=self.gate_s,
            gate_repeat_s=self.gate_repeat_s,
            late_repeat_s=min(1.0, self.gate_repeat_s),
        )
