"""Fixtures: one fork server for the whole run, and workers, peers and namespaces for one test each."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import ambassador
from ambassador.supervise.forkserver import ForkServer
from ambassador.values import Protocol

from .harness import Destination, Worker, Yard
from .peers import Peers
from .program import Program, Run

Start = Callable[..., Worker]


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    """These tests are never skipped: what they need must be there."""
    missing = [name for name in ("ip", "iptables", "strace") if not shutil.which(name)]
    if missing:
        pytest.fail(
            f"tests/relay needs {' and '.join(missing)}: apt-get install iproute2 iptables strace",
            pytrace=False,
        )
    if os.geteuid() != 0:
        pytest.fail("tests/relay needs root: it makes network namespaces", pytrace=False)
    # The fork server is a program of its own, wherever the tests are started from.
    root = str(Path(ambassador.__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [root, os.environ.get("PYTHONPATH", "")])
    )


@pytest.fixture(scope="session")
def yard(tools: None) -> Iterator[Yard]:
    yard = Yard(ForkServer.launch())
    yield yard
    yard.close()


@pytest.fixture
def start(yard: Yard) -> Iterator[Callable[..., Worker]]:
    """Start workers: `start(protocol, destination, ..., hold=...)`. They end with the test."""
    with contextlib.ExitStack() as workers:

        def start_one(protocol: Protocol, *destinations: Destination, **limits: Any) -> Worker:
            worker = Worker(yard, protocol, *destinations, **limits)
            workers.callback(worker.close)
            return worker

        yield start_one


@pytest.fixture
def start_tcp(start: Start) -> Start:
    return lambda *destinations, **limits: start(Protocol.TCP, *destinations, **limits)


@pytest.fixture
def start_udp(start: Start) -> Start:
    return lambda *destinations, **limits: start(Protocol.UDP, *destinations, **limits)


@pytest.fixture
def peers() -> Iterator[Peers]:
    peers = Peers()
    yield peers
    peers.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Run whole programs: `run("-workers", "2", "80/tcp=10.0.0.1:80")`. They end with the test."""
    with contextlib.ExitStack() as programs:

        def run_one(*arguments: str, before: Sequence[str] = ()) -> Program:
            program = Program(*arguments, log=tmp_path / "log", before=before)
            programs.callback(program.close)
            return program

        yield run_one


@pytest.fixture(params=["127.0.0.1", "::1"], ids=["ipv4", "ipv6"])
def loopback(request: pytest.FixtureRequest) -> str:
    return str(request.param)
