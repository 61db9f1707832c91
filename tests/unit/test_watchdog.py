"""The watchdog's judgement, over histories of checks."""

from __future__ import annotations

import pytest

from ambassador.supervise.timings import Timings
from ambassador.supervise.watchdog import Watchdog
from ambassador.system.processes import ProcessState

TIMINGS = Timings()
TIMEOUT_S = TIMINGS.watchdog_timeout
BUSY_TIMEOUT_S = TIMINGS.watchdog_busy_timeout
MIN_INTERVAL_S = TIMINGS.watchdog_min_interval
START_S = 1000.0


def verdict_at(
    watchdog: Watchdog, last_heartbeat: float, state: ProcessState, until: float
) -> float | None:
    """Check whenever the watchdog wants to: when the process counts as stuck, None if not before `until`."""
    while watchdog.next_check < until:
        now = max(watchdog.next_check, START_S)
        assert watchdog.start_check(now)
        if watchdog.is_stuck(last_heartbeat, lambda: state):
            return now
        assert watchdog.next_check >= now + MIN_INTERVAL_S
    return None


@pytest.mark.parametrize(
    ("state", "after_s"),
    [
        (ProcessState.WAITING, TIMEOUT_S),
        (ProcessState.RUNNING, BUSY_TIMEOUT_S),
        (ProcessState.ENDED, None),
    ],
)
def test_how_long_silence_is_borne(state: ProcessState, after_s: float | None) -> None:
    """W2: stopped, spinning or starved, and dead already."""
    found = verdict_at(Watchdog(TIMINGS), START_S, state, START_S + 100)
    assert found == (
        None if after_s is None else pytest.approx(START_S + after_s, abs=MIN_INTERVAL_S)
    )


def test_the_state_is_asked_only_of_who_is_silent() -> None:
    def state() -> ProcessState:
        raise AssertionError("asked")

    watchdog = Watchdog(TIMINGS)
    for turn in range(20):
        now = START_S + turn * TIMEOUT_S
        assert watchdog.start_check(now)
        assert not watchdog.is_stuck(now - TIMEOUT_S / 2, state)


def test_between_checks_there_is_nothing_to_do() -> None:
    watchdog = Watchdog(TIMINGS)
    assert watchdog.start_check(START_S)
    assert not watchdog.start_check(START_S + MIN_INTERVAL_S)


def test_who_was_away_accuses_nobody() -> None:
    """W2: after a late check everybody has a whole interval, and only then is stuck."""
    watchdog = Watchdog(TIMINGS)
    assert watchdog.start_check(START_S)
    assert not watchdog.is_stuck(START_S, lambda: ProcessState.WAITING)
    back = watchdog.next_check + 8
    assert watchdog.start_check(back)
    assert not watchdog.is_stuck(START_S, lambda: ProcessState.WAITING)
    assert watchdog.start_check(back + TIMEOUT_S)
    assert watchdog.is_stuck(START_S, lambda: ProcessState.WAITING)


def test_many_do_not_make_many_checks() -> None:
    """However their heartbeats are spread, checks are `watchdog_min_interval` apart."""
    watchdog, checks = Watchdog(TIMINGS), 0
    now = START_S
    while now < START_S + 10:
        checks += watchdog.start_check(now)
        for number in range(100):
            assert not watchdog.is_stuck(
                now - (now + number / 50) % 2, lambda: ProcessState.WAITING
            )
        now = watchdog.next_check
    assert checks <= 10 / MIN_INTERVAL_S + 1
