"""The help and the documents: printed from the tables, and the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from ambassador.cli.follow import follow_usage
from ambassador.cli.relay import relay_usage
from ambassador.cli.usage import flag_lines, reference
from ambassador.counters import COUNTERS
from ambassador.options import ListenerOptions, all_rows, rows

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_is_printed_from_the_tables() -> None:
    assert (ROOT / "docs/reference.md").read_text() == reference(), "run: make reference"


def test_the_readme_has_the_help() -> None:
    text = (ROOT / "README.md").read_text()
    assert f"```\n{follow_usage()}```\n" in text, "put there what grand-ambassador -help prints"


@pytest.mark.parametrize("usage", [follow_usage(), relay_usage()], ids=["follow", "relay"])
def test_usage_fits_a_terminal(usage: str) -> None:
    assert max(map(len, usage.splitlines())) <= 100
    assert usage.endswith("\n")


def test_usage_names_every_flag_and_the_reference_every_row() -> None:
    for row in all_rows():
        assert (f"\n  -{row.key} " in follow_usage()) == row.flag
        assert (f"\n  -{row.key} " in relay_usage()) == (row.flag and row.relay)
        for name in (f"-{row.key}", row.variable, row.label_key) if row.flag else (row.name,):
            assert not name or f"`{name}`" in reference()
        assert row.doc in reference()
    for counters in COUNTERS.values():
        assert all(f"`{each.name}`" in reference() for each in counters)


def test_which_flags_the_two_forms_take() -> None:
    original = {"name", "sock", "wait", "tls", "tlsverify", "tlscert", "tlskey", "tlscacert"}
    both = {"log-level", "version", "sandbox"} | {row.key for row in rows(ListenerOptions)}
    flags = {row.key: row.relay for row in all_rows() if row.flag}
    assert original < flags.keys()
    assert {key for key, relay in flags.items() if relay} == both & flags.keys()


def test_the_flags_are_an_aligned_table_sorted_by_name() -> None:
    named = {row.name: row for row in all_rows()}
    assert flag_lines([named["wait"], named["sock"], named["hold"], named["max_held"]]) == (
        "  -help           print this text\n"
        "  -hold DURATION  how long new connections wait for a backend (default 10s)\n"
        "  -sock ADDRESS   path or URL of the Docker Engine (default /var/run/docker.sock)\n"
        "  -wait           deprecated: an absent container is always waited for\n"
    )
