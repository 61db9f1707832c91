"""Fixtures of the long tests: those of the Docker tests."""

from __future__ import annotations

from tests.docker.conftest import engine, own, stage

__all__ = ["engine", "own", "stage"]
