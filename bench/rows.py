"""The rows of the table: the servers behind the relay, the loads through it, and what is read off them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from bench.peers import BASE, OURS, Peer, Relay, Route
from bench.places import Place
from bench.processes import Failed, Program, bound, busy_seconds, cpu_seconds, memory_of, tree

FIRST_PORT = 17_200
LIMIT_S = 30.0  # of a load, on top of the time that it is asked to take
REPOINT_S = 2.0
REPOINT_EVERY_S = 0.2
REPOINT_SHARE = 0.1  # of the work that each of two backends must get, if the route really changes
SETTLE_S = 1.0  # from the start of a relay to the reading of its memory

Result = dict[str, float]


@dataclass(frozen=True)
class Service:
    """A server that the loads talk to; `command` gets its host, its port and a directory for its files."""

    name: str
    protocol: str
    port: int
    command: Callable[[str, str, Path], list[str]]

    def start(self, place: Place, directory: Path) -> Program:
        """Return it once it listens. The caller stops it."""
        command = self.command(place.server_address, str(self.port), directory)
        program = Program([*place.server, *command], directory / f"{self.name}.log")
        program.wait_for(lambda: self.port in bound(program.pid, self.protocol))
        return program


def _nginx(host: str, port: str, directory: Path) -> list[str]:
    config, errors = directory / f"http{port}.conf", directory / f"http{port}.errors"
    config.write_text(
        "daemon off; worker_processes 1; user root; worker_rlimit_nofile 20000;\n"
        f"pid {config}.pid; error_log {errors}; events {{ worker_connections 19000; }}\n"
        f"http {{ access_log off; server {{ listen {host}:{port} backlog=4096;\n"
        f'  location / {{ return 200 "{"x" * 128}"; }} }} }}\n'
    )
    return ["/usr/sbin/nginx", "-p", str(directory), "-e", str(errors), "-c", str(config)]


def _redis(host: str, port: str, _: Path) -> list[str]:
    command = ["redis-server", "--bind", host, "--port", port, "--protected-mode", "no"]
    return [*command, "--save", "", "--tcp-backlog", "4096"]


def _iperf(host: str, port: str, _: Path) -> list[str]:
    return ["iperf3", "-s", "-B", host, "-p", port]


def _sockperf(host: str, port: str, _: Path) -> list[str]:
    return ["sockperf", "server", "--tcp", "-i", host, "-p", port]


def _udp_echo(host: str, port: str, _: Path) -> list[str]:
    return [sys.executable, "-m", "bench.agent", "echo", host, port]


REDIS = Service("redis", "tcp", 17001, _redis)
IPERF = Service("iperf", "tcp", 17002, _iperf)
HTTP = Service("http", "tcp", 17003, _nginx)
HTTP_2 = Service("http-2", "tcp", 17004, _nginx)
SOCKPERF = Service("sockperf", "tcp", 17005, _sockperf)
UDP_ECHO = Service("udp-echo", "udp", 17006, _udp_echo)


@dataclass(frozen=True)
class Aim:
    """Where a load goes: to the relay, or to the server itself if there is no relay."""

    place: Place
    host: str
    port: str

    def run(self, seconds: float, *command: str) -> str:
        """Run a load tool at the client's host and return its output."""
        try:
            done = subprocess.run(
                [*self.place.client, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                check=False, timeout=seconds + LIMIT_S,
            )  # fmt: skip
        except (subprocess.TimeoutExpired, OSError) as error:
            raise Failed(str(error)) from error
        if done.returncode:
            words = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
            raise Failed(f"{command[0]}: {words[:160] or done.returncode}")
        return done.stdout


def bulk(aim: Aim, seconds: float) -> Result:
    """iperf3: units are bytes."""
    output = aim.run(
        seconds, "iperf3", "-J", "-c", aim.host, "-p", aim.port, "-t", f"{seconds:.0f}"
    )
    received = json.loads(output)["end"]["sum_received"]
    return {"units": received["bytes"], "gbits": received["bits_per_second"] / 1e9}


def redis_get(aim: Aim, seconds: float) -> Result:
    """redis-benchmark: a fixed number of GETs over 50 connections, about `seconds` long."""
    requests = int(30_000 * seconds)
    output = aim.run(
        seconds, "redis-benchmark", "-h", aim.host, "-p", aim.port, "-t", "get", "-c", "50",
        "-n", str(requests), "--csv",
    )  # fmt: skip
    row = next(csv.DictReader(io.StringIO(output[output.index('"test"') :])))
    latencies = {key: 1e3 * float(row[f"{key}_latency_ms"]) for key in ("p50", "p99")}
    return {"units": requests, "rate": float(row["rps"]) / 1e3, **latencies}


def ping(aim: Aim, seconds: float) -> Result:
    """sockperf: round trips of 64 bytes over one TCP connection."""
    output = aim.run(
        seconds, "sockperf", "ping-pong", "--tcp", "--full-rtt", "-i", aim.host, "-p", aim.port,
        "-t", f"{seconds:.0f}", "-m", "64",
    )  # fmt: skip
    took = dict(re.findall(r"percentile ([\d.]+) = +([\d.]+)", output))
    received = re.search(r"Total Run\].*ReceivedMessages=(\d+)", output)
    if received is None or "50.000" not in took:
        raise Failed("sockperf: no result")
    return {"units": int(received[1]), "p50": float(took["50.000"]), "p99": float(took["99.000"])}


def http_close(aim: Aim, seconds: float, *, clients: int = 50) -> Result:
    """wrk: a new connection for each request. `refused` were not made, `cut` closed before their answer."""
    output = aim.run(
        seconds, "wrk", "-t", "1", "-c", str(clients), "-d", f"{seconds:.0f}s",
        "-H", "Connection: close", f"http://{aim.host}:{aim.port}/",
    )  # fmt: skip
    requests = re.search(r"(\d+) requests in ([\d.]+)s", output)
    if requests is None:
        raise Failed("wrk: no result")
    errors = dict(re.findall(r"(connect|read|write|timeout|responses:) (\d+)", output))
    refused, cut = int(errors.pop("connect", 0)), int(errors.pop("read", 0))
    count, total = int(requests[1]), refused + cut + sum(map(int, errors.values()))
    rate = count / float(requests[2]) / 1e3
    return {"units": count, "rate": rate, "errors": total, "refused": refused, "cut": cut}


def udp_loop(aim: Aim, seconds: float, *, sockets: int, depth: int, size: int) -> Result:
    """Closed loop over UDP (_load.pyx): units are echoes that came back intact."""
    numbers = (str(number) for number in (sockets, depth, size, seconds))
    agent = (sys.executable, "-m", "bench.agent", "exchange", aim.host, aim.port)
    result: Result = json.loads(aim.run(seconds, *agent, *numbers))
    delivered = result["delivered"]
    return result | {"units": delivered, "rate": delivered / result["seconds"] / 1e3}


@dataclass(frozen=True)
class Metric:
    """One figure of a row; `more` is whether more of it is better."""

    key: str
    unit: str
    more: bool = False
    digits: int = 1


@dataclass(frozen=True)
class Job:
    """One sample to take. If the row is a load, `relay` runs already."""

    row: Row
    peer: Peer
    place: Place
    directory: Path
    seconds: float
    services: Sequence[Program] = ()
    relay: Relay | None = None

    def start(self, ports: Sequence[int], services: Sequence[Service]) -> Relay:
        """Return the peer once it listens, with a route for each pair. The caller stops it."""
        pairs, host = zip(ports, services, strict=True), self.place.server_address
        routes = [Route(service.protocol, port, host, service.port) for port, service in pairs]
        return Relay(self.peer, self.place, routes, self.directory / self.peer.name)

    def aim(self) -> Aim:
        if self.relay and self.relay.programs:
            return Aim(self.place, self.place.relay_address, str(self.relay.routes[0].port))
        return Aim(self.place, self.place.server_address, str(self.row.services[0].port))


@dataclass(frozen=True)
class Row:
    """What runs, and what is read off it: a `load` through every peer in turn, or samples by `special`.

    `aims` are what the ambassador aims at, by metric, as multiples of the best peer's figure. CPU is
    counted for `per` units of work. `peers`, if not empty, are the only ones.
    """

    name: str
    title: str
    services: tuple[Service, ...]
    metrics: tuple[Metric, ...]
    load: Callable[[Aim, float], Result] | None = None
    special: Callable[[Job], Result] | None = None
    aims: Mapping[str, float] = field(default_factory=dict)
    per: float = 1e6
    place: str = "loopback"
    peers: tuple[str, ...] = ()

    def takes(self, peer: Peer) -> bool:
        """Whether the row has this peer."""
        if self.services[0].protocol not in peer.protocols:
            return False
        if self.special is repoint and not (peer.reload or peer.name == BASE):
            return False
        return self.name in (peer.rows or {self.name}) and peer.name in (self.peers or {peer.name})

    def sample(self, job: Job) -> Result:
        return self.special(job) if self.special else _measured(job, self.load)


def _measured(job: Job, load: Callable[[Aim, float], Result] | None) -> Result:
    """One load, with the processor time of the relay and of the machine for a unit of its work."""
    assert load
    pids = job.relay.pids if job.relay else []
    used, busy = cpu_seconds(pids), busy_seconds()
    result = load(job.aim(), job.seconds)
    used, busy = cpu_seconds(pids) - used, busy_seconds() - busy
    if result["units"]:
        result["machine"] = busy / result["units"] * job.row.per
        if pids:
            result["cpu"] = used / result["units"] * job.row.per
    return result


def repoint(job: Job) -> Result:
    """Short connections while the route changes between two backends. Without a relay nothing changes."""
    done = threading.Event()

    def change() -> None:
        turns = itertools.cycle(reversed(relay.routes))
        while not done.wait(REPOINT_EVERY_S):
            relay.repoint(next(turns))

    load = partial(http_close, clients=1)
    if job.peer.name == BASE:
        return _measured(job, load)
    relay = job.start([FIRST_PORT] * 2, job.row.services)
    thread = threading.Thread(target=change)
    works = [cpu_seconds([service.pid]) for service in job.services]
    try:
        thread.start()
        result = _measured(replace(job, relay=relay, seconds=max(REPOINT_S, job.seconds)), load)
    finally:
        done.set()
        thread.join()
        relay.stop()
    first, second = (
        cpu_seconds([service.pid]) - work for service, work in zip(job.services, works, strict=True)
    )
    share = second / ((first + second) or 1)
    if not REPOINT_SHARE < share < 1 - REPOINT_SHARE:
        raise Failed(f"the route does not follow: {100 * share:.0f} % to the second backend")
    return result


def memory(job: Job, *, ports: int) -> Result:
    """What an idle relay of so many ports holds. The middle process is a worker of the ambassador's."""
    relay = job.start(range(FIRST_PORT, FIRST_PORT + ports), job.row.services * ports)
    try:
        time.sleep(SETTLE_S)
        used = [memory_of(process.pid) for process in tree(relay.pids)]
    finally:
        relay.stop()
    middle = statistics.median_high(one.uss for one in used)
    return {
        "processes": len(used), "first": used[0].uss / 1e3, "middle": middle / 1e3,
        "uss": sum(one.uss for one in used) / 1e6, "pss": sum(one.pss for one in used) / 1e6,
    }  # fmt: skip


_RATE = Metric("rate", "k/s", more=True)
_P50, _P99 = Metric("p50", "p50 us"), Metric("p99", "p99 us")
_LOST = Metric("lost", "lost", digits=0)
_CPU = Metric("cpu", "CPU s/M", digits=2), Metric("machine", "machine CPU s/M", digits=2)
_CPU_GB = Metric("cpu", "CPU s/GB", digits=2), Metric("machine", "machine CPU s/GB", digits=2)

_LOADS = (
    Row(
        "ping64", "TCP ping-pong, 64 B", (SOCKPERF,), (_P50, _P99, *_CPU), ping,
        aims={"p50": 1.02, "p99": 1.02, "cpu": 0.95},
    ),
    Row(
        "redis1", "redis GET, 50 connections", (REDIS,), (_RATE, _P50, _P99, *_CPU), redis_get,
        aims={"rate": 1.03, "cpu": 0.92},
    ),
    Row(
        "http", "HTTP, Connection: close", (HTTP,), (_RATE, Metric("errors", "errors", digits=0), *_CPU),
        http_close, aims={"rate": 1.03, "cpu": 0.92},
    ),
    Row(
        "bulk1", "TCP bulk, 1 stream", (IPERF,), (Metric("gbits", "Gbit/s", more=True), *_CPU_GB), bulk,
        aims={"gbits": 1.0, "cpu": 1.05}, per=1e9,
    ),
    Row(
        "udp64", "UDP echo, 64 B, 50 sockets x 8", (UDP_ECHO,), (_RATE, _LOST, *_CPU),
        partial(udp_loop, sockets=50, depth=8, size=64), aims={"rate": 1.6, "cpu": 0.4},
    ),
    Row(
        "udp1400", "UDP echo, 1400 B, 4 sockets x 64", (UDP_ECHO,), (_RATE, _LOST, *_CPU),
        partial(udp_loop, sockets=4, depth=64, size=1400), aims={"rate": 1.6, "cpu": 0.4},
    ),
)  # fmt: skip
_REPOINT = Row(
    "repoint", "Short connections, the route changed 5 times a second", (HTTP, HTTP_2),
    (_RATE, Metric("refused", "refused", digits=0), Metric("cut", "cut", digits=0), *_CPU), special=repoint,
)  # fmt: skip
_MEMORY = [
    Row(
        f"memory{ports}", f"Idle memory, TCP ports: {ports}", (REDIS,),
        (
            Metric("processes", "processes", digits=0), Metric("first", "first process, USS kB", digits=0),
            Metric("middle", "middle process, USS kB", digits=0), Metric("uss", "all, USS MB", digits=2),
            Metric("pss", "all, PSS MB", digits=2),
        ),
        special=partial(memory, ports=ports), aims={"pss": 1.0} if ports > 1 else {},
        peers=(OURS, "other", "docker-proxy"),
    )
    for ports in (1, 100)
]  # fmt: skip
_VETH = [
    replace(row, name=f"veth-{row.name}", title=f"veth: {row.title}", place="veth", aims={})
    for row in _LOADS
]
ROWS = {row.name: row for row in (*_LOADS, _REPOINT, *_MEMORY, *_VETH)}
