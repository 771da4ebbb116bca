"""The client that talks to agents, against real sockets on loopback, under asyncio and uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import random
import socket
import ssl
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import uvloop

from shared.addresses import AddressRules
from shared.agents import AgentError, Agents, BodyLost, Exchange, Limits, NotSent, TooLarge, Unanswered
from shared.outcomes import Answer, Fault, NoAnswer

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
HERE = AddressRules(allow_loopback=True)
WITHIN_S = 20.0


def both_loops(story: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run the test once on each loop; whatever a callback raises fails it."""

    @wraps(story)
    def run(loop_name: str, **values: Any) -> None:
        loop = LOOPS[loop_name]()
        unhandled: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: unhandled.append(context))
        try:
            loop.run_until_complete(asyncio.wait_for(story(**values), WITHIN_S))
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()
        assert not unhandled

    signature = inspect.signature(story)
    first = inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    marked: Callable[..., None] = pytest.mark.parametrize("loop_name", list(LOOPS))(run)
    return marked


def listening(*, backlog: int = 100) -> socket.socket:
    for port in random.sample(range(26_000, 32_000), 50):
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", port), backlog=backlog)
    raise AssertionError("no free port")


class Peer:
    """The agent's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number
        """Which connection this is, from 1."""

    async def request(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head + await self.reader.readexactly(length)

    async def say(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def ended(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self.reader.read()

    def reset(self) -> None:
        self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def finish_now(self) -> None:
        """Send FIN before the loop turns again."""
        with socket.socket(fileno=os.dup(self._socket().fileno())) as same:
            same.shutdown(socket.SHUT_WR)

    def _socket(self) -> Any:
        return self.writer.get_extra_info("socket")


Script = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def agent(script: Script, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Run `script` for every connection; yield the URL."""
    running: set[asyncio.Task[None]] = set()
    count = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            await script(Peer(reader, writer, count))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            running.discard(task)
            writer.transport.abort()

    listener = listening()
    server = await asyncio.start_server(connected, sock=listener, ssl=tls)
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}/a2a?x=1"
    finally:
        server.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.sleep(0)


@asynccontextmanager
async def client(rules: AddressRules = HERE, **options: Any) -> AsyncIterator[Agents]:
    agents = Agents(rules, **options)
    try:
        yield agents
    finally:
        await agents.close()
        assert not any(origin.open for origin in agents._origins.values()), "a place was lost"
        assert agents._pool.idle == 0


def saying(*pieces: bytes, after: Callable[[Peer], None] | None = None) -> Script:
    """Answer each request with these bytes; `after` once the first was answered."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(*pieces)
            if after is not None:
                after(peer)
                await peer.ended()

    return script


async def fetch(agents: Agents, url: str, body: bytes = b"{}", **options: Any) -> tuple[int, bytes]:
    async with await agents.send(url, body, **options) as exchange:
        return exchange.status, await exchange.read(1 << 20)


def answer_of(error: AgentError) -> Answer:
    assert isinstance(error.outcome, Answer)
    return error.outcome


# ── a request and its answer ─────────────────────────────────────────────────────────────────────────────────────────


@both_loops
async def test_the_request_is_written_byte_for_byte() -> None:
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.say(OK)

    async with agent(script) as url, client() as agents:
        assert await fetch(agents, url, b'{"a":1}', headers=[(b"X-Queue-Id", b"7")]) == (200, b"ok")
    host = url.split("/")[2].encode()
    assert seen == [
        b"POST /a2a?x=1 HTTP/1.1\r\nhost: " + host + b'\r\nX-Queue-Id: 7\r\ncontent-length: 7\r\n\r\n{"a":1}'
    ]


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"he", b"llo"], b"hello", id="content-length"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r", b"\n3;x=1\r\nllo\r\n0\r\nT: v\r\n\r\n"],
            b"hello",
            id="chunked, with a trailer",
        ),
        pytest.param([b"HTTP/1.1 200 OK\r\n\r\nhello"], b"hello", id="until the connection ends"),
        pytest.param([b"HTTP/1.0 200 OK\r\n\r\nhello"], b"hello", id="HTTP/1.0"),
        pytest.param([b"HTTP/1.1 204 No Content\r\n\r\n"], b"", id="204"),
        pytest.param([b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n"], b"", id="304"),
        pytest.param(
            [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nx: 1\r\n\r\n", OK], b"ok", id="1xx before it"
        ),
        pytest.param([bytes([byte]) for byte in OK], b"ok", id="byte by byte"),
    ],
)
@both_loops
async def test_every_framing_of_an_answer_is_read(answer: Sequence[bytes], body: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        for piece in answer:
            await peer.say(piece)
            await asyncio.sleep(0)

    async with agent(script) as url, client() as agents, await agents.send(url, b"") as exchange:
        assert "x" not in exchange.headers
        assert "t" not in exchange.headers
        assert await exchange.read(100) == body


@both_loops
async def test_the_answer_to_a_head_has_no_body() -> None:
    async with agent(saying(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n")) as url, client() as agents:
        assert await fetch(agents, url, b"", method="HEAD") == (200, b"")


@both_loops
async def test_headers_are_by_lower_case_name_and_repeated_ones_are_joined() -> None:
    head = b"HTTP/1.1 200 OK\r\nRetry-After: 7\r\nX-A: 1\r\nx-a: \xe9\r\ncontent-length: 0\r\n\r\n"
    async with agent(saying(head)) as url, client() as agents, await agents.send(url) as exchange:
        assert dict(exchange.headers) == {"retry-after": "7", "x-a": "1, \xe9", "content-length": "0"}
        assert exchange.raw_headers[0] == (b"retry-after", b"7")


@both_loops
async def test_a_redirect_is_an_answer_and_is_not_followed() -> None:
    head = b"HTTP/1.1 307 Go\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n"
    async with agent(saying(head)) as url, client() as agents:
        assert await fetch(agents, url) == (307, b"")


@both_loops
async def test_a_stream_passes_through_at_once() -> None:
    read = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            await read.wait()  # the next event is written only when the last one was read
            read.clear()
            await peer.say(b"9\r\ndata: 1\n\n\r\n")
        await read.wait()
        await peer.say(b"0\r\n\r\n")

    async with agent(script) as url, client() as agents, await agents.send(url) as exchange:
        read.set()
        chunks = []
        async for chunk in exchange.chunks():
            chunks.append(chunk)
            read.set()
    assert chunks == [b"data: 1\n\n"] * 3


@both_loops
async def test_a_slow_reader_slows_the_agent_and_loses_nothing() -> None:
    size = 64 << 20
    sent = 0
    stuck = asyncio.Event()

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            peer.writer.write(bytes(1 << 16))
            try:
                async with asyncio.timeout(1.5):
                    await peer.writer.drain()
            except TimeoutError:
                stuck.set()
                await peer.writer.drain()
            sent += 1 << 16

    async with agent(script) as url, client() as agents:
        # A reader's slowness is not the agent's: the idle limit does not run while we do not read.
        async with await agents.send(url, limits=Limits(idle_timeout_s=1.0)) as exchange:
            await stuck.wait()
            assert exchange._buffered < 1 << 20
            assert sent < size
            total = 0
            async for chunk in exchange.chunks():
                total += len(chunk)
        assert total == size


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 101\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n65\r\n" + b"x" * 101 + b"\r\n0\r\n\r\n",
    ],
    ids=["declared", "found"],
)
@both_loops
async def test_a_body_over_the_readers_limit_is_too_large(answer: bytes) -> None:
    async with agent(saying(answer)) as url, client() as agents:
        async with await agents.send(url) as exchange:
            with pytest.raises(TooLarge) as caught:
                await exchange.read(100)
        assert (answer_of(caught.value).fault, answer_of(caught.value).status) == (Fault.TOO_LARGE, 200)


@both_loops
async def test_a_body_at_the_readers_limit_is_read() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + b"x" * 100
    async with agent(saying(answer)) as url, client() as agents, await agents.send(url) as exchange:
        assert len(await exchange.read(100)) == 100


# ── nothing was sent ─────────────────────────────────────────────────────────────────────────────────────────────────


def names(**addresses: Sequence[str]) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    """A resolver that knows these names."""

    async def lookup(host: str, _port: int) -> Sequence[str]:
        try:
            return addresses[host.partition(".")[0]]
        except KeyError:
            raise OSError("no such name") from None

    return lookup


async def not_sent(agents: Agents, url: str, **options: Any) -> Fault:
    with pytest.raises(NotSent) as caught:
        await fetch(agents, url, **options)
    assert isinstance(caught.value.outcome, NoAnswer)
    assert not caught.value.outcome.sent
    return caught.value.outcome.fault


@both_loops
async def test_a_refused_connection_is_not_sent() -> None:
    """A-Q-11."""
    with unheard() as nobody:
        async with client() as agents:
            url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
            assert await not_sent(agents, url) is Fault.CONNECTION_REFUSED


def unheard() -> socket.socket:
    """A port that is bound and not listened on: a connection to it is refused, and nobody else takes it."""
    for port in random.sample(range(26_000, 32_000), 50):
        bound = socket.socket()
        try:
            bound.bind(("127.0.0.1", port))
        except OSError:
            bound.close()
        else:
            return bound
    raise AssertionError("no free port")


@both_loops
async def test_a_connection_that_is_never_taken_is_not_sent() -> None:
    with listening(backlog=0) as full, contextlib.ExitStack() as others:
        for _ in range(3):  # the kernel takes one or two more than the backlog says, and drops the rest in silence
            filler = others.enter_context(socket.socket())
            filler.settimeout(0)
            filler.connect_ex(full.getsockname())
        async with client() as agents:
            url = f"http://127.0.0.1:{full.getsockname()[1]}/"
            begun = time.monotonic()
            assert await not_sent(agents, url, limits=Limits(connect_timeout_s=0.2)) is Fault.CONNECT_TIMEOUT
            assert 0.15 < time.monotonic() - begun < 4, "not the five seconds that are usual"


@both_loops
async def test_a_name_that_does_not_resolve_is_not_sent() -> None:
    async with client(lookup=names()) as agents:
        assert await not_sent(agents, "http://nowhere.test/") is Fault.DNS


@both_loops
async def test_a_resolver_that_hangs_is_asked_once_and_not_waited_for() -> None:
    asked = 0

    async def lookup(_host: str, _port: int) -> Sequence[str]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(60)
        return []

    async with agent(saying(OK)) as url, client(lookup=lookup) as agents:
        hung = [not_sent(agents, "http://hung.test/", limits=Limits(connect_timeout_s=0.1)) for _ in range(3)]
        faults, answer = await asyncio.gather(asyncio.gather(*hung), fetch(agents, url))
    assert (faults, answer, asked) == ([Fault.DNS] * 3, (200, b"ok"), 1)


@pytest.mark.parametrize(
    ("url", "rules"),
    [
        ("http://169.254.169.254/latest/meta-data", HERE),
        ("http://[::ffff:169.254.169.254]/", HERE),
        ("http://127.0.0.1:1/", AddressRules()),
        ("http://two-faced.test/", HERE),
        ("http://user@agent.test/", HERE),
        ("ftp://agent.test/", HERE),
        ("http://agent.test/\r\nx: 1", HERE),
    ],
)
@both_loops
async def test_a_forbidden_address_is_not_connected_to(url: str, rules: AddressRules) -> None:
    lookup = names(**{"two-faced": ["127.0.0.1", "169.254.169.254"], "agent": ["127.0.0.1"]})
    async with client(rules, lookup=lookup) as agents:
        assert await not_sent(agents, url) is Fault.ADDRESS_REFUSED


@both_loops
async def test_a_name_is_resolved_and_judged_for_every_new_connection() -> None:
    meanings = [["127.0.0.1"], ["169.254.169.254"]]

    async def lookup(_host: str, _port: int) -> Sequence[str]:
        return meanings.pop(0)

    async with agent(saying(OK)) as url, client(lookup=lookup) as agents:
        named = url.replace("127.0.0.1", "agent.test")
        assert await fetch(agents, named) == (200, b"ok")
        assert await fetch(agents, named) == (200, b"ok")  # the connection that was judged is kept
        assert await not_sent(agents, named, fresh=True) is Fault.ADDRESS_REFUSED


@both_loops
async def test_the_next_address_is_tried_and_the_host_stays_the_name() -> None:
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.say(OK)

    async with agent(script) as url, client(lookup=names(agent=["127.0.0.9", "127.0.0.1"])) as agents:
        named = url.replace("127.0.0.1", "agent.test")
        assert await fetch(agents, named) == (200, b"ok")
    assert b"host: agent.test:" in seen[0]


@pytest.mark.parametrize(
    "header",
    [
        (b"x", b"1\r\ny: 2"),
        (b"x", b"1\n"),
        (b"x", b"1\r"),
        (b"x", b"\0"),
        (b"x\r\ny", b"1"),
        (b"x y", b"1"),
        (b"", b"1"),
        (b"Transfer-Encoding", b"chunked"),
        (b"content-length", b"0"),
        (b"Host", b"other"),
        (b"connection", b"close"),
    ],
)
@both_loops
async def test_no_header_can_change_the_request(header: tuple[bytes, bytes]) -> None:
    async with agent(saying(OK)) as url, client() as agents:
        assert await not_sent(agents, url, headers=[header]) is Fault.REQUEST_REFUSED
        assert await not_sent(agents, url, method="GET / HTTP/1.1\r\n\r\n") is Fault.REQUEST_REFUSED


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

# For agent.test, its own authority, valid until 2120: it protects nothing.
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgeAWdCINYVVj9GZZb
cSvm5JrbdjdNkKPn4ITOynR0dvGhRANCAAShBcIUqXA+twPtv5EVp3a9oDrvcrFG
Ni7/SweAtMOntFLjvoyfVy8a7rgWbABkp7B5CTCdt0+u0bnLLnlP+hwH
-----END PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBYzCCAQqgAwIBAgIBATAKBggqhkjOPQQDAjAVMRMwEQYDVQQDDAphZ2VudC50
ZXN0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAVMRMwEQYDVQQD
DAphZ2VudC50ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEoQXCFKlwPrcD
7b+RFad2vaA673KxRjYu/0sHgLTDp7RS476Mn1cvGu64FmwAZKeweQkwnbdPrtG5
yy55T/ocB6NJMEcwFQYDVR0RBA4wDIIKYWdlbnQudGVzdDAPBgNVHRMBAf8EBTAD
AQH/MB0GA1UdDgQWBBT7qScMdoMZd/N5azhSu75FW2j2FDAKBggqhkjOPQQDAgNH
ADBEAiB6hvX7KgHLgRr/B1Q+5pUrGcAlAkxntMDoSZjvDDGNcwIgPefM/AbqHBgX
HIc1pqTE3r2MHRTPyYy31tLJ0ChrZUA=
-----END CERTIFICATE-----
"""


def server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pem")
        path.write_text(KEY + CERTIFICATE, encoding="utf-8")
        context.load_cert_chain(path)
    return context


@both_loops
async def test_tls_is_made_with_the_name_and_the_connection_is_kept() -> None:
    names_seen: list[str | None] = []
    context = server_tls()
    context.sni_callback = lambda _socket, name, _context: names_seen.append(name)
    trusting = ssl.create_default_context(cadata=CERTIFICATE)
    lookup = names(agent=["127.0.0.1"])
    async with agent(saying(OK), tls=context) as url, client(tls=trusting, lookup=lookup) as agents:
        named = url.replace("127.0.0.1", "agent.test")
        assert await fetch(agents, named) == (200, b"ok")
        assert await fetch(agents, named) == (200, b"ok")
    assert names_seen == ["agent.test"]


@pytest.mark.parametrize(
    ("host", "trusted", "plain"),
    [
        pytest.param("agent.test", False, False, id="nobody vouches for it"),
        pytest.param("other.test", True, False, id="it is somebody else"),
        pytest.param("agent.test", True, True, id="it speaks no TLS"),
    ],
)
@both_loops
async def test_what_fails_in_tls_is_not_sent(host: str, *, trusted: bool, plain: bool) -> None:
    context = ssl.create_default_context(cadata=CERTIFICATE) if trusted else None
    lookup = names(agent=["127.0.0.1"], other=["127.0.0.1"])

    async def shout(peer: Peer) -> None:
        await peer.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.ended()

    script, tls = (shout, None) if plain else (saying(OK), server_tls())
    async with agent(script, tls=tls) as url, client(tls=context, lookup=lookup) as agents:
        named = url.replace("http:", "https:").replace("127.0.0.1", host)
        assert await not_sent(agents, named) is Fault.TLS


# ── sent, and no answer ──────────────────────────────────────────────────────────────────────────────────────────────


async def unanswered(agents: Agents, url: str, **options: Any) -> Fault:
    with pytest.raises(Unanswered) as caught:
        await fetch(agents, url, **options)
    assert isinstance(caught.value.outcome, NoAnswer)
    assert caught.value.outcome.sent
    return caught.value.outcome.fault


async def silence(peer: Peer) -> None:
    await peer.request()
    await peer.ended()


async def hanging_up(peer: Peer) -> None:
    await peer.request()


async def resetting(peer: Peer) -> None:
    await peer.request()
    peer.reset()


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        pytest.param(hanging_up, Fault.EOF, id="eof"),
        pytest.param(resetting, Fault.RESET, id="reset"),
        pytest.param(silence, Fault.IDLE_TIMEOUT, id="silence"),
        pytest.param(saying(b"HTTP/1.1 200 OK\r\nx: "), Fault.IDLE_TIMEOUT, id="half a head"),
        pytest.param(saying(b"HTTP/1.1 100 Continue\r\n\r\n"), Fault.IDLE_TIMEOUT, id="only a 100"),
        pytest.param(saying(b"SSH-2.0-OpenSSH\r\n"), Fault.MALFORMED, id="no HTTP"),
        pytest.param(saying(b"HTTP/1.1 200 OK\r\nx: \0\r\n\r\n"), Fault.MALFORMED, id="NUL in a header"),
        pytest.param(saying(b"HTTP/1.1 200 OK\r\nx: " + b"x" * 70_000), Fault.MALFORMED, id="a head without end"),
        pytest.param(
            saying(b"HTTP/1.1 200 OK\r\n" + b"x: 1234567\r\n" * 6_000 + b"\r\n"),
            Fault.MALFORMED,
            id="a head over 64 KiB",
        ),
        pytest.param(saying(b"HTTP/1.1 102 Wait\r\n\r\n" * 6_000), Fault.MALFORMED, id="1xx without end"),
        pytest.param(
            saying(b"HTTP/1.1 101 Switch\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"), Fault.MALFORMED, id="101"
        ),
        pytest.param(
            saying(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n"),
            Fault.MALFORMED,
            id="two lengths",
        ),
    ],
)
@both_loops
async def test_what_is_sent_and_not_answered_says_so(script: Script, fault: Fault) -> None:
    """A timeout is not `not delivered`: the agent may have the message."""
    async with agent(script) as url, client() as agents:
        assert await unanswered(agents, url, limits=Limits(idle_timeout_s=0.2)) is fault


@both_loops
async def test_the_head_limit_is_exact_to_the_header_that_crosses_it() -> None:
    async with client(head_max_bytes=1000) as agents:
        for size, passes in [(960, True), (1000, False)]:
            head = b"HTTP/1.1 200 OK\r\nx: " + b"x" * size + b"\r\ncontent-length: 2\r\n\r\nok"
            async with agent(saying(head)) as url:
                if passes:
                    assert await fetch(agents, url) == (200, b"ok")
                else:
                    assert await unanswered(agents, url) is Fault.MALFORMED


@both_loops
async def test_a_heartbeat_keeps_a_silent_turn_alive_until_it_stops() -> None:
    beats = [time.monotonic()]
    async with agent(silence) as url, client() as agents:

        async def beat() -> None:
            for _ in range(8):
                await asyncio.sleep(0.2)
                beats.append(time.monotonic())

        beating = asyncio.create_task(beat())
        limits = Limits(idle_timeout_s=1.0)
        assert await unanswered(agents, url, limits=limits, last_life=lambda: beats[-1]) is Fault.IDLE_TIMEOUT
        assert beating.done()
        assert 0.99 <= time.monotonic() - beats[-1] < 30


@both_loops
async def test_no_sign_of_life_outlasts_the_total_limit() -> None:
    async with agent(silence) as url, client() as agents:
        begun = time.monotonic()
        limits = Limits(idle_timeout_s=0.1, total_timeout_s=0.3)
        assert await unanswered(agents, url, limits=limits, last_life=time.monotonic) is Fault.TOTAL_TIMEOUT
        assert 0.29 <= time.monotonic() - begun < 30


@pytest.mark.parametrize("moved_s", [0.5, -20.0], ids=["later", "sooner"])
@both_loops
async def test_a_bound_that_moves_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch, moved_s: float) -> None:
    monkeypatch.setattr("shared.connection._LOOK_AGAIN_S", 0.05)
    async with agent(silence) as url, client() as agents:
        begun = time.monotonic()
        until = [begun + (0.3 if moved_s > 0 else 20.5)]
        asyncio.get_running_loop().call_later(0.1, lambda: until.append(until[0] + moved_s))
        limits = Limits(total_timeout_s=0.1)
        assert await unanswered(agents, url, limits=limits, until=lambda: until[-1]) is Fault.TOTAL_TIMEOUT
        assert until[-1] - 0.01 <= time.monotonic() < until[-1] + 15


# ── a head came, the body not ────────────────────────────────────────────────────────────────────────────────────────

LONG = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"


@pytest.mark.parametrize(
    ("answer", "end", "fault"),
    [
        pytest.param(LONG, Peer.finish_now, Fault.EOF, id="eof before the length"),
        pytest.param(CHUNKED, Peer.finish_now, Fault.EOF, id="eof before the last chunk"),
        pytest.param(LONG, Peer.reset, Fault.RESET, id="reset"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\nhalf", Peer.reset, Fault.RESET, id="reset where eof would be the end"),
        pytest.param(LONG, lambda _: None, Fault.IDLE_TIMEOUT, id="silence"),
        pytest.param(CHUNKED + b"zz\r\n", lambda _: None, Fault.MALFORMED, id="no chunk"),
        pytest.param(CHUNKED + b"0\r\n" + b"t: 12345\r\n" * 7000, lambda _: None, Fault.MALFORMED, id="trailers"),
    ],
)
@both_loops
async def test_a_body_that_breaks_off_is_lost_after_what_came(
    answer: bytes, end: Callable[[Peer], None], fault: Fault
) -> None:
    """A-P-04."""
    seen = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(answer)
        await seen.wait()  # a reset throws away what was not read
        end(peer)
        await peer.ended()

    async with agent(script) as url, client() as agents:
        async with await agents.send(url, limits=Limits(idle_timeout_s=0.2)) as exchange:
            chunks = exchange.chunks()
            assert await anext(chunks) == b"half"
            seen.set()
            with pytest.raises(BodyLost) as caught:
                await anext(chunks)
        outcome = answer_of(caught.value)
        assert (outcome.status, outcome.body, outcome.fault) == (200, None, fault)


# ── connections that are kept ────────────────────────────────────────────────────────────────────────────────────────


class Counting:
    """Answers with the number of the connection."""

    def __init__(self, head: bytes = b"HTTP/1.1 200 OK\r\n", surplus: bytes = b"") -> None:
        self.peers: list[Peer] = []
        self.requests = 0
        self._head = head
        self._surplus = surplus

    async def __call__(self, peer: Peer) -> None:
        self.peers.append(peer)
        while True:
            await peer.request()
            self.requests += 1
            number = str(peer.number).encode()
            await peer.say(self._head + b"content-length: %d\r\n\r\n" % len(number) + number + self._surplus)


async def which(agents: Agents, url: str, **options: Any) -> int:
    return int((await fetch(agents, url, **options))[1])


@both_loops
async def test_a_connection_is_used_again_and_fresh_takes_a_new_one() -> None:
    async with agent(Counting()) as url, client() as agents:
        assert [await which(agents, url) for _ in range(3)] == [1, 1, 1]
        assert await which(agents, url, fresh=True) == 2
        assert await which(agents, url) == 2


@pytest.mark.parametrize(
    "counting",
    [
        pytest.param(lambda: Counting(b"HTTP/1.1 200 OK\r\nConnection: close\r\n"), id="it says close"),
        pytest.param(lambda: Counting(b"HTTP/1.0 200 OK\r\n"), id="HTTP/1.0"),
        pytest.param(
            lambda: Counting(b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=1, max=9\r\n"), id="it keeps it for 1 s"
        ),
        pytest.param(lambda: Counting(surplus=b"HTTP/1.1 200 OK\r\n"), id="it says more than was asked"),
        pytest.param(lambda: Counting(surplus=b"H"), id="one byte more"),
    ],
)
@both_loops
async def test_a_connection_is_not_used_again_when(counting: Callable[[], Counting]) -> None:
    async with agent(counting()) as url, client() as agents:
        assert [await which(agents, url) for _ in range(3)] == [1, 2, 3]


@both_loops
async def test_a_connection_whose_request_was_answered_before_it_was_written_is_not_used_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.say(b"HTTP/1.1 413 Too Large\r\ncontent-length: 1\r\n\r\n%d" % peer.number)
        await asyncio.Event().wait()  # the rest stays in the sockets

    async with agent(script) as url, client() as agents:
        assert await fetch(agents, url, bytes(32 << 20)) == (413, b"1")
        assert await fetch(agents, url, b"") == (413, b"2")


@both_loops
async def test_an_idle_connection_is_closed_by_us_before_the_server_does_it() -> None:
    closed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK)
        await peer.ended()
        closed.set()

    async with agent(script) as url, client(keepalive_s=0.1) as agents:
        await fetch(agents, url)
        begun = time.monotonic()
        await closed.wait()
        assert 0.05 < time.monotonic() - begun < 30


@both_loops
async def test_a_connection_that_grew_too_old_while_the_loop_was_busy_is_not_used() -> None:
    async with agent(Counting()) as url, client(keepalive_s=0.1) as agents:
        assert await which(agents, url) == 1
        time.sleep(0.15)  # noqa: ASYNC251 - the timer is due and has not run
        assert await which(agents, url) == 2


@both_loops
async def test_an_end_that_lies_in_the_socket_is_seen_before_the_loop_comes_to_it() -> None:
    """The server closed an idle connection: the request goes out on a new one and is not `unknown`."""
    script = Counting()
    async with agent(script) as url, client() as agents:
        assert await which(agents, url) == 1
        script.peers[0].finish_now()
        assert await which(agents, url) == 2


@both_loops
async def test_bytes_that_nobody_asked_for_are_no_answer_to_the_next_request() -> None:
    script = Counting()
    async with agent(script) as url, client() as agents:
        assert await which(agents, url) == 1
        script.peers[0].writer.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 1\r\n\r\n9")
        assert await which(agents, url) == 2


async def once(peer: Peer) -> None:
    """Take the second request of the first connection and end without a word: its race with the idle timeout."""
    await peer.request()
    await peer.say(OK)
    await peer.request()
    if peer.number > 1:
        await peer.say(OK)


@both_loops
async def test_a_post_that_meets_the_servers_end_on_the_way_is_unknown_and_not_repeated() -> None:
    """A-P-04: zero bytes came back on a reused connection, and still the server may have processed it."""
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.say(OK)
        seen.append(await peer.request())

    async with agent(script) as url, client() as agents:
        await fetch(agents, url, b"1")
        with pytest.raises(Unanswered) as caught:
            await fetch(agents, url, b"2")
        assert (caught.value.outcome.fault, caught.value.stale) == (Fault.EOF, True)
    assert [request[-1:] for request in seen] == [b"1", b"2"]


@both_loops
async def test_a_get_that_meets_it_is_repeated_once_on_a_new_connection() -> None:
    async with agent(once) as url, client() as agents:
        assert await fetch(agents, url) == (200, b"ok")
        assert await fetch(agents, url, b"", method="GET") == (200, b"ok")


@both_loops
async def test_a_get_on_a_new_connection_is_not_repeated() -> None:
    count = 0

    async def script(peer: Peer) -> None:
        nonlocal count
        count += 1
        await peer.request()

    async with agent(script) as url, client() as agents:
        assert await unanswered(agents, url, method="GET") is Fault.EOF
    assert count == 1


# ── who gives up ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"], ids=["waiting", "reading"])
@both_loops
async def test_a_caller_who_is_cancelled_closes_his_connection(head: bytes) -> None:
    begun, closed = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(head)
        begun.set()
        await peer.ended()
        closed.set()

    async with agent(script) as url, client() as agents:
        caller = asyncio.create_task(fetch(agents, url))
        await begun.wait()
        await asyncio.sleep(0.05)  # until the head, if any, has come through
        caller.cancel()
        await closed.wait()
        with pytest.raises(asyncio.CancelledError):
            await caller


@both_loops
async def test_an_answer_that_is_not_read_to_its_end_closes_the_connection() -> None:
    async with agent(saying(LONG)) as url, client() as agents:
        async with await agents.send(url) as exchange:
            assert exchange.status == 200
        with pytest.raises(BodyLost) as caught:
            await exchange.read(1000)
        assert caught.value.outcome.fault is Fault.HUNG_UP
        assert not any(origin.open for origin in agents._origins.values())


@both_loops
async def test_callers_share_the_connections_there_may_be_in_their_order() -> None:
    running = most = 0
    order: list[bytes] = []

    async def script(peer: Peer) -> None:
        nonlocal running, most
        while True:
            order.append((await peer.request())[-1:])
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1
            await peer.say(OK)

    async with agent(script) as url, client(connections_max=2) as agents:
        answers = await asyncio.gather(*(fetch(agents, url, b"%d" % number) for number in range(8)))
    assert answers == [(200, b"ok")] * 8
    assert most == 2
    assert order[2:] == sorted(order[2:])


@both_loops
async def test_who_finds_no_connection_in_time_has_sent_nothing() -> None:
    async with agent(silence) as url, client(connections_max=1) as agents:
        holder = asyncio.create_task(fetch(agents, url))
        await asyncio.sleep(0.05)
        assert await not_sent(agents, url, limits=Limits(connect_timeout_s=0.1)) is Fault.NO_CONNECTION
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)


@both_loops
async def test_a_hung_agent_costs_only_its_own_connections() -> None:
    async with agent(silence) as hung, agent(saying(OK)) as well, client(connections_max=4) as agents:
        holders = [asyncio.create_task(fetch(agents, hung)) for _ in range(8)]
        await asyncio.sleep(0)
        assert await asyncio.gather(*(fetch(agents, well) for _ in range(20))) == [(200, b"ok")] * 20
        for holder in holders:
            holder.cancel()
        await asyncio.gather(*holders, return_exceptions=True)


@both_loops
async def test_a_place_that_was_passed_on_to_somebody_who_left_is_not_lost() -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(OK[:-2])
            await go.wait()
            await peer.say(OK[-2:])

    async with agent(script) as url, client(connections_max=1, keepalive_s=60) as agents:
        async with await agents.send(url) as first:
            waiting = [asyncio.create_task(fetch(agents, url)) for _ in range(3)]
            await asyncio.sleep(0)
            origin = next(iter(agents._origins.values()))
            served = origin._waiting[0]
            go.set()
            await first.read(10)
            assert served.done()
            waiting[0].cancel()
            waiting[1].cancel()
            assert await waiting[2] == (200, b"ok")
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError, asyncio.CancelledError, tuple]


@both_loops
async def test_a_fresh_connection_takes_the_place_of_an_idle_one() -> None:
    async with agent(Counting()) as url, client(connections_max=1) as agents:
        assert await which(agents, url) == 1
        assert await which(agents, url, fresh=True) == 2
        both = await asyncio.gather(which(agents, url), which(agents, url, fresh=True))
        assert list(both) == [2, 3]


@both_loops
async def test_no_more_than_idle_max_are_kept() -> None:
    async with agent(Counting()) as url, client(idle_max=1) as agents:
        await asyncio.gather(*(fetch(agents, url) for _ in range(5)))
        assert agents._pool.idle == 1
        assert sum(origin.open for origin in agents._origins.values()) == 1


# ── the end of the pool ──────────────────────────────────────────────────────────────────────────────────────────────


@both_loops
async def test_a_graceful_close_waits_for_what_runs_and_takes_nothing_new() -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        begun.set()
        await go.wait()
        await peer.say(OK)
        await peer.ended()

    async with agent(script) as url, client(connections_max=1) as agents:
        running = asyncio.create_task(fetch(agents, url))
        await begun.wait()
        waiting = asyncio.create_task(fetch(agents, url))
        await asyncio.sleep(0)
        closing = asyncio.create_task(agents.close(grace_s=10))
        await asyncio.sleep(0)
        assert await not_sent(agents, url) is Fault.HUNG_UP
        with pytest.raises(NotSent):
            await waiting
        assert not closing.done()
        go.set()
        assert await running == (200, b"ok")
        await closing


@both_loops
async def test_an_abrupt_close_hangs_up_on_what_runs() -> None:
    taken = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        taken.set()
        await peer.ended()

    async with agent(script) as url, client() as agents:
        running = [asyncio.create_task(fetch(agents, url)) for _ in range(3)]
        await taken.wait()
        await agents.close()
        results = await asyncio.gather(*running, return_exceptions=True)
        faults = {result.outcome.fault for result in results if isinstance(result, AgentError)}
        assert faults == {Fault.HUNG_UP}
        assert len(results) == 3


@both_loops
async def test_nothing_is_left_of_hundreds_of_exchanges_that_ended_in_every_way() -> None:
    """I8: whatever happens to an exchange, its place comes back."""
    chance = random.Random(7)

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            ways: list[Callable[[], Awaitable[None]]] = [
                lambda: peer.say(OK),
                lambda: peer.say(CHUNKED, b"0\r\n\r\n"),
                lambda: peer.say(LONG),
                lambda: peer.say(b"nonsense"),
                lambda: peer.say(b"HTTP/1.1 503 Busy\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"),
            ]
            await chance.choice(ways)()
            if chance.random() < 0.2:
                peer.reset()
                return
            if chance.random() < 0.1:
                return

    async def one(agents: Agents, url: str) -> str:
        limits = Limits(idle_timeout_s=0.05, connect_timeout_s=5)
        try:
            async with asyncio.timeout(chance.choice([0.0, 0.001, 0.02, 5.0])):
                exchange: Exchange = await agents.send(url, b"x", limits=limits, fresh=chance.random() < 0.1)
                async with exchange:
                    if chance.random() < 0.8:
                        await exchange.read(1000)
        except (AgentError, TimeoutError) as error:
            return type(error).__name__
        return "read"

    async with agent(script) as url, client(connections_max=8) as agents:
        ends = await asyncio.gather(*(one(agents, url) for _ in range(400)))
        assert {"read", "TimeoutError", "Unanswered", "BodyLost"} <= set(ends)
        origin = next(iter(agents._origins.values()))
        assert origin.open == len(origin._connections) == len(origin._idle) == agents._pool.idle
