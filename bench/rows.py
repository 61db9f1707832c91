"""The rows of the table: what runs, how long, and what is read off it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import loads
from bench.loads import Aim, Result, Service
from bench.peers import Peer, Relay
from bench.places import Place
from bench.processes import Program

START_S = 2.0  # of a row: its service, and all its relays
OVERHEAD_S = 0.3  # of a sample: starting the load tool, reading /proc, a pause
WARM_UP = 0.4  # length of the round that is thrown away


@dataclass(frozen=True)
class Metric:
    """One figure of a row; `more` is whether more of it is better."""

    key: str
    unit: str
    more: bool
    digits: int = 1


@dataclass(frozen=True)
class Job:
    """One sample to take, of about `seconds`. `relay` runs already, but for special rows and where
    there is none; so do `services`.
    """

    row: Row
    peer: Peer
    place: Place
    relay: Relay | None
    directory: Path
    seconds: float
    services: Sequence[Program] = ()


@dataclass(frozen=True)
class Row:
    """`load` for about `seconds` against `service`, through each peer in turn.

    CPU is reported per `per` units of work, the relay's own and the whole machine's. `rounds` overrides the
    command's number, `discard` the first round's fate. A row of another kind than a load (memory, start-up)
    names its `special`; its `seconds` are then what a sample takes, not what it is asked to take.
    """

    name: str
    title: str
    service: Service
    metrics: tuple[Metric, ...]
    load: Callable[[Aim, float], Result] | None = None
    seconds: float = 1.0
    per: float = 1e6
    cpu_unit: str = "CPU s/M"
    place: str = "loopback"
    rounds: int | None = None
    discard: bool = True
    slow: bool = False  # left out by --quick
    special: str = ""
    alone: bool = (
        False  # each peer runs only for its own samples: ports would not do for all at once
    )
    second: Service | None = None  # another one beside `service`
    only: tuple[str, ...] = ()  # these peers alone
    bar: str = "cpu"  # the figure in the picture

    def takes(self, peer: Peer) -> bool:
        """Whether the row has this peer."""
        if self.service.protocol not in peer.protocols or (
            peer.rows and self.name not in peer.rows
        ):
            return False
        if self.place == "veth" and peer.name not in _VETH:
            return False
        return not self.only or peer.name in self.only

    def sample_seconds(self, scale: float, *, discard: bool = False) -> float:
        """How long a sample is asked to be."""
        if self.special:
            return self.seconds
        whole = self.service in (loads.IPERF, loads.HTTP, loads.SOCKPERF)
        least = 1.0 if whole else 0.3  # these count whole seconds
        return max(least, self.seconds * scale * (WARM_UP if discard else 1))

    def estimate(self, peers: Sequence[Peer], rounds: int, scale: float) -> float:
        """Seconds that the row takes, about."""
        each = (self.rounds or rounds) * (self.sample_seconds(scale) + OVERHEAD_S)
        if self.discard:
            each += self.sample_seconds(scale, discard=True) + OVERHEAD_S
        taken = [peer for peer in peers if self.takes(peer)]
        if self.special == "repoint":  # the others are n/a at once
            taken = [peer for peer in taken if peer.changing or peer.name == "direct"]
        return START_S + each * len(taken)

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        if self.load is None:
            return self.metrics
        return (
            *self.metrics,
            Metric("cpu", self.cpu_unit, more=False, digits=2),
            Metric("machine", f"machine {self.cpu_unit}", more=False, digits=2),
        )


_GBITS = Metric("gbits", "Gbit/s", more=True)
_RATE = Metric("rate", "k/s", more=True)
_P50 = Metric("p50", "p50 us", more=False)
_P99 = Metric("p99", "p99 us", more=False)
_P999 = Metric("p999", "p99.9 us", more=False)
_ERRORS = Metric("errors", "errors", more=False, digits=0)
_LOST = Metric("lost", "lost", more=False, digits=0)


_MANY = (
    "direct",
    "ambassador",
    "other",
    "haproxy",
    "nginx",
    "docker-proxy",
    "envoy",
    "socket-proxyd",
    "traefik",
)
_VETH = (
    "direct",
    "ambassador",
    "other",
    "haproxy",
    "haproxy-auto",
    "nginx",
    "docker-proxy",
    "envoy",
)
_FIRST = ("direct", "ambassador", "other", "haproxy", "haproxy-auto", "nginx")
FLAT = (10, 9000)
"""Connections: cost per operation from the first to the last of these should be flat."""


def _bulk(
    name: str, title: str, *, place: str = "loopback", streams: int = 1, reverse: bool = False
) -> Row:
    load = partial(loads.bulk, streams=streams, reverse=reverse)
    return Row(name, title, loads.IPERF, (_GBITS,), load, per=1e9, cpu_unit="CPU s/GB", place=place)


def _redis(name: str, title: str, *, pipeline: int, place: str = "loopback") -> Row:
    load = partial(loads.redis_get, pipeline=pipeline)
    return Row(name, title, loads.REDIS, (_RATE, _P50, _P99), load, place=place)


def _udp(
    name: str, title: str, *, sockets: int, depth: int, size: int, place: str = "loopback"
) -> Row:
    load = partial(loads.udp_loop, sockets=sockets, depth=depth, size=size)
    return Row(name, title, loads.UDP_ECHO, (_RATE, _LOST), load, place=place)


def _pingpong(name: str, title: str, *, size: int, place: str = "loopback") -> Row:
    load = partial(loads.tcp_loop, connections=1, size=size)
    return Row(name, title, loads.ECHO, (_P50, _P99, _P999), load, place=place)


def _udp_pingpong(name: str, title: str, *, place: str = "loopback") -> Row:
    load = partial(loads.udp_loop, sockets=1, depth=1, size=64)
    return Row(name, title, loads.UDP_ECHO, (_P50, _P99, _P999), load, place=place)


def _connections(count: int) -> Row:
    load = partial(loads.tcp_loop, connections=count, size=64)
    return Row(
        f"conns{count}",
        f"TCP, {count:,} busy connections, 64 B",
        loads.ECHO,
        (_RATE,),
        load,
        slow=True,
        only=_FIRST if count in FLAT else ("direct", "ambassador"),
    )


ROWS = {
    row.name: row
    for row in (
        _bulk("bulk1", "TCP bulk, 1 stream"),
        _bulk("bulk8", "TCP bulk, 8 streams", streams=8),
        _bulk("bulk1r", "TCP bulk, 1 stream, reverse", reverse=True),
        _pingpong("ping64", "TCP ping-pong, 64 B", size=64),
        Row(
            "sockperf", "TCP ping-pong, 64 B, by sockperf", loads.SOCKPERF, (_P50, _P99, _P999),
            partial(loads.sockperf_ping, size=64), slow=True, only=_MANY,
        ),
        _pingpong("ping16k", "TCP ping-pong, 16 kB", size=16_384),
        _redis("redis1", "redis GET, 50 connections", pipeline=1),
        _redis("redis16", "redis GET, 50 connections, pipeline 16", pipeline=16),
        Row("http", "HTTP, Connection: close", loads.HTTP, (_RATE, _ERRORS), loads.http_close),
        Row(
            "http60", "HTTP, Connection: close, 60 s", loads.HTTP, (_RATE, _ERRORS), loads.http_close,
            seconds=60, rounds=1, discard=False, slow=True, only=("ambassador", "nginx"),
        ),
        _udp("udp64", "UDP echo, 64 B, 50 sockets x 8", sockets=50, depth=8, size=64),
        _udp("udp1400", "UDP echo, 1400 B, 4 sockets x 64", sockets=4, depth=64, size=1400),
        _udp_pingpong("udpping", "UDP ping-pong, 64 B"),
        Row(
            "udpbulk", "UDP bulk, GSO sender, 1400 B", loads.UDP_SINK, (_GBITS, _LOST),
            partial(loads.udp_bulk, size=1400, segments=44),
        ),
        Row(
            "fair", "TCP ping-pong 64 B beside a bulk stream", loads.ECHO, (_P50, _P99, _GBITS),
            loads.fairness, bar="p99",
        ),
        _connections(10),
        _connections(100),
        _connections(1000),
        _connections(9000),
        Row(
            "sessions", "UDP echo, 64 B, 10,000 sockets x 1", loads.UDP_ECHO, (_RATE, _LOST),
            partial(loads.udp_loop, sockets=10_000, depth=1, size=64), alone=True, slow=True,
        ),
        Row(
            "idle", "9,000 idle TCP connections", loads.ECHO,
            (
                Metric("opened", "opened", more=True, digits=0),
                Metric("user", "user B each", more=False, digits=0),
                Metric("kernel", "kernel B each", more=False, digits=0),
                Metric("switches", "wake-ups in 2 s", more=False, digits=0),
            ),
            special="idle", seconds=8, only=_MANY, rounds=1, discard=False, bar="user",
        ),
        Row(
            "repoint", "Short connections, the route changed 5 times a second", loads.ECHO,
            (
                _RATE,
                Metric("refused", "refused", more=False, digits=0),
                Metric("cut", "cut", more=False, digits=0),
                _P99,
                Metric("longest", "longest us", more=False, digits=0),
                Metric("cpu", "CPU s/M", more=False, digits=2),
            ),
            special="repoint", seconds=2.4, second=loads.ECHO_2,
        ),
        *(
            Row(
                f"start{ports}", f"Start-up and memory, {ports} TCP port{'s' * (ports > 1)}", loads.ECHO,
                (
                    Metric("ready", "ms to first answer", more=False),
                    Metric("uss", "USS MB", more=False, digits=2),
                    Metric("pss", "PSS MB", more=False, digits=2),
                ),
                special="start", seconds=1 + ports / 50, rounds=1, bar="pss", slow=ports == 10,
            )
            for ports in (1, 10, 100)
        ),
        _bulk("veth-bulk1", "veth: TCP bulk, 1 stream", place="veth"),
        _redis("veth-redis1", "veth: redis GET, 50 connections", pipeline=1, place="veth"),
        Row(
            "veth-http", "veth: HTTP, Connection: close", loads.HTTP, (_RATE, _ERRORS), loads.http_close,
            place="veth",
        ),
        _pingpong("veth-ping64", "veth: TCP ping-pong, 64 B", size=64, place="veth"),
        _udp(
            "veth-udp64", "veth: UDP echo, 64 B, 50 sockets x 8", sockets=50, depth=8, size=64, place="veth",
        ),
        _udp_pingpong("veth-udpping", "veth: UDP ping-pong, 64 B", place="veth"),
    )
}  # fmt: skip
