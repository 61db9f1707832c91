"""The relays: how each is configured (the best we know of), started and stopped.

All get one thread, the same limit of descriptors and the same routes. What is particular about a peer
stands with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.measure import bound
from bench.places import Place
from bench.processes import Failed, Program

ROOT = Path(__file__).resolve().parent.parent
IDLE_S = 90  # of a UDP session, for all that have such a limit
CONNECTIONS = 9_200  # at once: two descriptors each, within a hard limit of 20,000
VARIANTS = {"ambassador-2": "-workers 2", "ambassador-bare": "-sandbox off"}
"""The ambassador with these flags: nobody's peer."""


@dataclass(frozen=True)
class Route:
    """Relay `port` to `host`:`to`."""

    protocol: str
    port: int
    host: str
    to: int


Starter = Callable[[Place, Sequence[Route], Path], list[Program]]


@dataclass(frozen=True)
class Changing:
    """How a peer whose route can change while it runs is started, and how it changes.

    `start` gets both routes and takes the first; `change` is called with each in turn.
    """

    start: Starter
    change: Callable[[Relay, Route], None]


@dataclass(frozen=True)
class Peer:
    """`programs` must exist; `start` returns the running relay's programs (none: no relay at all)."""

    name: str
    protocols: frozenset[str]
    programs: tuple[str, ...]
    version: tuple[str, ...]
    start: Starter
    note: str = ""
    rows: frozenset[str] = frozenset()  # the only ones it takes part in
    changing: Changing | None = None

    def missing(self) -> str | None:
        return next((path for path in self.programs if not Path(path).exists()), None)

    def read_version(self) -> str:
        if self.missing() or not self.version:
            return ""
        done = subprocess.run(self.version, capture_output=True, text=True, check=False, timeout=20)
        return next(
            (line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()), ""
        )


class Relay:
    """A peer that runs, with its routes open."""

    def __init__(
        self,
        peer: Peer,
        place: Place,
        routes: Sequence[Route],
        directory: Path,
        start: Starter | None = None,
    ) -> None:
        missing = peer.missing()
        if missing:
            raise Failed(f"not installed: {missing}")
        directory.mkdir(parents=True, exist_ok=True)
        self.place, self.directory = place, directory
        self.routes = routes
        self.programs = (start or peer.start)(place, routes, directory)

    def wait(self) -> None:
        """Until all its ports are open; stops it and raises if that does not happen."""
        try:
            for program in self.programs:
                program.wait_for(lambda program=program: self._open(program))  # type: ignore[misc]
        except Failed:
            self.stop()
            raise

    def _open(self, program: Program) -> bool:
        for protocol in {route.protocol for route in self.routes}:
            wanted = {route.port for route in self.routes if route.protocol == protocol}
            if not wanted <= bound(program.pid, protocol):
                return False
        return True

    @property
    def pids(self) -> list[int]:
        return [program.pid for program in self.programs]

    def stop(self) -> None:
        for program in self.programs:
            program.stop()


# ------------------------------------------------------------------------------------- one each


def _direct(place: Place, routes: Sequence[Route], directory: Path) -> list[Program]:
    del place, routes, directory
    return []


def _ambassador(
    place: Place,
    routes: Sequence[Route],
    directory: Path,
    *,
    options: Sequence[str] = (),
    root: Path = ROOT,
) -> list[Program]:
    arguments = [f"{route.port}/{route.protocol}={route.host}:{route.to}" for route in routes]
    # -P: what the folder we stand in holds is not what is asked for.
    command = [*place.relay, sys.executable, "-P", "-m", "ambassador", "relay"]
    command += [*options, *arguments]
    return [Program(command, directory / "log", {**os.environ, "PYTHONPATH": str(root)})]


def _ambassador_changing(place: Place, routes: Sequence[Route], directory: Path) -> list[Program]:
    backends = [f"{route.host}:{route.to}" for route in routes]
    command = [sys.executable, "-m", "bench.repoint", str(routes[0].port), *backends]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return [Program([*place.relay, *command], directory / "log", environment)]


def _ambassador_change(relay: Relay, route: Route) -> None:
    del route  # it knows
    os.kill(relay.pids[0], signal.SIGUSR1)


def _haproxy(
    place: Place, routes: Sequence[Route], directory: Path, *, auto: bool = False
) -> list[Program]:
    config = _haproxy_config(place, routes, directory, auto=auto)
    return [Program([*place.relay, "/usr/sbin/haproxy", "-db", "-f", config], directory / "log")]


def _haproxy_config(
    place: Place, routes: Sequence[Route], directory: Path, *, auto: bool = False
) -> str:
    lines = [
        "global",
        "  nbthread 1",
        f"  maxconn {CONNECTIONS}",
        "  maxpipes 500",
        "  tune.pipesize 1048576",
        "defaults",
        "  mode tcp",
        *(
            ["  option splice-auto"]
            if auto
            else ["  option splice-request", "  option splice-response"]
        ),
        "  timeout connect 5s",
        "  timeout client 1h",
        "  timeout server 1h",
    ]
    for route in routes:
        lines += [
            f"listen l{route.port}",
            f"  bind {place.relay_address}:{route.port}",
            f"  server s {route.host}:{route.to}",
        ]
    return _write(directory / "haproxy.cfg", lines)


def _haproxy_changing(place: Place, routes: Sequence[Route], directory: Path) -> list[Program]:
    config = _haproxy_config(place, routes[:1], directory)
    return [Program([*place.relay, "/usr/sbin/haproxy", "-W", "-f", config], directory / "log")]


def _haproxy_change(relay: Relay, route: Route) -> None:
    _haproxy_config(relay.place, [route], relay.directory)
    os.kill(relay.pids[0], signal.SIGUSR2)


def _nginx(place: Place, routes: Sequence[Route], directory: Path) -> list[Program]:
    config = _nginx_config(place, routes, directory)
    command = ["/usr/sbin/nginx", "-p", str(directory), "-e", f"{directory}/errors", "-c", config]
    return [Program([*place.relay, *command], directory / "log")]


def _nginx_changing(place: Place, routes: Sequence[Route], directory: Path) -> list[Program]:
    return _nginx(place, routes[:1], directory)


def _nginx_change(relay: Relay, route: Route) -> None:
    _nginx_config(relay.place, [route], relay.directory)
    os.kill(relay.pids[0], signal.SIGHUP)


def _nginx_config(place: Place, routes: Sequence[Route], directory: Path) -> str:
    lines = [
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;",
        "daemon off;",
        "user root;",
        "worker_processes 1;",
        "worker_rlimit_nofile 20000;",
        f"pid {directory}/pid;",
        f"error_log {directory}/errors warn;",
        "events { worker_connections 40000; }",
        "stream {",
        "  tcp_nodelay on;",
        "  proxy_buffer_size 64k;",
    ]
    for route in routes:
        kind = " udp" if route.protocol == "udp" else " backlog=4096"
        wait = IDLE_S if route.protocol == "udp" else 3600
        lines.append(
            f"  server {{ listen {place.relay_address}:{route.port}{kind}; "
            f"proxy_pass {route.host}:{route.to}; proxy_timeout {wait}s; }}"
        )
    return _write(directory / "nginx.conf", [*lines, "}"])


def _socat(place: Place, routes: Sequence[Route], directory: Path) -> list[Program]:
    programs = []
    for route in routes:
        if route.protocol == "tcp":
            here = f"TCP4-LISTEN:{route.port},bind={place.relay_address},fork,reuseaddr,backlog=4096,nodelay"
            there = f"TCP4:{route.host}:{route.to},nodelay"
            options = ["-b", "65536"]
        else:
            here = f"UDP4-LISTEN:{route.port},bind={place.relay_address},fork,reuseaddr"
            there = f"UDP4:{route.host}:{route.to}"
            options = ["-b", "65536", "-T", str(IDLE_S)]
        command = [*place.relay, "/usr/bin/socat", *options, here, there]
        programs.append(Program(command, directory / f"log.{route.port}"))
    return programs


def _socket_proxyd(place: Place, routes: Sequence[Route], directory: Path) -> list[Program]:
    programs = []
    for route in routes:
        command = [
            *place.relay,
            "/usr/bin/systemd-socket-activate",
            f"--listen={place.relay_address}:{route.port}",
            "/lib/systemd/systemd-socket-proxyd",
            f"--connections-max={CONNECTIONS}",
            f"{route.host}:{route.to}",
        ]
        programs.append(Program(command, directory / f"log.{route.port}"))
    return programs


def _docker_proxy(place: Place, routes: Sequence[Route], directory: Path) -> list[Program]:
    programs = []
    for route in routes:
        # dockerd gives it a pipe as descriptor 3 to say "0" to; without one it would write into another.
        command = [
            *place.relay, "sh", "-c", 'exec "$@" 3>/dev/null', "sh", "/usr/sbin/docker-proxy",
            "-proto", route.protocol, "-host-ip", place.relay_address, "-host-port", str(route.port),
            "-container-ip", route.host, "-container-port", str(route.to),
        ]  # fmt: skip
        programs.append(Program(command, directory / f"log.{route.port}"))
    return programs


def _envoy(place: Place, routes: Sequence[Route], directory: Path) -> list[Program]:
    listeners, clusters = [], []
    for route in routes:
        name = f"{route.protocol}{route.port}"
        here = _envoy_address(route.protocol, place.relay_address, route.port)
        there = _envoy_address(route.protocol, route.host, route.to)
        listeners.append(
            {"name": name, "address": here, "filter_chains": [{"filters": [_envoy_tcp(name)]}]}
            if route.protocol == "tcp"
            else {
                "name": name,
                "address": here,
                "udp_listener_config": {"downstream_socket_config": {"prefer_gro": True}},
                "listener_filters": [_envoy_udp(name)],
            }
        )
        breakers = {"thresholds": [{"max_connections": 20000, "max_pending_requests": 20000}]}
        endpoints = [{"lb_endpoints": [{"endpoint": {"address": there}}]}]
        clusters.append(
            {
                "name": name,
                "type": "STATIC",
                "connect_timeout": "5s",
                "circuit_breakers": breakers,
                "load_assignment": {"cluster_name": name, "endpoints": endpoints},
            }
        )
    config = _write(
        directory / "envoy.json",
        [json.dumps({"static_resources": {"listeners": listeners, "clusters": clusters}})],
    )
    command = [
        *place.relay, str(_script("envoy")), "-c", config, "--concurrency", "1",
        "--use-dynamic-base-id", "-l", "error",
    ]  # fmt: skip
    return [Program(command, directory / "log")]


_ENVOY_TYPES = "type.googleapis.com/envoy.extensions.filters"


def _envoy_tcp(name: str) -> dict[str, object]:
    config = {
        "@type": f"{_ENVOY_TYPES}.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": name,
        "cluster": name,
    }
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": config}


def _envoy_udp(name: str) -> dict[str, object]:
    to = {"@type": f"{_ENVOY_TYPES}.udp.udp_proxy.v3.Route", "cluster": name}
    config = {
        "@type": f"{_ENVOY_TYPES}.udp.udp_proxy.v3.UdpProxyConfig",
        "stat_prefix": name,
        "idle_timeout": f"{IDLE_S}s",
        "upstream_socket_config": {"prefer_gro": True},
        "matcher": {"on_no_match": {"action": {"name": "route", "typed_config": to}}},
    }
    return {"name": "envoy.filters.udp_listener.udp_proxy", "typed_config": config}


def _envoy_address(protocol: str, host: str, port: int) -> dict[str, object]:
    return {"socket_address": {"protocol": protocol.upper(), "address": host, "port_value": port}}


def _traefik(place: Place, routes: Sequence[Route], directory: Path) -> list[Program]:
    entries: dict[str, object] = {}
    dynamic: dict[str, dict[str, dict[str, object]]] = {}
    for route in routes:
        name = f"{route.protocol}{route.port}"
        entries[name] = {
            "address": f"{place.relay_address}:{route.port}/{route.protocol}",
            "udp": {"timeout": f"{IDLE_S}s"},
        }
        part = dynamic.setdefault(route.protocol, {"routers": {}, "services": {}})
        router: dict[str, object] = {"entryPoints": [name], "service": name}
        if route.protocol == "tcp":
            router["rule"] = "HostSNI(`*`)"
        part["routers"][name] = router
        part["services"][name] = {
            "loadBalancer": {"servers": [{"address": f"{route.host}:{route.to}"}]}
        }
    # JSON is YAML, and Traefik takes the format from the name.
    dynamic_file = _write(directory / "dynamic.yml", [json.dumps(dynamic)])
    static = {
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
        "log": {"level": "ERROR"},
        "entryPoints": entries,
        "providers": {"file": {"filename": dynamic_file, "watch": False}},
    }
    config = _write(directory / "static.yml", [json.dumps(static)])
    return [
        Program(
            [*place.relay, str(_script("traefik")), f"--configFile={config}"], directory / "log"
        )
    ]


def _write(path: Path, lines: Sequence[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def _script(name: str) -> Path:
    return Path(os.environ.get("BENCH_SCRIPTS", Path(sys.executable).parent)) / name


_BOTH = frozenset({"tcp", "udp"})
_TCP = frozenset({"tcp"})
_PROXYD = "/lib/systemd/systemd-socket-proxyd"


def _variant(name: str, *rows: str) -> Peer:
    flags = VARIANTS[name]
    run = partial(_ambassador, options=flags.split())
    return Peer(
        name, _BOTH, (sys.executable,), (), run, f"{flags}; no peer to itself", frozenset(rows)
    )


PEERS = {
    peer.name: peer
    for peer in (
        Peer("direct", _BOTH, (), (), _direct, "no relay at all"),
        Peer(
            "ambassador", _BOTH, (sys.executable,),
            (sys.executable, "-m", "ambassador", "-version"), _ambassador, "one worker",
            changing=Changing(_ambassador_changing, _ambassador_change),
        ),
        _variant("ambassador-2", "redis1", "http", "udp64"),
        _variant("ambassador-bare", "redis1", "ping64", "http", "udp64", "udpping"),
        Peer(
            "haproxy", _TCP, ("/usr/sbin/haproxy",), ("/usr/sbin/haproxy", "-v"), _haproxy,
            "splice both ways, pipes of 1 MB, one thread",
            changing=Changing(_haproxy_changing, _haproxy_change),
        ),
        Peer(
            "haproxy-auto", _TCP, ("/usr/sbin/haproxy",), ("/usr/sbin/haproxy", "-v"),
            partial(_haproxy, auto=True), "splice-auto, pipes of 1 MB, one thread",
        ),
        Peer(
            "nginx", _BOTH, ("/usr/sbin/nginx", "/usr/lib/nginx/modules/ngx_stream_module.so"),
            ("/usr/sbin/nginx", "-v"), _nginx, "stream, one worker process, buffers of 64 KB",
            changing=Changing(_nginx_changing, _nginx_change),
        ),
        Peer(
            "docker-proxy", _BOTH, ("/usr/sbin/docker-proxy",),
            ("dpkg-query", "-W", "-f", "docker.io ${Version}\n", "docker.io"), _docker_proxy,
            "as dockerd starts it: a process for each port, Go threads on all cores",
        ),
        Peer(
            "envoy", _BOTH, (str(_script("envoy")),), (str(_script("envoy")), "--version"), _envoy,
            "one worker thread, GRO where it has it",
        ),
        Peer(
            "socat", _BOTH, ("/usr/bin/socat",), ("/usr/bin/socat", "-V"), _socat,
            "a process per connection",
        ),
        Peer(
            "socket-proxyd", _TCP, (_PROXYD, "/usr/bin/systemd-socket-activate"), (_PROXYD, "--version"),
            _socket_proxyd, "under systemd-socket-activate",
        ),
        Peer(
            "traefik", _BOTH, (str(_script("traefik")),), (str(_script("traefik")), "version"), _traefik,
            "Go threads on all cores",
        ),
    )
}  # fmt: skip

if "BENCH_OTHER" in os.environ:
    PEERS["other"] = Peer(
        "other", _BOTH, (sys.executable,), (),
        partial(_ambassador, root=Path(os.environ["BENCH_OTHER"])),
        "the ambassador of another checkout; no peer to itself",
    )  # fmt: skip
