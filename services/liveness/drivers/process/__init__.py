"""Agents as processes of this machine: the driver, what it remembers of its starts, and the operator's file."""

from services.liveness.drivers.process.driver import ProcessDriver

__all__ = ["ProcessDriver"]
