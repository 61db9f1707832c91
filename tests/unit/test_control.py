"""Control records: what goes in comes out, however the stream is cut; nonsense is refused (W4)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from socket import AF_INET6, inet_ntop

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ambassador.control import (
    MAX_BACKENDS,
    MAX_PAYLOAD,
    MAX_SLOTS,
    VERSION,
    BadRecord,
    Destination,
    Drain,
    Record,
    RecordType,
    Repoint,
    Start,
    Unpacker,
    pack,
)
from ambassador.model import Listener
from ambassador.values import Protocol

HEADER_BYTES = 16
BACKEND_BYTES = 32
START_BYTES = 44
LIMITS = (
    *("hold_ms", "connect_ms", "session_idle_ms", "max_sessions", "max_held", "pipe_bytes"),
    *("max_connections", "idle_ms", "half_close_ms"),
)

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
ports = st.integers(1, 65535)


@st.composite
def addresses(draw: st.DrawFn) -> str:
    ip = draw(st.ip_addresses())
    if ip.version == 4:
        return str(ip)
    zone = draw(st.integers(0, (1 << 32) - 1))
    text = inet_ntop(
        AF_INET6, ip.packed
    )  # as records show it: ::ffff:1.2.3.4, where str(ip) has hex
    return f"{text}%{zone}" if zone else text


listeners = st.builds(Listener, ports, st.sampled_from(Protocol))
places = st.integers(1, MAX_SLOTS).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n)))
starts = st.builds(
    lambda listener, limits, gso, place: Start(
        listener, gso=gso, slot=place[0], slots=place[1], **limits
    ),
    listeners,
    st.fixed_dictionaries(dict.fromkeys(LIMITS, u32)),
    st.booleans(),
    places,
)
destinations = st.builds(Destination, addresses(), ports, u64)
repoints = st.builds(
    Repoint, u64, st.lists(destinations, max_size=5).map(tuple), st.text(max_size=60)
)
drains = st.builds(Drain, u32)
records: st.SearchStrategy[Record] = st.one_of(starts, repoints, drains)

START = Start(Listener(6379, Protocol.TCP))
BACKEND = Destination("10.0.0.5", 6379, 7)
REPOINT = Repoint(3, (BACKEND,), "redis")


def unpack(data: bytes) -> list[Record]:
    """The records in `data`, which must end with one."""
    unpacker = Unpacker()
    found = list(unpacker.feed(data))
    assert unpacker.pending == 0
    return found


def framed(kind: int, payload: bytes, generation: int = 0, **header: int) -> bytes:
    return (
        struct.pack(
            "<BBHIQ",
            header.get("version", VERSION),
            kind,
            header.get("reserved", 0),
            header.get("length", len(payload)),
            generation,
        )
        + payload
    )


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
    """Whatever is read must be what these very bytes stand for; nothing is guessed."""
    unpacker = Unpacker()
    consumed = b""
    try:
        for record in unpacker.feed(data):
            consumed += pack(record)
            assert data.startswith(consumed)
    except BadRecord:
        return
    assert len(consumed) + unpacker.pending == len(data)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\0" * 16)
@example(b"\xff" * 16)
def test_garbage_is_refused_or_incomplete(data: bytes) -> None:
    _read_garbage(data)


@given(
    st.integers(0, 5),
    st.one_of(st.just(0), u64),
    st.one_of(st.binary(max_size=80), st.binary(min_size=START_BYTES, max_size=START_BYTES)),
)
def test_a_good_header_with_any_payload(kind: int, generation: int, payload: bytes) -> None:
    _read_garbage(framed(kind, payload, generation))


@given(records, st.data())
def test_a_record_with_one_wrong_byte(record: Record, data: st.DataObject) -> None:
    wrong = bytearray(pack(record))
    wrong[data.draw(st.integers(0, len(wrong) - 1))] = data.draw(st.integers(0, 255))
    _read_garbage(bytes(wrong))


def _backend(version: int, address: bytes, port: int = 1, zone: int = 0, flags: int = 0) -> bytes:
    return struct.pack("<BBHIQ16s", version, flags, port, zone, 0, address)


def start_of(port: int, protocol: int, flags: int, slot: int = 0, slots: int = 1) -> bytes:
    return struct.pack("<HBB9IHH", port, protocol, flags, *[0] * 9, slot, slots)


def _repoint(backend: bytes, count: int = 1) -> bytes:
    return struct.pack("<HH", count, 0) + backend


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (framed(RecordType.DRAIN, b"\0" * 4, version=3), "version 3"),
        (framed(RecordType.DRAIN, b"\0" * 4, version=0), "version 0"),
        (framed(RecordType.DRAIN, b"\0" * 4, reserved=1), "reserved 1"),
        (framed(RecordType.DRAIN, b"", length=MAX_PAYLOAD + 1), "length 60001"),
        (framed(0, b""), "unknown type 0"),
        (framed(4, b""), "unknown type 4"),
        (framed(RecordType.DRAIN, b"\0" * 3), "type 3"),
        (framed(RecordType.DRAIN, b"\0" * 5), "type 3"),
        (framed(RecordType.DRAIN, b"\0" * 4, generation=1), "generation 1"),
        (framed(RecordType.START, pack(START)[HEADER_BYTES:], generation=1), "generation 1"),
        (framed(RecordType.START, b""), "type 1"),
        (framed(RecordType.START, start_of(0, 6, 0)), "port 0"),
        (framed(RecordType.START, start_of(1, 6, 0, 2, 2)), "slot 2 of 2"),
        (framed(RecordType.START, start_of(1, 6, 0, 0, MAX_SLOTS + 1)), "slot 0 of 65"),
        (framed(RecordType.START, start_of(1, 132, 0)), "number 132"),
        (framed(RecordType.START, start_of(1, 6, 8)), "unknown flags 0x8"),
        (framed(RecordType.START, start_of(1, 6, 4)), "unknown flags 0x4"),
        (framed(RecordType.REPOINT, b""), "type 2"),
        (framed(RecordType.REPOINT, struct.pack("<HH", 1, 0)), "1 backends in 4 bytes"),
        (framed(RecordType.REPOINT, struct.pack("<HH", 0, 0) + b"x"), "0 backends in 5 bytes"),
        (framed(RecordType.REPOINT, struct.pack("<HH", 0, 9) + b"x"), "0 backends in 5 bytes"),
        (framed(RecordType.REPOINT, struct.pack("<HH", 0, 1) + b"\xff"), "decode byte 0xff"),
        (
            framed(RecordType.REPOINT, _repoint(_backend(4, b"\1") * 1025, 1025)),
            "1025 backends",
        ),
        (framed(RecordType.REPOINT, _repoint(_backend(5, b"\1"))), "family 5"),
        (framed(RecordType.REPOINT, _repoint(_backend(4, b"\1", flags=1))), "flags 1"),
        (framed(RecordType.REPOINT, _repoint(_backend(4, b"\1", port=0))), "port 0"),
        (framed(RecordType.REPOINT, _repoint(_backend(4, b"\1\0\0\0\1"))), "more than 4 bytes"),
        (framed(RecordType.REPOINT, _repoint(_backend(4, b"\1", zone=3))), "port 1, zone 3"),
    ],
)
def test_refused_records(data: bytes, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        list(Unpacker().feed(data))


def test_a_wrong_header_is_refused_before_its_payload_arrives() -> None:
    with pytest.raises(BadRecord):
        list(Unpacker().feed(framed(RecordType.DRAIN, b"", length=MAX_PAYLOAD + 1)))


def test_good_records_before_a_bad_one_are_still_read() -> None:
    stream = Unpacker().feed(pack(START) + b"\0" * HEADER_BYTES)
    assert next(stream) == START
    with pytest.raises(BadRecord):
        next(stream)


@pytest.mark.parametrize(
    "record",
    [
        START._replace(hold_ms=-1),
        START._replace(max_sessions=1 << 32),
        START._replace(slot=1),
        START._replace(slots=MAX_SLOTS + 1),
        Drain(-1),
        Drain(1 << 32),
        REPOINT._replace(generation=-1),
        REPOINT._replace(generation=1 << 64),
        Repoint(1, (BACKEND._replace(identity=1 << 64),)),
        Repoint(1, (BACKEND._replace(identity=-1),)),
        Repoint(1, (BACKEND._replace(address="fe80::1%eth0"),)),
        Repoint(1, (BACKEND._replace(address="fe80::1%4294967296"),)),
        Repoint(1, (BACKEND._replace(address="fe80::1%-1"),)),
    ],
)
def test_what_does_not_fit_is_a_value_error(record: Record) -> None:
    with pytest.raises(ValueError):
        pack(record)


@pytest.mark.parametrize("address", ["", "redis", "10.0.0.256", "10.0.0.5%3", "fe80::1%", "[::1]"])
def test_a_destination_is_an_ip_literal(address: str) -> None:
    with pytest.raises(ValueError, match=r"no IP literal|no zone|invalid literal"):
        pack(Repoint(1, (Destination(address, 1, 0),)))


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_destination_has_a_port(port: int) -> None:
    with pytest.raises(ValueError, match="not between 1 and 65535"):
        pack(Repoint(1, (Destination("10.0.0.5", port, 0),)))


def test_the_most_backends() -> None:
    backends = tuple(BACKEND._replace(identity=number) for number in range(MAX_BACKENDS))
    title = "t" * (MAX_PAYLOAD - 4 - MAX_BACKENDS * BACKEND_BYTES)
    record = Repoint(1, backends, title)
    assert len(pack(record)) == HEADER_BYTES + MAX_PAYLOAD
    assert unpack(pack(record)) == [record]
    with pytest.raises(ValueError, match="is over 60000"):
        pack(record._replace(title=title + "t"))
    with pytest.raises(ValueError, match="1025 backends are over 1024"):
        pack(Repoint(1, (*backends, BACKEND)))


def test_a_full_record_fits_an_empty_pipe() -> None:
    assert HEADER_BYTES + MAX_PAYLOAD <= 65_536


def test_the_longest_title_is_counted_in_bytes() -> None:
    longest = "\u00e9" * ((MAX_PAYLOAD - 4) // 2)
    assert unpack(pack(Repoint(1, (), longest))) == [Repoint(1, (), longest)]
    for too_long in (longest + "e", "\u00e9" * 32_768):  # the second exceeds its length field too
        with pytest.raises(ValueError):
            pack(Repoint(1, (), too_long))


def test_a_title_that_is_no_unicode_travels_escaped() -> None:
    (record,) = unpack(pack(Repoint(1, (), "a\udc80b")))
    assert record == Repoint(1, (), "a\\udc80b")


@pytest.mark.parametrize("address", ["fe80::1%1", "fe80::1%4294967295", "::", "::ffff:1.2.3.4"])
def test_addresses_and_their_zones(address: str) -> None:
    (record,) = unpack(pack(Repoint(1, (Destination(address, 1, 0),))))
    assert isinstance(record, Repoint)
    assert int(record.backends[0].address.partition("%")[2] or 0) == int(
        address.partition("%")[2] or 0
    )
    assert pack(record) == pack(Repoint(1, (Destination(address, 1, 0),)))


def test_the_bytes_of_a_record_are_fixed() -> None:
    """The format is a contract between two processes: a change needs a new VERSION."""
    assert pack(Drain(500)).hex(" ") == (
        "02 03 00 00 04 00 00 00 00 00 00 00 00 00 00 00 f4 01 00 00"
    )
    assert pack(REPOINT).hex(" ") == (
        "02 02 00 00 29 00 00 00 03 00 00 00 00 00 00 00"
        " 01 00 05 00 72 65 64 69 73"
        " 04 00 eb 18 00 00 00 00 07 00 00 00 00 00 00 00"
        " 0a 00 00 05 00 00 00 00 00 00 00 00 00 00 00 00"
    )
    start = START._replace(pipe_bytes=1, max_connections=2, idle_ms=3, half_close_ms=4)
    assert pack(start._replace(slot=5, slots=7)).hex(" ") == (
        "02 01 00 00 2c 00 00 00 00 00 00 00 00 00 00 00"
        " eb 18 06 03 10 27 00 00 88 13 00 00 90 5f 01 00"
        " 00 40 00 00 00 10 00 00 01 00 00 00 02 00 00 00"
        " 03 00 00 00 04 00 00 00 05 00 07 00"
    )
