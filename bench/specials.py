"""Rows that are no load: idle connections, start-up and memory."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from bench import measure
from bench.loads import PATH, Result
from bench.peers import ROOT, Relay, Route
from bench.places import Place
from bench.processes import Failed
from bench.rows import Job

IDLE_CONNECTIONS = 9_000
IDLE_S = 2.0
SPECIAL_PORT = 18_700
MB = 1e6


def idle(job: Job) -> Result:
    """What one of many open and idle connections costs the relay, and how often it wakes up for them.

    Kernel memory is the whole machine's difference, the client's and the server's own sockets included:
    the row without a relay says how much that is, and the report subtracts it.
    """
    row, peer, place, directory = job.row, job.peer, job.place, job.directory
    route = Route("tcp", SPECIAL_PORT, place.server_address, row.service.port)
    started = Relay(peer, place, [route], directory / peer.name)
    started.wait()
    port = route.port if started.pids else row.service.port
    options: dict[str, str | int] = {"host": place.relay_address, "port": port, "connections": 1}
    try:
        _hold(place, options, started)  # once before: what the first connection loads stays
        user_before, kernel_before = measure.memory(started.pids), measure.kernel_memory()
        after = _hold(place, options | {"connections": IDLE_CONNECTIONS}, started)
    finally:
        started.stop()
        time.sleep(1)
    opened = after["opened"]
    return {
        "opened": opened,
        "user": (after["uss"] - user_before.uss) / opened,
        "kernel": (after["kernel"] - kernel_before) / opened,
        "switches": after["switches"],
        "cpu_seconds": after["cpu"],
    }


def _hold(place: Place, options: dict[str, str | int], relay: Relay) -> Result:
    with subprocess.Popen(
        [*place.client, sys.executable, "-m", "bench.agent", "tcp_hold", json.dumps(options)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": str(ROOT), "PATH": PATH},
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        line = holder.stdout.readline()
        opened = json.loads(line or "{}").get("opened", 0)
        if not opened:
            raise Failed("could not open any connection")
        time.sleep(0.5)
        switches, cpu = measure.switches(relay.pids), measure.cpu_seconds(relay.pids)
        time.sleep(IDLE_S)
        return {
            "opened": opened,
            "switches": measure.switches(relay.pids) - switches,
            "cpu": measure.cpu_seconds(relay.pids) - cpu,
            "uss": measure.memory(relay.pids).uss,
            "kernel": measure.kernel_memory(),
        }


def start(job: Job) -> Result:
    """From the start of the first process to a byte relayed through the last port; memory then."""
    row, peer, place = job.row, job.peer, job.place
    ports = int(row.name.removeprefix("start"))
    if peer.name == "direct":
        raise Failed("no relay to start")
    host = place.server_address
    routes = [
        Route("tcp", SPECIAL_PORT + number, host, row.service.port) for number in range(ports)
    ]
    begun = time.monotonic()
    started = Relay(peer, place, routes, job.directory / peer.name)
    try:
        _first_answer(place.relay_address, routes[-1].port)
        ready = time.monotonic() - begun
        time.sleep(0.5)
        used = measure.memory(started.pids)
        processes = len(measure.tree(started.pids))
    finally:
        started.stop()
    return {
        "ready": ready * 1e3,
        "uss": used.uss / MB,
        "pss": used.pss / MB,
        "processes": processes,
    }


def _first_answer(host: str, port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5) as client:
                client.sendall(b"x")
                if client.recv(1) == b"x":
                    return
        except OSError:
            pass
        time.sleep(0.001)
    raise Failed("gave no answer within 10 s of its start")


SAMPLERS: dict[str, Callable[[Job], Result]] = {
    "idle": idle,
    "start": start,
}
