"""What the services are told, and what they are not; and what is read from the servers' own words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.local.amqp import version_in
from deploy.local.errors import StackError
from deploy.local.memory import Memory
from deploy.local.postgres import checked, settings
from deploy.local.rabbitmq import Installation, definitions, node_env
from deploy.local.roles import role_password, service_url, with_database
from deploy.local.services import parse_replicas, secret, service_env
from deploy.local.supervise import FIRST_DELAY_S, LAST_DELAY_S, STEADY_S, Backoff, said_of

TOKENS = {"BIDE_ADMIN_TOKEN": "admin", "BIDE_DELIVERY_SECRET": "delivery"}
ADMIN = "postgresql://root%40x:p%2Fw@127.0.0.1:5432/bide?sslmode=disable"


def test_policy_passes_through_and_the_place_of_the_stack_does_not() -> None:
    environ = {
        "PATH": "/bin",
        "BIDE_QUEUE_LEASE_S": "9",
        "BIDE_DATABASE_URL": "foreign",
        "BIDE_AMQP_URL": "foreign",
        "BIDE_HTTP_PORT": "1",
        "BIDE_LOCAL_CACHE": "/c",
        "BIDE_TEST_STACK": "docker",
        "BIDE_ADMIN_TOKEN_FILE": "/secret",
    }
    env = service_env("scheduler", environ, TOKENS)
    assert env == {"PATH": "/bin", "BIDE_QUEUE_LEASE_S": "9", "BIDE_LOG_FORMAT": "json"}


@pytest.mark.parametrize(
    ("service", "told"),
    [
        ("proxy", {"BIDE_ADMIN_TOKEN", "BIDE_DELIVERY_SECRET", "BIDE_ALLOW_LOOPBACK"}),
        ("queue", {"BIDE_DELIVERY_SECRET", "BIDE_ALLOW_LOOPBACK"}),
        ("scheduler", set()),
        ("liveness", set()),
    ],
)
def test_a_secret_goes_only_to_whom_it_concerns(service: str, told: set[str]) -> None:
    given = {"BIDE_ADMIN_TOKEN": "of the caller", "BIDE_ALLOW_LOOPBACK": "0"}
    assert set(service_env(service, given, TOKENS)) - {"BIDE_LOG_FORMAT"} == told


def test_the_callers_log_format_is_kept() -> None:
    assert service_env("queue", {"BIDE_LOG_FORMAT": "console"}, {**TOKENS})["BIDE_LOG_FORMAT"] == "console"


def test_a_given_secret_wins_and_a_made_one_stays(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    made = secret("BIDE_ADMIN_TOKEN", {}, memory)
    assert secret("BIDE_ADMIN_TOKEN", {"BIDE_ADMIN_TOKEN": "given"}, memory) == "given"
    (tmp_path / "token").write_text("from the file\n")
    assert secret("BIDE_ADMIN_TOKEN", {"BIDE_ADMIN_TOKEN_FILE": str(tmp_path / "token")}, memory) == "from the file"
    assert secret("BIDE_ADMIN_TOKEN", {}, Memory(tmp_path)) == made


def test_services_that_are_not_named_get_one_replica() -> None:
    assert parse_replicas("") == {"proxy": 1, "queue": 1, "scheduler": 1, "liveness": 1}
    assert parse_replicas("proxy=2,queue=20") == {"proxy": 2, "queue": 20, "scheduler": 1, "liveness": 1}


@pytest.mark.parametrize("text", ["proxy", "proxy=0", "proxy=21", "proxy=x", "proxies=2", "proxy=-1"])
def test_replicas_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(StackError, match="NAME=NUMBER"):
        parse_replicas(text)


def test_a_role_has_the_same_password_from_every_stack_and_another_than_its_neighbour() -> None:
    assert role_password(ADMIN, "bide_queue") == role_password(ADMIN.replace("5432/bide", "5433/else"), "bide_queue")
    assert role_password(ADMIN, "bide_queue") != role_password(ADMIN, "bide_proxy")
    url = service_url(ADMIN, "bide_queue")
    assert url == f"postgresql://bide_queue:{role_password(ADMIN, 'bide_queue')}@127.0.0.1:5432/bide?sslmode=disable"


def test_an_administrator_without_a_password_gives_none_to_the_roles() -> None:
    with pytest.raises(StackError, match="no password"):
        service_url("postgresql://root@127.0.0.1/bide", "bide_queue")


def test_another_database_is_one_word_of_the_url() -> None:
    assert with_database(ADMIN, "w 1") == ADMIN.replace("/bide?", "/w%201?")


@pytest.mark.parametrize("name", ["", 'a"b', "a b", "1a", "a" * 64, "a;b"])
def test_a_database_name_needs_no_quoting(name: str) -> None:
    with pytest.raises(StackError, match="no database name"):
        checked(name)


def test_without_durability_commits_still_wait_for_the_server() -> None:
    assert "fsync=off" in settings(durable=False)
    assert "fsync=off" not in settings(durable=True)
    assert not [word for word in settings(durable=False) if "synchronous_commit" in word]


def test_vhosts_come_with_our_users_permissions() -> None:
    said = json.loads(definitions(["a", "b"]))
    assert said["vhosts"] == [{"name": "a"}, {"name": "b"}]
    assert [(grant["user"], grant["vhost"], grant["write"]) for grant in said["permissions"]] == [
        ("bide", "a", ".*"),
        ("bide", "b", ".*"),
    ]


def test_the_node_hears_nothing_of_the_machines_other_brokers(tmp_path: Path) -> None:
    environ = {"PATH": "/bin", "RABBITMQ_NODENAME": "other", "ERL_FLAGS": "-x", "BIDE_ADMIN_TOKEN": "t"}
    installation = Installation(Path("/r/sbin"), Path("/r/erlang"))
    env = node_env(
        environ, home=tmp_path, installation=installation, node="n@localhost", distribution_port=1, epmd_port=2
    )
    assert env["RABBITMQ_NODENAME"] == "n@localhost"
    assert env["PATH"] == "/r/erlang/bin:/bin"
    assert {"ERL_FLAGS", "BIDE_ADMIN_TOKEN", "LD_LIBRARY_PATH"} & set(env) == set()


def test_the_brokers_version_is_read_from_its_greeting() -> None:
    assert version_in(b"...\x07productS\x00\x00\x00\x08RabbitMQ\x07versionS\x00\x00\x00\x064.1.10rest") == "4.1.10"
    assert version_in(b"\x01\x00\x00") == "?"


def test_restarts_wait_twice_as_long_each_time_up_to_ten_seconds() -> None:
    backoff, waits = Backoff(), []
    for _ in range(8):
        waits.append(backoff.due_in_s(lived_s=0.0))
        backoff = backoff.after(lived_s=0.0)
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, LAST_DELAY_S, LAST_DELAY_S]


@pytest.mark.parametrize(
    ("lived_s", "wait_s"), [(STEADY_S - 0.001, 6.4), (STEADY_S, FIRST_DELAY_S), (STEADY_S + 0.001, FIRST_DELAY_S)]
)
def test_what_ran_for_half_a_minute_starts_again_at_once(lived_s: float, wait_s: float) -> None:
    assert Backoff(6.4).due_in_s(lived_s=lived_s) == wait_s


def test_a_death_is_said_in_words() -> None:
    assert said_of(-9) == "was ended by SIGKILL"
    assert said_of(2) == "ended with 2"
