"""The routes of `relay`: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.model import Backend, ListenAddress, ListenerSpec
from ambassador.options import ListenerOptions
from ambassador.rules import parse_routes
from ambassador.values import Protocol


def refused(*routes: str) -> str:
    """The one line that refuses `routes`."""
    with pytest.raises(ValueError, match=r"invalid route ") as caught:
        parse_routes(routes)
    line = str(caught.value)
    assert line.isprintable(), "not one clean line"
    return line


def spec_of(port: int, protocol: Protocol, address: str, backend_port: int) -> ListenerSpec:
    backend = Backend(address, backend_port)
    return ListenerSpec(ListenAddress(protocol, port), str(backend), "relay", (backend,))


def test_every_listener_gets_the_options() -> None:
    options = ListenerOptions(hold=1)
    specs = parse_routes(["1/tcp=10.0.0.5:1", "2/udp=10.0.0.5:2"], options)
    assert [spec.options for spec in specs] == [options, options]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("1/tcp=10.0.0.5:65535", spec_of(1, Protocol.TCP, "10.0.0.5", 65535)),
        ("65535/udp=10.0.0.5:1", spec_of(65535, Protocol.UDP, "10.0.0.5", 1)),
        ("0080/tcp=10.0.0.5:00080", spec_of(80, Protocol.TCP, "10.0.0.5", 80)),
        ("80/tcp=[fd00:0:0::5]:80", spec_of(80, Protocol.TCP, "fd00::5", 80)),
        ("80/tcp=[FD00::5]:80", spec_of(80, Protocol.TCP, "fd00::5", 80)),
        ("80/tcp=[::ffff:10.0.0.5]:80", spec_of(80, Protocol.TCP, "10.0.0.5", 80)),
        ("80/tcp=[fe80::1%7]:80", spec_of(80, Protocol.TCP, "fe80::1%7", 80)),
        ("80/tcp=127.0.0.1:81", spec_of(80, Protocol.TCP, "127.0.0.1", 81)),
    ],
)
def test_routes(spec: str, expected: ListenerSpec) -> None:
    assert parse_routes([spec]) == (expected,)


def test_a_zone_by_name_becomes_the_interfaces_number() -> None:
    number = socket.if_nametoindex("lo")
    (route,) = parse_routes(["80/tcp=[fe80::1%lo]:80"])
    assert route.backends[0].address == f"fe80::1%{number}"


def test_one_port_may_have_both_protocols() -> None:
    assert len(parse_routes(["53/tcp=10.0.0.5:53", "53/udp=10.0.0.5:53"])) == 2


_SHAPE = "write PORT/PROTOCOL=ADDRESS:PORT, such as 6379/tcp=10.0.0.5:6379"

BAD_ROUTES = [
    ("", _SHAPE),
    ("6379", _SHAPE),
    ("=10.0.0.5:1", _SHAPE),
    ("6379/tcp=", _SHAPE),
    ("6379/tcp:10.0.0.5:6379", _SHAPE),
    ("-hold", "flags go before the routes; move it to the front"),
    ("0/tcp=10.0.0.5:1", "port 0 is out of range; write 1 to 65535"),
    ("000/tcp=10.0.0.5:1", "port 000 is out of range; write 1 to 65535"),
    ("65536/tcp=10.0.0.5:1", "port 65536 is out of range; write 1 to 65535"),
    ("9" * 5000 + "/tcp=10.0.0.5:1", "is out of range; write 1 to 65535"),
    ("/tcp=10.0.0.5:1", "a port is missing; write a number from 1 to 65535"),
    ("-1/tcp=10.0.0.5:1", "flags go before the routes"),
    ("+1/tcp=10.0.0.5:1", 'port "+1" is not a number; write 1 to 65535 in digits 0-9'),
    (" 1/tcp=10.0.0.5:1", 'port " 1" is not a number'),
    ("1_0/tcp=10.0.0.5:1", 'port "1_0" is not a number'),
    ("redis/tcp=10.0.0.5:1", 'port "redis" is not a number'),
    ("\uff16\uff13\uff17\uff19/tcp=10.0.0.5:1", "is not a number"),
    ("\u0661/tcp=10.0.0.5:1", "is not a number"),
    ("\u00b9/tcp=10.0.0.5:1", "is not a number"),
    ("6379=10.0.0.5:6379", "the protocol is missing; write 6379/tcp or 6379/udp"),
    ("6379/=10.0.0.5:6379", "the protocol is missing; write 6379/tcp or 6379/udp"),
    ("6379/sctp=10.0.0.5:1", 'protocol "sctp" is not supported; write tcp or udp'),
    ("6379/TCP=10.0.0.5:1", 'protocol "TCP" is not supported; write tcp or udp'),
    ("6379/tcp/udp=10.0.0.5:1", 'protocol "tcp/udp" is not supported'),
    ("1/tcp=10.0.0.5:0", "port 0 is out of range"),
    ("1/tcp=10.0.0.5:65536", "port 65536 is out of range"),
    ("1/tcp=10.0.0.5:", "a port is missing"),
    ("1/tcp=10.0.0.5:\uff16", "is not a number"),
    ("1/tcp=10.0.0.5", "the port after the address is missing; write 10.0.0.5:6379"),
    ("1/tcp=[fd00::5]", "the port after the address is missing; write [fd00::5]:6379"),
    ("1/tcp=:6379", "the address is missing"),
    ("1/tcp=redis:6379", '"redis" is not an IP address; write an IP literal such as 10.0.0.5'),
    ("1/tcp=redis", '"redis" is not an IP address'),
    ("1/tcp=10.0.0.256:1", "10.0.0.256 is not a valid IPv4 address"),
    ("1/tcp=010.0.0.5:1", "010.0.0.5 is not a valid IPv4 address"),
    ("1/tcp=10.0.5:1", "10.0.5 is not a valid IPv4 address"),
    ("1/tcp=1\u0661.0.0.5:1", "is not an IP address"),
    ("1/tcp=10.0.0.5%lo:1", "an IPv4 address has no interface; write 10.0.0.5"),
    ("1/tcp=fd00::5:53", "an IPv6 address goes in brackets; write [fd00::5]:53"),
    ("1/tcp=[fd00::5:53", "brackets are for an IPv6 address only"),
    ("1/tcp=[fd00::5]53", "brackets are for an IPv6 address only"),
    ("1/tcp=[10.0.0.5]:53", "brackets are for an IPv6 address only"),
    ("1/tcp=[]:53", "brackets are for an IPv6 address only"),
    ("1/tcp=10.0.0.5]:53", "brackets go around the whole IPv6 address"),
    ("1/tcp=[[fd00::5]]:53", "brackets are for an IPv6 address only"),
    ("1/tcp=[fd00::g]:53", '"fd00::g" is not a valid IPv6 address'),
    ("1/tcp=[fe80::1]:53", "fe80::1 needs its interface; write [fe80::1%eth0]"),
    ("1/tcp=[fe80::1%]:53", 'interface "" does not exist here'),
    ("1/tcp=[fe80::1%nope0]:53", 'interface "nope0" does not exist here; `ip link` lists'),
    ("1/tcp=[fe80::1%\u0661]:53", "does not exist here"),
    ("1/tcp=[fe80::1%a\0b]:53", "does not exist here"),
    ("1/tcp=[fe80::1%0]:53", "interface number 0 is out of range; write its name"),
    ("1/tcp=[fe80::1%4294967296]:53", "interface number 4294967296 is out of range"),
    ("1/tcp=[fe80::1%" + "9" * 5000 + "]:53", "is out of range"),
    ("1/tcp=0.0.0.0:2", "0.0.0.0 is not the address of one machine"),
    ("1/tcp=[::]:2", ":: is not the address of one machine"),
    ("1/udp=224.0.0.1:2", "224.0.0.1 is not the address of one machine"),
    ("1/udp=255.255.255.255:2", "255.255.255.255 is not the address of one machine"),
    ("1/tcp=127.0.0.1:1", "it leads back to this program's own listener"),
    ("1/udp=[::1]:1", "it leads back to this program's own listener"),
    ("1/tcp=[::ffff:127.0.0.1]:1", "it leads back to this program's own listener"),
    ("1/tcp=10.0.0.5:1\nlevel=error", "is not a number"),
]


@pytest.mark.parametrize(("spec", "reason"), BAD_ROUTES)
def test_refused_routes(spec: str, reason: str) -> None:
    line = refused("2/tcp=10.0.0.9:2", spec)
    assert line.startswith("invalid route ")
    assert reason in line


def test_a_listener_is_given_once() -> None:
    line = refused("80/tcp=10.0.0.5:80", "80/udp=10.0.0.5:80", "080/tcp=10.0.0.6:80")
    assert line == (
        'invalid route "080/tcp=10.0.0.6:80": 80/tcp is already given; write each listener once'
    )


def test_two_routes_in_a_circle_are_refused() -> None:
    line = refused("1/tcp=127.0.0.1:2", "2/tcp=127.0.0.1:1")
    assert "leads back to this program's own listener" in line
    assert len(parse_routes(["1/tcp=127.0.0.1:2", "2/udp=127.0.0.1:1"])) == 2


@given(
    st.integers(1, 65535),
    st.sampled_from(Protocol),
    st.ip_addresses(),
    st.integers(1, 65535),
)
def test_any_address_makes_its_route_or_is_refused_for_a_reason(
    port: int, protocol: Protocol, address: object, backend_port: int
) -> None:
    host = f"[{address}]" if ":" in str(address) else str(address)
    try:
        (route,) = parse_routes([f"{port}/{protocol}={host}:{backend_port}"])
    except ValueError as error:
        assert "one machine" in str(error) or "interface" in str(error) or "leads" in str(error)
    else:
        assert route.listen == ListenAddress(protocol, port)
        assert route.backends[0].port == backend_port


@given(st.text(alphabet=st.sampled_from("0123456789/tcpud=.:[]%ae\u0661 -\n"), max_size=30))
def test_any_spec_is_a_route_or_one_line(spec: str) -> None:
    try:
        assert len(parse_routes([spec])) == 1
    except ValueError as error:
        assert str(error).isprintable()
