"""Rows that are no load: idle connections, start-up and memory."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from bench import measure
from bench.loads import PATH, Aim, Result, connects
from bench.peers import ROOT, Changing, Relay, Route
from bench.places import Place
from bench.processes import Failed, NotMeant
from bench.rows import Job

IDLE_CONNECTIONS = 9_000
IDLE_S = 2.0
CHANGE_S = 0.2
REPOINT_S = 2.0
SHARE = 0.2  # of the work that each of two backends must get, if the route really changes
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
        raise NotMeant("no relay to start")
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


def repoint(job: Job) -> Result:
    """Short connections while the route goes back and forth between two backends.

    Without a relay there is nothing to change: that is what the load and the backends can do.
    """
    row, place, changing = job.row, job.place, job.peer.changing
    assert row.second is not None
    host = place.server_address
    routes = [
        Route("tcp", SPECIAL_PORT, host, port) for port in (row.service.port, row.second.port)
    ]
    if job.peer.name == "direct":
        return connects(Aim(place, host, row.service.port), REPOINT_S)
    if changing is None:
        raise NotMeant("its route is fixed when it starts")
    relay = Relay(job.peer, place, routes, job.directory / job.peer.name, changing.start)
    relay.wait()
    done = threading.Event()
    thread = threading.Thread(target=_change, args=(changing, relay, routes, done))
    works = [measure.cpu_seconds([service.pid]) for service in job.services]
    before = measure.cpu_seconds(relay.pids)
    try:
        thread.start()
        result = connects(Aim(place, place.relay_address, SPECIAL_PORT), REPOINT_S)
    finally:
        done.set()
        thread.join()
        used = measure.cpu_seconds(relay.pids) - before
        relay.stop()
    first, second = (
        measure.cpu_seconds([service.pid]) - work
        for service, work in zip(job.services, works, strict=True)
    )
    share = second / (first + second) if first + second else 0.0
    if not SHARE < share < 1 - SHARE:
        raise Failed(f"the route does not follow: {100 * share:.0f} % to the second backend")
    result |= {"cpu_seconds": used, "second_backend": share}
    return result | ({"cpu": used / result["units"] * row.per} if result["units"] else {})


def _change(changing: Changing, relay: Relay, routes: list[Route], done: threading.Event) -> None:
    turns = itertools.cycle([*routes[1:], routes[0]])
    while not done.wait(CHANGE_S):
        changing.change(relay, next(turns))


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
    "repoint": repoint,
}
