"""Reads the Engine's inspect documents. Pure functions: no I/O, no Docker client.

Invariants:

- A document is untrusted. A value that is missing, null or of another type counts as absent.
- Nothing here raises on any JSON object.
- Equal documents give equal answers, in one order.
- An address or a gateway is an IP literal that another machine can have, or empty.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

from ambassador.engine.api import Document
from ambassador.model import ListenAddress
from ambassador.values import Protocol

DEFAULT_NETWORKS = frozenset({"bridge", "podman"})
"""The networks of a container whose user chose none: Docker's, Podman's."""

PSEUDO_NETWORKS = frozenset({"host", "none", "ingress", "docker_gwbridge"})
"""Never chosen: no container has an address on the first two, and Swarm keeps the others to itself."""

MAX_OWNERS = 8
"""Links of a chain of `--network container:X` that are followed."""

MIN_ID_PREFIX = 12
"""The length of Docker's short ID. A shorter prefix could be another container's name."""

_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/([A-Za-z]+))?", re.ASCII)
_HEX = re.compile(r"[0-9a-f]+")
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container's place on one network. A text is empty if Docker does not say it (yet)."""

    network: str
    network_id: str = ""
    address: str = ""
    gateway: str = ""

    def is_named(self, network: str) -> bool:
        """Whether -network can mean this one: by name, by ID, or by 12 or more digits of the ID."""
        if network in (self.network, self.network_id):
            return True
        return is_id_prefix(network) and self.network_id.startswith(network)

    def same_network(self, other: Attachment) -> bool:
        """Compares IDs, since names are not unique; compares names if the Engine reports no ID."""
        if self.network_id and other.network_id:
            return self.network_id == other.network_id
        return self.network == other.network


class Network(NamedTuple):
    """What never changes about a network: its driver, the gateways that are the driver's own, its subnets.

    Docker lists no gateway if the user gave a subnet only. `router`: another machine can be the gateway.
    """

    driver: str
    gateways: frozenset[str] = frozenset()
    router: bool = False
    subnets: frozenset[str] = frozenset()


class ExposedPorts(NamedTuple):
    """The ports that a container exposes: wanted listeners with the target port of each.

    `skipped` has the ports whose protocol is not relayed, as Docker writes them.
    """

    ports: Mapping[ListenAddress, int]
    skipped: tuple[str, ...]


def section(document: Document | None, *path: str) -> Mapping[str, Any]:
    """The object at `path`; empty if there is none."""
    here: Any = document
    for key in path:
        here = here.get(key) if isinstance(here, Mapping) else None
    return here if isinstance(here, Mapping) else {}


def text(values: Mapping[str, Any], key: str) -> str:
    """The text at `key`; empty if there is none."""
    value = values.get(key)
    return value if isinstance(value, str) else ""


def _literal(address: str) -> str:
    """`address` in its shortest form if a container can be dialled there, else empty.

    No container has a loopback, multicast, broadcast or reserved address, or one that needs a zone.
    """
    try:
        read = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(read, ipaddress.IPv6Address):
        if read.scope_id is not None or read.is_link_local:
            return ""
        plain = read.ipv4_mapped or read
    else:
        plain = read
    impossible = plain.is_unspecified or plain.is_loopback or plain.is_multicast
    if isinstance(plain, ipaddress.IPv4Address):
        impossible |= (
            plain.is_reserved or plain in _THIS_NETWORK
        )  # the broadcast address is reserved
    return "" if impossible else str(plain)


def container_id(document: Document) -> str:
    return text(document, "Id")


def container_name(document: Document) -> str:
    """The name without its leading slash, which Docker writes and Podman sometimes omits."""
    return text(document, "Name").removeprefix("/")


def started_at(document: Document) -> str:
    """The start of the container's last run, as Docker writes it."""
    return text(section(document, "State"), "StartedAt")


def is_id_prefix(target: str) -> bool:
    """Whether `target` can be a container's ID or its beginning."""
    return len(target) >= MIN_ID_PREFIX and _HEX.fullmatch(target) is not None


def is_target(document: Document, target: str) -> bool:
    """Whether the Engine answered with the container that `target` names.

    The Engine takes a name, an ID, and any prefix of an ID: without a container named `db`, it returns
    the one whose ID begins with db. This function accepts the exact name, the whole ID, or at least 12
    hexadecimal digits of it.
    """
    ident, name = container_id(document), container_name(document)
    if name and target.removeprefix("/") == name:
        return True
    return bool(ident) and (target == ident or (is_id_prefix(target) and ident.startswith(target)))


def is_running(document: Document) -> bool:
    """Whether the container has a network now. A paused container has one: its kernel still answers."""
    state = section(document, "State")
    return state.get("Running") is True and state.get("Restarting") is not True


def network_owner_reference(document: Document) -> str | None:
    """X if the container uses the network of container X (`--network container:X`), else None."""
    mode = text(section(document, "HostConfig"), "NetworkMode")
    return mode.removeprefix("container:") if mode.startswith("container:") else None


def is_host_mode(document: Document) -> bool:
    return text(section(document, "HostConfig"), "NetworkMode") == "host"


def exposed_ports(document: Document) -> ExposedPorts:
    """`Config.ExposedPorts` together with `NetworkSettings.Ports`; each range becomes single ports."""
    ports: dict[ListenAddress, int] = {}
    skipped: set[str] = set()
    sections = (
        section(document, "Config", "ExposedPorts"),
        section(document, "NetworkSettings", "Ports"),
    )
    for key in (key for each in sections for key in each):
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
            ports |= {ListenAddress(protocol, port): port for port in range(first, last + 1)}
    return ExposedPorts(MappingProxyType(ports), tuple(sorted(skipped)))


def attachments(document: Document) -> tuple[Attachment, ...]:
    """The networks of a container, best first: the user's own by name, then the default one.

    An IPv4 address goes before an IPv6 address.
    """
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
    """Microseconds since the epoch from Docker's text for a moment; None if it is not one."""
    try:
        read = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return (read.replace(tzinfo=read.tzinfo or UTC) - _EPOCH) // timedelta(microseconds=1)


def started_after(document: Document, other: Document) -> bool:
    """Whether `document`'s container started later than `other`'s; False if that is not known."""
    ours, theirs = microseconds(started_at(document)), microseconds(started_at(other))
    return ours is not None and theirs is not None and ours > theirs


def never_ended(document: Document) -> bool:
    """Whether the container's first run still goes on. False if that is not known."""
    ended = microseconds(text(section(document, "State"), "FinishedAt"))
    return ended is not None and ended < 0  # year 1


def owners_of(
    document: Document, inspect: Callable[[str], Document | None]
) -> tuple[Document | None, ...]:
    """The containers whose network the container uses: X of `container:X`, X's own X, and so on.

    Ends with the one that has a network of its own, with None if `inspect` finds none, or after MAX_OWNERS.
    A circle also ends at that bound.
    """
    owners: list[Document | None] = []
    here: Document | None = document
    while here is not None and len(owners) < MAX_OWNERS:
        reference = network_owner_reference(here)
        if reference is None:
            break
        here = inspect(reference)
        owners.append(here)
    return tuple(owners)


def networks_of(listed: Iterable[Any]) -> dict[str, Network]:
    """Each network in the Engine's list, by ID and by name."""
    networks: dict[str, Network] = {}
    for each in listed:
        if isinstance(each, Mapping):
            network = _network_of(each)
            networks |= {text(each, key): network for key in ("Id", "Name")}
    networks.pop("", None)
    return networks


def _network_of(listed: Mapping[str, Any]) -> Network:
    driver = text(listed, "Driver")
    if text(section(listed, "Options"), "com.docker.network.bridge.inhibit_ipv4") == "true":
        return Network(driver, router=True)
    value = section(listed, "IPAM").get("Config")
    configs = (
        [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []
    )
    gateways = (_literal(text(each, "Gateway").partition("/")[0]) for each in configs)
    # --aux-address DefaultGatewayIPv4=ADDRESS, or the daemon's --default-gateway.
    names = (name for each in configs for name in section(each, "AuxiliaryAddresses"))
    router = any(name.startswith("DefaultGatewayIPv") for name in names)
    subnets = (_subnet(text(each, "Subnet")) for each in configs)
    return Network(
        driver, frozenset(filter(None, gateways)), router, frozenset(filter(None, subnets))
    )


def _subnet(value: str) -> str:
    """The IP network in its shortest form; "" for what is none."""
    try:
        return str(ipaddress.ip_network(value, strict=False)) if value else ""
    except ValueError:
        return ""


def is_rootless(info: Document) -> bool:
    """Whether GET /info says that the Engine's networks are not those of the host."""
    options = info.get("SecurityOptions")
    listed = options if isinstance(options, list) else []
    return any(isinstance(each, str) and "name=rootless" in each.split(",") for each in listed)


def is_podman(info: Document) -> bool:
    """Whether GET /info is Podman's, whose `--network host` is the real host's also if rootless."""
    return "BuildahVersion" in info
