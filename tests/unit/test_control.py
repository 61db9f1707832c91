"""Control records: what goes in comes out, however the stream is cut; nonsense is refused (W4)."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Sequence
from dataclasses import replace
from socket import AF_INET6, inet_ntop

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ambassador import _control
from ambassador.control import (
    MAX_BACKENDS,
    MAX_PAYLOAD,
    MAX_RULES,
    MAX_SLOTS,
    VERSION,
    Drain,
    Record,
    RecordType,
    Start,
    Update,
    pack,
)
from ambassador.model import AccessRule, Backend
from ambassador.options import ListenerOptions, Sandbox
from ambassador.values import Protocol
from tests.support.records import HEADER_BYTES, OPTION_ROWS, Unpacker, unpack, unpack_payload

COUNTS_BYTES, OPTION_BYTES, BACKEND_BYTES, RULE_BYTES = 8, 10, 36, 20
OPTIONS_BYTES = len(OPTION_ROWS) * OPTION_BYTES
MAX_OPTION = (1 << 32) - 1

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
ports = st.integers(1, 65535)


@st.composite
def addresses(draw: st.DrawFn) -> str:
    ip = draw(st.ip_addresses())
    if ip.version == 4:
        return str(ip)
    zone = draw(st.integers(0, (1 << 32) - 1))
    # As records show it: ::ffff:1.2.3.4, where str(ip) has hex.
    text = inet_ntop(AF_INET6, ip.packed)
    return f"{text}%{zone}" if zone else text


@st.composite
def networks(draw: st.DrawFn) -> str:
    ip = draw(st.ip_addresses())
    prefix = draw(st.integers(0, 32 if ip.version == 4 else 128))
    return str(ipaddress.ip_network((ip, prefix), strict=False))


places = st.integers(1, MAX_SLOTS).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n)))
starts = st.builds(
    lambda protocol, place, sandbox: Start(protocol, place[0], place[1], sandbox),
    st.sampled_from(Protocol),
    places,
    st.sampled_from(Sandbox),
)
options = st.builds(
    ListenerOptions,
    **{
        row.name: st.booleans() if isinstance(row.default, bool) else st.integers(0, MAX_OPTION)
        for row in OPTION_ROWS.values()
    },
)
backends = st.builds(Backend, addresses(), ports, weight=st.integers(0, 65535))
rules = st.builds(AccessRule, networks(), st.booleans())
updates = st.builds(
    Update,
    u64,
    options,
    st.lists(st.tuples(u64, backends), max_size=5).map(tuple),
    st.lists(rules, max_size=5).map(tuple),
    st.text(max_size=60),
)
drains = st.builds(Drain, u32)
records: st.SearchStrategy[Record] = st.one_of(starts, updates, drains)

START = Start(Protocol.TCP)
BACKEND = Backend("10.0.0.5", 6379)
UPDATE = Update(3, backends=((7, BACKEND),), title="redis")
OPTIONS = pack(Update(0))[HEADER_BYTES + COUNTS_BYTES :]


def framed(kind: int, payload: bytes, generation: int = 0, **header: int) -> bytes:
    version, reserved = header.get("version", VERSION), header.get("reserved", 0)
    length = header.get("length", len(payload))
    return struct.pack("<BBHIQ", version, kind, reserved, length, generation) + payload


@given(records)
def test_every_record_comes_back(record: Record) -> None:
    assert unpack(pack(record)) == [record]


@given(st.lists(records, max_size=6), st.lists(st.integers(1, 40), min_size=1))
def test_a_stream_may_be_cut_anywhere(sent: list[Record], sizes: Sequence[int]) -> None:
    stream = b"".join(map(pack, sent))
    unpacker = Unpacker()
    found: list[Record] = []
    at = turn = 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        found += unpacker.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert found == sent
    assert unpacker.pending == 0


@given(records)
def test_an_unfinished_record_waits(record: Record) -> None:
    data = pack(record)
    unpacker = Unpacker()
    for count, byte in enumerate(data[:-1], 1):
        assert list(unpacker.feed(bytes([byte]))) == []
        assert unpacker.pending == count
    assert list(unpacker.feed(data[-1:])) == [record]
    assert unpacker.pending == 0


def _read_garbage(data: bytes) -> None:
    """Whatever is taken is what these very bytes say; what is refused or incomplete stays."""
    stream = bytearray(data)
    taken = b""
    while True:
        before = bytes(stream)
        try:
            found = _control.next_record(stream)
        except ValueError:
            assert stream == before
            return
        if found is None:
            assert stream == before
            assert taken + before == data
            return
        kind, generation, payload = found
        taken += framed(kind, payload, generation)
        assert taken + stream == data
        _check_meaning(kind, generation, payload)


def _check_meaning(kind: int, generation: int, payload: bytes) -> None:
    try:
        record = unpack_payload(kind, generation, payload)
    except ValueError:  # a title that is no UTF-8, a network with host bits
        assert kind == RecordType.UPDATE
        return
    assert unpack(pack(record)) == [record]


@given(st.binary(max_size=200))
@example(b"")
@example(b"\0" * 16)
@example(b"\xff" * 16)
def test_garbage_is_refused_or_incomplete(data: bytes) -> None:
    _read_garbage(data)


@given(
    st.integers(0, 5),
    st.one_of(st.just(0), u64),
    st.one_of(st.binary(max_size=80), st.binary(min_size=6, max_size=6)),
)
def test_a_good_header_with_any_payload(kind: int, generation: int, payload: bytes) -> None:
    _read_garbage(framed(kind, payload, generation))


@given(records, st.data())
def test_a_record_with_one_wrong_byte(record: Record, data: st.DataObject) -> None:
    wrong = bytearray(pack(record))
    wrong[data.draw(st.integers(0, len(wrong) - 1))] = data.draw(st.integers(0, 255))
    _read_garbage(bytes(wrong))


def start_of(protocol: int, flags: int, slot: int = 0, slots: int = 1) -> bytes:
    return framed(RecordType.START, struct.pack("<BBHH", protocol, flags, slot, slots))


def update_of(
    backends: Sequence[bytes] = (),
    rules: Sequence[bytes] = (),
    title: bytes = b"",
    options: bytes = OPTIONS,
    rest: bytes = b"",
) -> bytes:
    count = len(options) // OPTION_BYTES
    counts = struct.pack("<HHHH", count, len(backends), len(rules), len(title))
    payload = b"".join((counts, options, *backends, *rules, title, rest))
    return framed(RecordType.UPDATE, payload, 1)


def backend_of(
    version: int,
    address: bytes,
    *,
    port: int = 1,
    zone: int = 0,
    reserved: int = 0,
    weight: int = 1,
) -> bytes:
    return struct.pack("<BBHIIQ16s", version, reserved, port, weight, zone, 0, address)


def rule_of(
    version: int, prefix: int, allow: int = 1, reserved: int = 0, address: bytes = b""
) -> bytes:
    return struct.pack("<BBBB16s", version, prefix, allow, reserved, address)


def option_of(number: int, value: int = 1) -> bytes:
    return struct.pack("<HQ", number, value)


OTHERS = OPTIONS[OPTION_BYTES:]
FIRST = struct.unpack_from("<H", OPTIONS)[0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (framed(RecordType.DRAIN, b"\0" * 4, version=2), "version 2, this worker speaks 3"),
        (framed(RecordType.DRAIN, b"\0" * 4, version=0), "version 0"),
        (framed(RecordType.DRAIN, b"\0" * 4, reserved=1), "reserved 1"),
        (framed(RecordType.DRAIN, b"", length=MAX_PAYLOAD + 1), "length 1048577"),
        (framed(0, b""), "unknown type 0"),
        (framed(4, b""), "unknown type 4"),
        (framed(RecordType.DRAIN, b"\0" * 3), "type 3 of 3"),
        (framed(RecordType.DRAIN, b"\0" * 5), "type 3 of 5"),
        (framed(RecordType.DRAIN, b"\0" * 4, generation=1), "type 3 with generation 1"),
        (framed(RecordType.START, pack(START)[HEADER_BYTES:], generation=1), "generation 1"),
        (framed(RecordType.START, b""), "type 1 of 0"),
        (framed(RecordType.START, b"\0" * 7), "type 1 of 7"),
        (start_of(132, 0), "number 132"),
        (start_of(6, 4), "unknown flags 0x4"),
        (start_of(6, 2), "unknown flags 0x2"),
        (start_of(6, 0, 2, 2), "slot 2 of 2"),
        (start_of(6, 0, 0, 0), "slot 0 of 0"),
        (start_of(6, 0, 0, MAX_SLOTS + 1), "slot 0 of 65"),
        (framed(RecordType.UPDATE, b""), "type 2 of 0"),
        (framed(RecordType.UPDATE, b"\0" * 7), "type 2 of 7"),
        (update_of(rest=b"x"), "type 2 of 109 bytes instead of 108"),
        (framed(RecordType.UPDATE, struct.pack("<HHHH", 0, 0, 0, 9)), "8 bytes instead of 17"),
        (framed(RecordType.UPDATE, struct.pack("<HHHH", 0, 1, 0, 0)), "8 bytes instead of 44"),
        (framed(RecordType.UPDATE, struct.pack("<HHHH", 0, 0, 1, 0)), "8 bytes instead of 28"),
        (framed(RecordType.UPDATE, struct.pack("<HHHH", 65535, 0, 0, 0)), "instead of 655358"),
        (update_of(options=b""), "0 options of 10"),
        (update_of(options=OTHERS), "9 options of 10"),
        (update_of(options=option_of(0) + OTHERS), "option 0 with value 1"),
        (update_of(options=option_of(11) + OTHERS), "option 11 with value 1"),
        (update_of(options=option_of(65535) + OTHERS), "option 65535"),
        (update_of(options=OTHERS + OTHERS[:OPTION_BYTES]), "option 2 with"),
        (update_of(options=option_of(FIRST, 1 << 32) + OTHERS), "value 4294967296"),
        (update_of([backend_of(4, b"\1")] * (MAX_BACKENDS + 1)), "1025 backends and 0 rules"),
        (update_of(rules=[rule_of(4, 0)] * (MAX_RULES + 1)), "0 backends and 16385 rules"),
        (update_of([backend_of(5, b"\1")]), "backend of family 5"),
        (update_of([backend_of(4, b"\1", reserved=1)]), "reserved 1"),
        (update_of([backend_of(4, b"\1", port=0)]), "port 0"),
        (update_of([backend_of(4, b"\1", weight=65536)]), "weight 65536"),
        (update_of([backend_of(4, b"\1\0\0\0\1")]), "more than 4 bytes"),
        (update_of([backend_of(4, b"\1", zone=3)]), "port 1, zone 3"),
        (update_of(rules=[rule_of(0, 0)]), "rule of family 0"),
        (update_of(rules=[rule_of(4, 33)]), "prefix 33"),
        (update_of(rules=[rule_of(6, 129)]), "prefix 129"),
        (update_of(rules=[rule_of(4, 0, allow=2)]), "allow 2"),
        (update_of(rules=[rule_of(4, 0, reserved=1)]), "reserved 1"),
        (update_of(rules=[rule_of(4, 0, address=b"\0" * 15 + b"\1")]), "more than 4 bytes"),
        # A good item before a bad one does not hide it.
        (update_of([backend_of(4, b"\1"), backend_of(7, b"\1")]), "family 7"),
        (update_of(rules=[rule_of(4, 0), rule_of(4, 40)]), "prefix 40"),
    ],
)
def test_refused_records(data: bytes, reason: str) -> None:
    stream = bytearray(data)
    with pytest.raises(ValueError, match=reason):
        _control.next_record(stream)
    assert stream == data, "a refused record stays"


def test_a_title_that_is_no_utf_8_is_refused_where_it_is_read() -> None:
    with pytest.raises(ValueError, match="decode byte 0xff"):
        unpack(update_of(title=b"\xff"))


def test_a_wrong_header_is_refused_before_its_payload_arrives() -> None:
    with pytest.raises(ValueError, match="length"):
        unpack(framed(RecordType.DRAIN, b"", length=MAX_PAYLOAD + 1))


def test_good_records_before_a_bad_one_are_still_read() -> None:
    stream = Unpacker().feed(pack(START) + b"\0" * HEADER_BYTES)
    assert next(stream) == START
    with pytest.raises(ValueError, match="version 0"):
        next(stream)


def test_options_may_come_in_any_order() -> None:
    """The number counts, not the place."""
    (record,) = unpack(update_of(options=OTHERS + OPTIONS[:OPTION_BYTES]))
    assert record == Update(1)


@pytest.mark.parametrize(
    "record",
    [
        START._replace(slot=1),
        START._replace(slot=-1),
        START._replace(slots=0),
        START._replace(slots=MAX_SLOTS + 1),
        Drain(-1),
        Drain(1 << 32),
        UPDATE._replace(generation=-1),
        UPDATE._replace(generation=1 << 64),
        UPDATE._replace(options=ListenerOptions(hold=-1)),
        Update(1, backends=((1 << 64, BACKEND),)),
        Update(1, backends=((-1, BACKEND),)),
        Update(1, backends=((1, BACKEND),) * (MAX_BACKENDS + 1)),
        Update(1, access=(AccessRule("10.0.0.0/8", True),) * (MAX_RULES + 1)),
    ],
)
def test_what_does_not_fit_is_a_value_error(record: Record) -> None:
    with pytest.raises(ValueError):
        pack(record)


@pytest.mark.parametrize(
    "change",
    [
        {"address": "redis"},
        {"address": "fe80::1%eth0"},
        {"address": "fe80::1%4294967296"},
        {"address": f"fe80::1%{'9' * 5000}"},
        {"port": 0},
        {"weight": 65536},
    ],
)
def test_a_backend_out_of_range_cannot_be_made(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(BACKEND, **change)  # type: ignore[arg-type]


def test_the_bounds_of_every_option_travel() -> None:
    for row in OPTION_ROWS.values():
        for value in {row.default, row.low or 0, row.high or 1}:
            record = Update(1, replace(ListenerOptions(), **{row.name: type(row.default)(value)}))
            assert unpack(pack(record)) == [record], row.name


def test_the_most_of_everything() -> None:
    """The most backends and rules leave room for a title; a payload over MAX_PAYLOAD cannot be packed."""
    backends = tuple((number, BACKEND) for number in range(MAX_BACKENDS))
    access = tuple(AccessRule(f"10.{n >> 8}.{n & 255}.0/24", n % 2 == 0) for n in range(MAX_RULES))
    record = Update(1, ListenerOptions(), backends, access, "t" * 65535)
    assert unpack(pack(record)) == [record]
    most = COUNTS_BYTES + OPTIONS_BYTES + MAX_BACKENDS * BACKEND_BYTES + MAX_RULES * RULE_BYTES
    assert most + 65535 <= MAX_PAYLOAD
    with pytest.raises(ValueError, match="1025 backends are over 1024"):
        pack(record._replace(backends=(*backends, (0, BACKEND))))
    with pytest.raises(ValueError, match="16385 access rules are over 16384"):
        pack(record._replace(access=(*access, access[0])))


def test_the_longest_title_is_counted_in_bytes() -> None:
    longest = "\u00e9" * 32_767
    assert unpack(pack(Update(1, title=longest))) == [Update(1, title=longest)]
    with pytest.raises(ValueError, match="does not fit"):
        pack(Update(1, title="\u00e9" * 32_768))


def test_a_title_that_is_no_unicode_travels_escaped() -> None:
    assert unpack(pack(Update(1, title="a\udc80b"))) == [Update(1, title="a\\udc80b")]


@pytest.mark.parametrize("address", ["fe80::1%1", "fe80::1%4294967295", "::", "::ffff:1.2.3.4"])
def test_addresses_and_their_zones(address: str) -> None:
    record = Update(1, backends=((0, Backend(address, 1)),))
    assert unpack(pack(record)) == [record]


def test_the_bytes_of_a_record_are_fixed() -> None:
    """The format is a contract between two processes: a change needs a new VERSION."""
    assert pack(Drain(500)).hex(" ") == (
        "03 03 00 00 04 00 00 00 00 00 00 00 00 00 00 00 f4 01 00 00"
    )
    assert pack(Start(Protocol.UDP, 5, 7, Sandbox.REQUIRED)).hex(" ") == (
        "03 01 00 00 06 00 00 00 00 00 00 00 00 00 00 00 11 03 05 00 07 00"
    )
    access = (AccessRule("10.0.0.0/8", True), AccessRule("fe80::/10", False))
    backend = replace(BACKEND, weight=2)
    assert pack(Update(3, backends=((7, backend),), access=access, title="redis")).hex(" ") == (
        "03 02 00 00 bd 00 00 00 03 00 00 00 00 00 00 00"
        " 0a 00 01 00 02 00 05 00"
        " 01 00 10 27 00 00 00 00 00 00 02 00 00 00 00 00 00 00 00 00"
        " 03 00 00 00 00 00 00 00 00 00 04 00 00 00 00 00 00 00 00 00"
        " 05 00 90 5f 01 00 00 00 00 00 06 00 00 40 00 00 00 00 00 00"
        " 07 00 88 13 00 00 00 00 00 00 08 00 00 10 00 00 00 00 00 00"
        " 09 00 00 00 10 00 00 00 00 00 0a 00 01 00 00 00 00 00 00 00"
        " 04 00 eb 18 02 00 00 00 00 00 00 00 07 00 00 00 00 00 00 00"
        " 0a 00 00 05 00 00 00 00 00 00 00 00 00 00 00 00"
        " 04 08 01 00 0a 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"
        " 06 0a 00 00 fe 80 00 00 00 00 00 00 00 00 00 00 00 00 00 00"
        " 72 65 64 69 73"
    )
