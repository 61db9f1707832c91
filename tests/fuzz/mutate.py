"""Nonsense that is almost sense: a seed of the corpus with some edits.

Which seed and which edits is a list of numbers that hypothesis draws, so it also finds the fewest edits
that still do the damage.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.doors import seeds

TOKENS = (
    b"", b"\0", b"\n", b"\r", b"\x1b[2J", b"\xff\xfe", "\N{RIGHT-TO-LEFT OVERRIDE}".encode(),
    "\u2028".encode(), b"\xed\xa0\x80", b"\\ud800", b"\xff" * 8, b"0", b"-1", b"65536", b"4294967296",
    b"9" * 5000, b"{", b"}", b"[" * 300, b'"', b"null", b"1e999", b"NaN", b"%", b"%eth0", b"%1", b"::",
    b"/", b"=", b":", b"-", b"--", b"relay", b"[", b"]", b"@", b"unix://", b"tcp://", b"http://",
    b"1h1ms", b"x" * 5000, b"\x01\x02\0\0", b"\x60\xea\0\0", b"\xff\xff\xff\xff",
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1 << 70, 1.5, float("nan"), "", "\n", "\ud800", "x" * 5000, "::1",
    "fe80::1%eth0", "fe80::1%9", "fe80::1%-1", "10.0.0.5", "0.0.0.0", "container:", "container:\ud800",
    "host", [], {},
    [None], {"": None}, {"6379/tcp": {}}, {"1-65535": None}, {"٣/tcp": None}, "٣", "9999-12-31T23:59:59Z",
    "0001-01-01T00:00:00+14:00", "2026-02-30T00:00:00Z",
)  # fmt: skip

Edit = tuple[int, int, int, int]
_number = st.integers(0, 1 << 20)
_edits = st.lists(st.tuples(st.integers(0, 5), _number, _number, _number), max_size=6)


def nonsense(door: str) -> st.SearchStrategy[bytes]:
    """For the door of this name: edited seeds, and now and then plain noise."""
    corpus = [path.read_bytes() for path in seeds(door)]
    edited = st.builds(
        edit,
        st.sampled_from(corpus),
        st.sampled_from(corpus),
        _edits,
    )
    return st.one_of(edited, edited, edited, edited, st.binary(max_size=200))


def edit(data: bytes, other: bytes, edits: list[Edit]) -> bytes:
    for kind, a, b, c in edits:
        at = a % (len(data) + 1)
        to = at + b % (len(data) - at + 1)
        if kind == 0:
            data = data[:at] + TOKENS[b % len(TOKENS)] + data[at:]
        elif kind == 1:
            data = data[:at] + TOKENS[c % len(TOKENS)] + data[to:]
        elif kind == 2:
            data = data[:at] + data[to:]
        elif kind == 3:
            data = data[:at] + other[c % (len(other) + 1) :][: b % 400] + data[at:]
        elif kind == 4 and data:
            data = data[: at - 1] + bytes([b % 256]) + data[at:] if at else data
        else:
            data = _edit_json(data, a, b, c)
    return data


def _edit_json(data: bytes, a: int, b: int, c: int) -> bytes:
    """Another value somewhere in it, or another key; unchanged where it is no JSON."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = list(_places(root))
    if not places:
        return data
    holder, key = places[a % len(places)]
    value = VALUES[b % len(VALUES)]
    if isinstance(holder, dict) and c % 4 == 0 and isinstance(value, str):
        holder[value] = holder.pop(key)
    elif c % 4 == 1:
        other, place = places[c // 4 % len(places)]
        holder[key] = json.loads(json.dumps(other[place]))
    else:
        holder[key] = value
    return json.dumps(root).encode()


def _places(value: Any) -> Any:
    """Every (dict or list, key or index) below a value."""
    if isinstance(value, dict | list):
        for key, below in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(below)
