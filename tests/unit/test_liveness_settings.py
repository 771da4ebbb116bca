"""What liveness says of settings before it begins."""

from __future__ import annotations

import importlib.util

import pytest

from services.liveness.settings import Settings
from shared.settings import SettingsError, load

ENVIRON = {"BIDE_DATABASE_URL": "postgresql://u@h/d", "BIDE_AMQP_URL": "amqp://h/"}


@pytest.mark.parametrize("url", ["unix:///run/docker.sock", "tcp://10.0.0.1:2376", "https://engine:2376"])
def test_an_engine_is_named_by_its_url(url: str) -> None:
    assert load("liveness", Settings, ENVIRON | {"BIDE_LIVENESS_DOCKER_URL": url}).docker_url == url
    assert load("liveness", Settings, ENVIRON).docker_url is None


@pytest.mark.parametrize("url", ["/run/docker.sock", "unix://", "ftp://x"])
def test_what_is_no_engines_url_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="BIDE_LIVENESS_DOCKER_URL"):
        load("liveness", Settings, ENVIRON | {"BIDE_LIVENESS_DOCKER_URL": url})


def test_without_the_extra_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.liveness.settings.find_spec", lambda name: importlib.util.find_spec(f"no_{name}"))
    with pytest.raises(SettingsError, match=r"BIDE_LIVENESS_DOCKER_URL: .*pip install 'bide\[docker\]'"):
        load("liveness", Settings, ENVIRON | {"BIDE_LIVENESS_DOCKER_URL": "unix:///run/docker.sock"})
    load("liveness", Settings, ENVIRON)
