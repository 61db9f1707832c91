"""The grammar of what the user asks to be relayed: the routes of `relay`, `PORT/PROTOCOL=ADDRESS:PORT`."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from ambassador.model import Backend, ListenAddress, ListenerSpec
from ambassador.options import ListenerOptions
from ambassador.values import Protocol, parse_ip, parse_port, quote, split_address

_DEFAULTS = ListenerOptions()


def parse_routes(
    routes: Sequence[str], options: ListenerOptions = _DEFAULTS
) -> tuple[ListenerSpec, ...]:
    """`6379/tcp=10.0.0.5:6379` and the like as listeners, in order. Raises ValueError, one line."""
    specs: dict[ListenAddress, ListenerSpec] = {}
    for route in routes:
        try:
            listen, backend = _parse_route(route)
            if listen in specs:
                raise ValueError(f"{listen} is already given; write each listener once")
        except ValueError as error:
            raise ValueError(f"invalid route {quote(route)}: {error}") from None
        specs[listen] = ListenerSpec(listen, str(backend), "relay", (backend,), options)
    for listen, spec in specs.items():
        backend = spec.backends[0]
        # Listeners are on all addresses, so this would be a relay that calls itself for ever.
        if (
            ipaddress.ip_address(backend.address).is_loopback
            and ListenAddress(listen.protocol, backend.port) in specs
        ):
            raise ValueError(
                f"invalid route {quote(f'{listen}={backend}')}: it leads back to this "
                "program's own listener; write another address or another port"
            )
    return tuple(specs.values())


def _parse_route(route: str) -> tuple[ListenAddress, Backend]:
    if route.startswith("-"):
        raise ValueError("flags go before the routes; move it to the front")
    left, equals, right = route.partition("=")
    if not equals or not left or not right:
        raise ValueError("write PORT/PROTOCOL=ADDRESS:PORT, such as 6379/tcp=10.0.0.5:6379")
    port_text, slash, protocol = left.partition("/")
    port = parse_port(port_text)
    if not slash or not protocol:
        raise ValueError(f"the protocol is missing; write {port}/tcp or {port}/udp")
    if protocol not in tuple(Protocol):
        raise ValueError(f"protocol {quote(protocol)} is not supported; write tcp or udp")
    return ListenAddress(Protocol(protocol), port), _parse_backend(right)


def _parse_backend(text: str) -> Backend:
    host, port_text = split_address(text)
    if not host:
        raise ValueError("the address is missing; write ADDRESS:PORT, such as 10.0.0.5:6379")
    address = parse_ip(host)
    if port_text is None:
        shown = f"[{address}]" if ":" in address else address
        raise ValueError(f"the port after the address is missing; write {shown}:6379")
    ip = ipaddress.ip_address(address)
    if ip.is_unspecified or ip.is_multicast or address == "255.255.255.255":
        raise ValueError(f"{address} is not the address of one machine; write one such as 10.0.0.5")
    if ip.version == 6 and ip.is_link_local and "%" not in address:
        raise ValueError(f"{address} needs its interface; write [{address}%eth0]")
    return Backend(address, parse_port(port_text))
