"""What callers may write of a schedule, with its ranges; a row is such a form too, so that a patch is a merge."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from services.scheduler.decide import Schedule
from services.scheduler.shapes import Refused
from shared.facts import Priority

PROMPT_MAX = 65_536
_MONTH_S = 30 * 86_400
_Seconds = Annotated[float, Field(ge=0, le=_MONTH_S, allow_inf_nan=False)]
_RULE = ("cron", "every_s", "at")
_OBJECT = TypeAdapter(dict[str, Any])


class Timing(BaseModel):
    """When. What the expression says is judged by cron, with its own sentences."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cron: str | None = None
    every_s: int | None = None
    at: AwareDatetime | None = None
    timezone: str = "UTC"


class Form(Timing):
    """A whole schedule as its caller writes it."""

    name: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,128}$")]
    prompt: Annotated[str, Field(min_length=1, max_length=PROMPT_MAX)]
    context: Literal["fresh", "same"] = "fresh"
    overlap: Literal["queue_one", "queue_all", "skip"] = "queue_one"
    priority: Priority = Priority.TASK
    catchup_window_s: Annotated[_Seconds, Field(ge=1)] | None = None
    jitter_s: Annotated[_Seconds, Field(le=86_400)] = 0.0
    session_ceiling_s: _Seconds | None = None
    ends_at: AwareDatetime | None = None
    remaining_runs: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    paused: bool = False
    pause_note: Annotated[str, Field(max_length=500, pattern=r"^[^\x00]*$")] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _clean(cls, prompt: object) -> object:
        """Line ends as agents expect them (A-S-10). What no text may hold is refused, never cut."""
        if isinstance(prompt, str):
            if "\x00" in prompt:
                raise ValueError("a prompt holds no NUL")
            return prompt.replace("\r\n", "\n").replace("\r", "\n")
        return prompt


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a caller sent. Raises Refused; invalid UTF-8 and lone surrogates are refused here too."""
    try:
        return _OBJECT.validate_json(body or b"{}")
    except ValidationError as error:
        raise Refused("invalid_json", f"The body is no JSON object: {_sentence(error)}") from None


def read_form(values: dict[str, Any]) -> Form:
    """Raises Refused."""
    return _read(Form, values)


def read_timing(values: dict[str, Any]) -> Timing:
    """Raises Refused."""
    return _read(Timing, values)


def merged(schedule: Schedule, changes: dict[str, Any]) -> Form:
    """The form of `schedule` with `changes`; a rule that is given replaces the one that was. Raises Refused."""
    values: dict[str, Any] = {
        name: getattr(schedule, "ceiling_s" if name == "session_ceiling_s" else name) for name in Form.model_fields
    }
    if any(changes.get(name) is not None for name in _RULE):
        values |= dict.fromkeys(_RULE)
    if changes.get("paused") is False:
        values["pause_note"] = None
    return read_form({**values, **changes})


def schedule_of(form: Form, schedule_id: UUID, workspace_id: str, *, anchor_at: datetime, rev: int) -> Schedule:
    """The row that a form is, with no moment yet."""
    values = form.model_dump()
    values["ceiling_s"] = values.pop("session_ceiling_s")
    if not form.paused:
        values["pause_note"] = None
    return Schedule(
        schedule_id=schedule_id, workspace_id=workspace_id, anchor_at=anchor_at, paused_by_error=None,
        next_fire_at=None, rev=rev, **values,
    )  # fmt: skip


TimingT = TypeVar("TimingT", bound=Timing)


def _read(kind: type[TimingT], values: dict[str, Any]) -> TimingT:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise Refused("invalid_schedule", _sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, p['loc'])) or 'body'}: {p['msg']}" for p in problems)[:1000]
