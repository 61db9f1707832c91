"""Reads control records in Python: what a worker would understand, to compare with what was packed."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Any

from ambassador import _control
from ambassador.control import Drain, Record, RecordType, Start, Update
from ambassador.model import AccessRule, Backend
from ambassador.options import ListenerOptions, Sandbox, rows
from ambassador.values import Protocol

HEADER_BYTES = 16
OPTION_ROWS = {row.wire: row for row in rows(ListenerOptions) if row.wire}

_PROTOCOLS = {_control.TCP: Protocol.TCP, _control.UDP: Protocol.UDP}
_SANDBOX = {0: Sandbox.OFF, 1: Sandbox.AUTO, 3: Sandbox.REQUIRED}


class Unpacker:
    """A stream of records, fed in any pieces. Raises ValueError for what is not a record."""

    def __init__(self) -> None:
        self._stream = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of a record that is not complete yet."""
        return len(self._stream)

    def feed(self, data: bytes) -> Iterator[Record]:
        self._stream += data
        while (found := _control.next_record(self._stream)) is not None:
            yield unpack_payload(*found)


def unpack(data: bytes) -> list[Record]:
    """The records in `data`, which must end with one."""
    unpacker = Unpacker()
    found = list(unpacker.feed(data))
    assert unpacker.pending == 0
    return found


def unpack_payload(kind: int, generation: int, payload: bytes) -> Record:
    """The record of a checked payload. Raises ValueError for a title or a network that none has."""
    match RecordType(kind):
        case RecordType.START:
            protocol, flags, slot, slots = struct.unpack("<BBHH", payload)
            return Start(_PROTOCOLS[protocol], slot, slots, _SANDBOX[flags])
        case RecordType.DRAIN:
            return Drain(*struct.unpack("<I", payload))
        case RecordType.UPDATE:
            return _update(generation, payload)


def _update(generation: int, payload: bytes) -> Update:
    counts = struct.unpack_from("<HHHH", payload)
    at = 8
    items: list[list[tuple[Any, ...]]] = []
    for form, count in zip(("<HQ", "<BBHIIQ16s", "<BBBB16s"), counts[:3], strict=True):
        size = struct.calcsize(form)
        items.append(list(struct.iter_unpack(form, payload[at : at + count * size])))
        at += count * size
    options, backends, rules = items
    named = {OPTION_ROWS[number].name: _value(number, value) for number, value in options}
    return Update(
        generation,
        ListenerOptions(**named),
        tuple(map(_backend, backends)),
        tuple(map(_rule, rules)),
        payload[at:].decode(),
    )


def _value(number: int, value: int) -> Any:
    return type(OPTION_ROWS[number].default)(value)


def _backend(item: tuple[Any, ...]) -> tuple[int, Backend]:
    version, _, port, weight, zone, number, address = item
    text = _address(version, address)
    return number, Backend(f"{text}%{zone}" if zone else text, port, weight=weight)


def _rule(item: tuple[Any, ...]) -> AccessRule:
    version, prefix, allow, _, address = item
    network = ipaddress.ip_network(f"{_address(version, address)}/{prefix}")
    return AccessRule(str(network), bool(allow))


def _address(version: int, packed: bytes) -> str:
    return inet_ntop(AF_INET, packed[:4]) if version == 4 else inet_ntop(AF_INET6, packed)
