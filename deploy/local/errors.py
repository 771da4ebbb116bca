"""The two ways in which the local stack says no; both texts are written for the person at the terminal."""

from __future__ import annotations


class StackError(Exception):
    """The stack cannot go on; the message says what happened and what can be done about it."""


class UnavailableError(StackError):
    """One source cannot give a server here; the message is the reason, and the next source is tried."""
