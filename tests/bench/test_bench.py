"""`make bench` works, and its tables say of samples what they should. Nothing here is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import calls, compare, report
from bench.goals import GOALS
from bench.processes import Failed
from bench.rows import ROWS, Metric
from bench.run import Cell, Run, _check

ROOT = Path(__file__).resolve().parents[2]


def cell(*values: float, faults: tuple[str, ...] = ()) -> Cell:
    samples = [{"round": number, "rate": value} for number, value in enumerate(values, 1)]
    return Cell(samples, list(faults))


def test_a_run_writes_a_record_a_table_and_a_picture(tmp_path: Path) -> None:
    command = "-m bench --no-install --rows udp64 --peers direct,ambassador --rounds 2 --scale 0.3"
    done = subprocess.run(
        [sys.executable, *command.split(), "--output", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    record = json.loads((tmp_path / "results.json").read_text())
    for name in ("direct", "ambassador"):
        cell = record["rows"]["udp64"][name]
        assert not cell["faults"] and not cell["remarks"]
        assert [sample["round"] for sample in cell["samples"]] == [1, 2]  # 0 is thrown away
        assert all(sample["units"] > 0 for sample in cell["samples"])
    assert all(sample["cpu"] > 0 for sample in record["rows"]["udp64"]["ambassador"]["samples"])
    assert {"cpu", "kernel", "congestion", "commit"} <= record["machine"].keys()
    assert "| ambassador |" in (tmp_path / "results.md").read_text()
    ElementTree.parse(tmp_path / "results.svg")
    progress = done.stderr.splitlines()
    assert sum("ambassador " in line for line in progress) == 3


def test_an_unknown_row_is_said() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--no-install", "--rows", "udp65"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no such row or peer: udp65" in done.stderr and "Traceback" not in done.stderr


def test_a_ratio_is_of_samples_of_the_same_round() -> None:
    ours, slowed = cell(10.0, 5.0, 20.0), cell(5.0, 2.5, 20.0)
    assert compare.ratio(ours, slowed, "rate") == 2.0
    late = cell(1.0, 1.0)
    late.samples = [{"round": 3, "rate": 40.0}, {"round": 2}]
    assert compare.ratio(ours, late, "rate") == 0.5
    assert compare.ratio(ours, cell(), "rate") is None


@pytest.mark.parametrize(("more", "best"), [(True, "nginx"), (False, "socat")])
def test_the_best_peer_is_nobody_of_ours_and_without_fault(*, more: bool, best: str) -> None:
    cells = {
        "direct": cell(900.0, 1.0, 1.0),
        "ambassador": cell(800.0),
        "ambassador-2": cell(0.5),
        "ambassador-bare": cell(0.4),
        "nginx": cell(20.0, 30.0, 31.0),
        "socat": cell(10.0, 1000.0, 10.0),
        "envoy": cell(2000.0, faults=("corrupts datagrams",)),
        "traefik": cell(0.1, faults=("delivers twice",)),
        "haproxy": cell(),
    }
    assert (found := compare.best_peer(cells, Metric("rate", "k/s", more=more)))
    assert found[0] == best


def test_a_goal_is_measured_against_the_best_peer_of_its_figure() -> None:
    def of(rate: float, cpu: float) -> Cell:
        return Cell([{"round": number, "rate": rate, "cpu": cpu} for number in (1, 2, 3)])

    cells = {"udp64": {"ambassador": of(80.0, 2.0), "nginx": of(50.0, 9.0), "socat": of(20.0, 4.0)}}
    rate, cpu = (goal for goal in GOALS if goal.row == "udp64")
    assert rate.reached(cells) == 1.6 and rate.holds(1.6) and not rate.holds(1.59)
    assert cpu.reached(cells) == 0.5 and cpu.holds(0.404) and not cpu.holds(0.5)
    assert {goal.row for goal in GOALS if goal.reached(cells) is not None} == {"udp64"}


def test_a_goal_is_missed_where_the_ambassador_is_at_fault(tmp_path: Path) -> None:
    cells = {"ambassador": cell(80.0, faults=("corrupts datagrams",)), "nginx": cell(50.0)}
    run = Run([ROWS["udp64"]], [], 1, tmp_path, cells={"udp64": cells})
    goals = report._goals(run)
    assert len(goals) == 5 + 2  # the table's head, and both goals of the row
    assert all(line.endswith("| at fault | **no** |") for line in goals[5:])
    cells["ambassador"].faults.clear()
    assert [line for line in report._goals(run) if "| 1.60x | yes |" in line]


def test_corruption_is_a_fault_with_its_number() -> None:
    found = cell()
    _check(found, {"units": 100.0, "corrupt": 3.0, "wrong": 0.0})
    _check(found, {"units": 100.0, "corrupt": 4.0})
    assert found.faults == ["corrupts datagrams (3 of 100)"]


def test_calls_are_read_and_what_is_not_named_is_summed_up() -> None:
    text = (
        "# started\n"
        "1000;;raw_syscalls:sys_enter;1;100.00;;\n"
        "600;;syscalls:sys_enter_sendto;1;100.00;;\n"
        "300;;syscalls:sys_enter_epoll_wait;1;100.00;;\n"
        "<not counted>;;syscalls:sys_enter_close;0;100.00;;\n"
    )
    counted = calls._counts(text)
    assert counted["sendto"] == 600 and counted["others"] == 100 and "close" not in counted
    lines = calls._lines({"ambassador": calls.Counted(300.0, counted, {"sendto": 0.5})})
    assert lines[2:] == [
        "| sendto | 2.00 (50%) |",
        "| epoll_wait | 1.00 |",
        "| others | 0.33 |",
        "| all | 3.33 |",
    ]


def test_perf_that_counts_nothing_is_a_failure() -> None:
    with pytest.raises(Failed, match="no permission"):
        calls._counts("no permission to enable syscalls")
