"""Fixtures: one fork server for the whole run, and workers, peers and namespaces for one test each."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from ambassador.values import Protocol
from tests.support.endpoints import Peers
from tests.support.program import Program, Run
from tests.support.worker import Destination, StartWorker, Worker, Yard


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    """These tests are never skipped: what they need must be there."""
    missing = [name for name in ("ip", "iptables", "strace") if not shutil.which(name)]
    if missing:
        pytest.fail(
            f"tests/loops needs {' and '.join(missing)}: apt-get install iproute2 iptables strace",
            pytrace=False,
        )
    if os.geteuid() != 0:
        pytest.fail("tests/loops needs root: it makes network namespaces", pytrace=False)


@pytest.fixture(scope="session")
def yard(tools: None) -> Iterator[Yard]:
    yard = Yard()
    yield yard
    yard.close()


@pytest.fixture
def start(yard: Yard) -> Iterator[StartWorker]:
    """StartWorker workers: `start(protocol, destination, ..., hold=...)`. They end with the test."""
    with contextlib.ExitStack() as workers:

        def start_one(protocol: Protocol, *destinations: Destination, **limits: Any) -> Worker:
            worker = Worker(yard, protocol, *destinations, **limits)
            workers.callback(worker.close)
            return worker

        yield start_one


@pytest.fixture
def start_tcp(start: StartWorker) -> StartWorker:
    return lambda *destinations, **limits: start(Protocol.TCP, *destinations, **limits)


@pytest.fixture
def start_udp(start: StartWorker) -> StartWorker:
    return lambda *destinations, **limits: start(Protocol.UDP, *destinations, **limits)


@pytest.fixture
def peers() -> Iterator[Peers]:
    peers = Peers()
    yield peers
    peers.close()


@pytest.fixture
def run(tools: None) -> Iterator[Run]:
    """Run whole programs: `run("-workers", "2", "80/tcp=10.0.0.1:80")`. They end with the test."""
    with contextlib.ExitStack() as programs:

        def run_one(*arguments: str, before: Sequence[str] = ()) -> Program:
            program = Program("relay", *arguments, before=before)
            programs.callback(program.close)
            return program

        yield run_one


@pytest.fixture(params=["127.0.0.1", "::1"], ids=["ipv4", "ipv6"])
def loopback(request: pytest.FixtureRequest) -> str:
    return str(request.param)
