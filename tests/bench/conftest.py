"""Builds the load tool before test modules that import it are collected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

subprocess.run(
    [sys.executable, "-m", "bench.run", "--build-only"],
    cwd=Path(__file__).resolve().parents[2],
    check=True,
)
