"""The image takes only the packages that requirements/ names, byte for byte."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.engine import Engine
from tests.support.program import REPO

CONTEXT = ("Dockerfile", ".dockerignore", "pyproject.toml", "setup.py", "README.md", "LICENSE")
BUILD = """
import sys
sys.path.insert(0, "scripts")
import images
images.Docker(sys.argv[1]).build("grand-ambassador-tampered", "--target", "builder", sys.argv[2])
"""


def test_a_tampered_package_is_not_installed(engine: Engine, tmp_path: Path) -> None:
    """The build ends at a file whose hash is not on the list, and says so."""
    for name in CONTEXT:
        shutil.copy(REPO / name, tmp_path)
    for folder in ("certs", "requirements", "ambassador"):
        shutil.copytree(REPO / folder, tmp_path / folder)
    lock = tmp_path / "requirements" / "run.txt"
    head, name, rest = re.split(r"^(?=idna==|psutil==)", lock.read_text(), flags=re.MULTILINE)
    lock.write_text(head + re.sub("sha256:[0-9a-f]{8}", "sha256:00000000", name) + rest)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, engine.host, str(tmp_path)],
        cwd=REPO,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "idna==" in done.stderr
