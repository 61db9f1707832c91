"""From inspect documents to `TargetState`: the address to reach a target at, or what to do.

Pure functions, no I/O.

Invariants:

- Nothing here raises on any JSON object, and equal documents give equal answers.
- A replica is a container that runs now, on a network that the ambassador can reach by Docker's account.
- Without a replica the problem says what to do, unless the target is down or its address is still to come.
- A problem is one printable line: control characters in names are replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from ambassador.discovery.documents import (
    DEFAULT_NETWORKS,
    Attachment,
    attachments,
    container_id,
    container_name,
    exposed_ports,
    is_host_mode,
    is_running,
    is_target,
    network_owner_reference,
    section,
    started_after,
    started_at,
    text,
)
from ambassador.discovery.own_networks import OwnNetworks
from ambassador.engine.api import Document
from ambassador.model import Replica, TargetState

NAMES_SHOWN = 8
"""How many network names one problem lists before it counts the rest."""


def target_state(
    target: str,
    document: Document,
    own_networks: OwnNetworks,
    *,
    network: str = "",
    network_owner: Document | None = None,
    drivers: Mapping[str, str] = MappingProxyType({}),
) -> TargetState:
    """The state of `target` from its `document`, as seen from `own_networks`.

    `network` is the value of -network. `network_owner` is the document of the container that
    `network_owner_reference` names, None if that is gone. `drivers` maps network IDs and names to drivers,
    if `needs_drivers` says that they matter. Without a replica and without a problem the target does not
    run, or it runs and has no address yet (`awaits_address`).
    """
    name = printable(target)
    ident = container_id(document)
    state = TargetState(target, exposed_ports(document).ports)
    if own_networks.container_id and own_networks.container_id == ident:
        problem = f"{name} is the ambassador itself, or the owner of its network: name another"
        return replace(state, problem=problem)
    if not is_running(document):
        return state
    address, problem = _address(
        name,
        document,
        own_networks,
        network=network,
        network_owner=network_owner,
        drivers=drivers,
    )
    if address and not state.ports:
        problem = "exposes no port: start it with --expose PORT, or put EXPOSE in its image"
    return replace(
        state,
        replicas=(Replica(ident, started_at(document), address),) if address else (),
        problem=problem and f"{name} {problem}",
    )


def awaits_address(document: Document, state: TargetState) -> bool:
    """Whether the target runs on a network that will do, but Docker reports no address on it yet."""
    return is_running(document) and not state.replicas and not state.problem


def no_address_problem(target: str) -> str:
    """The problem of a target that has awaited its address for too long."""
    name = printable(target)
    return f"{name} is running, but Docker reports no address for it: docker restart {name}"


def keep_ports(previous: TargetState, state: TargetState) -> TargetState:
    """`state` of the same container as `previous`, with the ports of both while it cannot be reached.

    `NetworkSettings.Ports` is empty while a container is down, but its listeners must stay.
    """
    if state.replicas:
        return state
    return replace(state, ports=MappingProxyType({**previous.ports, **state.ports}))


def absent_state(previous: TargetState) -> TargetState:
    """The state if there is no such container: the ports of the last one stay."""
    return TargetState(previous.target, previous.ports)


def needs_drivers(document: Document, own_networks: OwnNetworks, network: str) -> bool:
    """Whether drivers decide: from the host, an address on an overlay or macvlan network is no use."""
    return own_networks.host and not network and len(attachments(document)) > 1


def _address(
    name: str,
    document: Document,
    own_networks: OwnNetworks,
    *,
    network: str,
    network_owner: Document | None,
    drivers: Mapping[str, str],
) -> tuple[str, str]:
    """An address and a problem, either of which may be empty."""
    reference = network_owner_reference(document)
    if reference is None:
        return _own_address(name, document, own_networks, network, drivers)
    problem = _owner_problem(document, reference, own_networks, network_owner)
    if problem or network_owner is None:
        return "", problem
    owner_name = printable(container_name(network_owner))
    return _own_address(owner_name, network_owner, own_networks, network, drivers)


def _own_address(
    name: str,
    document: Document,
    own_networks: OwnNetworks,
    network: str,
    drivers: Mapping[str, str],
) -> tuple[str, str]:
    """The address and the problem of container `name`, which uses no other container's network."""
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
        return _address_from_host(name, places, drivers)
    shared = [a for a in places if any(a.same_network(own) for own in own_networks.attachments)]
    if shared:
        return _first_address(shared), ""
    return "", (
        f"shares no network with the ambassador: it is on {_names(places)}, the ambassador on"
        f" {_names(own_networks.attachments)}: docker network connect NETWORK {name}, or AMBASSADOR"
    )


def _owner_problem(
    document: Document, reference: str, own_networks: OwnNetworks, network_owner: Document | None
) -> str:
    """Why the network that the container shares cannot be reached; "" if it can."""
    if network_owner is None or not is_target(network_owner, reference):
        return f"uses the network of container {printable(reference)[:12]}, which is gone: re-create it"
    name = printable(container_name(network_owner))
    if own_networks.network_owner and own_networks.network_owner == container_id(network_owner):
        return "shares the ambassador's own network, where its ports are taken: give either its own"
    if network_owner_reference(network_owner) is not None:
        return f"uses the network of {name}, which uses another's in turn: join that one directly"
    if not is_running(network_owner):
        return f"uses the network of container {name}, which is not running: start {name} first"
    if started_after(network_owner, document):
        # A restart makes a new network namespace. A container that joined the old one stays there, and
        # the new address would lead to another program.
        return (
            f"uses the network that container {name} had before its restart: restart this one too"
        )
    return ""


def _host_address(own_networks: OwnNetworks) -> tuple[str, str]:
    if own_networks.host:
        return "", "is on the ambassador's own host network: connect to it without the ambassador"
    for own in own_networks.attachments:
        if own.gateway:
            return own.gateway, ""
    return "", (
        "is on the host network, and the ambassador's own networks"
        f" ({_names(own_networks.attachments)}) have no gateway:"
        " docker network connect bridge AMBASSADOR"
    )


def _chosen_address(
    name: str, places: tuple[Attachment, ...], network: str, own_networks: OwnNetworks
) -> tuple[str, str]:
    for place in places:
        if network in (place.network, place.network_id):
            here = own_networks.host or any(
                place.same_network(own) for own in own_networks.attachments
            )
            if here:
                return place.address, ""
            return place.address, (
                f"is on network {printable(network)} of -network, but the ambassador is not:"
                f" docker network connect {printable(network)} AMBASSADOR"
            )
    return "", (
        f"is not on network {printable(network)} of -network, but on {_names(places)}:"
        f" docker network connect {printable(network)} {name}"
    )


def _address_from_host(
    name: str, places: tuple[Attachment, ...], drivers: Mapping[str, str]
) -> tuple[str, str]:
    def driver(place: Attachment) -> str:
        # Most networks are bridges. The list of networks may be forbidden, or not needed.
        return drivers.get(place.network_id) or drivers.get(place.network) or "bridge"

    bridges = [place for place in places if driver(place) == "bridge"]
    if not bridges:
        return "", (
            f"is only on {_names(places)}, which the host cannot reach:"
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
    """The first 128 characters of `name`, with a replacement for each that cannot be printed."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:128])
