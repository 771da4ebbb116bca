"""What every fact carries, and the few words that all of them use."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, TypeVar
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator
from uuid_utils.compat import uuid7

WorkspaceId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
"""sha256 of a string that a caller chose: the only form in which such a string is a key (4-data)."""
Count = Annotated[int, Field(ge=0)]


_AHEAD_MAX_S = 86_400.0


def _now() -> datetime:
    return datetime.now(UTC)


class Priority(StrEnum):
    CRITICAL = "CRITICAL"
    TASK = "TASK"
    INFO = "INFO"


class Part(BaseModel):
    """A value inside a fact."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_bytes="base64", val_json_bytes="base64")


class Fact(Part):
    """What every fact carries."""

    fact_id: UUID = Field(default_factory=uuid7)
    """uuid7: its time says which part of the inbox remembers it."""
    occurred_at: AwareDatetime = Field(default_factory=_now)
    workspace_id: WorkspaceId
    rev: Count
    """Revision of what the fact speaks about; grows with every change of it."""

    @field_validator("fact_id")
    @classmethod
    def _is_uuid7(cls, fact_id: UUID) -> UUID:
        if fact_id.version != 7:  # noqa: PLR2004 - the version that carries a time
            raise ValueError("a fact_id is a uuid7: the inbox forgets by its time")
        if (fact_id.int >> 80) / 1000 > time.time() + _AHEAD_MAX_S:
            raise ValueError("a fact_id from the future: the clock that made it is wrong by more than a day")
        return fact_id


FactT = TypeVar("FactT", bound=Fact)

_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])")


def routing_key(kind: type[Fact]) -> str:
    """`WorkspaceHeartbeat` → `workspace.heartbeat`."""
    return _BOUNDARY.sub(".", kind.__name__).lower()
