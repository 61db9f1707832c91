"""Fixtures of the Docker tests: the Engine and the images once, a stage for each test.

Where no Engine can be had every test here fails with the reason in one line. It is never skipped: a
green run means that the ambassador was seen to work with Docker.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator

import pytest

from tests.conftest import NETWORKS
from tests.support.engine import Engine, Stage, make_images, start_engine
from tests.support.own_engine import ADMIN_PATH, OwnEngine
from tests.support.program import REPO


@pytest.fixture(scope="session")
def engine() -> Engine:
    """An Engine that answers and has every image."""
    try:
        # One process after the other: the second finds all that the first has made.
        with (REPO / "scripts" / "images.py").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            host = start_engine()
            make_images()
    except RuntimeError as error:
        pytest.fail(f"Docker tests cannot run: {error}", pytrace=False)
    found = Engine(host)
    found.remove_abandoned()
    return found


@pytest.fixture
def stage(engine: Engine) -> Iterator[Stage]:
    """A corner of the Engine for one test; everything on it is removed afterwards."""
    with Stage(engine) as one:
        yield one


@pytest.fixture(scope="session")
def own(engine: Engine, request: pytest.FixtureRequest) -> Iterator[OwnEngine]:
    """A daemon to be hurt, which has the demo image. It runs before each test and after."""
    if os.geteuid() != 0 or shutil.which("dockerd", path=ADMIN_PATH) is None:
        pytest.skip("a daemon to kill needs root and dockerd")
    own = OwnEngine()
    try:
        own.start()
        own.load_image(engine)
        yield own
    finally:
        request.config.stash[NETWORKS].enter(outside=True)  # whatever test was the last one
        own.remove()
