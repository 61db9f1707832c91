"""Totals over the deaths of workers, and which losses are worth a line."""

from __future__ import annotations

from ambassador.counters import COUNTERS
from ambassador.supervise.losses import Losses, Totals
from ambassador.values import Protocol


def test_totals_never_fall_when_a_worker_dies() -> None:
    totals = Totals(Protocol.TCP)
    one, other = {"accepted": 5, "active": 2}, {"accepted": 7, "active": 3}
    before = totals.sum([one, other])
    assert (before["accepted"], before["active"]) == (12, 5)
    totals.add(one)
    after = totals.sum([other, {"accepted": 0, "active": 0}])
    assert (after["accepted"], after["active"]) == (12, 3)
    totals.add(other)
    assert totals.sum([])["accepted"] == 12
    assert totals.sum([])["active"] == 0


def test_totals_have_every_counter() -> None:
    for protocol, rows in COUNTERS.items():
        assert list(Totals(protocol).sum([])) == [row.name for row in rows]


def risen(losses: Losses, **counters: int) -> dict[str, int]:
    return {row.name: count for row, count in losses.risen(counters)}


def test_a_loss_is_reported_once() -> None:
    """C11."""
    losses = Losses(Protocol.TCP)
    assert risen(losses, rejected=0, over_limit=0) == {}
    assert risen(losses, rejected=3, over_limit=0) == {"rejected": 3}
    assert risen(losses, rejected=3, over_limit=0) == {}
    assert risen(losses, rejected=4, over_limit=0) == {"rejected": 1}


def test_what_was_over_the_limit_is_not_said_twice() -> None:
    """S7."""
    losses = Losses(Protocol.TCP)
    assert risen(losses, rejected=5, over_limit=5) == {"over_limit": 5}
    assert risen(losses, rejected=8, over_limit=6) == {"rejected": 2, "over_limit": 1}


def test_what_is_no_loss_is_not_said() -> None:
    assert risen(Losses(Protocol.UDP), sessions_created=9, dropped_no_backend=2) == {
        "dropped_no_backend": 2
    }
