"""What stands behind the relay (services) and what is sent through it (loads)."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import bound
from bench.peers import ROOT
from bench.places import Place
from bench.processes import Failed, Program

Result = dict[str, float]

# ---------------------------------------------------------------------------------------- services


@dataclass(frozen=True)
class Service:
    """A server that the loads talk to."""

    name: str
    protocol: str
    port: int
    command: Callable[[Service, str, Path], Sequence[str]]

    def start(self, place: Place, directory: Path) -> Program:
        command = [*place.server, *self.command(self, place.server_address, directory)]
        program = Program(
            command, directory / f"{self.name}.log", {"PYTHONPATH": str(ROOT), "PATH": PATH}
        )
        program.wait_for(lambda: self.port in bound(program.pid, self.protocol))
        return program


PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def _agent(verb: str) -> Callable[[Service, str, Path], Sequence[str]]:
    def command(service: Service, host: str, directory: Path) -> Sequence[str]:
        del directory
        options = json.dumps({"host": host, "port": service.port})
        return [sys.executable, "-m", "bench.agent", verb, options]

    return command


def _redis(service: Service, host: str, directory: Path) -> Sequence[str]:
    return [
        "redis-server", "--bind", host, "--port", str(service.port), "--save", "", "--appendonly", "no",
        "--protected-mode", "no", "--maxclients", "19000", "--tcp-backlog", "4096", "--dir", str(directory),
    ]  # fmt: skip


def _iperf(service: Service, host: str, directory: Path) -> Sequence[str]:
    del directory
    return ["iperf3", "-s", "-B", host, "-p", str(service.port)]


def _sockperf(service: Service, host: str, directory: Path) -> Sequence[str]:
    del directory
    return ["sockperf", "server", "--tcp", "-i", host, "-p", str(service.port)]


def _http(service: Service, host: str, directory: Path) -> Sequence[str]:
    config = directory / "http.conf"
    config.write_text(
        "daemon off; worker_processes 1; user root; worker_rlimit_nofile 20000;\n"
        f"pid {directory}/http.pid; error_log {directory}/http.errors;\n"
        "events { worker_connections 19000; }\n"
        "http { access_log off; server {\n"
        f"  listen {host}:{service.port} backlog=4096;\n"
        f'  location / {{ return 200 "{"x" * 128}"; }}\n'
        "} }\n"
    )
    return ["nginx", "-p", str(directory), "-e", f"{directory}/http.errors", "-c", str(config)]


REDIS = Service("redis", "tcp", 17001, _redis)
IPERF = Service("iperf", "tcp", 17002, _iperf)
HTTP = Service("http", "tcp", 17003, _http)
SOCKPERF = Service("sockperf", "tcp", 17008, _sockperf)
ECHO = Service("echo", "tcp", 17004, _agent("serve_tcp"))
ECHO_2 = Service("echo-2", "tcp", 17007, _agent("serve_tcp"))
UDP_ECHO = Service("udp-echo", "udp", 17005, _agent("serve_udp_echo"))
UDP_SINK = Service("udp-sink", "udp", 17006, _agent("serve_udp_sink"))

# ------------------------------------------------------------------------------------------- loads


@dataclass(frozen=True)
class Aim:
    """Where a load goes: the relay's address, or the server's own where there is no relay."""

    place: Place
    host: str
    port: int
    pids: Sequence[int] = ()  # of the relay, for loads that measure a part of what they do


def run(aim: Aim, command: Sequence[str], limit: float) -> str:
    """A load tool at the client's host; what it printed."""
    try:
        done = subprocess.run(
            [*aim.place.client, *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=limit,
            env={"PYTHONPATH": str(ROOT), "PATH": PATH},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{command[0]} was not done after {limit:.0f} s") from error
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Failed(f"{Path(command[0]).name}: {words[-1][:160] if words else done.returncode}")
    return done.stdout


def agent(aim: Aim, verb: str, seconds: float, **options: float | list[int]) -> Result:
    """One of our own generators (bench/agent.py)."""
    text = json.dumps({"host": aim.host, "port": aim.port, "seconds": seconds, **options})
    output = run(aim, [sys.executable, "-m", "bench.agent", verb, text], 2 * seconds + 15)
    result: Result = json.loads(output)
    return result


def bulk(aim: Aim, seconds: float, *, streams: int = 1, reverse: bool = False) -> Result:
    """iperf3: units are bytes."""
    command = ["iperf3", "-J", "-c", aim.host, "-p", str(aim.port)]
    command += ["-t", f"{seconds:.0f}", "-P", str(streams)]
    report = json.loads(run(aim, command + ["-R"] * reverse, seconds + 15))
    if "error" in report:
        raise Failed(f"iperf3: {report['error']}")
    received = report["end"]["sum_received"]
    return {"units": received["bytes"], "gbits": received["bits_per_second"] / 1e9}


def redis_get(aim: Aim, seconds: float, *, pipeline: int) -> Result:
    """redis-benchmark: a fixed number of GETs over 50 connections, about `seconds` long."""
    requests = int((30_000 if pipeline == 1 else 400_000) * seconds)
    output = run(
        aim,
        [
            "redis-benchmark", "-h", aim.host, "-p", str(aim.port), "-t", "get", "-c", "50",
            "-P", str(pipeline), "-n", str(requests), "--csv",
        ],
        8 * seconds + 10,
    )  # fmt: skip
    row = next(csv.DictReader(io.StringIO(output[output.index('"test"') :])))
    return {
        "units": requests,
        "rate": float(row["rps"]) / 1e3,
        "p50": 1e3 * float(row["p50_latency_ms"]),
        "p99": 1e3 * float(row["p99_latency_ms"]),
    }


def sockperf_ping(aim: Aim, seconds: float, *, size: int) -> Result:
    """sockperf: round trips over TCP, as somebody else counts them."""
    output = run(
        aim,
        [
            "sockperf", "ping-pong", "--tcp", "--full-rtt", "-i", aim.host, "-p", str(aim.port),
            "-t", f"{seconds:.0f}", "-m", str(size),
        ],
        seconds + 15,
    )  # fmt: skip
    took = {
        name: float(value) for name, value in re.findall(r"percentile ([\d.]+) = +([\d.]+)", output)
    }
    sent = re.search(r"Total Run\].*ReceivedMessages=(\d+)", output)
    if sent is None or "50.000" not in took:
        raise Failed("sockperf: no result")
    return {"units": int(sent[1])} | {
        key: took[name] for key, name in (("p50", "50.000"), ("p99", "99.000"), ("p999", "99.900"))
    }


def http_close(aim: Aim, seconds: float) -> Result:
    """wrk with a new connection for each request; whatever went wrong is counted."""
    output = run(
        aim,
        [
            "wrk", "-t", "1", "-c", "50", "-d", f"{seconds:.0f}s", "--latency",
            "-H", "Connection: close",
            f"http://{aim.host}:{aim.port}/",
        ],
        seconds + 15,
    )  # fmt: skip
    requests = re.search(r"(\d+) requests in ([\d.]+)(s|m)", output)
    if requests is None:
        raise Failed("wrk: no result")
    errors = sum(
        int(number) for number in re.findall(r"(?:connect|read|write|timeout) (\d+)", output)
    )
    errors += sum(int(number) for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", output))
    took = float(requests[2]) * (60 if requests[3] == "m" else 1)
    count = int(requests[1])
    return {"units": count, "rate": count / took / 1e3, "errors": errors}


def udp_loop(aim: Aim, seconds: float, *, sockets: int, depth: int, size: int) -> Result:
    """Closed loop over UDP: units are echoes that came back intact."""
    return _delivered(agent(aim, "udp_exchange", seconds, sockets=sockets, depth=depth, size=size))


def udp_bulk(aim: Aim, seconds: float, *, size: int, segments: int) -> Result:
    """Runs of datagrams: units are those that reached the sink intact."""
    result = _delivered(
        agent(aim, "udp_blast", seconds, size=size, segments=segments, window=8 * segments)
    )
    return result | {"gbits": 8 * size * result["units"] / result["seconds"] / 1e9}


def tcp_loop(aim: Aim, seconds: float, *, connections: int, size: int) -> Result:
    """Ping-pong over TCP. The processor time is that of the exchange: the connections are open by then."""
    pids = list(aim.pids)
    return _delivered(
        agent(aim, "tcp_exchange", seconds, connections=connections, size=size, pids=pids)
    )


def fairness(aim: Aim, seconds: float) -> Result:
    """A 64-byte ping-pong beside a bulk stream."""
    result = _delivered(agent(aim, "tcp_beside_bulk", seconds, size=64))
    return result | {"gbits": 8 * result["bytes"] / result["bulk_seconds"] / 1e9}


def connects(aim: Aim, seconds: float) -> Result:
    """Short connections one after the other: units are those that were answered."""
    return _delivered(agent(aim, "connect_loop", seconds, every_ms=0))


def _delivered(result: Result) -> Result:
    return result | {
        "units": result["delivered"],
        "rate": result["delivered"] / result["seconds"] / 1e3,
    }
