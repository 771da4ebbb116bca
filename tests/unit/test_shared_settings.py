"""Settings: one frozen value, and no typo that silently leaves a default in force."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from shared.settings import SettingsError, SharedSettings, load


class Settings(SharedSettings):
    lease_s: float = Field(default=1.0, gt=0)


MINIMAL = {"BIDE_DATABASE_URL": "postgresql://u:hunter2@h/d", "BIDE_AMQP_URL": "amqp://h/"}


def test_shared_names_have_no_prefix_and_own_names_have_the_services() -> None:
    settings = load("queue", Settings, {**MINIMAL, "BIDE_HTTP_PORT": "20001", "BIDE_QUEUE_LEASE_S": "2.5"})
    assert (settings.http_port, settings.lease_s) == (20001, 2.5)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("BIDE_HTPP_PORT", "BIDE_HTPP_PORT: unknown setting, did you mean BIDE_HTTP_PORT?"),
        ("BIDE_LEASE_S", "BIDE_LEASE_S: unknown setting"),
        ("BIDE_QUEUE_LEESE_S", "did you mean BIDE_QUEUE_LEASE_S?"),
        ("BIDE_ZZZ", "BIDE_ZZZ: unknown setting; remove it"),
    ],
)
def test_an_unknown_name_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load("queue", Settings, {**MINIMAL, name: "1"})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "name", ["BIDE_TEST_STACK", "BIDE_NO_DOCKERD", "BIDE_LOCAL_CACHE", "BIDE_PROXY_ANYTHING", "PATH"]
)
def test_names_of_others_are_left_to_them(name: str) -> None:
    load("queue", Settings, {**MINIMAL, name: "1"})


@pytest.mark.parametrize(("ceiling_s", "taken"), [("0", True), ("2592000", True), ("2592001", False), ("inf", False)])
def test_a_ceiling_is_at_most_thirty_days(ceiling_s: str, *, taken: bool) -> None:
    environ = {**MINIMAL, "BIDE_SESSION_CEILING_S": ceiling_s}
    if taken:
        assert load("queue", Settings, environ).session_ceiling_s == float(ceiling_s)
        return
    with pytest.raises(SettingsError, match="BIDE_SESSION_CEILING_S"):
        load("queue", Settings, environ)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load("queue", Settings, {"BIDE_AMQP_URL": "amqp://h/", "BIDE_QUEUE_LEASE_S": "0", "BIDE_X": "1"})
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["BIDE_X", "BIDE_DATABASE_URL", "BIDE_QUEUE_LEASE_S"]


def test_a_secret_may_stand_in_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("postgresql://file\n")
    environ = {"BIDE_DATABASE_URL_FILE": str(secret), "BIDE_AMQP_URL": "amqp://h/"}
    assert load("queue", Settings, environ).database_url.get_secret_value() == "postgresql://file"
    secret.write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load("queue", Settings, environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BIDE_DATABASE_URL", "postgresql://u:hun/ter2@h/d"),
        ("BIDE_DATABASE_URL", "mysql://u:hunter2@h/d"),
        ("BIDE_DATABASE_URL", "postgres:hunter2@h/d"),
        ("BIDE_AMQP_URL", "postgresql://u:hunter2@h/d"),
        ("BIDE_AMQP_URL", "amqp://u:hunter2@h:99999/"),
        ("BIDE_INBOX_KEEP_S", "inf"),
    ],
)
def test_what_a_driver_would_stumble_over_is_refused_without_showing_it(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load("queue", Settings, {**MINIMAL, name: value})
    assert str(caught.value).startswith(f"{name}: ")
    assert "hun" not in str(caught.value)


def test_a_secret_file_that_is_missing_or_doubled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="BIDE_DATABASE_URL_FILE: cannot read"):
        load("queue", Settings, {"BIDE_DATABASE_URL_FILE": str(tmp_path / "none"), "BIDE_AMQP_URL": "amqp://h/"})
    with pytest.raises(SettingsError, match="both set"):
        load("queue", Settings, {**MINIMAL, "BIDE_DATABASE_URL_FILE": str(tmp_path / "none")})


def test_a_secret_is_not_shown() -> None:
    settings = load("queue", Settings, MINIMAL)
    assert "hunter2" not in repr(settings)
    with pytest.raises(SettingsError) as caught:
        load("queue", Settings, {**MINIMAL, "BIDE_HTTP_PORT": "topsecret"})
    assert "topsecret" not in str(caught.value)


def test_settings_are_frozen() -> None:
    settings = load("queue", Settings, MINIMAL)
    with pytest.raises(ValidationError):
        settings.http_port = 1  # type: ignore[misc]


def test_every_process_is_a_new_replica() -> None:
    """B-07: a restarted process must never be taken for the one that died."""
    assert load("queue", Settings, MINIMAL).replica_id != load("queue", Settings, MINIMAL).replica_id
