"""The benchmark runs, its UDP load notices every fault, and its tables follow from the samples."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import _load, report
from bench.report import Cell
from bench.rows import ROWS, Metric

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_run_prints_a_table_and_writes_it(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    only = ["--rows", "udp64", "--peers", "direct,ambassador"]
    done = run(*only, "--rounds", "2", "--seconds", "0.3", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == output.read_text().strip()
    lines = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if "|" in line}
    for name in ("direct", "ambassador"):
        assert "±" in lines[name]  # of two rounds: the first is thrown away
        assert lines[name].endswith("|  |"), "a fault"
    assert sum("ambassador " in line for line in done.stderr.splitlines()) == 3


def test_an_unknown_row_is_an_error() -> None:
    done = run("--rows", "udp65")
    assert done.returncode == 2
    assert "no such row or peer: udp65" in done.stderr and "Traceback" not in done.stderr


Answer = Callable[
    [bytes, tuple[str, int], set[tuple[str, int]]], list[tuple[bytes, tuple[str, int]]]
]
FAULTS: dict[str, Answer] = {
    "": lambda data, client, _: [(data, client)],
    "lost": lambda *_: [],
    "twice": lambda data, client, _: [(data, client)] * 2,
    "corrupt": lambda data, client, _: [(data[:-1] + bytes([data[-1] ^ 1]), client)],
    "wrong": lambda data, client, all_: [(data, next(iter(all_ - {client}), client))],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_udp_load_notices(fault: str) -> None:
    """The server makes the fault with every tenth datagram."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(1)

        def serve() -> None:
            seen: set[tuple[str, int]] = set()
            number = 0
            while True:
                try:
                    data, client = server.recvfrom(2048)
                except TimeoutError:
                    return
                seen.add(client)
                number += 1
                answer = FAULTS[fault if number % 10 == 0 else ""]
                for back, to in answer(data, client, seen):
                    server.sendto(back, to)

        thread = threading.Thread(target=serve)
        thread.start()
        clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
        for client in clients:
            client.connect(server.getsockname())
            client.setblocking(False)
        result = _load.udp_exchange([client.fileno() for client in clients], 4, 64, 0.3)
        thread.join()
        for client in clients:
            client.close()
    assert result["delivered"] > 0
    noticed = {key for key in ("lost", "twice", "corrupt", "wrong") if result[key]}
    also = {"lost"} if fault in ("corrupt", "wrong") else set()
    assert noticed == ({fault} if fault else set()) | also


def cell(*values: float, faults: tuple[str, ...] = ()) -> Cell:
    samples = [{"round": number, "rate": value} for number, value in enumerate(values, 1)]
    return Cell(samples, list(faults))


def test_a_ratio_is_of_samples_of_the_same_round() -> None:
    ours, slowed = cell(10.0, 5.0, 20.0), cell(5.0, 2.5, 20.0)
    assert report.ratio(ours, slowed, "rate") == 2.0
    late = cell(1.0, 1.0)
    late.samples = [{"round": 3, "rate": 40.0}, {"round": 2}]
    assert report.ratio(ours, late, "rate") == 0.5
    assert report.ratio(ours, cell(), "rate") is None


@pytest.mark.parametrize(("more", "best"), [(True, "nginx"), (False, "haproxy")])
def test_the_best_peer_is_none_of_ours_and_without_fault(*, more: bool, best: str) -> None:
    cells = {
        "direct": cell(900.0, 1.0, 1.0),
        "ambassador": cell(800.0),
        "ambassador-2": cell(0.5),
        "nginx": cell(20.0, 30.0, 31.0),
        "haproxy": cell(10.0, 1000.0, 10.0),
        "docker-proxy": cell(2000.0, faults=("corrupts datagrams",)),
        "haproxy-auto": cell(),
    }
    assert report.best_peer(cells, Metric("rate", "k/s", more=more)) == best


def test_the_table_says_what_is_aimed_at_and_whether_it_holds() -> None:
    cells = {"ambassador": cell(80.0), "nginx": cell(50.0), "ambassador-2": cell(88.0)}
    text = "\n".join(report.table(ROWS["udp64"], cells))
    assert "| 1.60x nginx |" in text and "| ≥ 1.6x: yes |" in text
    assert "| **ambassador-2 / ambassador** | 1.10x |" in text
    cells["ambassador"] = cell(79.0)
    assert "≥ 1.6x: **no**" in "\n".join(report.table(ROWS["udp64"], cells))
    cells["ambassador"] = cell(80.0, faults=("corrupts datagrams",))
    assert "≥ 1.6x: **no**" in "\n".join(report.table(ROWS["udp64"], cells))


def test_corruption_is_a_fault_with_its_number() -> None:
    found = cell()
    found.add({"units": 100.0, "corrupt": 3.0, "wrong": 0.0})
    found.add({"units": 100.0, "corrupt": 4.0})
    assert found.faults == ["corrupts datagrams (3 of 100)"]
