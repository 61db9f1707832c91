"""The watchdog's judgement, over histories of looks."""

from __future__ import annotations

import pytest

from ambassador.model import ProcessState
from ambassador.watchdog import (
    LOOK_S,
    PATIENCE_S,
    RUNNING_PATIENCE_S,
    Watchdog,
)

START_S = 1000.0


def verdict_at(
    watchdog: Watchdog, alive_at: float, state: ProcessState, until: float
) -> float | None:
    """Look whenever the watchdog wants to: when the process counts as stuck, if it does before `until`."""
    while watchdog.look_at < until:
        now = max(watchdog.look_at, START_S)
        assert watchdog.begin(now)
        if watchdog.is_stuck(alive_at, lambda: state):
            return now
        assert watchdog.look_at >= now + LOOK_S
    return None


@pytest.mark.parametrize(
    ("state", "after_s"),
    [
        (ProcessState.WAITING, PATIENCE_S),
        (ProcessState.RUNNING, RUNNING_PATIENCE_S),
        (ProcessState.ENDED, None),
    ],
)
def test_how_long_silence_is_borne(state: ProcessState, after_s: float | None) -> None:
    """W2: stopped, spinning or starved, and dead already."""
    found = verdict_at(Watchdog(), START_S, state, START_S + 100)
    assert found == (None if after_s is None else pytest.approx(START_S + after_s, abs=LOOK_S))


def test_the_state_is_asked_only_of_who_is_silent() -> None:
    def state() -> ProcessState:
        raise AssertionError("asked")

    watchdog = Watchdog()
    for turn in range(20):
        now = START_S + turn * PATIENCE_S
        assert watchdog.begin(now)
        assert not watchdog.is_stuck(now - PATIENCE_S / 2, state)


def test_between_looks_there_is_nothing_to_do() -> None:
    watchdog = Watchdog()
    assert watchdog.begin(START_S)
    assert not watchdog.begin(START_S + LOOK_S)


def test_who_was_away_does_not_judge() -> None:
    """W2: after a late look everybody has a whole interval, and only then is stuck."""
    watchdog = Watchdog()
    assert watchdog.begin(START_S)
    assert not watchdog.is_stuck(START_S, lambda: ProcessState.WAITING)
    back = watchdog.look_at + 8
    assert watchdog.begin(back)
    assert not watchdog.is_stuck(START_S, lambda: ProcessState.WAITING)
    assert watchdog.begin(back + PATIENCE_S)
    assert watchdog.is_stuck(START_S, lambda: ProcessState.WAITING)


def test_many_do_not_make_many_looks() -> None:
    """However their beats are spread, looks are LOOK_S apart."""
    watchdog, looks = Watchdog(), 0
    now = START_S
    while now < START_S + 10:
        looks += watchdog.begin(now)
        for number in range(100):
            assert not watchdog.is_stuck(
                now - (now + number / 50) % 2, lambda: ProcessState.WAITING
            )
        now = watchdog.look_at
    assert looks <= 10 / LOOK_S + 1
