"""What a source distribution and the compiled modules have. `make package` builds a wheel from one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ambassador import _control, _datagram, _forkserver, _sandbox, _splice, _worker
from tests.support.wait import SANITIZED

REPO = Path(__file__).parents[2]


def test_the_source_distribution_is_whole(tmp_path: Path) -> None:
    """Whatever a wheel is built from, and nothing that is built."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path)]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    (listing,) = tmp_path.glob("*/SOURCES.txt")
    named = set(listing.read_text().split())
    wanted = {
        str(file.relative_to(REPO))
        for kind in ("*.py", "*.pyi", "*.pyx", "*.pxd", "py.typed")
        for file in (REPO / "ambassador").rglob(kind)
    }
    wanted |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"}
    assert wanted <= named
    assert not [name for name in named if name.endswith((".c", ".so"))]


@pytest.mark.native
@pytest.mark.skipif(SANITIZED, reason="built with other flags")
@pytest.mark.parametrize(
    "module",
    [_control, _datagram, _forkserver, _sandbox, _splice, _worker],
    ids=lambda m: m.__name__,
)
def test_compiled_modules_are_hardened(module: object) -> None:
    """S9: stack protector, and nothing that is resolved late: else a stray write picks the next call."""
    file = str(vars(module)["__file__"])
    read = subprocess.run(
        ["readelf", "-Wd", "-l", "-s", "-n", file], check=True, capture_output=True, text=True
    )
    said = read.stdout
    assert "BIND_NOW" in said
    assert "GNU_RELRO" in said
    assert " RWE " not in said
    if module in (_datagram, _forkserver, _splice, _worker):  # they have buffers on the stack
        assert "__stack_chk_fail" in said
