"""From the Engine's inspect documents to `TargetState`: pure functions, no I/O, no Docker client.

Invariants:

- A document is untrusted. Whatever is missing, null or of another type counts as not said; nothing
  here raises on any JSON object.
- Equal documents give equal answers: every choice among several networks follows one order.
- An address is an IP literal or it is absent. It comes from a container that runs now, on a network
  that the ambassador can reach by what Docker says.
- A problem is one printable line: control characters in names are replaced, never passed on.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ambassador.model import Listener, Protocol, TargetState

Document = Mapping[str, Any]

DEFAULT_NETWORKS = frozenset({"bridge", "podman"})
"""The networks that a container is on when nobody chose one: Docker's, Podman's."""

PSEUDO_NETWORKS = frozenset({"host", "none"})
"""Docker lists these as networks; nobody has an address on them."""

NAMES_SHOWN = 8
"""How many network names one problem lists before it counts the rest."""

MIN_ID_PREFIX = 12
"""What Docker calls a short ID. A shorter prefix could be a name that somebody else chose."""

_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/([A-Za-z]+))?", re.ASCII)
_HEX = re.compile(r"[0-9a-f]+")
_MOUNT = re.compile(
    r"/(?:containers/([0-9a-f]{64})|overlay-containers/([0-9a-f]{64})/userdata)"
    r"/(?:hostname|hosts|resolv\.conf)"
)
_MOUNTED_FILES = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
_CGROUP = re.compile(r"[/-]([0-9a-f]{64})(?:\.scope)?(?:/|$)")


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container's place on one network. Empty text where Docker says nothing (yet)."""

    network: str
    network_id: str = ""
    address: str = ""
    gateway: str = ""

    def same_network(self, other: Attachment) -> bool:
        """By ID, since names are not unique; by name where an engine reports no ID."""
        if self.network_id and other.network_id:
            return self.network_id == other.network_id
        return self.network == other.network


@dataclass(frozen=True, slots=True)
class Vantage:
    """Where the ambassador stands. As it is by default: on the host, in no container.

    `network_owner` is the container whose network the ambassador uses: itself, unless it was
    started with `--network container:Y`. `drivers` maps network IDs and names to drivers, as far
    as the Engine was asked.
    """

    container_id: str | None = None
    network_owner: str | None = None
    host: bool = True
    attachments: tuple[Attachment, ...] = ()
    drivers: Mapping[str, str] = field(default_factory=dict)


class Exposed(NamedTuple):
    """What a container exposes, and the ports left out because their protocol is not relayed."""

    listeners: frozenset[Listener]
    skipped: tuple[str, ...]


# --- reading a document ------------------------------------------------------------------------


def _section(document: Document | None, *path: str) -> Mapping[str, Any]:
    here: Any = document
    for key in path:
        here = here.get(key) if isinstance(here, Mapping) else None
    return here if isinstance(here, Mapping) else {}


def _text(section: Mapping[str, Any], key: str) -> str:
    value = section.get(key)
    return value if isinstance(value, str) else ""


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:128])


def _literal(text: str) -> str:
    """`text` if one can connect to it as an address, else empty."""
    try:
        return "" if ipaddress.ip_address(text).is_unspecified else text
    except ValueError:
        return ""


def container_id(document: Document) -> str:
    return _text(document, "Id")


def container_name(document: Document) -> str:
    """Without the slash that Docker puts first and Podman, in places, does not."""
    return _text(document, "Name").removeprefix("/")


def is_id_prefix(target: str) -> bool:
    return len(target) >= MIN_ID_PREFIX and _HEX.fullmatch(target) is not None


def is_target(document: Document, target: str) -> bool:
    """Whether the Engine's answer is the container that was meant.

    It answers to a name, an ID, and to *any* prefix of an ID: asked for `db` where no container has
    that name, it gives the one whose ID begins with db. Accepted is the exact name, the whole ID,
    or 12 hexadecimal digits and more of it.
    """
    ident = container_id(document)
    if target.removeprefix("/") == container_name(document):
        return True
    return bool(ident) and (target == ident or (is_id_prefix(target) and ident.startswith(target)))


def is_running(document: Document) -> bool:
    """Running in the sense of having a network now. A paused container has: the kernel holds."""
    state = _section(document, "State")
    return state.get("Running") is True and state.get("Restarting") is not True


def joined_reference(document: Document) -> str | None:
    """X, where the container uses the network of a container X (`--network container:X`)."""
    mode = _text(_section(document, "HostConfig"), "NetworkMode")
    return mode.removeprefix("container:") if mode.startswith("container:") else None


def _is_host_mode(document: Document) -> bool:
    return _text(_section(document, "HostConfig"), "NetworkMode") == "host"


def exposed_listeners(document: Document) -> Exposed:
    """`Config.ExposedPorts` together with `NetworkSettings.Ports`; ranges expanded."""
    listeners: set[Listener] = set()
    skipped: set[str] = set()
    ports = [
        _section(document, "Config", "ExposedPorts"),
        _section(document, "NetworkSettings", "Ports"),
    ]
    for key in (key for section in ports for key in section):
        match = _PORT.fullmatch(key)
        if match is None:
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        try:
            protocol = Protocol((match[3] or "tcp").lower())
        except ValueError:
            skipped.add(key)
            continue
        if 1 <= first <= last <= 65535:
            listeners.update(Listener(port, protocol) for port in range(first, last + 1))
    return Exposed(frozenset(listeners), tuple(sorted(skipped)))


def attachments(document: Document) -> tuple[Attachment, ...]:
    """The networks a container is on, in the order of preference: the user's own by name, then the
    default one. IPv4 before IPv6."""
    settings = _section(document, "NetworkSettings")
    found = [
        Attachment(
            name,
            _text(entry, "NetworkID"),
            _literal(_text(entry, "IPAddress")) or _literal(_text(entry, "GlobalIPv6Address")),
            _literal(_text(entry, "Gateway")) or _literal(_text(entry, "IPv6Gateway")),
        )
        for name, entry in _section(settings, "Networks").items()
        if isinstance(entry, Mapping) and name not in PSEUDO_NETWORKS
    ]
    if not found and _literal(_text(settings, "IPAddress")):
        # Podman before 3.2 leaves Networks empty and fills the top level only.
        address, gateway = _text(settings, "IPAddress"), _literal(_text(settings, "Gateway"))
        found = [Attachment("bridge", "", address, gateway)]
    return tuple(sorted(found, key=lambda a: (a.network in DEFAULT_NETWORKS, a.network)))


def started_after(document: Document, other: Document) -> bool:
    """Whether `document`'s container was started later than `other`'s; False where not known."""
    moments = []
    for each in (document, other):
        try:
            moment = datetime.fromisoformat(_text(_section(each, "State"), "StartedAt"))
        except ValueError:
            return False
        moments.append(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    return moments[0] > moments[1]


# --- the ambassador's own place ----------------------------------------------------------------


def own_container_id(mountinfo: str, cgroup: str) -> str | None:
    """This process's container, from the texts of /proc/self/mountinfo and /proc/self/cgroup.

    The mounts come first: with cgroup v2 the cgroup file says only `0::/`. Started with `--network
    container:Y` the files that Docker mounts are Y's, and so is this ID, which is what is wanted:
    the networks to compare are those of Y.
    """
    mounts: dict[str, str] = {}
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        # A host sees its containers' directories too, but not mounted on its own /etc/hostname.
        if len(fields) > 4 and fields[4] in _MOUNTED_FILES:
            match = _MOUNT.search(fields[3])
            if match:
                mounts.setdefault(fields[4], match[1] or match[2])
    for path in _MOUNTED_FILES:
        if path in mounts:
            return mounts[path]
    for line in cgroup.splitlines():
        found = _CGROUP.findall(line.rpartition(":")[2])
        if found:
            return str(found[-1])
    return None


def vantage_of(document: Document | None, joined: Document | None = None) -> Vantage:
    """The ambassador's place, from its own container's document; None: it is in no container.

    `joined` is the container whose network it uses, if another's.
    """
    if document is None:
        return Vantage()
    owner = joined if joined is not None else document
    return Vantage(
        container_id=container_id(document),
        network_owner=container_id(owner),
        host=_is_host_mode(owner),
        attachments=attachments(owner),
    )


def drivers_of(networks: Iterable[Any]) -> dict[str, str]:
    """Network drivers by ID and by name, from the Engine's list of networks."""
    drivers: dict[str, str] = {}
    for network in networks:
        if isinstance(network, Mapping):
            drivers |= {_text(network, key): _text(network, "Driver") for key in ("Id", "Name")}
    drivers.pop("", None)
    return drivers


def needs_drivers(document: Document, vantage: Vantage, network: str | None) -> bool:
    """Whether to ask for the networks: from the host, an overlay or macvlan address is no use."""
    return vantage.host and not network and len(attachments(document)) > 1


# --- the state of a target ---------------------------------------------------------------------


def target_state(
    target: str,
    document: Document,
    vantage: Vantage,
    *,
    network: str | None = None,
    joined: Document | None = None,
) -> TargetState:
    """What `document` says of `target`, seen from `vantage`.

    `network` is what the user asked for with -network; `joined` is the document of the container
    named by `joined_reference`, None where that is gone. An empty `problem` with no address means:
    not running, or running and still without an address (`awaits_address`).
    """
    state = TargetState(
        target=target,
        exposed=exposed_listeners(document).listeners,
        container_id=container_id(document),
        started_at=_text(_section(document, "State"), "StartedAt"),
    )
    if vantage.container_id and vantage.container_id == state.container_id:
        return replace(
            state,
            problem="is the ambassador itself, or the container whose network it uses: name another",
        )
    if not is_running(document):
        return state
    address, problem = _address(document, vantage, network, joined)
    if address and not state.exposed:
        problem = "exposes no port: start it with --expose PORT, or put EXPOSE in its image"
    return replace(state, address=address or None, problem=problem)


def awaits_address(document: Document, state: TargetState) -> bool:
    """Running and on a network that will do, but Docker reports no address on it yet."""
    return is_running(document) and state.address is None and not state.problem


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
    document: Document, vantage: Vantage, network: str | None, joined: Document | None
) -> tuple[str, str]:
    """An address and a problem, either of which may be empty."""
    owner = document
    reference = joined_reference(document)
    if reference is not None:
        problem = _joined_problem(document, reference, vantage, joined)
        if problem or joined is None:
            return "", problem
        owner = joined
    if _is_host_mode(owner):
        return _host_address(vantage)
    places = attachments(owner)
    if not places:
        mode = _plain(_text(_section(owner, "HostConfig"), "NetworkMode")) or "unknown"
        return "", (
            f"is on no network (network mode {mode}), so nothing can reach it:"
            " docker network connect NETWORK CONTAINER"
        )
    if network:
        return _chosen_address(places, network, vantage)
    if vantage.host:
        return _address_from_host(places, vantage)
    shared = [a for a in places if any(a.same_network(own) for own in vantage.attachments)]
    if not shared:
        return "", (
            f"shares no network with the ambassador: it is on {_names(places)}, the ambassador on"
            f" {_names(vantage.attachments)}: docker network connect NETWORK CONTAINER for one of them"
        )
    return _first_address(shared), ""


def _joined_problem(
    document: Document, reference: str, vantage: Vantage, joined: Document | None
) -> str:
    if joined is None or not is_target(joined, reference):
        return (
            f"uses the network of container {_plain(reference)[:12]}, which is gone: re-create it"
        )
    name = _plain(container_name(joined))
    if vantage.network_owner and vantage.network_owner == container_id(joined):
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


def _host_address(vantage: Vantage) -> tuple[str, str]:
    if vantage.host:
        return "", "is on the host network, as the ambassador is: it listens there itself"
    for own in vantage.attachments:
        if own.gateway:
            return own.gateway, ""
    return "", (
        f"is on the host network, and none of the ambassador's own ({_names(vantage.attachments)})"
        " has a gateway to it: docker network connect bridge AMBASSADOR"
    )


def _chosen_address(
    places: tuple[Attachment, ...], network: str, vantage: Vantage
) -> tuple[str, str]:
    for place in places:
        if network in (place.network, place.network_id):
            here = vantage.host or any(place.same_network(own) for own in vantage.attachments)
            if here:
                return place.address, ""
            return place.address, (
                f"is on the network {_plain(network)} that -network names, but the ambassador is not:"
                f" docker network connect {_plain(network)} AMBASSADOR"
            )
    return "", (
        f"is not on the network {_plain(network)} that -network names, but on {_names(places)}:"
        f" docker network connect {_plain(network)} CONTAINER"
    )


def _address_from_host(places: tuple[Attachment, ...], vantage: Vantage) -> tuple[str, str]:
    def driver(place: Attachment) -> str:
        known = vantage.drivers.get(place.network_id) or vantage.drivers.get(place.network)
        return known or "bridge"  # not asked or not allowed to: what it most often is

    bridges = [place for place in places if driver(place) == "bridge"]
    if not bridges:
        return "", (
            f"is on no bridge network, only on {_names(places)}, which the host cannot reach:"
            " docker network connect bridge CONTAINER"
        )
    bridges.sort(key=lambda a: (a.network not in DEFAULT_NETWORKS, a.network))
    return _first_address(bridges), ""


def _first_address(places: Iterable[Attachment]) -> str:
    return next((place.address for place in places if place.address), "")


def _names(places: tuple[Attachment, ...]) -> str:
    if not places:
        return "none"
    shown = ", ".join(_plain(place.network) for place in places[:NAMES_SHOWN])
    rest = len(places) - NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
