"""The import map of the house: what may touch what (docs: the table of rooms in README)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("services", "shared", "bide_agent", "bide_cli", "deploy")
SERVICES = ("proxy", "queue", "scheduler", "liveness")

CRON_IN_WORDS = "services.scheduler.cron.words"

# Room of a service → the rooms of the same service that it may import. __main__ may import all of them.
ROOMS: dict[str, set[str]] = {
    "settings": {"decide"},
    "metrics": {"decide"},
    "decide": set(),
    "cron": set(),
    "store": {"decide"},
    "forward": {"decide", "metrics", "settings", "copies"},
    "deliver": {"decide", "metrics", "settings"},
    "drivers": {"decide", "metrics", "settings"},
    "backlogs": {"store", "decide"},
    "gates": {"store", "decide", "backlogs"},
    "evidence": {"deliver"},
    "fires": {"store", "decide", "metrics"},
    "ticks": {"store", "decide", "metrics", "drain", "backlogs", "fires", "waiting"},
    "sessions": {
        "store", "decide", "metrics", "settings", "drain", "backlogs", "gates", "cron", "rules", "shapes", "turns",
    },
    "settling": {"store", "decide", "deliver", "fires", "metrics", "settings"},
    "waiting": {"store", "decide", "fires", "metrics"},
    "snapshots": {"store", "decide", "backlogs", "metrics"},
    "drain": {"store", "decide", "deliver", "evidence", "backlogs", "settling", "fires", "metrics", "settings"},
    "copies": {"decide", "metrics", "settings"},
    "restart": {"store", "decide", "drivers", "metrics", "settings"},
    "control": {"copies", "decide", "metrics", "settings"},
    "keeping": {"store", "decide", "metrics"},
    "handlers": {
        "store", "decide", "metrics", "settings", "drain", "backlogs", "copies", "cron", "rules", "gates", "restart",
        "keeping",
    },
    "loops": {
        "store", "decide", "metrics", "settings", "deliver", "drivers", "drain", "backlogs", "fires", "copies",
        "restart", "snapshots", "waiting",
    },
    "aside": {"store", "metrics"},
    "history": {"store", "metrics", "settings"},
    "letters": {"store", "aside"},
    "items": {"store", "decide"},
    "rules": {"cron", "decide"},
    "forms": {"decide", "shapes"},
    "shapes": {"decide"},
    "turns": set(),
    "ticking": {"store", "decide", "rules", "metrics", "settings", "turns"},
    "verbs": {"store", "decide", "items", "waiting", "cron", "rules", "forms", "shapes"},
    "answers": {
        "store", "decide", "drain", "backlogs", "items", "loops", "verbs", "letters", "cron", "rules", "forms",
        "shapes", "sessions", "metrics", "settings", "restart",
    },
    "api": {"store", "forward", "decide", "metrics", "settings", "copies"},
}  # fmt: skip


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: the reader sees the package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def refusal(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`; None: it may."""
    top, target = module.split(".", maxsplit=1)[0], imported.split(".", maxsplit=1)[0]
    if target not in PACKAGES:
        return None if target in sys.stdlib_module_names else _package_where_none_may_be(module)
    if top == "shared":
        return None if target == "shared" else "shared imports no service and no tool"
    if top in {"bide_agent", "bide_cli"}:
        return None if target == top else f"{top} talks HTTP and imports nothing else of Bide"
    if top == "deploy":
        allowed = {"deploy", "shared", "bide_agent"}  # the demo's agents are real ones
        return None if target in allowed else "deploy starts services as processes"
    return _inside_service(module, imported)


def _package_where_none_may_be(module: str) -> str | None:
    if ".decide." in f"{module}.":
        return "decide is pure: the standard library and shared.facts"
    if module.startswith("services.scheduler.cron") and module != CRON_IN_WORDS:
        return f"cron is pure: the standard library; packages in {CRON_IN_WORDS}"
    return None


def _inside_service(module: str, imported: str) -> str | None:
    if imported.startswith("shared."):
        impure = ".decide." in f"{module}." and not imported.startswith(("shared.facts.", "shared.capacity."))
        return "decide is pure: the standard library, shared.facts and shared.capacity" if impure else None
    service, room = [*module.split("."), "", ""][1:3]
    parts = [*imported.split("."), "", ""][1:3]
    if imported.split(".", maxsplit=1)[0] != "services" or parts[0] != service:
        return "services never import each other"
    if room == "__main__" or parts[1] == room:
        return None
    if room not in ROOMS:
        return f"{room} is no room of the house: add it to the table with its job"
    return None if parts[1] in ROOMS[room] else f"{room} may import {sorted(ROOMS[room])}"


def test_every_import_follows_the_map() -> None:
    wrong = [
        f"{module} imports {imported}: {why}"
        for module, tree in modules()
        for imported in imports(tree)
        if (why := refusal(module, imported))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("services.queue.handlers", "services.proxy.store"),
        ("services.queue.decide", "services.queue.store"),
        ("services.queue.decide", "asyncpg"),
        ("services.scheduler.cron.times", "cron_descriptor"),
        ("services.scheduler.cron.times", "services.scheduler.store"),
        ("services.queue.decide", "shared.database"),
        ("services.queue.store", "services.queue.handlers"),
        ("services.queue.utils", "services.queue.store"),
        ("shared.broker", "services.queue.settings"),
        ("bide_agent.server", "shared.a2a"),
        ("bide_cli.main", "services.proxy.api"),
    ],
)
def test_the_map_refuses(module: str, imported: str) -> None:
    assert refusal(module, imported)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("services.queue.handlers", "services.queue.decide"),
        ("services.queue.__main__", "services.queue.handlers"),
        ("services.queue.decide", "shared.facts.Priority"),
        ("services.queue.decide", "dataclasses"),
        ("shared.broker", "aio_pika"),
        ("services.scheduler.cron.words", "cron_descriptor"),
        ("services.scheduler.cron.times", "zoneinfo"),
    ],
)
def test_the_map_allows(module: str, imported: str) -> None:
    assert refusal(module, imported) is None


def test_no_folder_or_file_hides_behind_an_empty_name() -> None:
    """utils, common, helpers and manager say nothing about what is in them."""
    forbidden = {"utils", "common", "helpers", "manager", "misc", "base"}
    assert not [name for name, _ in modules() if name.rsplit(".", maxsplit=1)[-1] in forbidden]


def test_every_module_says_what_it_is_for() -> None:
    assert not [name for name, tree in modules() if not ast.get_docstring(tree)]
