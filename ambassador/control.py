"""Control records: what the parent tells a worker over its control pipe. Packing only, no I/O.

A worker reads them in compiled code (_control.pyx, _record.pxd). A record is a 16-byte header and a payload,
all little-endian:

    offset  size  field
    0       1     version      VERSION; a worker rejects any other
    1       1     type         RecordType
    2       2     reserved     zero
    4       4     length       of the payload, bytes, at most MAX_PAYLOAD
    8       8     generation   of the listener's state; 0 in records that carry none

    Start    protocol, flags, slot, slots: what never changes
    Update   counts, then options (number, value), backends, access rules, title: all else, always complete
    Drain    milliseconds

Invariants:

- The stream is self-delimiting: a reader needs no state but the bytes it has not consumed yet.
- What does not parse is refused whole; a reader never guesses where the next record begins.
- An Update is the whole state. The newest generation wins: a worker ignores one that is lower.
"""

from __future__ import annotations

import enum
import ipaddress
import struct
from socket import AF_INET, AF_INET6, inet_pton
from typing import NamedTuple

from ambassador import _control
from ambassador.model import AccessRule, Backend
from ambassador.options import ListenerOptions, Sandbox, rows
from ambassador.values import Protocol

VERSION = _control.VERSION
MAX_PAYLOAD = _control.MAX_PAYLOAD
MAX_BACKENDS = _control.MAX_BACKENDS
MAX_RULES = _control.MAX_RULES
MAX_SLOTS = _control.MAX_SLOTS

_HEADER = struct.Struct("<BBHIQ")
_START = struct.Struct("<BBHH")
_UPDATE = struct.Struct("<HHHH")
_OPTION = struct.Struct("<HQ")
_BACKEND = struct.Struct("<BBHIIQ16s")
_RULE = struct.Struct("<BBBB16s")
_DRAIN = struct.Struct("<I")

_PROTOCOLS = {Protocol.TCP: _control.TCP, Protocol.UDP: _control.UDP}
_SANDBOX = {
    Sandbox.OFF: 0,
    Sandbox.AUTO: _control.SANDBOX,
    Sandbox.REQUIRED: _control.SANDBOX | _control.SANDBOX_REQUIRED,
}


class RecordType(enum.IntEnum):
    START = _control.START
    UPDATE = _control.UPDATE
    DRAIN = _control.DRAIN


class Start(NamedTuple):
    """The first record a worker gets: what never changes. It has `slot` of the listener's `slots`."""

    protocol: Protocol
    slot: int = 0
    slots: int = 1
    sandbox: Sandbox = Sandbox.AUTO


class Update(NamedTuple):
    """Everything else, complete. Each backend has the listener's id for it.

    A connection to a backend whose id is not in the newest list is reset.
    """

    generation: int
    options: ListenerOptions = ListenerOptions()
    backends: tuple[tuple[int, Backend], ...] = ()
    access: tuple[AccessRule, ...] = ()
    title: str = ""


class Drain(NamedTuple):
    """Take no new work, finish what is open, exit; reset what is left after `deadline_ms`."""

    deadline_ms: int


Record = Start | Update | Drain


def pack(record: Record) -> bytes:
    """One record as bytes. Raises ValueError if a field does not fit."""
    generation = 0
    try:
        match record:
            case Start():
                kind, payload = RecordType.START, _pack_start(record)
            case Update():
                kind, payload = RecordType.UPDATE, _pack_update(record)
                generation = record.generation
            case Drain():
                kind, payload = RecordType.DRAIN, _DRAIN.pack(record.deadline_ms)
        header = _HEADER.pack(VERSION, kind, 0, len(payload), generation)
    except struct.error as error:
        raise ValueError(f"{record} does not fit a control record: {error}") from error
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a control record of {len(payload)} bytes is over {MAX_PAYLOAD}")
    return header + payload


def _pack_start(record: Start) -> bytes:
    if not 0 <= record.slot < record.slots <= MAX_SLOTS:
        raise ValueError(f"there is no slot {record.slot} of {record.slots}")
    flags = _SANDBOX[record.sandbox]
    return _START.pack(_PROTOCOLS[record.protocol], flags, record.slot, record.slots)


def _pack_update(record: Update) -> bytes:
    for what, count, most in (
        ("backends", len(record.backends), MAX_BACKENDS),
        ("access rules", len(record.access), MAX_RULES),
    ):
        if count > most:
            raise ValueError(f"{count} {what} are over {most}")
    numbered = [row for row in rows(type(record.options)) if row.wire]
    title = record.title.encode("utf-8", "backslashreplace")
    return b"".join(
        [
            _UPDATE.pack(len(numbered), len(record.backends), len(record.access), len(title)),
            *(_OPTION.pack(row.wire, getattr(record.options, row.name)) for row in numbered),
            *(_pack_backend(number, backend) for number, backend in record.backends),
            *map(_pack_rule, record.access),
            title,
        ]
    )


def _pack_backend(number: int, backend: Backend) -> bytes:
    address, percent, zone = backend.address.partition("%")
    version, packed = _pack_address(address)
    if percent and version == 4:
        raise ValueError(f"{backend.address!r}: an IPv4 address has no zone")
    fields = (version, 0, backend.port, backend.weight, int(zone) if percent else 0, number)
    return _BACKEND.pack(*fields, packed)


def _pack_rule(rule: AccessRule) -> bytes:
    network = ipaddress.ip_network(rule.network)
    version, packed = _pack_address(str(network.network_address))
    return _RULE.pack(version, network.prefixlen, rule.allow, 0, packed)


def _pack_address(text: str) -> tuple[int, bytes]:
    """An IP literal's version, and its bytes in network order. Raises ValueError."""
    try:
        if ":" in text:
            return 6, inet_pton(AF_INET6, text)
        return 4, inet_pton(AF_INET, text).ljust(16, b"\0")
    except OSError as error:
        raise ValueError(f"{text!r} is no IP literal") from error
