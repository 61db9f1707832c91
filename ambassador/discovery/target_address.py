"""From inspect documents to `TargetState`: which address, seen from own networks.

Pure functions, no I/O.

Invariants:

- Nothing here raises on any JSON object, and equal documents give equal answers.
- An address comes from a container that runs now, on a network that the ambassador can reach by
  what Docker says. Where there is none, the problem says what to do.
- A problem is one printable line: control characters in names are replaced, never passed on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ambassador.discovery.documents import DEFAULT_NETWORKS, Attachment, OwnNetworks, attachments, container_id, container_name, exposed_listeners, is_host_mode, is_running, is_target, joined_reference, section, started_after, text
from ambassador.engine.api import Document
from ambassador.model import TargetState

NAMES_SHOWN = 8
"""How many network names one problem lists before it counts the rest."""


def target_state(
    target: str,
    document: Document,
    own_networks: OwnNetworks,
    *,
    network: str | None = None,
    joined: Document | None = None,
) -> TargetState:
    """What `document` says of `target`, seen from `own_networks`.

    `network` is what the user asked for with -network; `joined` is the document of the container
    named by `joined_reference`, None where that is gone. An empty `problem` with no address means:
    not running, or running and still without an address (`awaits_address`).
    """
    name = printable(target)
    state = TargetState(
        target=target,
        exposed=exposed_listeners(document).listeners,
        container_id=container_id(document),
        started_at=text(section(document, "State"), "StartedAt"),
    )
    if own_networks.container_id and own_networks.container_id == state.container_id:
        return replace(
            state,
            problem=f"{name} is the ambassador itself, or the one whose network it uses:"
            " name another",
        )
    if not is_running(document):
        return state
    address, problem = _address(name, document, own_networks, network, joined)
    if address and not state.exposed:
        problem = "exposes no port: start it with --expose PORT, or put EXPOSE in its image"
    return replace(state, address=address or None, problem=problem and f"{name} {problem}")


def awaits_address(document: Document, state: TargetState) -> bool:
    """Running and on a network that will do, but Docker reports no address on it yet."""
    return is_running(document) and state.address is None and not state.problem


def no_address_problem(target: str) -> str:
    """The problem of a target that has awaited its address for too long."""
    name = printable(target)
    return f"{name} is running, but Docker reports no address for it: docker restart {name}"


def keep_exposed(previous: TargetState, state: TargetState) -> TargetState:
    """A container that only stopped goes on exposing what its last run did.

    `NetworkSettings.Ports` is empty while it is down, and its listeners must stay.
    """
    if state.container_id == previous.container_id and state.address is None:
        return replace(state, exposed=state.exposed | previous.exposed)
    return state


def absent_state(previous: TargetState) -> TargetState:
    """No such container (any more): what the last one exposed stays exposed."""
    return TargetState(previous.target, previous.exposed)


def _address(
    name: str,
    document: Document,
    own_networks: OwnNetworks,
    network: str | None,
    joined: Document | None,
) -> tuple[str, str]:
    """An address and a problem, either of which may be empty."""
    reference = joined_reference(document)
    if reference is None:
        return _own_address(name, document, own_networks, network)
    problem = _joined_problem(document, reference, own_networks, joined)
    if problem or joined is None:
        return "", problem
    return _own_address(printable(container_name(joined)), joined, own_networks, network)


def _own_address(
    name: str, document: Document, own_networks: OwnNetworks, network: str | None
) -> tuple[str, str]:
    """Of the container `name`, which has a network of its own."""
    if is_host_mode(document):
        return _host_address(own_networks)
    places = attachments(document)
    if not places:
        mode = printable(text(section(document, "HostConfig"), "NetworkMode")) or "unknown"
        return "", (
            f"is on no network (network mode {mode}), so nothing can reach it:"
            f" docker network connect NETWORK {name}"
        )
    if network:
        return _chosen_address(name, places, network, own_networks)
    if own_networks.host:
        return _address_from_host(name, places, own_networks)
    shared = [a for a in places if any(a.same_network(own) for own in own_networks.attachments)]
    if shared:
        return _first_address(shared), ""
    return "", (
        f"shares no network with the ambassador: it is on {_names(places)}, the ambassador on"
        f" {_names(own_networks.attachments)}: docker network connect NETWORK {name}, or the ambassador"
    )


def _joined_problem(
    document: Document, reference: str, own_networks: OwnNetworks, joined: Document | None
) -> str:
    if joined is None or not is_target(joined, reference):
        return (
            f"uses the network of container {printable(reference)[:12]}, which is gone: re-create it"
        )
    name = printable(container_name(joined))
    if own_networks.network_owner and own_networks.network_owner == container_id(joined):
        return "shares the ambassador's own network, where its ports are taken: give either its own"
    if joined_reference(joined) is not None:
        return f"uses the network of {name}, which uses another's in turn: join that one directly"
    if not is_running(joined):
        return (
            f"uses the network of container {name}, which is not running: start it, then this one"
        )
    if started_after(joined, document):
        # A restart makes a new network namespace; who joined the old one stays there, unreachable,
        # and the new address would lead to whatever else listens at X.
        return (
            f"uses the network that container {name} had before its restart: restart this one too"
        )
    return ""


def _host_address(own_networks: OwnNetworks) -> tuple[str, str]:
    if own_networks.host:
        return "", "is on the host network, as the ambassador is: it listens there itself"
    for own in own_networks.attachments:
        if own.gateway:
            return own.gateway, ""
    return "", (
        f"is on the host network, and none of the ambassador's own ({_names(own_networks.attachments)})"
        " has a gateway to it: docker network connect bridge AMBASSADOR"
    )


def _chosen_address(
    name: str, places: tuple[Attachment, ...], network: str, own_networks: OwnNetworks
) -> tuple[str, str]:
    for place in places:
        if network in (place.network, place.network_id):
            here = own_networks.host or any(place.same_network(own) for own in own_networks.attachments)
            if here:
                return place.address, ""
            return place.address, (
                f"is on the network {printable(network)} that -network names, the ambassador is not:"
                f" docker network connect {printable(network)} AMBASSADOR"
            )
    return "", (
        f"is not on the network {printable(network)} that -network names, but on {_names(places)}:"
        f" docker network connect {printable(network)} {name}"
    )


def _address_from_host(
    name: str, places: tuple[Attachment, ...], own_networks: OwnNetworks
) -> tuple[str, str]:
    def driver(place: Attachment) -> str:
        known = own_networks.drivers.get(place.network_id) or own_networks.drivers.get(place.network)
        return known or "bridge"  # not asked or not allowed to: what it most often is

    bridges = [place for place in places if driver(place) == "bridge"]
    if not bridges:
        return "", (
            f"is on no bridge network, only on {_names(places)}, which the host cannot reach:"
            f" docker network connect bridge {name}"
        )
    bridges.sort(key=lambda a: (a.network not in DEFAULT_NETWORKS, a.network))
    return _first_address(bridges), ""


def _first_address(places: Iterable[Attachment]) -> str:
    return next((place.address for place in places if place.address), "")


def _names(places: tuple[Attachment, ...]) -> str:
    if not places:
        return "none"
    shown = ", ".join(printable(place.network) for place in places[:NAMES_SHOWN])
    rest = len(places) - NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def printable(name: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:128])
