"""tests/engines/expected.py: a row that fits nothing explains nothing."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest

from tests.engines.engine import KINDS
from tests.engines.expected import EXPECTED, Expected, chosen
from tests.engines.scenarios import SCENARIOS


@pytest.mark.parametrize("row", EXPECTED, ids=lambda row: f"{row.scenario}-{row.finding}")
def test_row_fits_a_scenario_and_each_of_its_patterns_an_engine(row: Expected) -> None:
    assert any(fnmatch(name, row.scenario) for name in SCENARIOS)
    for pattern in row.engines.split():
        assert any(chosen(name, pattern) for name in KINDS), pattern
