"""The relays: how each is configured (the best way we know), started, repointed and stopped.

All get one thread, the same limit of descriptors and the same routes. A note says what else is particular.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.places import Place
from bench.processes import Failed, Program, bound

ROOT = Path(__file__).resolve().parent.parent
OURS = "ambassador"
BASE = "direct"  # no relay at all


@dataclass(frozen=True)
class Route:
    """Relay `port` to `host`:`to`."""

    protocol: str
    port: int
    host: str
    to: int


Commands = Callable[[Place, Sequence[Route], Path], list[list[str]]]


@dataclass(frozen=True)
class Peer:
    """A relay. `commands` writes its configuration and returns the programs to start.

    The signal `reload` makes the first program take a new configuration. A variant is another ambassador:
    the report compares it with ours only. `rows`, if not empty, are the only ones the peer takes part in.
    """

    name: str
    commands: Commands
    note: str
    program: str = sys.executable
    protocols: frozenset[str] = frozenset({"tcp", "udp"})
    reload: int | None = None
    variant: bool = False
    rows: frozenset[str] = frozenset()


class Relay:
    """A peer that runs, with its ports open. The owner calls `stop`."""

    def __init__(self, peer: Peer, place: Place, routes: Sequence[Route], directory: Path) -> None:
        """Raise Failed if the peer is not installed, or if its ports do not open in time."""
        if not Path(peer.program).exists():
            raise Failed(f"not installed: {peer.program}")
        directory.mkdir(parents=True, exist_ok=True)
        self.peer, self.place, self.routes, self.directory = peer, place, routes, directory
        self.programs: list[Program] = []
        ports = {route.port for route in routes}
        try:
            for command in peer.commands(place, routes, directory):
                log = directory / f"log{len(self.programs)}"
                self.programs.append(Program([*place.relay, *command], log))
            if self.programs:  # one look will do: they are in one network namespace
                pid = self.pids[0]
                self.programs[0].wait_for(lambda: ports <= bound(pid, routes[0].protocol))
        except Failed:
            self.stop()
            raise

    def repoint(self, route: Route) -> None:
        """Give it this route instead of the one with the same port."""
        assert self.peer.reload is not None
        self.peer.commands(self.place, [route], self.directory)
        os.kill(self.pids[0], self.peer.reload)

    @property
    def pids(self) -> list[int]:
        return [program.pid for program in self.programs]

    def stop(self) -> None:
        for program in self.programs:
            program.stop()


def _ambassador(
    place: Place, routes: Sequence[Route], directory: Path, *, options: Sequence[str] = (), root: Path = ROOT
) -> list[list[str]]:  # fmt: skip
    del place, directory
    if len({route.port for route in routes}) < len(routes):  # a route that changes
        backends = [f"{route.host}:{route.to}" for route in routes]
        return [[sys.executable, "-m", "bench.repoint", str(routes[0].port), *backends]]
    python = sys.executable if root == ROOT else str(root / ".venv/bin/python")
    arguments = [f"{route.port}/{route.protocol}={route.host}:{route.to}" for route in routes]
    # -P: Python must not take the package from the current folder.
    command = ["env", f"PYTHONPATH={root}", python, "-P", "-m", "ambassador", "relay"]
    return [[*command, *options, *arguments]]


def _haproxy(
    place: Place, routes: Sequence[Route], directory: Path, *, splice: Sequence[str]
) -> list[list[str]]:
    config = directory / "haproxy.cfg"
    lines = [
        "global", " nbthread 1", " maxconn 9200", " maxpipes 500", " tune.pipesize 1048576",
        "defaults", " mode tcp", *(f" option {option}" for option in splice),
        " timeout connect 5s", " timeout client 1h", " timeout server 1h",
    ]  # fmt: skip
    for route in routes[:1]:
        lines += [f"listen l{route.port}", f" bind {place.relay_address}:{route.port}"]
        lines.append(f" server s {route.host}:{route.to}")
    config.write_text("\n".join(lines) + "\n")
    return [["/usr/sbin/haproxy", "-W", "-f", str(config)]]


def _nginx(place: Place, routes: Sequence[Route], directory: Path) -> list[list[str]]:
    route, config = routes[0], directory / "nginx.conf"
    kind, idle = ("udp", "90s") if route.protocol == "udp" else ("backlog=4096", "1h")
    config.write_text(f"""\
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; user root; worker_processes 1; worker_rlimit_nofile 20000;
pid {directory}/pid; error_log {directory}/errors warn;
events {{ worker_connections 40000; }}
stream {{
  tcp_nodelay on; proxy_buffer_size 64k;
  server {{
    listen {place.relay_address}:{route.port} {kind};
    proxy_pass {route.host}:{route.to}; proxy_timeout {idle};
  }}
}}
""")
    return [
        ["/usr/sbin/nginx", "-p", str(directory), "-e", f"{directory}/errors", "-c", str(config)]
    ]


def _docker_proxy(place: Place, routes: Sequence[Route], directory: Path) -> list[list[str]]:
    del directory
    # dockerd gives it a pipe as descriptor 3, for the answer that it is ready.
    shell = ["sh", "-c", 'exec "$@" 3>/dev/null', "sh", "/usr/sbin/docker-proxy"]
    return [
        [
            *shell, "-proto", route.protocol, "-host-ip", place.relay_address, "-host-port", str(route.port),
            "-container-ip", route.host, "-container-port", str(route.to),
        ]
        for route in routes
    ]  # fmt: skip


def _all() -> list[Peer]:
    splice = partial(_haproxy, splice=("splice-request", "splice-response"))
    splice_auto = partial(_haproxy, splice=("splice-auto",))
    haproxy, tcp, haproxy_reload = "/usr/sbin/haproxy", frozenset({"tcp"}), signal.SIGUSR2
    peers = [
        Peer(BASE, lambda *_: [], "no relay at all"),
        Peer(OURS, _ambassador, "one worker", reload=signal.SIGUSR1),
        Peer(
            "ambassador-2", partial(_ambassador, options=("-workers", "2")), "-workers 2", variant=True,
            rows=frozenset({"redis1", "http", "udp64"}),
        ),
        Peer("haproxy", splice, "splice both ways, pipes of 1 MB, one thread", haproxy, tcp, haproxy_reload),
        Peer("haproxy-auto", splice_auto, "the same with splice-auto", haproxy, tcp, haproxy_reload),
        Peer(
            "nginx", _nginx, "stream, one worker process, buffers of 64 KB", "/usr/sbin/nginx",
            reload=signal.SIGHUP,
        ),
        Peer(
            "docker-proxy", _docker_proxy, "as dockerd starts it: a process a port, Go threads on all cores",
            "/usr/sbin/docker-proxy",
        ),
    ]  # fmt: skip
    if "BENCH_OTHER" in os.environ:
        root = Path(os.environ["BENCH_OTHER"]).resolve()
        python = str(root / ".venv/bin/python")
        note = "the ambassador of another checkout"
        peers.append(Peer("other", partial(_ambassador, root=root), note, python, variant=True))
    return peers


PEERS = {peer.name: peer for peer in _all()}
