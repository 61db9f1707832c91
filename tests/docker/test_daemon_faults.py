"""The daemon, or what stands between it and the ambassador, hangs, forgets, cuts or forbids.

Fault rows D3, D4, D6, D8, D9, S3. That it goes and comes is test_daemon.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ambassador.discovery.docker_source import DockerSource
from ambassador.engine.client import connect_engine
from ambassador.system.processes import own_addresses
from tests.support.endpoints import PORT, Caller, Conversation, greet, is_greeted_by
from tests.support.engine import Stage, lines_with, run_server, wait_until_accepts
from tests.support.net import Namespace, free_port, linked
from tests.support.own_engine import OwnEngine
from tests.support.processes import descendants, workers_of
from tests.support.program import Program
from tests.support.proxy import GET_ONLY, EngineProxy
from tests.support.wait import wait_until
from tests.unit.fake_engine import ON_HOST, Log, address_of

HERE = "127.0.0.1"
QUICK_S = 1.0
"""Stands for the 10 s between pings, and the 30 s between reconciles, where only the order matters."""


class TcpFront:
    """The Engine at a TCP address inside a network namespace, by a relay that dies with it."""

    def __init__(self, namespace: Namespace, engine: str) -> None:
        self._engine = engine
        self._listener = namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.bind((namespace.theirs4, 2375))
        self._listener.listen()
        self.address = f"tcp://{namespace.theirs4}:2375"
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                engine = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                engine.connect(self._engine)
                self._open += [client, engine]
                for pair in ((client, engine), (engine, client)):
                    threading.Thread(target=self._move, args=pair, daemon=True).start()

    @staticmethod
    def _move(source: socket.socket, destination: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                destination.sendall(data)
            destination.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@contextlib.contextmanager
def followed(discovery: DockerSource) -> Iterator[DockerSource]:
    discovery.start()
    try:
        yield discovery
    finally:
        discovery.stop()


@pytest.mark.alone
def test_half_open_event_stream(stage: Stage) -> None:
    """D3: nothing arrives from the Engine any more, not even an end: the ping finds out."""
    log = Log()
    db = run_server(stage, "db", f"{PORT}/tcp")
    with linked() as namespace:
        front = TcpFront(namespace, stage.engine.socket)
        discovery = DockerSource(
            lambda: connect_engine(front.address, timeout=QUICK_S),
            [db.name],
            network="",
            on_change=lambda: None,
            log=log.logger(),
            ping_every=QUICK_S,
            reconcile_every=600,
            place=replace(ON_HOST, addresses=own_addresses),
        )
        try:
            with followed(discovery):
                wait_until(lambda: address_of(discovery) == db.address(), "its address")
                namespace.drop()
                begin = time.monotonic()
                stage.restart_elsewhere(db)  # of which it hears nothing
                wait_until(lambda: not discovery.connected, "the loss to be noticed")
                assert time.monotonic() - begin < 2 * QUICK_S + 5
                (line,) = log.having("cannot ask Docker")
                assert namespace.theirs4 in line
                assert address_of(discovery) is not None, "what is known stands"
                namespace.restore()
                wait_until(lambda: address_of(discovery) == db.address(), "the new address")
                assert len(log.having("connected to Docker again")) == 1
        finally:
            front.close()


@pytest.mark.alone
def test_daemon_hangs(own: OwnEngine) -> None:
    """D4: the daemon takes connections and answers none: only news waits, everything else goes on."""
    port, mortal_port = free_port(), free_port()
    with Stage(own.engine) as stage:
        db = run_server(stage, "db", f"{port}/tcp", f"{port}/udp")
        mortal = run_server(stage, "mortal", f"{mortal_port}/tcp")
        mortal_pid = int(mortal.inspect()["State"]["Pid"])
        names = ("-name", db.name, "-name", mortal.name)
        ambassador = stage.run_ambassador_on_host(*names)
        wait_until_accepts(HERE, port)
        wait_until_accepts(HERE, mortal_port)
        with Conversation(HERE, port) as old, Caller(HERE, port) as caller:
            old.greeting()
            wait_until(lambda: caller.ask(b"x"), "an answer")
            with own.hung():
                os.kill(mortal_pid, signal.SIGKILL)
                (victim,) = [w for w in workers_of(ambassador.pid) if f"{port}/udp" in w.title]
                os.kill(victim.pid, signal.SIGKILL)
                begin = time.monotonic()
                wait_until(lambda: caller.ask(b"still there?", 0.1), "another worker")
                assert time.monotonic() - begin < 1, "the parent waits for Docker"
                assert greet(HERE, port) == "db"
                assert old.ask(b"as before") == b"as before"
                # What ps, psutil and top show is the status: every process answers for itself.
                titles = [process.title for process in descendants(ambassador.pid)]
                assert any(f"{port}/tcp {db.name} -> " in title for title in titles)
                # One that starts, and one that is told to end, do not wait for Docker either.
                other = Program("-sock", str(own.socket), *names)
                other.wait_for_line("cannot ask Docker")
                time.sleep(0.5)  # until it asks
                begin = time.monotonic()
                assert other.stop() == 0
                assert time.monotonic() - begin < 2
            with Conversation(HERE, mortal_port) as held:
                ambassador.wait_for_line(f"no backend, holding new connections.*{mortal.name}")
                mortal.start()
                assert held.greeting()[0] == "mortal"
            assert old.ask(b"and after") == b"and after"
        assert lines_with(ambassador, "backend changed", db.name) == []


@pytest.mark.alone
def test_daemon_skips_the_subscriber(stage: Stage, tmp_path: Path) -> None:
    """D6: the stream stands and says nothing more: the next reconcile sees what is so."""
    log = Log()
    db = run_server(stage, "db", f"{PORT}/tcp")
    with EngineProxy(tmp_path / "s", stage.engine.socket) as proxy:
        discovery = DockerSource(
            lambda: connect_engine(str(proxy.path)),
            [db.name],
            network="",
            on_change=lambda: None,
            log=log.logger(),
            ping_every=QUICK_S,
            reconcile_every=QUICK_S,
            place=replace(ON_HOST, addresses=own_addresses),
        )
        with followed(discovery):
            wait_until(lambda: address_of(discovery) == db.address(), "its address")
            streams = sum("/events" in line for line in proxy.asked)
            proxy.deaf = True
            _, after = stage.restart_elsewhere(db)
            begin = time.monotonic()
            wait_until(lambda: address_of(discovery) == after, "the new address")
            assert time.monotonic() - begin < 2 * QUICK_S + 1
            assert sum("/events" in line for line in proxy.asked) == streams, "the stream ended"
            proxy.deaf = False
            wait_until(
                lambda: sum("/events" in line for line in proxy.asked) == streams + 1,
                "another subscription, since an event is missing",
            )


@pytest.mark.alone
def test_parent_sleeps_through_churn(stage: Stage) -> None:
    """D6: the parent is stopped while much happens: workers serve on, then the newest state is taken."""
    port = free_port()
    db = run_server(stage, "db", f"{port}/tcp")
    ambassador = stage.run_ambassador_on_host("-name", db.name)
    wait_until_accepts(HERE, port)
    assert greet(HERE, port) == "db"
    os.kill(ambassador.pid, signal.SIGSTOP)
    try:
        assert greet(HERE, port) == "db", "the parent carries no traffic"
        for number in range(30):  # some hundred events
            db.container.rename(stage.name(f"other{number}"))
            db.container.rename(stage.name("db"))
        for _ in range(2):
            db.restart(0)
        stage.restart_elsewhere(db, timeout=0)
    finally:
        os.kill(ambassador.pid, signal.SIGCONT)
    begin = time.monotonic()
    wait_until(lambda: is_greeted_by("db", HERE, port), "db")
    with Conversation(HERE, port) as conversation:
        assert conversation.greeting() == ("db", db.address())
    assert time.monotonic() - begin < 2
    assert len(workers_of(ambassador.pid)) == 1


@pytest.mark.alone  # the Engine has no events meanwhile
def test_proxy_that_cuts_idle_streams(stage: Stage, tmp_path: Path) -> None:
    """D8: subscribed again in silence, as often as it is cut; nothing is repointed, nothing missed."""
    port = free_port()
    db = run_server(stage, "db", f"{port}/tcp")
    with EngineProxy(tmp_path / "s", stage.engine.socket, cut_idle_s=1.2) as proxy:
        ambassador = stage.run_ambassador_on_host("-sock", str(proxy.path), "-name", db.name)
        wait_until_accepts(HERE, port)
        with Conversation(HERE, port) as old:
            old.greeting()
            lines = list(ambassador.lines)
            wait_until(lambda: proxy.cuts >= 2, "two cuts")
            wait_until(lambda: sum("/events" in a for a in proxy.asked) >= 3, "a third stream")
            assert old.ask(b"as before") == b"as before"
            assert ambassador.lines == lines
        with Conversation(HERE, port) as held:
            _, after = stage.restart_elsewhere(db, timeout=0)
            held.ending()
        with Conversation(HERE, port) as conversation:
            assert conversation.greeting() == ("db", after)


def test_allow_list_of_five_endpoints(stage: Stage, tmp_path: Path) -> None:
    """S3: the main job through a proxy that admits GET of five endpoints, and it asks for nothing else."""
    port = free_port()
    back = stage.network("back")
    db = run_server(stage, "db", f"{port}/tcp", f"{port}/udp")
    # Two networks: for these it also asks GET /networks.
    double = run_server(stage, "double", f"{free_port()}/tcp")
    stage.docker("network", "connect", back, double.name)
    with EngineProxy(tmp_path / "s", stage.engine.socket, allowed=GET_ONLY) as proxy:
        ambassador = stage.run_ambassador_on_host(
            "-sock", str(proxy.path), "-name", db.name, "-name", double.name
        )
        wait_until_accepts(HERE, port)
        with Conversation(HERE, port) as old, Caller(HERE, port) as caller:
            assert old.greeting()[0] == "db"
            stage.restart_elsewhere(db)
            old.ending()
            with Conversation(HERE, port) as held:
                assert held.greeting() == ("db", db.address())
            wait_until(lambda: caller.ask(b"x"), "an answer")
        assert ambassador.stop() == 0
        # What it asks every 10 and 30 s, sooner.
        watching = DockerSource(
            lambda: connect_engine(str(proxy.path)),
            [db.name],
            network="",
            on_change=lambda: None,
            log=Log().logger(),
            ping_every=0.1,
            reconcile_every=0.1,
        )
        with followed(watching):
            pings = sum("/_ping" in line for line in proxy.asked)
            wait_until(lambda: sum("/_ping" in a for a in proxy.asked) > pings + 3, "pings")
    assert proxy.refused == []
    for word in ("/_ping", "/events?", f"/containers/{db.name}/json", "/networks"):
        assert any(word in line for line in proxy.asked), word
    assert lines_with(ambassador, "level=error") == []


@pytest.mark.parametrize(
    ("endpoint", "word"),
    [("/_ping", "PING"), ("/events", "EVENTS"), ("/containers", "CONTAINERS")],
)
def test_proxy_that_forbids(stage: Stage, tmp_path: Path, endpoint: str, word: str) -> None:
    """D9: a 403 is a line that names the endpoint, and what to allow."""
    allowed = re.compile(rf"(?!.*{endpoint}).*")
    db = run_server(stage, "db", f"{PORT}/tcp")
    with EngineProxy(tmp_path / "s", stage.engine.socket, allowed=allowed) as proxy:
        ambassador = stage.run_ambassador_on_host("-sock", str(proxy.path), "-name", db.name)
        if endpoint == "/_ping":  # which it can do without
            ambassador.wait_for_line("target is running")
            warnings = lines_with(ambassador, "level=warning")
            # These tests may themselves run in a container of another Engine.
            assert [line for line in warnings if "own container not found" not in line] == []
            return
        line = ambassador.wait_for_line(r"forbids GET .*\(403\)")
        assert endpoint in line
        assert word in line
        assert str(proxy.path) in line


def test_socket_of_somebody_else(stage: Stage) -> None:
    """D9: permission denied on the socket: the line says how to have its group."""
    ambassador = stage.run_ambassador("-name", "db", flags="--user=65534:65534")
    ambassador.wait_for_log(r"permission denied on /var/run/docker.sock.*--group-add")
    assert ambassador.is_running(), "it may be permitted later"
