"""Seats: when the next worker is due after deaths, and what counts as a crash loop."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from ambassador.control import Repoint, Start, Unpacker
from ambassador.model import Listener, Route
from ambassador.values import Protocol
from ambassador.supervise.post import (
    DEGRADED_AFTER,
    RESTART_FIRST_S,
    RESTART_LAST_S,
    STABLE_S,
    Post,
    WorkerSlot,
)
from ambassador.supervise.worker import WorkerProcess


class Clock:
    def __init__(self, slot: WorkerSlot) -> None:
        self.slot = slot
        self.now = 1000.0

    def live(self, seconds: float) -> float:
        """A worker is born, lives so long and dies: the delay before the next."""
        self.slot.take(WorkerProcess(Start(Listener(1, Protocol.TCP)), Repoint(1)), self.now)
        self.now += seconds
        delay = self.slot.worker_exited(self.now)
        assert self.slot.due == self.now + delay
        self.now += delay
        return delay


@pytest.fixture
def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock(WorkerSlot())
    yield clock
    if clock.slot.worker is not None:
        clock.slot.worker.close()


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
    assert clock.slot.degraded
    assert clock.live(STABLE_S) == 0
    assert not clock.slot.degraded


def test_degraded_until_one_is_stable(clock: Clock) -> None:
    """W3: after some deaths in a row, until a worker has lived for long; a young one proves nothing."""
    for number in range(DEGRADED_AFTER):
        assert clock.slot.degraded == (number >= DEGRADED_AFTER)
        clock.live(0.001)
    assert clock.slot.degraded
    clock.slot.recover(clock.now + 2 * STABLE_S)  # there is no worker to be stable
    assert clock.slot.degraded
    clock.slot.take(WorkerProcess(Start(Listener(1, Protocol.TCP)), Repoint(1)), clock.now)
    clock.slot.recover(clock.now + STABLE_S / 2)
    assert clock.slot.degraded
    clock.slot.recover(clock.now + STABLE_S)
    assert not clock.slot.degraded


def test_a_worker_that_could_not_be_asked_for_has_not_died(clock: Clock) -> None:
    for _ in range(2 * DEGRADED_AFTER):
        clock.slot.take(WorkerProcess(Start(Listener(1, Protocol.TCP)), Repoint(1)), clock.now)
        clock.slot.retry_at(clock.now + 1)
        assert clock.slot.due == clock.now + 1
    assert not clock.slot.degraded
    assert clock.live(0.001) == 0


def test_no_name_gives_a_worker_its_title(free_port: int) -> None:
    """I3, S6: a worker shows what it is told as it is, so what it is told must be one printable line."""
    post = Post(Route(Listener(free_port, Protocol.TCP), "web\x1b[31m\n\u202e\udc80 -> 6.6.6.6:1"))
    post.bind()
    handle, (_, control, _) = post.prepare(post.slots[0], Start(post.listener))
    _, repoint = Unpacker().feed(os.read(control, 65536))
    handle.close()
    post.close()
    assert isinstance(repoint, Repoint)
    shown = "web?[31m??? -> 6.6.6.6:1 -> hold"
    assert repoint.title == f"grand-ambassador: {free_port}/tcp {shown}"
