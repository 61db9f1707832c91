"""How much a port may hold, from what was asked for and what descriptors allow."""

from __future__ import annotations

import logging

import pytest

from ambassador.options import ListenerOptions
from ambassador.supervise.worker_path import SPARE_DESCRIPTORS, PortLimits, port_limits

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
