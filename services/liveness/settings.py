"""What an operator may turn in liveness."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator

from shared.settings import SharedSettings


class Settings(SharedSettings):
    """Settings of liveness; a field `lease_s` here is `BIDE_LIVENESS_LEASE_S`."""

    mode: Literal["act", "observe"] = "act"
    """`observe` decides and records, and neither restarts nor kills; orders to kill are answered not_killable."""
    agents_file: Path | None = None
    """TOML, `[agents.<workspace_id>]` with command, cwd, env, stop_s: what the process driver runs."""
    agents_folder: Path = Field(default_factory=lambda: Path(tempfile.gettempdir()) / f"bide-agents-{os.getuid()}")
    """Where the process driver remembers what it started, and puts its output. Replicas of a machine share it."""
    docker_url: str | None = Field(default=None, pattern="^(unix|tcp|http|https)://.+")
    """The Docker engine whose labelled containers are looked at and restarted (`unix:///var/run/docker.sock`); without
    it there is no such driver. Who may talk to an engine owns its machine."""
    webhook_secret: SecretStr | None = None
    """Signs what the webhook driver sends (HMAC-SHA256); without it there is no such driver."""
    sweep_s: float = Field(default=8.0, gt=0, le=60)
    """Between two looks at an agent about which nothing else is heard."""
    boot_s: float = Field(default=120.0, gt=0, le=3600)
    """What a started agent gets until it must be heard: until then nothing restarts it, afterwards its silence does."""
    wedged_after_s: float = Field(default=240.0, gt=0)
    """Running and busy, but neither heard nor getting on for so long is wedged."""
    settle_s: float = Field(default=15.0, ge=0)
    """After its own start a replica gives no verdict from silence or a single look."""
    notice_s: float = Field(default=10.0, ge=0, le=600)
    """Between `checkpoint {restart}` and a restart that can wait: an operator's, or of a wedged agent."""
    backoff_s: float = Field(default=10.0, gt=0, le=300)
    """The first wait before a restart that follows another, or before a driver call that failed is made again; it
    doubles, to 300 s."""
    call_s: float = Field(default=60.0, gt=0)
    """The longest a driver call may take; above the longest stop_s of an agent."""
    lease_s: float = Field(default=75.0, gt=0)
    """How long a replica holds a restart; its death delays it by this much. Above call_s."""
    boot_slot_s: float = Field(default=30.0, ge=0)
    """How long a started agent that was not heard yet counts against the cap of its engine."""
    look_s: float = Field(default=5.0, gt=0, le=60)
    """The longest sleep between two looks at what is due."""
    evidence_days: int = Field(default=7, ge=1)
    """How long evidence, restarts that ended and orders that were answered are kept."""

    @field_validator("docker_url")
    @classmethod
    def _can_talk_to_docker(cls, url: str | None) -> str | None:
        if url is not None and find_spec("aiodocker") is None:
            raise ValueError("the docker driver needs aiodocker: pip install 'bide[docker]'")
        return url
