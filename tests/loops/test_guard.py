"""The parent's loop when something raises that nobody thought of: the rest goes on, and it is tried again.

As a program it is a parent with two listeners. The first state cannot be read, and the worker of the first
listener cannot be started twice.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

from ambassador.model import Backend, DesiredState, ListenAddress, ListenerSpec
from ambassador.options import Sandbox
from ambassador.supervise import supervisor as module
from ambassador.supervise.forkserver import ForkServer
from ambassador.supervise.supervisor import Supervisor
from ambassador.supervise.timings import Timings
from ambassador.supervise.worker_path import WorkerPath
from ambassador.system import logs
from ambassador.values import Protocol
from tests.support.net import free_port
from tests.support.wait import TIMEOUT_S, wait_until

ROOT = Path(__file__).parents[2]


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), TIMEOUT_S).close()
    except ConnectionRefusedError:
        return False
    return True


def test_whatever_raises(tmp_path: Path) -> None:
    """R6: both listeners serve in the end; each error is a line, with its traceback at debug level."""
    broken, good = free_port(), free_port()
    said = tmp_path / "log"
    with said.open("wb") as stderr:
        command = [sys.executable, "-m", "tests.loops.test_guard", str(broken), str(good)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=stderr)
    try:
        for port in (good, broken):
            wait_until(lambda port=port: accepts(port), f"{port} is not served")  # type: ignore[misc]
        process.send_signal(signal.SIGCHLD)
        wait_until(lambda: said.read_text().count("internal error") >= 3, "not all is said")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0, "a duty that raises keeps nobody from stopping"
    lines = [line for line in said.read_text().splitlines() if "internal error" in line]
    assert len(lines) == 3
    for words in ("no state", "no path", "no signal"):
        assert any(words in line for line in lines), words
    assert all("Traceback" in line for line in lines)


def _run(broken: int, good: int) -> int:
    states, starts = iter([ValueError("no state")]), iter([KeyError("no path")] * 2)
    listens = [ListenAddress(Protocol.TCP, port) for port in (broken, good)]
    backend = (Backend("127.0.0.1", 9),)
    wanted = DesiredState({each: ListenerSpec(each, "web", "", backend) for each in listens})
    open_path, reap = WorkerPath.open, vars(module)["reap_children"]

    def desired() -> DesiredState:
        for error in states:
            raise error
        return wanted

    def open_or_raise(path: WorkerPath, spec: ListenerSpec) -> None:
        if spec.listen.first_port == broken:
            for error in starts:
                raise error
        open_path(path, spec)

    def reap_and_raise() -> None:
        reap()
        raise RuntimeError("no signal")

    vars(module)["reap_children"] = reap_and_raise
    setattr(WorkerPath, "open", open_or_raise)  # noqa: B010 - mypy forbids the plain way
    server = ForkServer.fork()
    logs.setup("debug")
    supervisor = Supervisor(server, desired, sandbox=Sandbox.AUTO, timings=Timings(start_retry=0.1))
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(_run(int(sys.argv[1]), int(sys.argv[2])))
