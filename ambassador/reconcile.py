"""What should run, and the step from what runs to it. Pure functions: no I/O, no clock, no state.

Invariants:

- A listen address has one target. If two want the same one, the target named first on the command line
  has it, whatever came up first; one line names both. A wildcard and a specific address on one port are the
  same clash.
- A target that is away keeps its listeners, with no backend: hold.
- If not all listeners fit, those that run stay, and no target takes what the others may still want.
- The work is linear in the ports that targets expose; the problems are one for each pair of targets.
- `plan` of a state and itself is empty, and carrying out a plan makes the two equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ambassador.model import Backend, DesiredState, ListenAddress, ListenerSpec, TargetState
from ambassador.options import Change, ListenerOptions, rows
from ambassador.values import Protocol

MAX_LISTENERS = 1024
"""Each is a process and five descriptors of the parent: a range exposed by mistake must not take all."""

RESERVED = 16
"""Listeners kept free for each other target by one that wants more than its share."""

MAX_RANGES = 10
"""Ranges of ports that one line names."""

REMEDY = "each takes a process: expose fewer, or run an ambassador for each target"

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
    clashes: dict[tuple[str, str], list[tuple[ListenAddress, ListenAddress]]] = {}
    for target in targets:
        for listen in sorted(target.ports, key=_order):
            owner = _clash(listen, by_port)
            if owner is not None:
                pair = (target.target, listeners[owner].target)
                clashes.setdefault(pair, []).append((listen, owner))
                continue
            listeners[listen] = _spec(target, listen, defaults)
            for port in range(listen.first_port, listen.last_port + 1):
                by_port.setdefault((listen.protocol, port), []).append(listen)
    problems = tuple(_clash_problem(*pair, found) for pair, found in clashes.items())
    return DesiredState(listeners, problems, tuple(target.target for target in targets))


def fit(
    desired: DesiredState,
    running: Collection[ListenAddress],
    limit: int = MAX_LISTENERS,
    remedy: str = REMEDY,
) -> DesiredState:
    """`desired` with at most `limit` listeners; a problem for each target that has some left out.

    Those that run stay. Then each target gets up to an equal share. What is left goes to those who want
    more, but for RESERVED listeners for each of the others, which may come later.
    """
    limit = max(limit, sum(listen in running for listen in desired.listeners))
    if len(desired.listeners) <= limit:
        return desired
    wanted: dict[str, list[ListenAddress]] = {name: [] for name in desired.targets}
    for listen, spec in desired.listeners.items():
        wanted.setdefault(spec.target if desired.targets else "", []).append(listen)
    kept = set(islice((listen for listen in desired.listeners if listen in running), limit))
    has = {name: sum(listen in kept for listen in listens) for name, listens in wanted.items()}

    def raise_to(name: str, count: int) -> None:
        count = min(count - has[name], limit - len(kept))
        more = list(islice((each for each in wanted[name] if each not in kept), max(count, 0)))
        kept.update(more)
        has[name] += len(more)

    share = limit // len(wanted)
    reserved = min(RESERVED, share)
    for count in (reserved, share):
        for name in sorted(wanted, key=lambda name: has[name]):
            raise_to(name, count)
    free = limit - len(kept) - sum(max(reserved - each, 0) for each in has.values())
    for name in wanted:
        before = has[name]
        raise_to(name, before + free)
        free -= has[name] - before
    left_out = {
        name: [listen for listen in listens if listen not in kept]
        for name, listens in wanted.items()
    }
    problems = [
        f"{_ports(listens)}{f' of {name}' if name else ''} left out, {limit} are relayed in all: {remedy}"
        for name, listens in left_out.items()
        if listens
    ]
    listeners = {listen: spec for listen, spec in desired.listeners.items() if listen in kept}
    return replace(desired, listeners=listeners, problems=(*desired.problems, *problems))


def _order(listen: ListenAddress) -> tuple[Protocol, int, int, str]:
    """As ListenAddress sorts; far cheaper for a range of thousands."""
    return listen.protocol, listen.first_port, listen.last_port, listen.address


def _ports(listens: Iterable[ListenAddress]) -> str:
    """A listener as it is written, several as `12 ports (30000-30010/udp, 80/tcp)`."""
    listens = list(listens)
    if len(listens) == 1:
        return str(listens[0])
    ranges: list[tuple[Protocol, int, int, str]] = []
    count = 0
    for listen in sorted(listens, key=lambda each: (each.protocol, each.address, each.first_port)):
        protocol, first, last, address = _order(listen)
        count += last - first + 1
        if ranges and ranges[-1][::3] == (protocol, address) and first <= ranges[-1][2] + 1:
            first, last = ranges[-1][1], max(ranges[-1][2], last)
            ranges.pop()
        ranges.append((protocol, first, last, address))
    shown = [str(ListenAddress(*each)) for each in ranges[:MAX_RANGES]]
    more = [f"{len(ranges) - MAX_RANGES} more"] if len(ranges) > MAX_RANGES else []
    return f"{count} ports ({', '.join([*shown, *more])})"


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


def _clash_problem(
    target: str, winner: str, found: Sequence[tuple[ListenAddress, ListenAddress]]
) -> str:
    """One line for all that `target` wants and `winner` has."""
    ports = _ports(listen for listen, _ in found)
    many = len(found) > 1
    if all(listen == owner for listen, owner in found):
        return (
            f"{ports} {'are' if many else 'is'} exposed by both {winner} and {target}: "
            f"{'they go' if many else 'it goes'} to {winner}, "
            f"which is named first; run a second ambassador for {target}"
        )
    return (
        f"{ports} of {target} and {_ports({owner: None for _, owner in found})} of {winner} overlap: "
        f"{winner} has {'them' if many else 'it'}, "
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
