"""Parsing an event stream that is cut anywhere, and the containers of an event."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.discovery.events import (
    FILTERS,
    NOBODY,
    EventParser,
    Loss,
    Subject,
    loss,
    start,
    subject,
)

RECORDED = (Path(__file__).parent / "documents" / "events-20.10.jsonl").read_bytes()
EVENTS = [json.loads(line) for line in RECORDED.splitlines()]
ID = "d0" * 32


def parsed(*pieces: bytes, max_record: int = 1 << 18) -> list[Any]:
    parser = EventParser(max_record)
    return [value for piece in pieces for value in parser.feed(piece)]


# --- the parser --------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(0, len(RECORDED)), max_size=30))
def test_the_cuts_do_not_matter(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(RECORDED)]
    pieces = [RECORDED[a:b] for a, b in itertools.pairwise(edges)]
    assert parsed(*pieces) == EVENTS


def test_one_byte_at_a_time() -> None:
    data = '{"a":"é"}\n{"b":[{}]}'.encode()
    assert parsed(*(bytes([byte]) for byte in data)) == [{"a": "é"}, {"b": [{}]}]


def test_records_without_newlines() -> None:
    assert parsed(b'{"a":1}{"b":2} {"c"', b":3}") == [{"a": 1}, {"b": 2}, {"c": 3}]


@pytest.mark.parametrize("junk", [b"junk", b"<html>", b'{"cut":', b"}", b"\xff\xfe", b'{"a":1'])
def test_junk_is_one_none_and_the_stream_goes_on(junk: bytes) -> None:
    assert parsed(junk + b'\n{"b":2}\n') == [None, {"b": 2}]


def test_blank_lines_are_nothing() -> None:
    assert parsed(b"\n\r\n  \n", b'{"a":1}\n\n') == [{"a": 1}]


def test_bytes_that_are_no_utf8_stay_inside_their_record() -> None:
    (value,) = parsed(b'{"name":"\xff\xfe"}\n')
    assert value == {"name": "\N{REPLACEMENT CHARACTER}" * 2}


def test_memory_is_bounded() -> None:
    parser = EventParser(max_record=1000)
    values = [value for _ in range(100) for value in parser.feed(b'{"a":"' + b"x" * 100)]
    assert values and set(values) == {None}
    assert len(parser._buffer) <= 1000 + 106


def test_deep_nesting_is_junk_not_a_crash() -> None:
    assert parsed(b"[" * 100_000 + b"\n" + b'{"a":1}\n') == [None, {"a": 1}]


# --- the containers of an event -----------------------------------------------------------------


def container_event(**changes: Any) -> dict[str, Any]:
    event = {
        "Type": "container",
        "Action": "start",
        "Actor": {"ID": ID, "Attributes": {"name": "web", "image": "x"}},
    }
    return event | changes


def test_recorded_events() -> None:
    subjects = [subject(event) for event in EVENTS]
    assert None not in subjects
    web, two = EVENTS[0]["Actor"]["ID"], EVENTS[-1]["Actor"]["ID"]
    assert [next(iter(who.ids)) for who in subjects if who] == [web] * 7 + [two] * 5
    assert subjects[-1] == Subject(frozenset({two}), frozenset({"two", "deux"}))
    network = next(
        who for who, event in zip(subjects, EVENTS, strict=True) if event["Type"] == "network"
    )
    assert network == Subject(frozenset({web}), frozenset())


def test_podmans_network_event_has_the_container_as_its_id() -> None:
    event = {
        "Type": "network",
        "Action": "connect",
        "Actor": {"ID": ID, "Attributes": {"name": "", "image": "", "network": "back"}},
    }
    assert subject(event) == Subject(frozenset({ID}), frozenset())


@pytest.mark.parametrize(
    "event",
    [
        None,
        3,
        "start",
        [],
        {},
        {"status": "start", "id": ID},
        container_event(Type="volume"),
        container_event(Type=None),
        container_event(Type=[]),
        container_event(Actor=None),
        container_event(Actor={"ID": ID}),
        container_event(Actor={"ID": ID, "Attributes": {}}),
        container_event(Actor={"ID": ID, "Attributes": {"name": {}}}),
        container_event(Actor={"ID": 7, "Attributes": {"name": "web"}}),
        container_event(Actor={"ID": "", "Attributes": {"name": "web"}}),
        {
            "Type": "network",
            "Action": "disconnect",
            "Actor": {"ID": "n", "Attributes": {"name": "back"}},
        },
        {"Type": "network", "Actor": {"ID": "n", "Attributes": {"container": 5}}},
        {"Type": "network", "Actor": {"ID": "n", "Attributes": {"container": {}}}},
    ],
)
def test_an_unknown_event_concerns_every_target(event: object) -> None:
    assert subject(event) is None


@pytest.mark.parametrize("action", ["create", "destroy", "remove"])
def test_a_network_alone_concerns_nobody(action: str) -> None:
    """Builds make and remove networks all day; to have every target inspected took two thirds of a core."""
    actor = {"ID": "n", "Attributes": {"name": "back", "type": "bridge"}}
    assert subject({"Type": "network", "Action": action, "Actor": actor}) == NOBODY


def test_filters() -> None:
    asked = set(FILTERS["event"])
    assert {"die", "died", "start", "destroy", "rename", "connect", "disconnect"} <= asked
    # A health check makes three exec events every few seconds; a signal is no death.
    assert not {name for name in asked if name.startswith("exec")}
    assert "kill" not in asked
    assert FILTERS["type"] == ["container", "network"]


# --- losses and starts ----------------------------------------------------------------------------

DIE = {
    "Type": "container",
    "Action": "die",
    "Actor": {"ID": "a" * 64, "Attributes": {"name": "web"}},
    "timeNano": 1_700_000_000_000_000_007,
}
AT = 1_700_000_000_000_000_007
LEAVE = {
    "Type": "network",
    "Action": "disconnect",
    "Actor": {"ID": "n" * 64, "Attributes": {"name": "back", "container": ID}},
    "timeNano": AT,
}


@pytest.mark.parametrize("action", ["die", "died", "destroy", "remove"])
def test_an_end_names_the_container_and_the_moment(action: str) -> None:
    assert loss({**DIE, "Action": action}) == Loss("a" * 64, AT)
    assert loss({**DIE, "Action": action, "timeNano": "soon"}) == Loss("a" * 64, 0)


def test_a_disconnect_names_the_network() -> None:
    assert loss(LEAVE) == Loss(ID, AT, network="n" * 64)
    podman = {"ID": ID, "Attributes": {"network": "back"}}
    assert loss({**LEAVE, "Actor": podman}) == Loss(ID, AT, network="back")


def test_a_rename_names_the_old_name() -> None:
    actor = {"ID": ID, "Attributes": {"name": "new", "oldName": "/web"}}
    assert loss({**DIE, "Action": "rename", "Actor": actor}) == Loss(ID, AT, old_name="web")


@pytest.mark.parametrize(
    "event",
    [
        {**DIE, "Action": "kill"},
        {**DIE, "Action": "rename"},
        {**DIE, "Action": []},
        {**DIE, "Type": "network"},
        {**LEAVE, "Action": "connect"},
        {**LEAVE, "Action": "destroy"},
        {**LEAVE, "Actor": {"ID": 7, "Attributes": {"container": ID}}},
        {**DIE, "Actor": None},
        None,
        [],
    ],
)
def test_nothing_else_is_a_loss(event: object) -> None:
    assert loss(event) is None


def test_a_start() -> None:
    assert start({**DIE, "Action": "start"}) == ("a" * 64, AT)
    assert start(DIE) is None
    assert start({**LEAVE, "Action": "start"}) is None
    assert start(None) is None
