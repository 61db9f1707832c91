"""How much a port may hold, from what was asked for and what descriptors allow."""

from __future__ import annotations

import logging

import pytest

from ambassador.model import DesiredState, ListenAddress, ListenerSpec
from ambassador.options import ListenerOptions
from ambassador.reconcile import MAX_LISTENERS
from ambassador.supervise.port_limits import SPARE_DESCRIPTORS, PortLimits, port_limits
from ambassador.values import Protocol

ROOM = 20_000 - SPARE_DESCRIPTORS
SESSIONS = ListenerOptions().max_sessions


@pytest.mark.parametrize(
    ("asked", "workers", "expected"),
    [
        (0, 1, (ROOM // 2, SESSIONS)),
        (0, 4, (4 * (ROOM // 2), SESSIONS)),
        (100, 1, (100, 100)),
        (100, 4, (100, 25)),
        (3, 4, (3, 1)),
        (1_000_000, 1, (ROOM // 2, ROOM)),
        (1_000_000, 4, (4 * (ROOM // 2), ROOM)),
    ],
)
def test_port_limits(asked: int, workers: int, expected: tuple[int, int]) -> None:
    options = ListenerOptions(max_connections=asked, workers=workers)
    limited = port_limits(options, ROOM + SPARE_DESCRIPTORS)
    assert (limited.max_connections, limited.max_sessions) == expected


def test_something_is_always_allowed() -> None:
    limited = port_limits(ListenerOptions(), 10)
    assert (limited.max_connections, limited.max_sessions) == (1, 2)


def test_all_other_options_stay() -> None:
    assert port_limits(ListenerOptions(hold=7, gso=False), 1000).hold == 7


def test_too_few_descriptors_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """R1: a warning with both numbers, and what each port can hold; not again for the next port."""
    limits = PortLimits(1000)
    options = ListenerOptions(max_connections=5000)
    with caplog.at_level(logging.INFO, logger="ambassador"):
        assert limits.resolve(options) == limits.resolve(options)
    warning, holds = caplog.records
    assert warning.message == "too few descriptors for -max-connections, raise ulimit -n"
    assert vars(warning)["fields"] == {"asked": 5000, "connections": 468}
    assert holds.message == "each port can hold"


def specs(count: int, protocol: Protocol, workers: int = 1) -> dict[ListenAddress, ListenerSpec]:
    options = ListenerOptions(workers=workers)
    listens = [ListenAddress(protocol, port) for port in range(1, count + 1)]
    return {listen: ListenerSpec(listen, "web", options=options) for listen in listens}


@pytest.mark.parametrize(
    ("descriptors", "protocol", "workers", "expected"),
    [
        (20, Protocol.TCP, 1, 1),
        (256, Protocol.TCP, 1, 41),
        (1024, Protocol.TCP, 1, 192),
        (1024, Protocol.UDP, 4, 48),
        (20_000, Protocol.TCP, 1, MAX_LISTENERS),
    ],
)
def test_listeners_by_descriptors(
    descriptors: int, protocol: Protocol, workers: int, expected: int
) -> None:
    """R1: no more than what the parent has descriptors for."""
    desired = DesiredState(specs(120, protocol, workers))
    count, remedy = PortLimits(descriptors).max_listeners(desired)
    assert count == expected
    assert ("raise ulimit -n" in remedy) == (expected < MAX_LISTENERS)


def test_udp_workers_share_the_local_ports() -> None:
    """R8: all together get three quarters of them; a share changes when their number doubles."""
    limits = PortLimits(100_000, 28_000)
    options = ListenerOptions()
    assert limits.resolve(options).max_sessions == SESSIONS
    assert not limits.share_local_ports(specs(1, Protocol.UDP).values())
    assert not limits.share_local_ports(specs(50, Protocol.TCP).values())
    for count, expected in ((2, 10_500), (3, 5_250), (5, 2_625), (1000, 512)):
        assert limits.share_local_ports(specs(count, Protocol.UDP).values())
        assert limits.resolve(options).max_sessions == expected
    assert not limits.share_local_ports(specs(900, Protocol.UDP).values())
    assert limits.share_local_ports(specs(1, Protocol.UDP, workers=2).values())
    assert limits.resolve(ListenerOptions(max_connections=1_000_000)).max_sessions == 10_500


def test_hardly_any_local_ports() -> None:
    limits = PortLimits(100_000, 200)
    limits.share_local_ports(specs(100, Protocol.UDP).values())
    assert limits.resolve(ListenerOptions()).max_sessions == 50
