"""Seats: when the next worker is due after deaths, and what counts as a crash loop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ambassador.control import Repoint, Start
from ambassador.model import Listener, Protocol
from ambassador.post import DEGRADED_AFTER, RESTART_FIRST_S, RESTART_LAST_S, STABLE_S, Seat
from ambassador.worker import Handle


class Clock:
    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.now = 1000.0

    def live(self, seconds: float) -> float:
        """A worker is born, lives so long and dies: the delay before the next."""
        self.seat.take(Handle(Start(Listener(1, Protocol.TCP)), Repoint(1)), self.now)
        self.now += seconds
        delay = self.seat.lose(self.now)
        assert self.seat.due == self.now + delay
        self.now += delay
        return delay


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock(Seat())
    yield clock
    if clock.seat.worker is not None:
        clock.seat.worker.close()


def test_the_first_death_costs_nothing(clock: Clock) -> None:
    assert clock.live(0.001) == 0


def test_deaths_in_a_row_are_slowed_down(clock: Clock) -> None:
    """W3: at once, then 0.1 s doubling to 10 s, and no further."""
    delays = [clock.live(0.001) for _ in range(20)]
    assert delays[:4] == [0, RESTART_FIRST_S, 2 * RESTART_FIRST_S, 4 * RESTART_FIRST_S]
    assert delays == sorted(delays)
    assert delays[-5:] == [RESTART_LAST_S] * 5


def test_a_stable_life_forgives(clock: Clock) -> None:
    """W3: a worker that has lived for long was no part of a loop, however it ended."""
    for _ in range(DEGRADED_AFTER):
        clock.live(0.001)
    assert clock.seat.degraded
    assert clock.live(STABLE_S) == 0
    assert not clock.seat.degraded


def test_degraded_until_one_is_stable(clock: Clock) -> None:
    """W3: after some deaths in a row, until a worker has lived for long; a young one proves nothing."""
    for number in range(DEGRADED_AFTER):
        assert clock.seat.degraded == (number >= DEGRADED_AFTER)
        clock.live(0.001)
    assert clock.seat.degraded
    clock.seat.recover(clock.now + 2 * STABLE_S)  # there is no worker to be stable
    assert clock.seat.degraded
    clock.seat.take(Handle(Start(Listener(1, Protocol.TCP)), Repoint(1)), clock.now)
    clock.seat.recover(clock.now + STABLE_S / 2)
    assert clock.seat.degraded
    clock.seat.recover(clock.now + STABLE_S)
    assert not clock.seat.degraded


def test_a_worker_that_could_not_be_asked_for_has_not_died(clock: Clock) -> None:
    for _ in range(2 * DEGRADED_AFTER):
        clock.seat.take(Handle(Start(Listener(1, Protocol.TCP)), Repoint(1)), clock.now)
        clock.seat.postpone(clock.now + 1)
        assert clock.seat.due == clock.now + 1
    assert not clock.seat.degraded
    assert clock.live(0.001) == 0
