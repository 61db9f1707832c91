"""What a port may hold, from what was asked for and what descriptors allow."""

from __future__ import annotations

import pytest

from ambassador.cli.main import MAX_SESSIONS, SPARE_DESCRIPTORS, port_limits

ROOM = 20_000 - SPARE_DESCRIPTORS


@pytest.mark.parametrize(
    ("asked", "workers", "expected"),
    [
        (0, 1, (ROOM // 2, MAX_SESSIONS)),
        (0, 4, (4 * (ROOM // 2), MAX_SESSIONS)),
        (100, 1, (100, 100)),
        (100, 4, (100, 25)),
        (3, 4, (3, 1)),
        (1_000_000, 1, (ROOM // 2, ROOM)),
        (1_000_000, 4, (4 * (ROOM // 2), ROOM)),
    ],
)
def test_port_limits(asked: int, workers: int, expected: tuple[int, int]) -> None:
    assert port_limits(asked, workers, ROOM + SPARE_DESCRIPTORS) == expected


def test_something_is_always_allowed() -> None:
    assert port_limits(0, 1, 10) == (1, 2)
