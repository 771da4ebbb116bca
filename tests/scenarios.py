"""Print the ids of docs/scenarios.md that no test names. Exit 0: it is a list of what is owed, not a check."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWED = re.compile(r"^- \*\*([A-D]-[A-Z0-9-]+)\*\* (.*)$", re.MULTILINE)
NAMED = re.compile(r"\b(?:A-[A-Z]-\d\d|B-\d\d|C-[A-Z]\d+|D-S\d+)\b")


def owed() -> dict[str, str]:
    return dict(OWED.findall((ROOT / "docs" / "scenarios.md").read_text(encoding="utf-8")))


def named() -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    return {found for text in texts for found in NAMED.findall(text)}


def main() -> int:
    scenarios, tested = owed(), named()
    for scenario, lesson in scenarios.items():
        if scenario not in tested:
            print(f"{scenario:8} {lesson[:110]}")
    print(f"{len(scenarios) - len(scenarios.keys() & tested)} of {len(scenarios)} scenarios have no test yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
