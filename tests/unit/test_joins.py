"""Whether a container is still in the network that it joined: runs, not clocks, wherever they tell."""

from __future__ import annotations

from typing import Any

import pytest

from ambassador.discovery.joins import joins_of

NEVER = "0001-01-01T00:00:00Z"


def at(hour: int) -> str:
    return f"2026-01-01T{hour:02}:00:00Z"


def document(ident: str, run: int, ended: str = at(0)) -> Any:
    return {"Id": ident, "State": {"StartedAt": at(run), "FinishedAt": ended}}


def stale(member: int, owner: int, former: Any = (), ended: str = at(0)) -> bool:
    (join,) = joins_of(document("m", member), [document("o", owner, ended)], former)
    return join.stale


@pytest.mark.parametrize(
    ("member", "owner", "ended", "expected"),
    [
        (6, 5, at(0), False),
        (5, 6, at(0), True),
        (5, 5, at(0), False),
        (5, 6, NEVER, False),  # the clock was set back: the first run of X is the only one
        (5, 6, "", True),
    ],
)
def test_at_first_sight(member: int, owner: int, ended: str, expected: bool) -> None:
    assert stale(member, owner, ended=ended) is expected


@pytest.mark.parametrize("was_stale", [False, True])
def test_from_what_was_seen_before(was_stale: bool) -> None:
    former = joins_of(document("m", 5), [document("o", 6 if was_stale else 4)])
    run = int(former[0].owner_run[11:13])
    assert former[0].stale is was_stale
    assert stale(5, run, former) is was_stale  # nothing is new
    assert not stale(1, run, former)  # the member is: it joined what is there
    assert stale(5, 1, former)  # the owner is
    assert stale(1, 2, former) and not stale(2, 1, former)  # both are: the clock


def test_each_link_of_a_chain() -> None:
    chain = [document("x", 4), document("y", 6), None]
    joins = joins_of(document("m", 5), chain)
    assert [(each.member, each.owner, each.stale) for each in joins] == [
        ("m", "x", False),
        ("x", "y", True),
    ]
