"""Delays that double, with jitter."""

from __future__ import annotations

from ambassador.backoff import Backoff


def test_backoff_doubles_up_to_its_cap_and_starts_anew() -> None:
    backoff = Backoff(1.0, 5.0, fraction=lambda: 0.0)
    assert [backoff.next() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert backoff.next(cap=2.0) == 2.0
    assert backoff.next(cap=100.0) == 5.0
    backoff.reset()
    assert backoff.next() == 1.0


def test_backoff_varies_between_half_and_whole() -> None:
    assert Backoff(1.0, 5.0, fraction=lambda: 1.0).next() == 0.5
    delays = {Backoff(1.0, 5.0).next() for _ in range(50)}
    assert len(delays) > 1 and all(0.5 <= delay <= 1.0 for delay in delays)
