"""Builds the load generator before the tests, which import it with the modules they test, are collected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

subprocess.run(
    [sys.executable, "-m", "bench.install", "--build-only"],
    cwd=Path(__file__).resolve().parents[2],
    check=True,
)
