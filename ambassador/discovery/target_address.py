"""From inspect documents to `TargetState`: the address to reach a target at, or what to do.

Pure functions, no I/O.

Invariants:

- Nothing here raises on any JSON object, and equal documents give equal answers.
- A replica is a container that runs now, on a network that the ambassador can reach. From a container that
  is a network that both are on; from the host, a network whose gateway is an address of the host itself.
  Only -network overrules: its address is used even so, with a problem.
- The address in use stays while the run has it and it can be reached.
- Without a replica the problem says what to do, unless the target is down or its address is still to come.
- A problem is one printable line: control characters in names are replaced.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ambassador.discovery.documents import (
    DEFAULT_NETWORKS,
    Attachment,
    Network,
    attachments,
    container_id,
    container_name,
    exposed_ports,
    is_host_mode,
    is_running,
    is_target,
    network_owner_reference,
    section,
    started_at,
    text,
)
from ambassador.discovery.joins import Join, joins_of
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
    owners: Sequence[Document | None] = (),
    joins: Sequence[Join] | None = None,
    networks: Mapping[str, Network] = MappingProxyType({}),
    previous: Sequence[Replica] = (),
) -> TargetState:
    """The state of `target` from its `document`, as seen from `own_networks`.

    `network` is the value of -network. `owners` and `joins` say whose network it uses (`owners_of`,
    `joins_of`). `networks` has what is known of those that `networks_in_question` returns. `previous` are the
    replicas of the last state. Without a replica and without a problem the target does not run, or it runs
    and has no address yet (`awaits_address`).
    """
    name = printable(target)
    ident = container_id(document)
    state = TargetState(target, exposed_ports(document).ports, container=ident)
    if own_networks.container_id and own_networks.container_id == ident:
        problem = f"{name} is the ambassador itself, or the owner of its network: name another"
        return replace(state, problem=problem)
    if not is_running(document):
        return state
    problem, found = "", document
    if network_owner_reference(document) is not None:
        known = joins_of(document, owners) if joins is None else joins
        problem = _owner_problem(document, own_networks, owners, known)
        found = (owners[-1] if owners else None) or document
    addresses: tuple[str, ...] = ()
    if not problem:
        of = name if found is document else printable(container_name(found))
        addresses, problem = _addresses(of, found, own_networks, network, networks)
    if addresses and not state.ports:
        problem = "exposes no port: start it with --expose PORT, or put EXPOSE in its image"
    run = started_at(document)
    used = {each.address for each in previous if (each.container, each.run) == (ident, run)}
    address = next((each for each in addresses if each in used), "") or next(iter(addresses), "")
    return replace(
        state,
        replicas=(Replica(ident, run, address),) if address else (),
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
    """The state if there is no such container: the ports and the ID of the last one stay."""
    return TargetState(previous.target, previous.ports, container=previous.container)


def networks_in_question(document: Document, own_networks: OwnNetworks) -> tuple[Attachment, ...]:
    """The networks whose driver and gateway decide; `document` is the network's owner.

    From the host: all of the target's, unless it is on the default one only, with the host as its gateway.
    From a container: its own, if the target is on the host network.
    """
    if not own_networks.host:
        return own_networks.attachments if is_host_mode(document) else ()
    places = attachments(document)
    plain = all(
        place.network in DEFAULT_NETWORKS and place.gateway in own_networks.addresses
        for place in places
    )
    return () if plain else places


def _addresses(
    name: str,
    document: Document,
    own_networks: OwnNetworks,
    network: str,
    networks: Mapping[str, Network],
) -> tuple[tuple[str, ...], str]:
    """The addresses of container `name`, best first, and a problem. Either may be empty.

    The container uses no other container's network.
    """
    if is_host_mode(document):
        return _host_addresses(own_networks, networks)
    places = attachments(document)
    if not places:
        return (), _no_network_problem(name, document)
    if network:
        return _chosen_addresses(name, places, network, own_networks, networks)
    if own_networks.host:
        return _addresses_from_host(name, places, own_networks, networks)
    shared = _shared(places, own_networks)
    if shared:
        return _known(shared), ""
    return (), (
        f"shares no network with the ambassador: it is on {_names(places)}, the ambassador on"
        f" {_names(own_networks.attachments)}: docker network connect NETWORK {name}, or AMBASSADOR"
    )


def _no_network_problem(name: str, document: Document) -> str:
    mode = printable(text(section(document, "HostConfig"), "NetworkMode")) or "unknown"
    problem = f"is on no network (network mode {mode}), so nothing can reach it"
    if mode.partition(":")[0] in ("pasta", "slirp4netns"):
        # Podman cannot connect such a container to a network later.
        return (
            f"{problem}: start it on a bridge network, podman run --network podman;"
            " a pod with podman pod create --network podman"
        )
    return f"{problem}: docker network connect NETWORK {name}"


def _owner_problem(
    document: Document,
    own_networks: OwnNetworks,
    owners: Sequence[Document | None],
    joins: Sequence[Join],
) -> str:
    """Why the network that the container shares cannot be reached; "" if it can."""
    member = document
    for index, owner in enumerate(owners or (None,)):
        reference = network_owner_reference(member) or ""
        if owner is None or not is_target(owner, reference):
            of = printable(reference)[:12]
            return f"uses the network of container {of}, which is gone: re-create it"
        name = printable(container_name(owner))
        if own_networks.network_owner and own_networks.network_owner == container_id(owner):
            return "shares the ambassador's own network, where its ports are taken: give either its own"
        if not is_running(owner):
            return f"uses the network of container {name}, which is not running: start {name} first"
        if joins[index].stale:
            whom = "this one" if index == 0 else printable(container_name(member))
            return (
                f"uses the network that container {name} had before its restart: restart {whom} too"
            )
        member = owner
    if network_owner_reference(member) is not None:
        return f"uses the network of {len(owners)} containers in turn: join the last one directly"
    return ""


def _host_addresses(
    own_networks: OwnNetworks, networks: Mapping[str, Network]
) -> tuple[tuple[str, ...], str]:
    """The host's addresses on the ambassador's networks, the default one first.

    The gateway of a network is the host only if the network is a bridge and the gateway is the bridge's own:
    a macvlan's is a router, and a bridge can be given one too.
    """
    if own_networks.host:
        return (), "is on the ambassador's own host network: connect to it without the ambassador"
    own = sorted(own_networks.attachments, key=_default_first)
    found = tuple(place.gateway for place in own if _is_gateway_the_host(place, networks))
    if found:
        return found, ""
    return (), (
        "is on the host network, and the host is not known to be the gateway of the ambassador's own"
        f" networks ({_names(own_networks.attachments)}): docker network connect bridge AMBASSADOR"
    )


def _is_gateway_the_host(place: Attachment, networks: Mapping[str, Network]) -> bool:
    network = _network(place, networks)
    if not place.gateway:
        return False
    if network is None:  # the list may be forbidden; a default network is a bridge
        return place.network in DEFAULT_NETWORKS
    if network.driver != "bridge":
        return False
    return place.gateway in network.gateways or not (network.gateways or network.router)


def _chosen_addresses(
    name: str,
    places: tuple[Attachment, ...],
    network: str,
    own_networks: OwnNetworks,
    networks: Mapping[str, Network],
) -> tuple[tuple[str, ...], str]:
    """As `_addresses`, of those of `places` that -network names."""
    chosen = tuple(place for place in places if place.is_named(network))
    if not chosen:
        return (), (
            f"is not on network {printable(network)} of -network, but on {_names(places)}:"
            f" docker network connect {printable(network)} {name}"
        )
    if own_networks.host:
        addresses, problem = _addresses_from_host(name, chosen, own_networks, networks)
        # The user may know of a route to it. To a rootless Engine's networks there is none.
        return (addresses if own_networks.rootless else _known(chosen)), problem
    if _shared(chosen, own_networks):
        return _known(chosen), ""
    return _known(chosen), (
        f"is on network {printable(network)} of -network, but the ambassador is not:"
        f" docker network connect {printable(network)} AMBASSADOR"
    )


def _addresses_from_host(
    name: str,
    places: tuple[Attachment, ...],
    own_networks: OwnNetworks,
    networks: Mapping[str, Network],
) -> tuple[tuple[str, ...], str]:
    """From the host: an address of another network may be anybody's."""
    with_address = tuple(place for place in places if place.address)
    if not with_address:
        return (), ""
    if own_networks.rootless:
        return (), (
            f"is on {_names(places)} of a rootless Engine, which the host cannot reach:"
            " run the ambassador as a container on that network"
        )
    bridges = tuple(place for place in with_address if _is_bridge(place, networks))
    if not bridges:
        return (), (
            f"is only on {_names(places)}, which the host cannot reach:"
            f" docker network connect bridge {name}"
        )
    reached = [place for place in bridges if _has_host(place, own_networks, networks)]
    if reached:
        return _known(sorted(reached, key=_default_first)), ""
    if own_networks.unknown:
        return (), (
            f"is on {_names(places)} of an Engine that does not know the ambassador's container:"
            " run the ambassador as a container of that Engine"
        )
    return (), (
        f"is on {_names(places)}, where the host has no address:"
        " run the ambassador as a container on that network"
    )


def _is_bridge(place: Attachment, networks: Mapping[str, Network]) -> bool:
    network = _network(place, networks)
    return network is None or network.driver in ("", "bridge")


def _has_host(
    place: Attachment, own_networks: OwnNetworks, networks: Mapping[str, Network]
) -> bool:
    """Whether an own interface has the network's gateway address. A container may have another gateway.

    An internal network with a subnet of the user's has a bridge address that Docker tells nowhere. Then an
    own address in the subnet is it.
    """
    network = _network(place, networks) or Network("")
    gateways = {place.gateway, *network.gateways} - {""}
    if gateways or network.router:
        return not own_networks.addresses.isdisjoint(gateways)
    subnets = [ipaddress.ip_network(subnet) for subnet in network.subnets]
    own = map(ipaddress.ip_address, own_networks.addresses)
    return any(address in subnet for address in own for subnet in subnets)


def _network(place: Attachment, networks: Mapping[str, Network]) -> Network | None:
    return networks.get(place.network_id or place.network)  # another may have had the name before


def _shared(places: tuple[Attachment, ...], own_networks: OwnNetworks) -> tuple[Attachment, ...]:
    return tuple(
        place
        for place in places
        if any(place.same_network(own) for own in own_networks.attachments)
    )


def _default_first(place: Attachment) -> tuple[bool, str]:
    return place.network not in DEFAULT_NETWORKS, place.network


def _known(places: Sequence[Attachment]) -> tuple[str, ...]:
    return tuple(place.address for place in places if place.address)


def _names(places: tuple[Attachment, ...]) -> str:
    if not places:
        return "none"
    shown = ", ".join(printable(place.network) for place in places[:NAMES_SHOWN])
    rest = len(places) - NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def printable(name: str) -> str:
    """The first 128 characters of `name`, with a replacement for each that cannot be printed."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:128])
