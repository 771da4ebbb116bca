"""The bodies of the plain routes: what may be said in them, with its ranges."""

from __future__ import annotations

from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, field_validator

from shared.facts import FLEET, Priority, WorkspaceId

_WEEK_S = 7 * 86_400


class Register(BaseModel):
    """POST /registry/register. Unknown fields are other people's and ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    id: WorkspaceId
    url: str = ""
    agent_card: dict[str, Any] | None = None
    boot_id: str | None = Field(default=None, min_length=1, max_length=200)
    max_concurrent_tasks: int = Field(default=1, ge=1, le=10_000)
    heartbeat_interval_s: float = Field(default=30.0, ge=0.05, le=3600)
    capabilities: tuple[str, ...] = ()

    @field_validator("id")
    @classmethod
    def _is_no_fleet(cls, workspace_id: str) -> str:
        if workspace_id == FLEET:
            raise ValueError('"-" stands for all of them; take another id')
        return workspace_id

    @field_validator("capabilities")
    @classmethod
    def _are_known(cls, capabilities: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted({"control", "refuses_when_busy"}.intersection(capabilities)))


class Acknowledged(BaseModel):
    """A directive that the agent has taken, and what came of it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: UUID
    result: str = ""


class Heartbeat(BaseModel):
    """POST /registry/heartbeat."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    workspace_id: WorkspaceId
    active_tasks: int = Field(ge=0, le=1_000_000)
    boot_id: str | None = Field(default=None, min_length=1, max_length=200)
    max_concurrent_tasks: int | None = Field(default=None, ge=1, le=10_000)
    uptime_seconds: float | None = Field(default=None, ge=0)
    progress: float | None = None
    runtime_state: str | None = Field(default=None, max_length=200)
    acknowledged: tuple[Acknowledged, ...] = Field(default=(), max_length=256)


class UpdateCard(BaseModel):
    """POST /registry/update-card."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    workspace_id: WorkspaceId
    agent_card: dict[str, Any]


class Patch(BaseModel):
    """PATCH /workspaces/{id}: only what is named changes; null takes a setting back to its default."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, strict=True)

    # Settings (5-policies, ws). Seconds unless the name says otherwise.
    queue_depth_max: int | None = Field(default=None, ge=1, le=1_000_000)
    admission: Literal["auto", "queue_first"] | None = None
    delivery: Literal["at_least_once", "at_most_once"] | None = None
    heartbeat: Literal["expected", "none"] | None = None
    give_up_after_s: float | None = Field(default=None, ge=1, le=90 * 86_400)
    hold_max_s: float | None = Field(default=None, ge=0, le=3600)
    session_ceiling_s: float | None = Field(default=None, ge=0, le=_WEEK_S)
    session_min_s: float | None = Field(default=None, ge=0, le=_WEEK_S)
    checkpoint_grace_s: float | None = Field(default=None, ge=0, le=86_400)
    stop_grace_s: float | None = Field(default=None, ge=0, le=3600)
    tick_preempts: Literal["ticks", "all", "none"] | None = None
    tick_preempt_after_s: float | None = Field(default=None, ge=0, le=_WEEK_S)
    critical_preempt_after_s: float | None = Field(default=None, ge=0, le=_WEEK_S)
    restart_wedged: bool | None = None
    cordoned: bool | None = None
    # Columns.
    paused: bool = False
    pause_note: str | None = Field(default=None, max_length=1000)
    desired: Literal["running", "stopped"] = "running"
    runtime: dict[str, str] = {}
    agent_authorization: str | None = Field(default=None, max_length=8192, pattern=r"^[\x20-\x7e]*$")


class Note(BaseModel):
    """Why somebody does it, for whoever reads the record. The body may be left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, strict=True)

    note: str | None = Field(default=None, max_length=1000)


class Why(BaseModel):
    """Why a session is stopped or saved, or an agent restarted. The body may be left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, strict=True)

    reason: str | None = Field(default=None, max_length=1000)


class CancelMany(Note):
    """POST /workspaces/{id}/queue/cancel: of what waits there, whatever matches all that is named."""

    priority: Priority | None = None
    caller: str | None = Field(default=None, min_length=1, max_length=1000)
    older_than_s: float | None = Field(default=None, ge=0, le=10 * 366 * 86_400, allow_inf_nan=False)
    count_only: bool = False
