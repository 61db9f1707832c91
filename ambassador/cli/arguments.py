"""The program's command line and environment, as one checked, immutable value.

Two forms:

    grand-ambassador [flags]                                    follow containers by name
    grand-ambassador relay [flags] 6379/tcp=10.0.0.5:6379 ...   relay to fixed addresses

Invariants:

- Nothing is read but the arguments and the environment mapping passed in (an interface's number
  and, for a relative -sock, the working directory apart); only `check_tls_files` touches files.
- An `Options` that exists is valid: every number is in range, every address an IP literal, every
  listener there once, the Engine's address a full URL. Nothing behind this module checks again.
- Every error is one line that says what to do; `exit_code` is what the program ends with.
- A flag beats the environment, and the environment beats the default.
"""

from __future__ import annotations

import enum
import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ambassador.cli.goflags import (
    Flag,
    FlagError,
    HelpRequested,
    Parsed,
    escape,
    parse,
    parse_bool,
    parse_duration,
    parse_text,
    quote,
    usage,
)
from ambassador.model import Backend, Listener, Route
from ambassador.values import Protocol
from ambassador.options import Sandbox

DEFAULT_SOCKET = "/var/run/docker.sock"
MAX_DURATION_MS = 1000 * 3_600_000
"""1000 h. Control records carry milliseconds in 32 bits, which end at 1193 h."""

MAX_CONNECTIONS = 10_000_000
"""For each port. More than a worker can have descriptors for."""

MAX_WORKERS = 64
"""For each listener. More than cores is of no use."""

LOG_LEVELS = {
    "debug": "debug",
    "info": "info",
    "warn": "warning",
    "warning": "warning",
    "error": "error",
    "fatal": "fatal",
    "panic": "panic",
}
"""What a user may write for a level, as logrus reads it, and its one name."""


class OptionsError(Exception):
    """The program cannot start; the text is the line to print."""

    exit_code: ClassVar[int] = 1


class UsageError(OptionsError):
    """The command line is wrong. The line is followed by `usage`, as Go does."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__(message)
        self.usage = usage


class MissingName(OptionsError):
    """No target, in the Go original's words."""

    def __init__(self) -> None:
        super().__init__("Missing required arguments *name*")


class ConfigError(OptionsError):
    """The command line is right, but what it names is not."""


class Command(enum.StrEnum):
    FOLLOW = "follow"
    RELAY = "relay"
    VERSION = "version"
    HELP = "help"


@dataclass(frozen=True, slots=True)
class Tls:
    """How to reach an Engine over TLS; paths of PEM files, empty where not to be used.

    `client_required`: the user named the client's certificate or key, so they must exist.
    """

    verify: bool
    ca: str
    cert: str
    key: str
    client_required: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for.

    `docker_host` is `unix:///path` or `tcp://host:port[/path]` (empty for a relay); `tls` says how
    the latter is encrypted, if at all. `max_connections` 0 is as many as descriptors allow; `idle_ms` and
    `half_close_ms` 0 are never. `warnings` are lines for the log, once there is one. `usage`
    is this form's help.
    """

    command: Command
    targets: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    docker_host: str = ""
    tls: Tls | None = None
    network: str = ""
    hold_ms: int = 10_000
    drain_ms: int = 300
    workers: int = 1
    max_connections: int = 0
    idle_ms: int = 0
    half_close_ms: int = 0
    session_idle_ms: int = 90_000
    sandbox: Sandbox = Sandbox.AUTO
    log_level: str = "info"
    wait: bool = True
    warnings: tuple[str, ...] = ()
    usage: str = ""


# --- the tables of flags -----------------------------------------------------------------------


def _parse_milliseconds(text: str) -> int:
    nanoseconds = parse_duration(text)
    if nanoseconds < 0:
        raise ValueError("it is negative; write 0 or more")
    milliseconds = -(-nanoseconds // 1_000_000)  # rounded up: 1us must not become 0, "never hold"
    if milliseconds > MAX_DURATION_MS:
        raise ValueError("it is too long; write 1000h or less")
    return milliseconds


def _parse_positive_milliseconds(text: str) -> int:
    milliseconds = _parse_milliseconds(text)
    if milliseconds == 0:
        raise ValueError("write more than 0")
    return milliseconds


def _parse_connections(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_CONNECTIONS):
        raise ValueError(f"write a number from 1 to {MAX_CONNECTIONS}")
    return int(text)


def _parse_workers(text: str) -> int:
    if text == "auto":
        return min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:5]) <= MAX_WORKERS):
        raise ValueError(f"write a number from 1 to {MAX_WORKERS}, or auto")
    return int(text)


def _parse_sandbox(text: str) -> Sandbox:
    if text not in tuple(Sandbox):
        raise ValueError(f"write one of {', '.join(Sandbox)}")
    return Sandbox(text)


def _parse_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"write one of {', '.join(LOG_LEVELS)}")
    return LOG_LEVELS[text.lower()]


NAME = Flag("name", parse_text, "", "NAME", "name or ID of a container to follow; repeatable")
SOCK = Flag(
    "sock",
    parse_text,
    DEFAULT_SOCKET,
    "ADDRESS",
    "path or URL of the Docker Engine",
    DEFAULT_SOCKET,
)
WAIT = Flag("wait", parse_bool, True, "", "deprecated: an absent container is always waited for")
TLS = Flag("tls", parse_bool, False, "", "use TLS for a tcp:// Engine")
TLSVERIFY = Flag("tlsverify", parse_bool, False, "", "use TLS and verify the Engine")
TLSCACERT = Flag("tlscacert", parse_text, "", "FILE", "authority that vouches for it", "ca.pem")
TLSCERT = Flag("tlscert", parse_text, "", "FILE", "this client's certificate", "cert.pem")
TLSKEY = Flag("tlskey", parse_text, "", "FILE", "this client's key", "key.pem")
NETWORK = Flag("network", parse_text, "", "NAME", "network to reach the container over")
HOLD = Flag(
    "hold",
    _parse_milliseconds,
    10_000,
    "DURATION",
    "how long new connections wait for a backend",
    "10s",
)
DRAIN = Flag(
    "drain",
    _parse_milliseconds,
    300,
    "DURATION",
    "how long SIGTERM lets open connections finish",
    "300ms",
)
WORKERS = Flag(
    "workers", _parse_workers, 1, "N", "processes for each port, or auto: one to a core", "1"
)
MAX_CONNECTIONS_FLAG = Flag(
    "max-connections",
    _parse_connections,
    0,
    "N",
    "TCP connections or UDP sessions per port",
    "by ulimit -n",
)
IDLE_TIMEOUT = Flag(
    "idle-timeout",
    _parse_milliseconds,
    0,
    "DURATION",
    "reset TCP connections after such a silence",
    "0, never",
)
HALF_CLOSE_TIMEOUT = Flag(
    "half-close-timeout",
    _parse_milliseconds,
    0,
    "DURATION",
    "reset TCP connections half-closed for so long",
    "0, never",
)
UDP_TIMEOUT = Flag(
    "udp-timeout",
    _parse_positive_milliseconds,
    90_000,
    "DURATION",
    "forget a UDP client after such a silence",
    "90s",
)
SANDBOX = Flag(
    "sandbox",
    _parse_sandbox,
    Sandbox.AUTO,
    "MODE",
    "what workers give up: auto, required or off",
    "auto",
)
LOG_LEVEL = Flag(
    "log-level", _parse_level, "info", "LEVEL", "debug, info, warn, error, fatal or panic", "info"
)
VERSION = Flag("version", parse_bool, False, "", "print the version")
# Undefined in the table that is parsed, so that goflags treats them as Go does; shown in the usage.
_HELP: Flag[bool] = Flag("help", parse_bool, False, "", "print this text")

RELAY_FLAGS: tuple[Flag[Any], ...] = (
    HOLD,
    DRAIN,
    WORKERS,
    MAX_CONNECTIONS_FLAG,
    IDLE_TIMEOUT,
    HALF_CLOSE_TIMEOUT,
    UDP_TIMEOUT,
    SANDBOX,
    LOG_LEVEL,
    VERSION,
)
FOLLOW_FLAGS: tuple[Flag[Any], ...] = (
    *RELAY_FLAGS,
    NAME,
    NETWORK,
    SOCK,
    WAIT,
    TLS,
    TLSVERIFY,
    TLSCERT,
    TLSKEY,
    TLSCACERT,
)


def follow_usage() -> str:
    return (
        "Usage:\n"
        "  grand-ambassador [flags] -name NAME [-name NAME ...]\n"
        "  grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT ...\n"
        "\n"
        "Relays every port that the named containers expose and follows them through restarts.\n"
        "\n"
        "Flags:\n"
        f"{usage((*FOLLOW_FLAGS, _HELP))}"
        "\n"
        "Environment, where no flag says otherwise:\n"
        "  DOCKER_HOST        as -sock\n"
        "  DOCKER_TLS_VERIFY  as -tlsverify, where it is not empty\n"
        "  DOCKER_CERT_PATH   directory of ca.pem, cert.pem and key.pem; else $HOME/.docker\n"
    )


def relay_usage() -> str:
    return (
        "Usage:\n"
        "  grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT ...\n"
        "\n"
        "Relays each port to a fixed address, without Docker:\n"
        "  grand-ambassador relay 6379/tcp=10.0.0.5:6379 53/udp=[fd00::5]:53\n"
        "\n"
        "Flags:\n"
        f"{usage((*RELAY_FLAGS, _HELP))}"
    )


# --- the command line --------------------------------------------------------------------------


def parse_options(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Read `arguments` (without the program's name). Raises UsageError or MissingName."""
    relay = list(arguments[:1]) == ["relay"]
    text = relay_usage() if relay else follow_usage()
    try:
        if relay:
            return replace(_relay(arguments[1:]), usage=text)
        return replace(_follow(arguments, environment), usage=text)
    except HelpRequested:
        return Options(Command.HELP, usage=text)
    except (FlagError, UsageError) as error:
        raise UsageError(str(error), text) from None


def _follow(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    parsed = parse(FOLLOW_FLAGS, arguments)
    if parsed.get(VERSION):
        return Options(Command.VERSION)
    if parsed.rest:
        raise UsageError(_unexpected(arguments, parsed.rest))
    targets = tuple(dict.fromkeys(parsed.all(NAME)))
    if not targets:
        raise MissingName
    text, source = _engine(parsed, environment)
    scheme = text.partition("://")[0]
    tls = _tls(parsed, environment, scheme)
    try:
        docker_host = _parse_engine(text, tls is not None)
    except (ValueError, OSError) as error:
        raise UsageError(f"invalid value {quote(text)} for {source}: {error}") from None
    warnings = []
    if not parsed.get(WAIT):
        warnings.append("-wait flag is deprecated and will not be used")
    if scheme == "http" and tls is not None:
        tls = None
        warnings.append("TLS is not used with http://: write -sock tcp:// or https:// to use it")
    return Options(
        Command.FOLLOW,
        targets=targets,
        docker_host=docker_host,
        tls=tls if docker_host.startswith("tcp:") else None,
        network=parsed.get(NETWORK),
        **_limits(parsed),
        log_level=parsed.get(LOG_LEVEL),
        wait=parsed.get(WAIT),
        warnings=tuple(warnings),
    )


def _limits(parsed: Parsed) -> dict[str, Any]:
    """The fields that both forms have in common."""
    return {
        "hold_ms": parsed.get(HOLD),
        "drain_ms": parsed.get(DRAIN),
        "workers": parsed.get(WORKERS),
        "max_connections": parsed.get(MAX_CONNECTIONS_FLAG),
        "idle_ms": parsed.get(IDLE_TIMEOUT),
        "half_close_ms": parsed.get(HALF_CLOSE_TIMEOUT),
        "session_idle_ms": parsed.get(UDP_TIMEOUT),
        "sandbox": parsed.get(SANDBOX),
    }


def _unexpected(arguments: Sequence[str], rest: Sequence[str]) -> str:
    """Why an argument that is no flag stands where only flags may."""
    line = f"unexpected argument {quote(rest[0])}"
    before = arguments[-len(rest) - 1] if len(arguments) > len(rest) else ""
    if rest[0].lower() in ("true", "false") and before.startswith("-") and before.strip("-"):
        return f"{line}: write {escape(before)}={rest[0]}"
    if rest[0] == "relay":
        return f"{line}: write it first, grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT"
    return f"{line}: write -name {quote(rest[0])} to follow a container of that name"


def _relay(arguments: Sequence[str]) -> Options:
    parsed = parse(RELAY_FLAGS, arguments)
    if parsed.get(VERSION):
        return Options(Command.VERSION)
    if not parsed.rest:
        raise UsageError("relay needs at least one route: write 6379/tcp=10.0.0.5:6379")
    return Options(
        Command.RELAY,
        routes=parse_routes(parsed.rest),
        **_limits(parsed),
        log_level=parsed.get(LOG_LEVEL),
    )


# --- the Engine --------------------------------------------------------------------------------

_SCHEMES = {"tcp": 2375, "http": 2375, "https": 2376}
"""What is reached over TCP, and the port where none is written; 2376 under TLS."""

_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+")


def _engine(parsed: Parsed, environment: Mapping[str, str]) -> tuple[str, str]:
    """The Engine's address as written, and where it was."""
    host = environment.get("DOCKER_HOST")
    if parsed.given(SOCK) or not host:
        return parsed.get(SOCK), f"flag -{SOCK.name}"
    # As in Docker's own command line, an address without a scheme is tcp; but a path is a path.
    if "://" not in host and not host.startswith(("/", ".")):
        host = f"tcp://{host}"
    return host, "DOCKER_HOST"


def _parse_engine(text: str, tls: bool) -> str:
    """The full address. Raises ValueError, or OSError where there is no working directory."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        if re.fullmatch(r"[^/]*:[0-9]+", text):
            raise ValueError(f"an address needs a scheme; write tcp://{escape(text)}")
        scheme, rest = "unix", text
    if scheme == "unix":
        return f"unix://{Path(rest or DEFAULT_SOCKET).absolute()}"
    if scheme not in _SCHEMES:
        raise ValueError(
            f"{quote(scheme)} is not supported; write a path, unix://, tcp://, http:// or https://"
        )
    address, _, path_text = rest.partition("/")
    if re.search(r"[@?#\s]", rest) or not rest.isprintable():
        raise ValueError(f"only a host, a port and a path may follow; write {scheme}://host:port")
    host, port_text = _split_address(address)
    if not host:
        host = "localhost"
    elif ":" in host:
        host = f"[{_parse_ip(host)}]"
    elif not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{quote(host)} is no host name; write {scheme}://host:port")
    default = 2376 if tls and scheme == "tcp" else _SCHEMES[scheme]
    port = default if port_text is None else _parse_port(port_text)
    return f"tcp://{host}:{port}" + (f"/{path_text}" if path_text.strip("/") else "")


def _tls(parsed: Parsed, environment: Mapping[str, str], scheme: str) -> Tls | None:
    """-tlsverify implies -tls; https:// implies both, unless -tls alone says not to verify."""
    wanted = bool(environment.get("DOCKER_TLS_VERIFY"))
    if parsed.given(TLSVERIFY):
        verify = parsed.get(TLSVERIFY)
    elif scheme == "https":
        verify = wanted or not parsed.get(TLS)
    else:
        verify = wanted and (parsed.get(TLS) or not parsed.given(TLS))
    if not (verify or parsed.get(TLS) or scheme == "https"):
        return None
    directory = Path(
        environment.get("DOCKER_CERT_PATH") or Path(environment.get("HOME") or "/") / ".docker"
    )
    return Tls(
        verify,
        ca=parsed.get(TLSCACERT) or str(directory / "ca.pem"),
        cert=parsed.get(TLSCERT) or str(directory / "cert.pem"),
        key=parsed.get(TLSKEY) or str(directory / "key.pem"),
        client_required=parsed.given(TLSCERT) or parsed.given(TLSKEY),
    )


def check_tls_files(options: Options) -> Options:
    """`options` with only those TLS files that are to be used, each readable. Raises ConfigError.

    As in the original, the authority's is needed only to verify, and a client that has neither a
    certificate nor a key goes without; one of the two alone is a mistake.
    """
    tls = options.tls
    if tls is None:
        return options
    if tls.verify:
        _check_file(tls.ca, TLSCACERT)
    else:
        tls = replace(tls, ca="")
    if not tls.client_required and not Path(tls.cert).exists() and not Path(tls.key).exists():
        tls = replace(tls, cert="", key="")
    else:
        _check_file(tls.cert, TLSCERT)
        _check_file(tls.key, TLSKEY)
    return replace(options, tls=tls)


def _check_file(path: str, flag: Flag[str]) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(
            f"Error setting up TLS: cannot read {quote(path)} ({error.strerror}): "
            f"mount the file or name another with -{flag.name}"
        ) from None


# --- routes ------------------------------------------------------------------------------------


def parse_routes(specs: Sequence[str]) -> tuple[Route, ...]:
    """`6379/tcp=10.0.0.5:6379` and the like as routes, in order. Raises UsageError."""
    routes: dict[Listener, Route] = {}
    for spec in specs:
        try:
            route = _parse_route(spec)
            if route.listener in routes:
                raise ValueError(f"{route.listener} is already given; write each listener once")
        except ValueError as error:
            raise UsageError(f"invalid route {quote(spec)}: {error}") from None
        routes[route.listener] = route
    for route in routes.values():
        backend = route.backends[0]
        # Listeners are on all addresses, so this would be a relay that calls itself for ever.
        if (
            ipaddress.ip_address(backend.address).is_loopback
            and Listener(backend.port, route.listener.protocol) in routes
        ):
            raise UsageError(
                f"invalid route {quote(f'{route.listener}={backend}')}: it leads back to this "
                "program's own listener; write another address or another port"
            )
    return tuple(routes.values())


def _parse_route(spec: str) -> Route:
    if spec.startswith("-"):
        raise ValueError("flags go before the routes; move it to the front")
    left, equals, right = spec.partition("=")
    if not equals or not left or not right:
        raise ValueError("write PORT/PROTOCOL=ADDRESS:PORT, such as 6379/tcp=10.0.0.5:6379")
    port_text, slash, protocol = left.partition("/")
    port = _parse_port(port_text)
    if not slash or not protocol:
        raise ValueError(f"the protocol is missing; write {port}/tcp or {port}/udp")
    if protocol not in tuple(Protocol):
        raise ValueError(f"protocol {quote(protocol)} is not supported; write tcp or udp")
    backend = _parse_backend(right)
    return Route(Listener(port, Protocol(protocol)), str(backend), (backend,))


def _parse_backend(text: str) -> Backend:
    host, port_text = _split_address(text)
    if not host:
        raise ValueError("the address is missing; write ADDRESS:PORT, such as 10.0.0.5:6379")
    address = _parse_ip(host)
    if port_text is None:
        shown = f"[{address}]" if ":" in address else address
        raise ValueError(f"the port after the address is missing; write {shown}:6379")
    ip = ipaddress.ip_address(address)
    if ip.is_unspecified or ip.is_multicast or address == "255.255.255.255":
        raise ValueError(f"{address} is not the address of one machine; write one such as 10.0.0.5")
    if ip.version == 6 and ip.is_link_local and "%" not in address:
        raise ValueError(f"{address} needs its interface; write [{address}%eth0]")
    return Backend(address, _parse_port(port_text))


def _split_address(text: str) -> tuple[str, str | None]:
    """`host:port`, `[v6]:port` or either without a port, as (host, port or None); not checked."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or ":" not in host:
            raise ValueError("brackets are for an IPv6 address only; write [fd00::5]:53")
        return host, rest[1:] if rest else None
    if text.count(":") > 1:
        raise ValueError("an IPv6 address goes in brackets; write [fd00::5]:53")
    if "[" in text or "]" in text:
        raise ValueError("brackets go around the whole IPv6 address; write [fd00::5]:53")
    host, colon, port = text.partition(":")
    return host, port if colon else None


def _parse_port(text: str) -> int:
    if not text:
        raise ValueError("a port is missing; write a number from 1 to 65535")
    # int() also takes digits of other scripts, signs, spaces and underscores.
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"port {quote(text)} is not a number; write 1 to 65535 in digits 0-9")
    digits = text.lstrip("0") or "0"
    if len(digits) > 5 or not 1 <= int(digits) <= 65535:
        raise ValueError(f"port {text[:20]} is out of range; write 1 to 65535")
    return int(digits)


def _parse_ip(text: str) -> str:
    """An IP literal in its shortest form; a zone becomes the interface's number."""
    address, percent, zone = text.partition("%")
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        raise ValueError(_not_an_ip(text)) from None
    if ip.version == 6 and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if not percent:
        return str(ip)
    if ip.version == 4:
        raise ValueError(f"an IPv4 address has no interface; write {ip}")
    return f"{ip}%{_parse_zone(zone)}"


def _not_an_ip(text: str) -> str:
    if re.fullmatch(r"[0-9.]+", text):
        return f"{text[:40]} is not a valid IPv4 address; write four numbers from 0 to 255"
    if ":" in text:
        return f"{quote(text[:60])} is not a valid IPv6 address; write one such as fd00::5"
    return (
        f"{quote(text[:60])} is not an IP address; write an IP literal such as 10.0.0.5 "
        "(-name, without relay, follows a container by its name)"
    )


def _parse_zone(zone: str) -> int:
    if zone.isascii() and zone.isdigit():
        digits = zone.lstrip("0") or "0"
        if len(digits) > 10 or not 1 <= int(digits) < 1 << 32:
            raise ValueError(f"interface number {zone[:20]} is out of range; write its name")
        return int(digits)
    try:
        return socket.if_nametoindex(zone)
    except (OSError, ValueError):
        raise ValueError(
            f"interface {quote(zone[:60])} does not exist here; `ip link` lists the ones that do"
        ) from None
