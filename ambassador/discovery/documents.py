"""What one of the Engine's inspect documents says: pure reading, no I/O, no Docker client.

Invariants:

- A document is untrusted. Whatever is missing, null or of another type counts as not said; nothing
  here raises on any JSON object.
- Equal documents give equal answers, in one order.
- An address or a gateway is an IP literal or empty.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from ambassador.engine.api import Document
from ambassador.model import Listener
from ambassador.values import Protocol

DEFAULT_NETWORKS = frozenset({"bridge", "podman"})
"""The networks that a container is on when nobody chose one: Docker's, Podman's."""

PSEUDO_NETWORKS = frozenset({"host", "none"})
"""Docker lists these as networks; nobody has an address on them."""

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
class OwnNetworks:
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


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def section(document: Document | None, *path: str) -> Mapping[str, Any]:
    here: Any = document
    for key in path:
        here = here.get(key) if isinstance(here, Mapping) else None
    return here if isinstance(here, Mapping) else {}


def text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""


def _literal(address: str) -> str:
    """`address` if one can connect to it as an address, else empty."""
    try:
        return "" if ipaddress.ip_address(address).is_unspecified else address
    except ValueError:
        return ""


def container_id(document: Document) -> str:
    return text(document, "Id")


def container_name(document: Document) -> str:
    """Without the slash that Docker puts first and Podman, in places, does not."""
    return text(document, "Name").removeprefix("/")


def is_id_prefix(target: str) -> bool:
    return len(target) >= MIN_ID_PREFIX and _HEX.fullmatch(target) is not None


def is_target(document: Document, target: str) -> bool:
    """Whether the Engine's answer is the container that was meant.

    It answers to a name, an ID, and to *any* prefix of an ID: asked for `db` where no container has
    that name, it gives the one whose ID begins with db. Accepted is the exact name, the whole ID,
    or 12 hexadecimal digits and more of it.
    """
    ident, name = container_id(document), container_name(document)
    if name and target.removeprefix("/") == name:
        return True
    return bool(ident) and (target == ident or (is_id_prefix(target) and ident.startswith(target)))


def is_running(document: Document) -> bool:
    """Running in the sense of having a network now. A paused container has: the kernel holds."""
    state = section(document, "State")
    return state.get("Running") is True and state.get("Restarting") is not True


def joined_reference(document: Document) -> str | None:
    """X, where the container uses the network of a container X (`--network container:X`)."""
    mode = text(section(document, "HostConfig"), "NetworkMode")
    return mode.removeprefix("container:") if mode.startswith("container:") else None


def is_host_mode(document: Document) -> bool:
    return text(section(document, "HostConfig"), "NetworkMode") == "host"


def exposed_listeners(document: Document) -> Exposed:
    """`Config.ExposedPorts` together with `NetworkSettings.Ports`; ranges expanded."""
    listeners: set[Listener] = set()
    skipped: set[str] = set()
    ports = [
        section(document, "Config", "ExposedPorts"),
        section(document, "NetworkSettings", "Ports"),
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
    settings = section(document, "NetworkSettings")
    found = [
        Attachment(
            name,
            text(entry, "NetworkID"),
            _literal(text(entry, "IPAddress")) or _literal(text(entry, "GlobalIPv6Address")),
            _literal(text(entry, "Gateway")) or _literal(text(entry, "IPv6Gateway")),
        )
        for name, entry in section(settings, "Networks").items()
        if isinstance(entry, Mapping) and name not in PSEUDO_NETWORKS
    ]
    if not found and _literal(text(settings, "IPAddress")):
        # Podman before 3.2 leaves Networks empty and fills the top level only.
        address, gateway = text(settings, "IPAddress"), _literal(text(settings, "Gateway"))
        found = [Attachment("bridge", "", address, gateway)]
    return tuple(sorted(found, key=lambda a: (a.network in DEFAULT_NETWORKS, a.network)))


def microseconds(moment: str) -> int | None:
    """Docker's text for a moment as microseconds since the epoch, or None if it is none."""
    try:
        read = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return (read.replace(tzinfo=read.tzinfo or UTC) - _EPOCH) // timedelta(microseconds=1)


def started_after(document: Document, other: Document) -> bool:
    """Whether `document`'s container was started later than `other`'s; False where not known."""
    ours, theirs = (
        microseconds(text(section(each, "State"), "StartedAt")) for each in (document, other)
    )
    return ours is not None and theirs is not None and ours > theirs


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


def own_networks_of(document: Document | None, joined: Document | None = None) -> OwnNetworks:
    """The ambassador's place, from its own container's document; None: it is in no container.

    `joined` is the container whose network it uses, if another's.
    """
    if document is None:
        return OwnNetworks()
    owner = joined if joined is not None else document
    return OwnNetworks(
        container_id=container_id(document),
        network_owner=container_id(owner),
        host=is_host_mode(owner),
        attachments=attachments(owner),
    )


def drivers_of(networks: Iterable[Any]) -> dict[str, str]:
    """Network drivers by ID and by name, from the Engine's list of networks."""
    drivers: dict[str, str] = {}
    for network in networks:
        if isinstance(network, Mapping):
            drivers |= {text(network, key): text(network, "Driver") for key in ("Id", "Name")}
    drivers.pop("", None)
    return drivers


def needs_drivers(document: Document, own_networks: OwnNetworks, network: str | None) -> bool:
    """Whether to ask for the networks: from the host, an overlay or macvlan address is no use."""
    return own_networks.host and not network and len(attachments(document)) > 1
