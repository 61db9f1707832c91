"""What holds for every test: where its network is, and whether others run beside it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.support.net import enter_namespace, new_namespace
from tests.support.program import REPO
from tests.support.wait import SANITIZED

OUTSIDE = ("tests/docker/", "tests/soak/", "tests/bench/")
"""Tests that need this machine's network. The others have one of their own, for each process of theirs."""

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


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NETWORKS] = Networks()


NETWORKS = pytest.StashKey[Networks]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Docker tests stay in one process, in their order. Those that run alone come last."""
    for item in items:
        alone = item.get_closest_marker("alone") is not None
        if is_outside(item):
            item.add_marker(pytest.mark.xdist_group("outside"))
        elif alone:
            item.add_marker(pytest.mark.xdist_group("alone"))
        if SANITIZED and item.get_closest_marker("native"):
            item.add_marker(pytest.mark.skip("the sanitizers have too much of what it measures"))
    items.sort(
        key=lambda item: (not is_outside(item), item.get_closest_marker("alone") is not None)
    )


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
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:  # there is one process
        yield
        return
    with Path(f"/tmp/grand-ambassador-tests-{run}").open("w") as lock:
        alone = item.get_closest_marker("alone") is not None
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
