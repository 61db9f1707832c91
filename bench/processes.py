"""Programs that the benchmark starts: known by their own process IDs, and ended by them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench import measure

STOP_S = 3.0


class Failed(Exception):
    """A program did not start, or gave no result."""


class NotMeant(Failed):
    """The row means nothing for this peer; the text says why."""


class Program:
    """One program in the background, its output in a file."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.command = command
        self.log = log
        self._handle = log.open("ab")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._handle,
            stderr=self._handle,
            env=environment,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_for(self, ready: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.alive or time.monotonic() > deadline:
                state = (
                    "did not get ready" if self.alive else f"ended with {self._process.returncode}"
                )
                raise Failed(f"{Path(self.command[0]).name} {state}: {self.last_words()}")
            time.sleep(0.002)

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "(no output)"

    def stop(self) -> None:
        """It and whatever it started."""
        below = [pid for pid in measure.tree([self.pid]) if pid != self.pid]
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._handle.close()
        for pid in below:
            _end(pid)


def _end(pid: int) -> None:
    """One that outlived its parent."""
    if Path(f"/proc/{pid}").exists():
        subprocess.run(["kill", "-KILL", str(pid)], check=False, stderr=subprocess.DEVNULL)
