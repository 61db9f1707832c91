"""What should run, and the step from what runs to it. Pure functions: no I/O, no clock, no state.

Invariants:

- A listener has one target. Where two want the same port, the one named first on the command line has
  it, whatever came up first, and the other is told so in one line that names both.
- A target that is away keeps its listeners, with no backend: hold.
- `plan` of a state and itself is empty, and carrying out a plan makes the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from ambassador.model import Backend, DesiredState, Listener, Route, TargetState

MAX_LISTENERS = 1024
"""Each is a process and four descriptors of the parent: a range exposed by mistake must not take all."""


@dataclass(frozen=True, slots=True)
class Start:
    """Bind the listener and give it a worker."""

    route: Route


@dataclass(frozen=True, slots=True)
class Repoint:
    """The listener stays; its worker gets a new list of backends."""

    route: Route


@dataclass(frozen=True, slots=True)
class Stop:
    """Nobody exposes it any more: close the listener, end the worker."""

    listener: Listener


Action = Start | Repoint | Stop


def merge(targets: Sequence[TargetState]) -> DesiredState:
    """The whole desired state for `targets`, which are in the order of the command line.

    Its problems are those between targets; a target's own are its TargetState's.
    """
    routes: dict[Listener, Route] = {}
    problems: list[str] = []
    for target in targets:
        for listener in sorted(target.exposed):
            if listener in routes:
                winner = routes[listener].target
                problems.append(
                    f"{listener} is exposed by both {winner} and {target.target}: it goes to {winner}, "
                    f"which is named first; run a second ambassador for {target.target}"
                )
            else:
                routes[listener] = Route(listener, target.target, _backends(target, listener))
    if len(routes) > MAX_LISTENERS:
        problems.append(
            f"{len(routes)} ports are exposed, {MAX_LISTENERS} are relayed: each takes a process; "
            f"expose fewer, or run an ambassador for each target"
        )
        routes = dict(islice(routes.items(), MAX_LISTENERS))
    return DesiredState(routes, tuple(problems))


def _backends(target: TargetState, listener: Listener) -> tuple[Backend, ...]:
    if target.address is None:
        return ()
    return (Backend(target.address, listener.port, target.container_id, target.started_at),)


def plan(desired: Mapping[Listener, Route], actual: Mapping[Listener, Route]) -> list[Action]:
    """The actions that turn `actual` into `desired`; what ends comes first, so that ports are free."""
    actions: list[Action] = [
        Stop(listener) for listener in sorted(actual) if listener not in desired
    ]
    for listener in sorted(desired):
        if listener not in actual:
            actions.append(Start(desired[listener]))
        elif desired[listener] != actual[listener]:
            actions.append(Repoint(desired[listener]))
    return actions
