"""The list of mutants fits the sources and the tests. `make mutants` runs it."""

from tests.mutants.__main__ import read


def test_the_list_fits() -> None:
    """Each `old` occurs once in its file, and each test exists."""
    mutants = read()
    assert len({mutant.name for mutant in mutants}) == len(mutants)
    assert all(mutant.old != mutant.new for mutant in mutants)
