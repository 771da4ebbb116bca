"""The services' database roles: each service reaches its own schema and nothing else, here as in production.

Owns the passwords of bide_proxy, bide_queue, bide_scheduler and bide_liveness on a local stack: derived from the
administrator's, so that two stacks on one cluster agree without a word. deploy/postgres/roles.sql makes the roles.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import asyncpg

from deploy.local.errors import StackError

SERVICES = ("proxy", "queue", "scheduler", "liveness")
ROLES_SQL = Path(__file__).parents[1] / "postgres" / "roles.sql"
CONNECT_LIMIT_S = 10.0
STATEMENT_LIMIT_S = 60.0
ROLE_TRIES = 20
"""Roles belong to the whole cluster: stacks that apply them at once make each other's statements fail."""

ResultT = TypeVar("ResultT")


def service_url(admin_url: str, role: str) -> str:
    """Return the administrator's URL with this role and its password in it."""
    return _with_user(admin_url, role, role_password(admin_url, role))


def role_password(admin_url: str, role: str) -> str:
    """Return HMAC-SHA256(administrator's password, role) in hex."""
    admin_password = unquote(urlsplit(admin_url).password or "")
    if not admin_password:
        raise StackError("the database URL has no password; the passwords of the service roles are derived from it")
    return hmac.new(admin_password.encode(), role.encode(), hashlib.sha256).hexdigest()


def apply_roles(admin_url: str) -> None:
    """Create the roles and schemas in this URL's database (idempotent) and set the roles' passwords."""
    script = ROLES_SQL.read_text()

    async def apply(connection: asyncpg.Connection) -> None:
        for attempt in range(1, ROLE_TRIES + 1):
            try:
                async with connection.transaction():
                    await connection.execute(script)
                    for service in SERVICES:
                        role = f"bide_{service}"
                        # Hex from our own HMAC: ALTER ROLE takes no parameters.
                        await connection.execute(f"ALTER ROLE {role} PASSWORD '{role_password(admin_url, role)}'")
            except asyncpg.InsufficientPrivilegeError as error:
                raise StackError(
                    f"the user of the database URL may not make the roles of the services ({error}); "
                    "it needs CREATEROLE, and CREATE on the database"
                ) from error
            except (asyncpg.InternalServerError, asyncpg.UniqueViolationError, asyncpg.DuplicateObjectError):
                # "tuple concurrently updated" and its like: another stack was at the same roles.
                if attempt == ROLE_TRIES:
                    raise
                await asyncio.sleep(0.05 * attempt)
            else:
                return

    with_connection(admin_url, apply)


def execute(admin_url: str, *statements: str) -> None:
    """Run statements one by one, each in its own transaction."""

    async def run(connection: asyncpg.Connection) -> None:
        for statement in statements:
            await connection.execute(statement)

    with_connection(admin_url, run)


def server_version(admin_url: str) -> str:
    """Return PostgreSQL's version ("15.18"); OSError while it does not accept connections."""

    async def read(connection: asyncpg.Connection) -> str:
        version: str = await connection.fetchval("SHOW server_version")
        return version.split(maxsplit=1)[0]

    return with_connection(admin_url, read)


def with_database(url: str, name: str) -> str:
    """Return the URL with another database in it."""
    return urlunsplit(urlsplit(url)._replace(path="/" + quote(name, safe="")))


def with_connection(url: str, work: Callable[[asyncpg.Connection], Awaitable[ResultT]]) -> ResultT:
    """Run one piece of work on its own connection; OSError while the server does not accept any."""

    async def connect_and_work() -> ResultT:
        try:
            connection = await asyncpg.connect(url, timeout=CONNECT_LIMIT_S, command_timeout=STATEMENT_LIMIT_S)
        except asyncpg.CannotConnectNowError as error:
            raise ConnectionRefusedError(str(error)) from error  # It still starts, or recovers.
        try:
            return await work(connection)
        finally:
            await connection.close()

    return _in_own_loop(connect_and_work)


def _in_own_loop(work: Callable[[], Awaitable[ResultT]]) -> ResultT:
    # In a thread of its own: the caller may be a test whose event loop runs in this one.
    results: list[ResultT] = []
    errors: list[BaseException] = []

    async def main() -> None:
        results.append(await work())

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 (it is raised again below, in the caller's thread)
            errors.append(error)

    thread = threading.Thread(target=run, name="bide-sql")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _with_user(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(user, safe='')}:{quote(password, safe='')}@{host}"))
