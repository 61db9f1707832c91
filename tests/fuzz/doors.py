"""Every place where the program reads what somebody else wrote, as a function of bytes.

A door takes any bytes at all and returns where its invariants hold. What it raises, whatever it is, is
a finding. A door's corpus is the folder of its name.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from setproctitle import getproctitle, setproctitle

from ambassador import _control
from ambassador.cli.arguments import MissingName, UsageError
from ambassador.cli.main import parse_arguments
from ambassador.control import MAX_PAYLOAD, VERSION, RecordType, Update, pack
from ambassador.discovery import documents, joins, own_networks, target_address
from ambassador.discovery.events import MAX_RECORD, EventParser, loss, subject
from ambassador.model import ListenerSpec, TargetState
from ambassador.options import ListenerOptions
from ambassador.reconcile import merge
from ambassador.rules import parse_routes
from ambassador.system.logs import format_line
from ambassador.system.titles import PROGRAM, set_title
from tests.support.records import HEADER_BYTES, unpack, unpack_payload

CORPUS = Path(__file__).parent / "corpus"
_HEADER = struct.Struct("<BBHIQ")
GOOD_EVENT = {"Type": "container", "Actor": {"ID": "f" * 64, "Attributes": {"name": "web"}}}

Door = Callable[[bytes], None]


def seeds(door: str) -> list[Path]:
    """The corpus of one door, in one order."""
    return sorted(path for path in (CORPUS / door).iterdir() if path.is_file())


def pieces(data: bytes) -> Iterator[bytes]:
    """`data` in pieces, whose lengths it says itself: any cut can be reached by changing a byte."""
    at = 0
    while at < len(data):
        step = 1 + data[(at * 7 + len(data)) % len(data)]
        yield data[at : at + step]
        at += step


def is_one_line(text: str) -> bool:
    """Nothing in it can end, disguise or forge a line."""
    return text.isprintable()


# --- what the parent writes to a worker --------------------------------------------------------


def control(data: bytes) -> None:
    """W4: records or ValueError, the same however the stream is cut; a refused or incomplete rest stays."""
    whole, rest = _records([data])
    cut, cut_rest = _records(pieces(data))
    assert whole == cut
    taken = b"".join(
        _HEADER.pack(VERSION, kind, 0, len(payload), number) + payload
        for kind, number, payload in whole
    )
    assert data.startswith(taken)
    if rest is None:
        assert cut_rest is None
        return
    assert taken + rest == data
    assert len(rest) < HEADER_BYTES + MAX_PAYLOAD, "waits for more than a record can have"
    for found in whole:
        _check_meaning(*found)


def _records(chunks: Iterable[bytes]) -> tuple[list[tuple[int, int, bytes]], bytes | None]:
    """The records before the first that is none, and what waits behind them; None if one was refused."""
    stream = bytearray()
    found: list[tuple[int, int, bytes]] = []
    for chunk in chunks:
        stream += chunk
        while True:
            before = bytes(stream)
            try:
                record = _control.next_record(stream)
            except ValueError:
                assert bytes(stream) == before, "a refused stream was changed"
                return found, None
            if record is None:
                assert bytes(stream) == before, "an incomplete record was changed"
                break
            found.append(record)
    return found, bytes(stream)


def _check_meaning(kind: int, number: int, payload: bytes) -> None:
    """What Python makes of a record packs to the same meaning. A title or a network may be none."""
    try:
        record = unpack_payload(kind, number, payload)
    except ValueError:
        assert kind == RecordType.UPDATE
        return
    assert unpack(pack(record)) == [record]


# --- what the Engine answers -------------------------------------------------------------------


def events(data: bytes) -> None:
    """D7: whatever comes, memory is bounded, and the next good event is seen."""
    parser = EventParser()
    for chunk in (data, *pieces(data), b"\n"):
        _look(parser.feed(chunk))
        assert len(parser._buffer) <= MAX_RECORD
    assert list(parser.feed(json.dumps(GOOD_EVENT).encode() + b"\n"))[-1:] == [GOOD_EVENT]


def _look(found: Iterator[Any]) -> None:
    for event in found:
        who, lost = subject(event), loss(event)
        assert lost is None or (who is not None and lost.container in who.ids)


def document(data: bytes) -> None:
    """One inspect document as everybody's: the target's, the ambassador's own, that of a joined one."""
    read = _json(data)
    if not isinstance(read, dict):
        return
    own = own_networks.own_networks_of(read)
    shared = own_networks.own_networks_of(read, read)
    for ours in (own_networks.OwnNetworks(), own, shared):
        for network in ("", "bridge"):
            for owners in ((), (None,), (read,), (read, read)):
                state = target_address.target_state(
                    "web\n", read, ours, network=network, owners=owners
                )
                _check_state(state)
                _check_state(target_address.keep_ports(state, target_address.absent_state(state)))
                target_address.awaits_address(read, state)
    documents.is_target(read, "web")
    target_address.networks_in_question(read, own)
    joins.joins_of(read, documents.owners_of(read, lambda _: read))
    documents.is_rootless(read)


def _check_state(state: TargetState) -> None:
    assert is_one_line(state.problem)
    desired = merge((state,), ListenerOptions())
    assert all(map(is_one_line, desired.problems))
    _check_routes(desired.listeners.values())


def _check_routes(specs: Iterable[ListenerSpec]) -> None:
    """What was made of it can be told to a worker, whole."""
    for spec in specs:
        pack(Update(1, spec.options, tuple(enumerate(spec.backends, 1)), title=str(spec.listen)))


def networks(data: bytes) -> None:
    """The list of networks; from the host it decides which address is chosen."""
    read = _json(data)
    if isinstance(read, list):
        found = documents.networks_of(read)
        assert "" not in found
        assert all(isinstance(each.driver, str) for each in found.values())


def own_id(data: bytes) -> None:
    """mountinfo and cgroup: container names and paths stand in them."""
    mounts, _, cgroup = data.decode(errors="replace").partition("\0")
    found = own_networks.own_container_id(mounts, cgroup)
    assert found is None or len(found) == 64


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


# --- what the user types -----------------------------------------------------------------------


def arguments(data: bytes) -> None:
    """I1: words that end in NUL, as in /proc/PID/cmdline; `NAME=value` before `--env` is environment."""
    words = [word.decode(errors="surrogateescape") for word in data.split(b"\0")]
    environment = {}
    if "--env" in words:
        at = words.index("--env")
        environment = dict(word.split("=", 1) for word in words[:at] if "=" in word)
        words = words[at + 1 :]
    try:
        read = parse_arguments(words, environment)
    except UsageError as error:
        assert is_one_line(str(error))
        assert error.exit_code == 2
        assert error.usage or str(error).endswith("-help")
        return
    except MissingName as error:
        assert error.exit_code == 1
        return
    _check_routes(read.routes)
    assert all(is_one_line(warning) for warning in read.warnings)
    assert 0 <= read.listener.drain < 1 << 32
    assert read.listener.workers >= 1
    if not read.routes and read.program.name:
        assert read.engine.url.startswith(("unix:///", "tcp://"))
    else:
        assert not read.engine.url, "nobody asks an Engine"


def routes(data: bytes) -> None:
    """I1: `PORT/PROTOCOL=ADDRESS:PORT`, one to a line. Digits are 0 to 9 only."""
    specs = data.decode(errors="surrogateescape").split("\n")
    try:
        _check_routes(parse_routes(specs, ListenerOptions()))
    except ValueError as error:
        assert is_one_line(str(error))
        return
    assert all(spec.partition("%")[0].isascii() for spec in specs)


# --- what a person sees ------------------------------------------------------------------------

_WORD = re.compile(r'([\w.-]+)=("(?:[^"\\]|\\.)*"|[^" ]+)')
_WORDS = re.compile(rf"{_WORD.pattern}(?: {_WORD.pattern})*")


def log_line(data: bytes) -> None:
    """I3: one event is one line, whatever is in it, and standard error can take it."""
    for text in _texts(data):
        record = logging.makeLogRecord(
            {
                "name": text,
                "levelno": len(data),
                "msg": text,
                "fields": {text: text, "n": data, "time": 1, "msg": text},
            }
        )
        try:
            raise ValueError(text)
        except ValueError as error:
            record.exc_info = (type(error), error, error.__traceback__)
        line = format_line(record, show_exceptions=True)
        assert line.endswith("\n") and is_one_line(line[:-1])
        assert _WORDS.fullmatch(line[:-1])
        keys = [word[1] for word in _WORD.finditer(line)]
        assert keys[:3] == ["time", "level", "msg"]
        assert keys.count("msg") == 1
        line.encode()


def title(data: bytes) -> None:
    """I3: the kernel's own view of a process whose title holds the text."""
    former = getproctitle()
    try:
        for text in _texts(data):
            set_title(text)
            shown = Path("/proc/self/cmdline").read_bytes().rstrip(b"\0")
            assert shown.startswith(f"{PROGRAM}: "[: len(shown)].encode())
            assert is_one_line(shown.decode(errors="replace"))
    finally:
        setproctitle(former)


def _texts(data: bytes) -> tuple[str, ...]:
    """As a command line gives it, and every code point there is, surrogates among them."""
    wide = data[: len(data) & ~1].decode("utf-16-le", errors="surrogatepass")
    return data.decode(errors="surrogateescape"), wide


DOORS: dict[str, Door] = {
    door.__name__: door
    for door in (
        control, events, document, networks, own_id, arguments, routes, log_line, title,
    )
}  # fmt: skip
