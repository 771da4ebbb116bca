"""Where Bide may connect to: URLs as agents register them, and every kind of address."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.addresses import AddressRefused, AddressRules, check_url, parse_url, resolve

PUBLIC = AddressRules()
LOCAL = AddressRules(allow_loopback=True)
EVERYTHING = AddressRules(allow_loopback=True, private_networks=(ip_network("0.0.0.0/0"), ip_network("::/0")))
FLEET = AddressRules(private_networks=(ip_network("10.1.0.0/16"), ip_network("fd00:1::/32")))


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254", "169.254.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254",
        "fd20:ce::254", "fe80::1", "fe80::1%eth0", "0.0.0.0", "0.1.2.3", "::", "224.0.0.1", "239.255.255.250",
        "ff02::1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "203.0.113.9", "2001:db8::1", "2001::1",
        "2002:7f00:1::", "fec0::1", "100::1", "::127.0.0.1", "64:ff9b:1::1",
        "::ffff:169.254.169.254", "::ffff:0.0.0.0", "64:ff9b::169.254.169.254", "64:ff9b::a9fe:a9fe",
    ],
)  # fmt: skip
def test_some_addresses_are_never_connected_to(address: str) -> None:
    assert address in (EVERYTHING.refusal(address) or "")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1", "64:ff9b::127.0.0.1"])
def test_this_machine_needs_the_operators_word(address: str) -> None:
    assert "BIDE_ALLOW_LOOPBACK" in (FLEET.refusal(address) or "")
    assert LOCAL.refusal(address) is None


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("10.0.255.255", False),
        ("10.1.0.0", True),
        ("10.1.255.255", True),
        ("10.2.0.0", False),
        ("::ffff:10.1.0.1", True),
        ("::ffff:10.2.0.1", False),
        ("172.16.0.1", False),
        ("172.31.255.255", False),
        ("172.32.0.0", True),
        ("192.168.1.1", False),
        ("100.63.255.255", True),
        ("100.64.0.0", False),
        ("100.127.255.255", False),
        ("100.128.0.0", True),
        ("fc00::1", False),
        ("fd00:1::1", True),
        ("fd00:2::1", False),
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
    ],
)
def test_private_ranges_need_the_operators_list(address: str, *, allowed: bool) -> None:
    assert (FLEET.refusal(address) is None) is allowed


@given(st.ip_addresses())
def test_what_python_knows_to_be_no_public_host_is_refused_without_a_list(address: object) -> None:
    refusal = PUBLIC.refusal(str(address))
    private = getattr(address, "is_private", False) or getattr(address, "is_multicast", False)
    mapped = getattr(address, "ipv4_mapped", None)
    if private and (mapped is None or mapped.is_private):
        assert refusal


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("", "http://"),
        ("agent.test", "http://"),
        ("//agent.test/", "http://"),
        ("ftp://agent.test/", "http://"),
        ("file:///etc/passwd", "http://"),
        ("javascript:alert(1)", "http://"),
        ("http://", "no host"),
        ("http:///path", "no host"),
        ("http://-agent/", "no name"),
        ("http://a..b/", "no name"),
        ("http://[fe80::1%25eth0]/", "no name"),
        ("http://[::1", "cannot be read"),
        ("http://user@agent.test/", "user name"),
        ("http://user:secret@agent.test/", "user name"),
        ("http://agent.test@169.254.169.254/", "user name"),
        ("http://agent.test/#", "fragment"),
        ("http://agent.test/#x", "fragment"),
        ("http://agent.test:0/", "port"),
        ("http://agent.test:/", "port"),
        ("http://agent.test:65536/", "port"),
        ("http://agent.test:x/", "port"),
        ("http://agent.test/a b", "percent-encode"),
        ("http://agent.test/\r\nx: 1", "percent-encode"),
        ("http://agent.test/\0", "percent-encode"),
        ("http://agent.test\\@169.254.169.254/", "percent-encode"),
        ("http://\u0430gent.test/", "percent-encode"),
        ("http://agent.test/\u00e9", "percent-encode"),
        ("http://" + "a" * 2048, "longer"),
        ("http://169.254.169.254/", "metadata"),
        ("http://[::ffff:a9fe:a9fe]/", "metadata"),
        ("http://10.0.0.1/", "private"),
        ("http://localhost:8000/", "BIDE_ALLOW_LOOPBACK"),
        ("http://LOCALHOST./", "BIDE_ALLOW_LOOPBACK"),
        ("http://127.0.0.1/", "BIDE_ALLOW_LOOPBACK"),
        ("http://[::1]/", "BIDE_ALLOW_LOOPBACK"),
    ],
)
def test_a_url_is_refused_with_a_sentence_that_says_why(url: str, word: str) -> None:
    with pytest.raises(AddressRefused, match=word) as caught:
        check_url(url, PUBLIC)
    assert str(caught.value).endswith(".")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "host", "port", "path", "authority"),
    [
        ("http://agent.test", "agent.test", 80, b"/", b"agent.test"),
        ("HTTP://Agent.Test:80/x", "agent.test", 80, b"/x", b"agent.test"),
        ("https://agent.test/a/b?c=%20d", "agent.test", 443, b"/a/b?c=%20d", b"agent.test"),
        ("https://agent.test:8443?q", "agent.test", 8443, b"/?q", b"agent.test:8443"),
        ("http://my_agent-1:8000/a2a", "my_agent-1", 8000, b"/a2a", b"my_agent-1:8000"),
        ("http://[2606:4700::1111]:81/", "2606:4700::1111", 81, b"/", b"[2606:4700::1111]:81"),
        ("http://8.8.8.8/", "8.8.8.8", 80, b"/", b"8.8.8.8"),
    ],
)
def test_a_url_is_taken_apart(url: str, host: str, port: int, path: bytes, authority: bytes) -> None:
    target = check_url(url, PUBLIC)
    assert (target.host, target.port, target.path, target.authority) == (host, port, path, authority)
    assert target.tls is url.lower().startswith("https")


@given(st.text())
def test_any_text_is_a_url_or_is_refused_with_a_sentence(text: str) -> None:
    for url in (text, f"http://{text}", f"http://agent.test{text}"):
        try:
            target = parse_url(url)
        except AddressRefused as error:
            said = str(error)
            assert said.endswith(".")
        else:
            written = target.authority + target.path
            assert not any(byte <= 0x20 or byte >= 0x7F for byte in written)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (["8.8.8.8", "169.254.169.254"], "agent.test resolves to 169.254.169.254"),
        (["127.0.0.1"], "agent.test resolves to 127.0.0.1"),
        (["10.9.9.9", "8.8.8.8"], "private"),
    ],
)
async def test_one_bad_meaning_spoils_a_name(found: Sequence[str], word: str) -> None:
    async def lookup(_host: str, _port: int) -> Sequence[str]:
        return found

    with pytest.raises(AddressRefused, match=word):
        await resolve(parse_url("http://agent.test/"), PUBLIC, lookup)


async def test_a_name_without_an_address_does_not_resolve() -> None:
    async def lookup(_host: str, _port: int) -> Sequence[str]:
        return []

    with pytest.raises(OSError, match=r"agent\.test has no address"):
        await resolve(parse_url("http://agent.test/"), PUBLIC, lookup)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1"])
async def test_other_spellings_of_an_address_are_judged_by_what_they_mean(host: str) -> None:
    """The system's resolver reads them as 127.0.0.1, or not at all."""
    with pytest.raises((AddressRefused, OSError)):
        await resolve(parse_url(f"http://{host}/"), PUBLIC)
