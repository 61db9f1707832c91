"""What a Docker test works with: one `Stage` per test, on an Engine that all of them share.

    def test_x(stage: Stage) -> None:
        redis = stage.run_target("redis")
        ambassador = stage.run_ambassador("-name", redis.name)
        client = stage.run_client(flags=f"--link {ambassador.name}:db")
        assert client.run("redis-cli", "-h", "db", "ping") == "PONG"

Invariants:

- Everything that a test creates has a name that begins with the stage's own prefix, and everything
  with that prefix is removed after the test, whatever created it: a helper, or a `docker run` line
  of the test's own.
- Nothing here sleeps to let something happen: it waits for what it wants to see, with a limit.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import docker
from docker.errors import NotFound
from docker.models.containers import Container

from tests.support import endpoints
from tests.support.endpoints import PORT, accepts
from tests.support.program import REPO, Program
from tests.support.wait import TIMEOUT_S, wait_until

AMBASSADOR = "grand-ambassador"
"""The image under test."""

DEMO = "grand-ambassador-demo"
"""redis-server, redis-cli, dnsmasq, python3, ip, ss and socat: see scripts/images.py."""

REDIS = f"{DEMO}:redis"
REDIS_CLI = f"{DEMO}:redis-cli"
DNSMASQ = f"{DEMO}:dnsmasq"

SOCKET_INSIDE = "/var/run/docker.sock"
PREFIX = "gat"
LOG_LINES = 40

_SERVER = Path(endpoints.__file__).read_text()

_counter = itertools.count(1)


class Engine:
    """The Engine of the session: where it is, and two ways to speak to it."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.client = docker.DockerClient(base_url=host, timeout=60)
        # Which path to mount is the Engine's view: its own socket, or the usual one where we reach
        # it over a network.
        self.socket = host.removeprefix("unix://") if host.startswith("unix://") else SOCKET_INSIDE

    def docker(self, *args: str, check: bool = True) -> str:
        """The docker command as a person types it; what it printed on standard output."""
        done = subprocess.run(
            ["docker", *args],
            check=False,
            env={**os.environ, "DOCKER_HOST": self.host},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
        )
        if check and done.returncode != 0:
            words = (word if len(word) < 200 else f"{word[:50]}…" for word in args)
            raise AssertionError(f"docker {' '.join(words)}: {done.stdout}{done.stderr}".strip())
        return done.stdout.strip()

    def remove_all(self, prefix: str) -> None:
        """Remove every container and network whose name begins so."""
        for entry in self.client.api.containers(all=True, filters={"name": f"^/{prefix}"}):
            try:
                self.client.api.remove_container(entry["Id"], force=True, v=True)
            except NotFound:
                pass
        for network in self.client.networks.list(names=[prefix]):
            if str(network.name).startswith(prefix):
                network.remove()

    def remove_abandoned(self) -> None:
        """Remove what earlier sessions left that were killed: their process is gone."""
        names = [name for c in self.client.api.containers(all=True) for name in c["Names"]]
        names += [f"/{network.name}" for network in self.client.networks.list()]
        for match in filter(None, (re.match(rf"/({PREFIX}(\d+)x)", name) for name in names)):
            if not Path(f"/proc/{match[2]}").exists():
                self.remove_all(match[1])


class Box:
    """One container and what a test asks of it."""

    def __init__(self, engine: Engine, container: Container) -> None:
        self._engine = engine
        self.container = container
        self.id = str(container.id)
        self.name = str(container.name)

    def inspect(self) -> dict[str, Any]:
        document: dict[str, Any] = self._engine.client.api.inspect_container(self.id)
        return document

    def address(self, network: str | None = None) -> str:
        """Its IPv4 address in a network, or in the only one it is in; empty where it has none."""
        networks = self.inspect()["NetworkSettings"]["Networks"]
        if network is None:
            (entry,) = networks.values()
        else:
            entry = networks[network]
        return str(entry["IPAddress"])

    def is_running(self) -> bool:
        return bool(self.inspect()["State"]["Running"])

    def logs(self) -> str:
        """Both its output streams so far."""
        return self.container.logs().decode(errors="replace")

    def wait_for_log(
        self, pattern: str, timeout: float = TIMEOUT_S, since: int = 0
    ) -> re.Match[str]:
        """Wait until its output, from an offset on, matches a regular expression."""
        try:
            return wait_until(
                lambda: re.search(pattern, self.logs()[since:], re.MULTILINE),
                f"no {pattern!r} in the log of {self.name}",
                timeout,
            )
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.logs()}") from None

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Run a command inside it; its output, stripped."""
        done = subprocess.run(
            ["docker", "exec", self.name, *command],
            check=False,
            env={**os.environ, "DOCKER_HOST": self._engine.host},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"{command}: exit code {done.returncode}: {done.stdout}{done.stderr}"
            )
        return (done.stdout + done.stderr).strip()

    def spawn(self, *command: str) -> subprocess.Popen[str]:
        """Start a command inside it and leave it running; the caller reads its output and waits."""
        return subprocess.Popen(
            ["docker", "exec", "-i", self.name, *command],
            env={**os.environ, "DOCKER_HOST": self._engine.host},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start(self) -> None:
        self._engine.client.api.start(self.id)

    def stop(self, timeout: int = 5) -> int:
        """`docker stop`; its exit code."""
        self._engine.client.api.stop(self.id, timeout=timeout)
        return int(self.inspect()["State"]["ExitCode"])

    def restart(self, timeout: int = 5) -> None:
        self._engine.client.api.restart(self.id, timeout=timeout)

    def kill(self, signal_name: str = "SIGKILL") -> None:
        self._engine.client.api.kill(self.id, signal_name)

    def remove(self) -> None:
        self._engine.client.api.remove_container(self.id, force=True, v=True)


class Stage:
    """One test's corner of the Engine; a context manager that leaves nothing behind."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prefix = f"{PREFIX}{os.getpid()}x{next(_counter)}-"
        self._on_host: list[Program] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for ambassador in self._on_host:
                if ambassador.process.poll() is None:
                    ambassador.stop()
        finally:
            self._print_logs()
            self.engine.remove_all(self.prefix)

    def _print_logs(self) -> None:
        """What everything said: pytest shows it where the test failed."""
        for ambassador in self._on_host:
            print(f"--- ambassador on the host, exit code {ambassador.process.poll()}")
            print(*ambassador.lines[-LOG_LINES:], sep="\n")
        for entry in self.engine.client.api.containers(
            all=True, filters={"name": f"^/{self.prefix}"}
        ):
            print(f"--- {entry['Names'][0]}: {entry['Status']}")
            log = self.engine.client.api.logs(entry["Id"], tail=LOG_LINES)
            print(log.decode(errors="replace").rstrip())

    def name(self, short: str) -> str:
        """The name that `short` has on this stage; a full one stays as it is."""
        return short if short.startswith(self.prefix) else self.prefix + short

    def docker(self, *args: str, check: bool = True) -> str:
        """The docker command. Names in it must be made with `name`."""
        return self.engine.docker(*args, check=check)

    def box(self, name_or_id: str) -> Box:
        """A container that a docker line made."""
        return Box(self.engine, self.engine.client.containers.get(name_or_id))

    # Making. `flags` are those of `docker run`, in one string or as a list.

    def create(self, short: str, image: str, *command: str, flags: str | Sequence[str] = ()) -> Box:
        """`docker create`."""
        words = shlex.split(flags) if isinstance(flags, str) else flags
        made = self.docker("create", "--name", self.name(short), *words, image, *command)
        return self.box(made)

    def run(self, short: str, image: str, *command: str, flags: str | Sequence[str] = ()) -> Box:
        """`docker run -d`."""
        words = shlex.split(flags) if isinstance(flags, str) else flags
        made = self.docker("run", "-d", "--name", self.name(short), *words, image, *command)
        return self.box(made)

    def run_target(
        self,
        short: str = "redis",
        image: str = REDIS,
        *command: str,
        expose: Sequence[str] = ("6379/tcp",),
        flags: str | Sequence[str] = (),
    ) -> Box:
        """Start a target that exposes ports."""
        words = shlex.split(flags) if isinstance(flags, str) else flags
        exposed = [f"--expose={port}" for port in expose]
        return self.run(short, image, *command, flags=[*exposed, *words])

    def run_ambassador(
        self, *args: str, short: str = "ambassador", flags: str | Sequence[str] = ()
    ) -> Box:
        """Start the ambassador's image with the Engine's socket mounted where it expects it."""
        words = shlex.split(flags) if isinstance(flags, str) else flags
        mount = f"--volume={self.engine.socket}:{SOCKET_INSIDE}"
        return self.run(short, AMBASSADOR, *args, flags=[mount, *words])

    def run_ambassador_on_host(self, *args: str, **env: str) -> Program:
        """Start the working tree's program on this host; it is stopped with the stage."""
        ambassador = Program("-sock", self.engine.host, *args, env=env)
        self._on_host.append(ambassador)
        return ambassador

    def run_client(self, short: str = "client", flags: str | Sequence[str] = ()) -> Box:
        """Start a container that does nothing by itself, to run commands in."""
        words = shlex.split(flags) if isinstance(flags, str) else flags
        return self.run(short, DEMO, "sleep", "infinity", flags=["--init", *words])

    def network(self, short: str, *flags: str) -> str:
        """Create a user network; its full name."""
        name = self.name(short)
        self.docker("network", "create", *flags, name)
        return name

    # Restarting

    def restart_elsewhere(self, box: Box, *, timeout: int = 5) -> tuple[str, str]:
        """Stop a container, let others take its address, start it: (address before, after).

        It must be in one network only. What takes its address stays until the stage ends.
        """
        before = box.address()
        (network,) = box.inspect()["NetworkSettings"]["Networks"]
        # Another test's container may have had the address for a moment only: then once more.
        for _ in range(5):
            place = self.create_placeholder(network)
            box.stop(timeout)
            self.occupy_address(network, before, place)
            box.start()
            after = wait_until(box.address, f"{box.name} has no address")
            if after != before:
                return before, after
        raise AssertionError(f"{box.name} got its old address {before} again and again")

    def create_placeholder(self, network: str = "bridge") -> Box:
        """A container that will do nothing but have an address; created, not started."""
        short = f"placeholder{next(_counter)}"
        return self.create(
            short, DEMO, "sleep", "infinity", flags=["--init", f"--network={network}"]
        )

    def occupy_address(self, network: str, address: str, first: Box | None = None) -> Box:
        """Take an address that was just given up, by starting containers until one has it.

        Engines differ in which free address they give next: the lowest, or the one after the last.
        In the second case nobody gets the old one soon, and the last one started is returned.
        """
        place = first or self.create_placeholder(network)
        for _ in range(4):
            place.start()
            if place.address() == address:
                break
            place = self.create_placeholder(network)
        return place


# Servers in containers, and the ambassador before them


def server_command(name: str, ports: Sequence[str]) -> list[str]:
    return ["python3", "-c", _SERVER, name, *ports]


def run_server(
    stage: Stage, short: str, *ports: str, flags: str | Sequence[str] = (), wait: bool = True
) -> Box:
    """A container with the server of endpoints.py that says `short`; it listens when this returns."""
    box = create_server(stage, short, *ports, flags=flags)
    box.start()
    if wait:
        listening_since(box)
    return box


def create_server(
    stage: Stage, short: str, *ports: str, flags: str | Sequence[str] = (), says: str = ""
) -> Box:
    """The same, not started."""
    words = shlex.split(flags) if isinstance(flags, str) else flags
    return stage.create(
        short,
        DEMO,
        *server_command(says or short, ports),
        flags=[*(f"--expose={port}" for port in ports), *words],
    )


def started_at(box: Box) -> float:
    """When the container's last run began, by Docker's clock."""
    return datetime.fromisoformat(box.inspect()["State"]["StartedAt"]).timestamp()


def finished_at(box: Box) -> float:
    """When the container's last run ended."""
    return datetime.fromisoformat(box.inspect()["State"]["FinishedAt"]).timestamp()


def listening_since(box: Box, run: int = 1) -> float:
    """When the server's n-th run began to listen, by its own clock. Waits until it does.

    A run is known by its line: Docker may stamp a run's start after the server has begun to listen.
    """

    def find() -> float | None:
        lines = [line.split() for line in box.logs().splitlines() if line.startswith("listening ")]
        return float(lines[run - 1][1]) if len(lines) >= run else None

    return wait_until(find, f"{box.name} does not listen in its run {run}")


def visitors(box: Box) -> list[str]:
    """The connections and datagrams that a server got."""
    return [line for line in box.logs().splitlines() if line.startswith(("connection", "datagram"))]


def wait_until_accepts(host: str, port: int = PORT) -> None:
    wait_until(lambda: accepts(host, port), f"no listener on {host}:{port}")


def wait_until_refuses(host: str, port: int = PORT) -> None:
    wait_until(lambda: not accepts(host, port), f"a listener on {host}:{port}")


def fixed_network(stage: Stage, short: str) -> str:
    """A network in which a container may be given an address of the test's choice."""
    name = stage.network(short)  # Docker chooses a range that is free, but then allows no --ip
    (config,) = stage.engine.client.networks.get(name).attrs["IPAM"]["Config"]
    stage.docker("network", "rm", name)
    return stage.network(short, f"--subnet={config['Subnet']}")


def run_ambassador(
    stage: Stage,
    *args: str,
    port: int = PORT,
    short: str = "ambassador",
    network: str | None = None,
    flags: str | Sequence[str] = (),
) -> tuple[Box, str]:
    """An ambassador in a container, and its address once it takes connections on the port."""
    words = shlex.split(flags) if isinstance(flags, str) else list(flags)
    if network is not None:
        words += [f"--network={network}"]
    ambassador = stage.run_ambassador(*args, short=short, flags=words)
    address = wait_until(lambda: ambassador.address(network), "the ambassador has no address")
    try:
        wait_until_accepts(address, port)
    except AssertionError as error:
        raise AssertionError(f"{error}; the ambassador said:\n{ambassador.logs()}") from None
    return ambassador, address


def lines_with(ambassador: Box | Program, *words: str) -> list[str]:
    """Its log lines that contain all of the words."""
    lines = ambassador.logs().splitlines() if isinstance(ambassador, Box) else ambassador.lines
    return [line for line in lines if all(word in line for word in words)]


# The Engine itself


def start_engine() -> str:
    """The DOCKER_HOST of an Engine; raises RuntimeError with one line where none can be had."""
    return _script("engine.py", "up").removeprefix("DOCKER_HOST=")


def make_images() -> None:
    """Make sure of the images; raises RuntimeError with one line where that fails."""
    _script("images.py")


def _script(name: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts" / name), *args],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"{name} failed"])[-1])
    return done.stdout.strip()
