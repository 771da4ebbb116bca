"""Agents as containers: the driver, and what it hears of the engine. Needs the extra `docker`."""

from services.liveness.drivers.docker.driver import DockerDriver
from services.liveness.drivers.docker.engine import LABEL

__all__ = ["LABEL", "DockerDriver"]
