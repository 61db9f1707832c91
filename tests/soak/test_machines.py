"""The state machines of tests/loops and tests/docker, for longer: `MACHINE_EXAMPLES` and `MACHINE_STEPS`,
`DOCKER_EXAMPLES` and `DOCKER_STEPS` make it longer still.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.docker import test_machine as of_docker
from tests.loops import test_machine as of_loops
from tests.loops.test_machine import machine
from tests.support.engine import Stage

__all__ = ["machine"]

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "100"))
DOCKER_EXAMPLES = int(os.environ.get("DOCKER_EXAMPLES", "10"))


@pytest.mark.timeout(120 + 10 * EXAMPLES)
def test_connections_in_any_order(machine: type[of_loops.Machine]) -> None:
    """Invariants 1 to 7."""
    run_state_machine_as_test(machine, settings=settings(of_loops.SETTINGS, max_examples=EXAMPLES))


@pytest.mark.timeout(120 + 60 * DOCKER_EXAMPLES)
def test_containers_in_any_order(stage: Stage) -> None:
    """C1, C2, C4, C6, C7, C8, C9."""
    of_docker.prepare(stage)
    run_state_machine_as_test(
        of_docker.Machine, settings=settings(of_docker.SETTINGS, max_examples=DOCKER_EXAMPLES)
    )
