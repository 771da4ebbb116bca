"""The list of scenarios and the tests that name them."""

from __future__ import annotations

from tests.scenarios import named, owed


def test_every_section_of_the_list_is_read() -> None:
    prefixes = {scenario.rsplit("-", 1)[0] if scenario[0] == "A" else scenario[0] for scenario in owed()}
    assert prefixes == {"A-Q", "A-P", "A-D", "A-S", "A-L", "A-A", "B", "C", "D"}
    assert len(owed()) > 200


def test_no_test_names_a_scenario_that_the_list_does_not_have() -> None:
    assert not named() - owed().keys()
