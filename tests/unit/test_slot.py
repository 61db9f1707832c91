"""Slots: when the next worker is due after exits, what a crash loop is, and counters that never fall."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest

from ambassador._worker import COUNTERS_BYTES, FIRST_COUNTER
from ambassador.control import Start, Update
from ambassador.counters import COUNTERS
from ambassador.supervise.slot import DEGRADED_AFTER, WorkerSlot
from ambassador.supervise.timings import Timings
from ambassador.supervise.worker import WorkerProcess
from ambassador.values import Protocol
from tests.unit.fake_workers import descriptors

TIMINGS = Timings()


class Clock:
    def __init__(self, slot: WorkerSlot) -> None:
        self.slot = slot
        self.now = 1000.0

    def assign(self) -> None:
        worker = WorkerProcess(Start(Protocol.TCP), Update(1), self.slot.page)
        self.slot.assign(worker, self.now)

    def live(self, seconds: float) -> float:
        """A worker starts, runs so long and exits: the delay before the next."""
        self.assign()
        self.now += seconds
        delay = self.slot.worker_exited(self.now)
        assert self.slot.start_at == self.now + delay
        self.now += delay
        return delay


@pytest.fixture
def clock() -> Iterator[Clock]:
    before = descriptors()
    clock = Clock(WorkerSlot(Protocol.TCP, TIMINGS))
    yield clock
    clock.slot.close()
    assert descriptors() == before


def write(slot: WorkerSlot, **counters: int) -> None:
    """As the slot's worker does."""
    with mmap.mmap(slot.page.fd, COUNTERS_BYTES) as page, memoryview(page).cast("Q") as words:
        for place, row in enumerate(COUNTERS[Protocol.TCP], FIRST_COUNTER):
            words[place] = counters.get(row.name, words[place])


def test_the_first_exit_costs_nothing(clock: Clock) -> None:
    assert clock.live(0.001) == 0


def test_exits_in_a_row_are_slowed_down(clock: Clock) -> None:
    """W3: at once, then 0.1 s doubling to 10 s, and no further."""
    delays = [clock.live(0.001) for _ in range(20)]
    first = TIMINGS.restart_first
    assert delays[:4] == [0, first, 2 * first, 4 * first]
    assert delays == sorted(delays)
    assert delays[-5:] == [TIMINGS.restart_last] * 5


def test_a_stable_run_resets_the_delay(clock: Clock) -> None:
    """W3: a worker that ran for long is no part of a crash loop, however it exited."""
    for _ in range(DEGRADED_AFTER):
        clock.live(0.001)
    assert clock.slot.degraded
    assert clock.live(TIMINGS.stable) == 0
    assert not clock.slot.degraded


def test_degraded_until_one_is_stable(clock: Clock) -> None:
    """W3: after some exits in a row, until a worker has run for long; a new one proves nothing."""
    for number in range(DEGRADED_AFTER):
        assert clock.slot.degraded == (number >= DEGRADED_AFTER)
        clock.live(0.001)
    assert clock.slot.degraded
    clock.slot.recover(clock.now + 2 * TIMINGS.stable)  # there is no worker to be stable
    assert clock.slot.degraded
    clock.assign()
    clock.slot.recover(clock.now + TIMINGS.stable / 2)
    assert clock.slot.degraded
    clock.slot.recover(clock.now + TIMINGS.stable)
    assert not clock.slot.degraded


def test_a_worker_that_could_not_be_asked_for_has_not_exited(clock: Clock) -> None:
    for _ in range(2 * DEGRADED_AFTER):
        clock.assign()
        clock.slot.retry_at(clock.now + 1)
        assert clock.slot.start_at == clock.now + 1
    assert not clock.slot.degraded
    assert clock.live(0.001) == 0


def test_counters_never_fall_whatever_the_worker_writes(clock: Clock) -> None:
    write(clock.slot, accepted=5, active=3)
    assert clock.slot.counters()["accepted"] == 5
    write(clock.slot, accepted=2, active=1)
    assert clock.slot.counters()["accepted"] == 5
    assert clock.slot.counters()["active"] == 1


def test_the_page_is_clear_for_the_next_worker(clock: Clock) -> None:
    write(clock.slot, accepted=5)
    assert clock.slot.end_counters()["accepted"] == 5
    assert not any(clock.slot.counters().values())


def test_a_sibling_can_read_the_page_and_not_write_it(clock: Clock) -> None:
    """A worker that was taken over cannot lift its sibling's limits."""
    with open(clock.slot.page.reopen_read_only(), "rb") as page:  # noqa: PTH123
        write(clock.slot, active=7)
        mapped = mmap.mmap(page.fileno(), COUNTERS_BYTES, prot=mmap.PROT_READ)
        assert 7 in memoryview(mapped).cast("Q")
        with pytest.raises(PermissionError):
            mmap.mmap(page.fileno(), COUNTERS_BYTES)


def test_nobody_can_shrink_the_page(clock: Clock) -> None:
    """Or else the parent would die of SIGBUS."""
    with pytest.raises(PermissionError):
        open(clock.slot.page.fd, "r+b", closefd=False).truncate(0)  # noqa: SIM115
