"""The compiled core's enums say what the tables in Python say: options by number, counters in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ambassador
from ambassador import _worker
from ambassador.counters import COUNTERS
from ambassador.options import ListenerOptions, rows
from ambassador.values import Protocol

CORE = Path(ambassador.__file__).parent
VOCABULARIES = {Protocol.TCP: "_tcp.pxd", Protocol.UDP: "_udp.pxd"}


def enums(path: Path) -> list[dict[str, int]]:
    """Every `cdef enum` of a file whose members are plain numbers or have none: name to value, in order."""
    found = []
    for body in re.findall(r"^cdef enum:.*\n((?:    .*\n)+)", path.read_text(), re.MULTILINE):
        members: dict[str, int] = {}
        number = -1
        for name, value in re.findall(r"^    (\w+)(?: = (\d+))?(?=\s|$)", body, re.MULTILINE):
            number = int(value) if value else number + 1
            members[name] = number
        found.append(members)
    return found


def enum_ending_with(path: Path, last: str) -> dict[str, int]:
    """The members of the enum whose last name is `last`, without that."""
    (members,) = (members for members in enums(path) if [*members][-1] == last)
    del members[last]
    return members


def test_options_have_their_wire_numbers() -> None:
    table = {row.name.upper(): row.wire for row in rows(ListenerOptions) if row.wire}
    assert enum_ending_with(CORE / "_options.pxd", "OPTIONS_END") == table
    assert sorted(table.values()) == list(range(1, len(table) + 1)), "no number is left out"


@pytest.mark.parametrize("protocol", Protocol)
def test_counters_have_their_order(protocol: Protocol) -> None:
    table = {each.name.upper(): number for number, each in enumerate(COUNTERS[protocol])}
    assert enum_ending_with(CORE / VOCABULARIES[protocol], "COUNTERS_END") == table


def test_the_counters_page_has_room() -> None:
    words = _worker.COUNTERS_BYTES // 8
    common = (
        _worker.GENERATION_WORD, _worker.BACKENDS_WORD, _worker.HEARTBEAT_WORD, _worker.SANDBOX_WORD,
    )  # fmt: skip
    assert len({*common}) == len(common)
    assert max(common) < _worker.FIRST_COUNTER
    for table in COUNTERS.values():
        assert _worker.FIRST_COUNTER + len(table) <= words
