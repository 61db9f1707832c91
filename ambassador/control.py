"""Control records: what the parent tells a worker over its control pipe. No I/O.

Packing is here; taking apart, which is what a worker does, is compiled (_wire.pyx).

A record is a 16-byte header and a payload, little-endian:

    offset  size  field
    0       1     version      VERSION; a worker rejects any other
    1       1     type         RecordType
    2       2     reserved     zero
    4       4     length       of the payload, bytes, at most MAX_PAYLOAD
    8       8     generation   of the listener's backends; 0 in records that do not carry any

Invariants:

- The stream is self-delimiting: a reader needs no state but the bytes it has not consumed yet.
- Anything that does not parse raises `BadRecord`; a reader never guesses where the next one begins.
- The newest generation wins: a record with a lower one than was applied is ignored by the worker.
- Backends travel as a *list* from the first day: none means hold, one is usual, more are replicas.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import TYPE_CHECKING, Any, NamedTuple

from ambassador import _control
from ambassador.model import Listener
from ambassador.values import Protocol
from ambassador.options import Sandbox

VERSION = _control.VERSION
MAX_PAYLOAD = _control.MAX_PAYLOAD
MAX_BACKENDS = _control.MAX_BACKENDS
MAX_SLOTS = _control.MAX_SLOTS

_HEADER = struct.Struct("<BBHIQ")
_START = struct.Struct("<HBBIIIIIIIIIHH")
_BACKEND = struct.Struct("<BBHIQ16s")
_REPOINT = struct.Struct("<HH")
_DRAIN = struct.Struct("<I")


if TYPE_CHECKING:
    from ambassador._control import StartNumbers


class BadRecord(ValueError):
    """The bytes are no control record of this version."""


class RecordType(enum.IntEnum):
    START = _control.START
    REPOINT = _control.REPOINT
    DRAIN = _control.DRAIN


class Start(NamedTuple):
    """The first record a worker gets: which listener it serves, and its limits.

    Times are milliseconds. `pipe_bytes` 0 forces copying; `gso` False forces one send per datagram.
    `max_connections`, `idle_ms` and `half_close_ms` are of TCP; 0 is no limit. `max_connections` is for all
    `slots` of the listener together; the worker has `slot`, and that page of the counters.
    """

    listener: Listener
    hold_ms: int = 10_000
    connect_ms: int = 5_000
    session_idle_ms: int = 90_000
    max_sessions: int = 16_384
    max_held: int = 4_096
    pipe_bytes: int = 1 << 20
    gso: bool = True
    sandbox: Sandbox = Sandbox.AUTO
    max_connections: int = 0
    idle_ms: int = 0
    half_close_ms: int = 0
    slot: int = 0
    slots: int = 1


class Destination(NamedTuple):
    """A backend as a worker sees it.

    `identity` is the supervisor's number for this run of this container at this address: a
    connection whose backend's identity is not in the newest list is reset. `pack` raises ValueError
    where `address` is not an IP literal or the port is out of range.
    """

    address: str
    port: int
    identity: int


class Repoint(NamedTuple):
    """The complete list of backends from now on, and the worker's process title (titles.title_of)."""

    generation: int
    backends: tuple[Destination, ...] = ()
    title: str = ""


class Drain(NamedTuple):
    """Take no new work, finish what is open, exit; reset what is left after `deadline_ms`."""

    deadline_ms: int


Record = Start | Repoint | Drain


def pack(record: Record) -> bytes:
    """One record as bytes. Raises ValueError where a field does not fit its place."""
    try:
        match record:
            case Start():
                kind, generation, payload = RecordType.START, 0, _pack_start(record)
            case Repoint():
                kind, generation, payload = (
                    RecordType.REPOINT,
                    record.generation,
                    _pack_repoint(record),
                )
            case Drain():
                kind, generation, payload = RecordType.DRAIN, 0, _DRAIN.pack(record.deadline_ms)
        header = _HEADER.pack(VERSION, kind, 0, len(payload), generation)
    except struct.error as error:
        raise ValueError(f"{record} does not fit a control record: {error}") from error
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a control record of {len(payload)} bytes is over {MAX_PAYLOAD}")
    return header + payload


class Unpacker:
    """Splits a byte stream into records; holds the bytes of an unfinished one.

    For tests and tools: a worker calls `_control.take`, as this does, and spares itself the objects.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Record]:
        """Yield each record that `data` completes. Raises BadRecord; then the stream is unusable."""
        self._bytes += data
        try:
            while (taken := _control.take(self._bytes)) is not None:
                yield _record(*taken)
        except ValueError as error:
            raise BadRecord(f"control record: {error}") from error

    @property
    def pending(self) -> int:
        """Bytes of a record that is not complete yet."""
        return len(self._bytes)


def _record(kind: int, generation: int, content: Any) -> Record:
    if kind == RecordType.START:
        return _start(content)
    if kind == RecordType.DRAIN:
        return Drain(content)
    backends, title = content
    return Repoint(generation, tuple(map(_destination, backends)), title)


def _start(numbers: StartNumbers) -> Start:
    port, number, flags, hold, connect, idle, sessions, held, pipe, *tcp_and_seat = numbers
    protocol = next(protocol for protocol, known in _PROTOCOLS.items() if known == number)
    gso, sandbox = bool(flags & _control.GSO), _SANDBOX_OF[flags & _SANDBOX_BITS]
    listener = Listener(port, protocol)
    return Start(listener, hold, connect, idle, sessions, held, pipe, gso, sandbox, *tcp_and_seat)


def _destination(backend: tuple[bytes, int, int, int]) -> Destination:
    packed, port, zone, identity = backend
    address = inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)
    return Destination(f"{address}%{zone}" if zone else address, port, identity)


_PROTOCOLS = {Protocol.TCP: _control.TCP, Protocol.UDP: _control.UDP}
_SANDBOX = {
    Sandbox.OFF: 0,
    Sandbox.AUTO: _control.SANDBOX,
    Sandbox.REQUIRED: _control.SANDBOX | _control.SANDBOX_REQUIRED,
}
_SANDBOX_OF = {flags: sandbox for sandbox, flags in _SANDBOX.items()}
_SANDBOX_BITS = _control.SANDBOX | _control.SANDBOX_REQUIRED


def _pack_start(record: Start) -> bytes:
    if not 0 <= record.slot < record.slots <= _control.MAX_SLOTS:
        raise ValueError(f"there is no seat {record.slot} of {record.slots}")
    return _START.pack(
        record.listener.port,
        _PROTOCOLS[record.listener.protocol],
        (_control.GSO if record.gso else 0) | _SANDBOX[record.sandbox],
        record.hold_ms,
        record.connect_ms,
        record.session_idle_ms,
        record.max_sessions,
        record.max_held,
        record.pipe_bytes,
        record.max_connections,
        record.idle_ms,
        record.half_close_ms,
        record.slot,
        record.slots,
    )


def _pack_repoint(record: Repoint) -> bytes:
    if len(record.backends) > MAX_BACKENDS:
        raise ValueError(f"{len(record.backends)} backends are over {MAX_BACKENDS}")
    title = record.title.encode("utf-8", "backslashreplace")
    parts = [_REPOINT.pack(len(record.backends), len(title)), title]
    for backend in record.backends:
        if not 1 <= backend.port <= 65535:
            raise ValueError(f"port {backend.port} is not between 1 and 65535")
        version, packed, zone = _pack_address(backend.address)
        fields = (version, 0, backend.port, zone, backend.identity, packed.ljust(16, b"\0"))
        parts.append(_BACKEND.pack(*fields))
    return b"".join(parts)


def _pack_address(text: str) -> tuple[int, bytes, int]:
    """An IP literal as its version, its bytes in network order, and its zone (0 for none).

    Raises ValueError.
    """
    address, percent, zone = text.partition("%")
    try:
        if ":" not in address:
            if percent:
                raise ValueError(f"{text!r}: an IPv4 address has no zone")
            return 4, inet_pton(AF_INET, address), 0
        return 6, inet_pton(AF_INET6, address), int(zone) if percent else 0
    except OSError as error:
        raise ValueError(f"{text!r} is no IP literal") from error
