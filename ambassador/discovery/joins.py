"""Whether a container still has its place in another's network (`--network container:X`). Pure functions.

A restart of X makes a new network namespace. A container that joined the old one stays there, and the address
of X would lead to another program. Docker does not say which run was joined, so it is concluded:

- Both runs are as seen before: the verdict stays.
- Only the member has a new run: it has joined the present run of X.
- Only X has a new run: the member is in the old one.
- X has never ended: there is no old one.
- Otherwise the two starts are compared by the daemon's clock, which may have been set back meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ambassador.discovery.documents import container_id, never_ended, started_after, started_at
from ambassador.engine.api import Document


class Join(NamedTuple):
    """A member of the network of an owner, with the run of each. `stale`: of an earlier run of it."""

    member: str
    member_run: str
    owner: str
    owner_run: str
    stale: bool


def joins_of(
    document: Document, owners: Sequence[Document | None], former: Sequence[Join] = ()
) -> tuple[Join, ...]:
    """A Join for each link of the chain of `owners`; `former` is the answer of the last inspect."""
    joins: list[Join] = []
    member = document
    for owner in owners:
        if owner is None:
            break
        ids = container_id(member), container_id(owner)
        seen = next((each for each in former if (each.member, each.owner) == ids), None)
        joins.append(
            Join(
                ids[0],
                started_at(member),
                ids[1],
                started_at(owner),
                _is_stale(member, owner, seen),
            )
        )
        member = owner
    return tuple(joins)


def _is_stale(member: Document, owner: Document, seen: Join | None) -> bool:
    if seen is not None:
        member_is_new = started_at(member) != seen.member_run
        owner_is_new = started_at(owner) != seen.owner_run
        if not owner_is_new:
            return seen.stale and not member_is_new
        if not member_is_new:
            return True
    return not never_ended(owner) and started_after(owner, member)
