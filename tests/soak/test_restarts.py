"""A target that restarts again and again. Fault row C13."""

from __future__ import annotations

import pytest

from tests.docker.test_limits import restart_often
from tests.support.engine import Stage


@pytest.mark.timeout(600)
def test_a_hundred_restarts(stage: Stage) -> None:
    """C13: the address is the newest after each, and nothing leaks."""
    restart_often(stage, 100)
