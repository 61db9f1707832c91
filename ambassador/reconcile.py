"""What should run, and the step from what runs to it. Pure functions: no I/O, no clock, no state.

Invariants:

- A listen address has one target. If two want the same one, the target named first on the command line
  has it, whatever came up first; one line names both. A wildcard and a specific address on one port are the
  same clash.
- A target that is away keeps its listeners, with no backend: hold.
- `plan` of a state and itself is empty, and carrying out a plan makes the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from ambassador.model import Backend, DesiredState, ListenAddress, ListenerSpec, TargetState
from ambassador.options import Change, ListenerOptions, rows

MAX_LISTENERS = 1024
"""Each is a process and four descriptors of the parent: a range exposed by mistake must not take all."""

_REPLACING = tuple(row.name for row in rows(ListenerOptions) if row.change is Change.REPLACE)


@dataclass(frozen=True, slots=True)
class Open:
    """Bind the listen address and give it workers."""

    spec: ListenerSpec


@dataclass(frozen=True, slots=True)
class Update:
    """The listener and its workers stay; the workers get the new state."""

    spec: ListenerSpec


@dataclass(frozen=True, slots=True)
class Replace:
    """The listener stays; new workers take its socket over, and the old ones drain."""

    spec: ListenerSpec


@dataclass(frozen=True, slots=True)
class Close:
    """Nobody wants it any more: close the listener, end its workers."""

    listen: ListenAddress


Action = Open | Update | Replace | Close


def merge(targets: Sequence[TargetState], defaults: ListenerOptions) -> DesiredState:
    """The whole desired state for `targets`, which are in the order of the command line.

    `defaults` are the options of a target that has none of its own. The problems are those between targets.
    """
    targets = _distinct(targets)
    listeners: dict[ListenAddress, ListenerSpec] = {}
    by_port: dict[tuple[str, int], list[ListenAddress]] = {}
    problems: list[str] = []
    for target in targets:
        for listen in sorted(target.ports):
            owner = _clash(listen, by_port)
            if owner is not None:
                problems.append(
                    _clash_problem(listen, target.target, owner, listeners[owner].target)
                )
                continue
            listeners[listen] = _spec(target, listen, defaults)
            for port in range(listen.first_port, listen.last_port + 1):
                by_port.setdefault((listen.protocol, port), []).append(listen)
    if len(listeners) > MAX_LISTENERS:
        problems.append(
            f"{len(listeners)} ports are exposed, {MAX_LISTENERS} are relayed: each takes a process; "
            f"expose fewer, or run an ambassador for each target"
        )
        listeners = dict(islice(listeners.items(), MAX_LISTENERS))
    return DesiredState(listeners, tuple(problems))


def _distinct(targets: Sequence[TargetState]) -> Sequence[TargetState]:
    """`targets` without those that name a container again, by its ID or by another of its names.

    A target whose container was renamed away knows it still, without a replica: then the other one stays.
    """
    best: dict[str, TargetState] = {}
    for target in targets:
        other = best.setdefault(target.container, target)
        if target.replicas and not other.replicas:
            best[target.container] = target
    return [each for each in targets if not each.container or best[each.container] is each]


def _clash(
    listen: ListenAddress, by_port: Mapping[tuple[str, int], Sequence[ListenAddress]]
) -> ListenAddress | None:
    """The listener that has a port of `listen` already, if any."""
    for port in range(listen.first_port, listen.last_port + 1):
        for other in by_port.get((listen.protocol, port), ()):
            if not listen.address or not other.address or listen.address == other.address:
                return other
    return None


def _clash_problem(listen: ListenAddress, target: str, owner: ListenAddress, winner: str) -> str:
    if listen == owner:
        return (
            f"{listen} is exposed by both {winner} and {target}: it goes to {winner}, "
            f"which is named first; run a second ambassador for {target}"
        )
    return (
        f"{listen} of {target} and {owner} of {winner} overlap: {winner} has it, "
        f"which is named first; give {target} another port or address"
    )


def _spec(target: TargetState, listen: ListenAddress, defaults: ListenerOptions) -> ListenerSpec:
    port = target.ports[listen]
    return ListenerSpec(
        listen,
        target.target,
        target.origin,
        tuple(Backend(r.address, port, r.container, r.run, r.weight) for r in target.replicas),
        target.options or defaults,
        target.access,
    )


def plan(
    desired: Mapping[ListenAddress, ListenerSpec], running: Mapping[ListenAddress, ListenerSpec]
) -> list[Action]:
    """The actions that turn `running` into `desired`; what ends comes first, so that ports are free."""
    actions: list[Action] = [Close(listen) for listen in sorted(running) if listen not in desired]
    for listen in sorted(desired):
        spec, old = desired[listen], running.get(listen)
        if old is None:
            actions.append(Open(spec))
        elif needs_new_workers(spec.options, old.options):
            actions.append(Replace(spec))
        elif spec != old:
            actions.append(Update(spec))
    return actions


def needs_new_workers(new: ListenerOptions, old: ListenerOptions) -> bool:
    """Whether an option differs that a running worker cannot change."""
    return any(getattr(new, name) != getattr(old, name) for name in _REPLACING)
