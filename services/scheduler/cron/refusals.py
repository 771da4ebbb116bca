"""Why a rule is refused: a code for programs, a sentence for the person who wrote the rule."""

from __future__ import annotations

from enum import StrEnum


class Refusal(StrEnum):
    TOO_LONG = "too_long"
    CONTROL_CHARACTERS = "control_characters"
    WRONG_FIELD_COUNT = "wrong_field_count"
    UNKNOWN_NAME = "unknown_name"
    OUT_OF_RANGE = "out_of_range"
    BACKWARD_RANGE = "backward_range"
    ZERO_STEP = "zero_step"
    NOT_UNDERSTOOD = "not_understood"
    REBOOT = "reboot"
    UNKNOWN_ZONE = "unknown_zone"
    NEVER_FIRES = "never_fires"
    NOT_ONE_RULE = "not_one_rule"


class CronError(ValueError):
    """The rule is not taken. `str()` is the sentence; it quotes at most what a checked expression holds."""

    def __init__(self, code: Refusal, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
