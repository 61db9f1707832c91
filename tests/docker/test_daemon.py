"""The Docker daemon goes and comes; the ambassador runs on the host, beside a daemon of its own.

Fault rows D1, D2.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.endpoints import Caller, Conversation, greet
from tests.support.engine import Stage, lines_with, run_server, wait_until_accepts
from tests.support.net import free_port
from tests.support.own_engine import OwnEngine
from tests.support.program import Program
from tests.support.wait import wait_until

HERE = "127.0.0.1"


@pytest.mark.alone
def test_daemon_killed(own: OwnEngine) -> None:
    """D1: relaying goes on, and within 2 s of the daemon's return what changed meanwhile is known."""
    port, mortal_port = free_port(), free_port()
    with Stage(own.engine) as stage:
        db = run_server(stage, "db", f"{port}/tcp", f"{port}/udp")
        mortal = run_server(stage, "mortal", f"{mortal_port}/tcp")
        ambassador = stage.run_ambassador_on_host("-name", db.name, "-name", mortal.name)
        wait_until_accepts(HERE, port)
        wait_until_accepts(HERE, mortal_port)
        mortal_pid = int(mortal.inspect()["State"]["Pid"])

        with Conversation(HERE, port) as old, Caller(HERE, port) as caller:
            old.greeting()
            wait_until(lambda: caller.ask(b"x"), "an answer")
            own.kill()
            ambassador.wait_for_line("cannot ask Docker, keeping the last state")
            assert old.ask(b"still here") == b"still here"
            assert greet(HERE, port) == "db"
            answer = caller.ask(b"and now?")
            assert answer is not None
            assert answer.data == b"db and now?"
            os.kill(mortal_pid, signal.SIGKILL)

            own.start()
            back = time.monotonic()
            ambassador.wait_for_line(f"no backend, holding new connections.*{mortal.name}")
            ambassador.wait_for_line("connected to Docker again")
            assert time.monotonic() - back < 2
            assert old.ask(b"as before") == b"as before"
            assert caller.ask(b"as ever") == (b"db as ever", HERE)
        assert len(lines_with(ambassador, "cannot ask Docker")) == 1
        assert lines_with(ambassador, "backend changed") == [], "nothing changed for db"

        with Conversation(HERE, mortal_port) as held:
            mortal.start()  # and what it says is heard again
            assert held.greeting()[0] == "mortal"


@pytest.mark.alone
def test_daemon_absent_at_start(own: OwnEngine) -> None:
    """D2: it waits, says so in one line, and picks up when the daemon comes."""
    port = free_port()
    own.stop()
    ambassador = Program("-sock", str(own.socket), "-name", "gat-db")
    try:
        line = ambassador.wait_for_line("cannot ask Docker")
        assert f"there is no socket {own.socket}" in line
        assert "docker run -v" in line
        own.start()
        back = time.monotonic()
        ambassador.wait_for_line("connected to Docker again")
        ambassador.wait_for_line("no such container, waiting.*gat-db")
        assert time.monotonic() - back < 2
        assert len(lines_with(ambassador, "cannot ask Docker")) == 1
        with Stage(own.engine) as stage:
            db = run_server(stage, "db", f"{port}/tcp")
            db.container.rename("gat-db")
            wait_until_accepts(HERE, port)
            assert greet(HERE, port) == "db"
            db.remove()
        assert ambassador.stop() == 0
    finally:
        if ambassador.process.poll() is None:
            ambassador.process.kill()
            ambassador.process.wait()
        if not own.socket.exists():
            own.start()
