"""The TCP loop's ready bits over all states and events, and the size of a connection."""

from __future__ import annotations

import re
from pathlib import Path
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP

import pytest

from ambassador import _splice

VOCABULARY = Path(_splice.__file__).parent / "_tcp.pxd"

READ_READY, WRITE_READY, END_QUEUED, ERROR_QUEUED = 1, 2, 4, 8
FIN_QUEUED, URGENT_QUEUED, READ_PAUSED = 16, 32, 64
STATES = range(128)
EVENTS = (EPOLLIN, EPOLLPRI, EPOLLOUT, EPOLLRDHUP, EPOLLERR, EPOLLHUP)
MASKS = tuple(
    sum(event for place, event in enumerate(EVENTS) if chosen >> place & 1)
    for chosen in range(1 << len(EVENTS))
)

SET_BY = {
    READ_READY: {EPOLLIN, EPOLLRDHUP, EPOLLERR, EPOLLHUP},
    WRITE_READY: {EPOLLOUT, EPOLLERR, EPOLLHUP},
    END_QUEUED: {EPOLLRDHUP, EPOLLERR, EPOLLHUP, EPOLLPRI},
    ERROR_QUEUED: {EPOLLERR},
    URGENT_QUEUED: {EPOLLPRI},
}
"""The table of _ready.pxd, without FIN_QUEUED, which depends on the state too."""


def constants(first: str) -> dict[str, int]:
    """The names of the enum that begins with `first`, and their values."""
    enum = re.search(
        rf"^cdef enum:[^\n]*\n    {first}\b.*?\n\n", VOCABULARY.read_text(), re.M | re.S
    )
    assert enum
    return {
        name: int(value) for name, value in re.findall(r"^    (\w+) = (\d+)", enum.group(), re.M)
    }


def test_the_bits_are_those_of_the_loop() -> None:
    assert constants("READ_READY") == {
        "READ_READY": READ_READY,
        "WRITE_READY": WRITE_READY,
        "END_QUEUED": END_QUEUED,
        "ERROR_QUEUED": ERROR_QUEUED,
        "FIN_QUEUED": FIN_QUEUED,
        "URGENT_QUEUED": URGENT_QUEUED,
        "READ_PAUSED": READ_PAUSED,
    }


@pytest.mark.parametrize("mask", MASKS)
def test_events_set_bits(mask: int) -> None:
    happened = {event for event in EVENTS if mask & event}
    fin = EPOLLRDHUP in happened and not happened & {EPOLLERR, EPOLLHUP}
    for bits in STATES:
        expected = bits
        for bit, events in SET_BY.items():
            if happened & events:
                expected |= bit
        if fin and not bits & READ_PAUSED:
            expected |= FIN_QUEUED
        after, *meaning = _splice.ready_functions(bits, 0, mask)
        assert after == expected, f"{bits:#x} after {mask:#x}"
        assert after & bits == bits, "an event clears no bit"
        assert meaning == list(_splice.ready_functions(bits, 0, 0))[1:], "bits alone have a meaning"


@pytest.mark.parametrize("bits", STATES)
def test_what_the_bits_mean(bits: int) -> None:
    splice, empties, only_fin, interest = _splice.ready_functions(bits, 0, 0)[2:]
    assert splice == (not bits & URGENT_QUEUED)
    assert empties == (not bits & END_QUEUED)
    assert only_fin == (bool(bits & FIN_QUEUED) and not bits & URGENT_QUEUED)
    assert interest & (EPOLLOUT | EPOLLRDHUP | EPOLLET) == EPOLLOUT | EPOLLRDHUP | EPOLLET
    assert interest & (EPOLLIN | EPOLLPRI) == (0 if bits & READ_PAUSED else EPOLLIN | EPOLLPRI)
    for destination in STATES:
        moves = _splice.ready_functions(bits, destination, 0)[1]
        assert moves == (bool(bits & READ_READY) and bool(destination & WRITE_READY))


def test_a_connection_is_two_cache_lines() -> None:
    assert _splice.CONNECTION_BYTES == 128
