"""What holds for every test: where its network is, and whether others run beside it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.support.net import enter_namespace, new_namespace
from tests.support.program import REPO
from tests.support.wait import SANITIZED

OUTSIDE = ("tests/docker/", "tests/soak/", "tests/bench/")
"""Tests that need this machine's network. The others have one of their own, for each process of theirs."""

HALF = "test_n"
"""The file names of the second half of the Docker tests begin here."""

# Programs that tests start find the working tree's package, wherever the tests are started from.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")])
)


class Networks:
    """Two namespaces: this machine's, and one that nobody else has."""

    def __init__(self) -> None:
        self._here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self._own = new_namespace() if os.geteuid() == 0 else self._here

    def enter(self, *, outside: bool) -> None:
        """For what this thread does from now on, and the threads and processes that it starts."""
        enter_namespace(self._here if outside else self._own)


NETWORKS = pytest.StashKey[Networks]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NETWORKS] = Networks()


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Docker tests go to two processes, by file; every other test to the process that is free.

    (`--dist loadgroup` of xdist 3.8 writes groups into node ids, which pytest 9.2 does not let it.)
    """

    def _split_scope(self, nodeid: str) -> str:
        if not nodeid.startswith(OUTSIDE):
            return nodeid
        # Those with a daemon of their own are all in one half; it takes long to start.
        return "first half" if nodeid.rpartition("/")[2] < HALF else "second half"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def pytest_itemcollected(item: pytest.Item) -> None:
    if SANITIZED and item.get_closest_marker("native"):
        item.add_marker(pytest.mark.skip("the sanitizers have too much of what it measures"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Docker tests begin first, since they take longest. Those that run alone come last."""
    items.sort(key=lambda item: (not is_outside(item), is_alone(item)))


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def is_outside(item: pytest.Item) -> bool:
    return item.nodeid.startswith(OUTSIDE)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    item.config.stash[NETWORKS].enter(outside=is_outside(item))
    with turn(item):
        return (yield)


@contextlib.contextmanager
def turn(item: pytest.Item) -> Generator[None]:
    """While in here nobody runs a test that is marked `alone`; beside such a test, nobody any test."""
    with (REPO / "pyproject.toml").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        yield
