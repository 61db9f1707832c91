"""The whole program of the working tree, run on this machine as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.support.processes import descendants, workers_of
from tests.support.wait import SANITIZED, TIMEOUT_S, wait_until

REPO = Path(__file__).resolve().parents[2]

NURSERY_TITLE = "grand-ambassador: fork server"


class Program:
    """It and its processes, and what it has said on standard error. `stop` or `close` ends it."""

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        command: Sequence[str] = (sys.executable, "-m", "ambassador"),
    ) -> None:
        """`before` is a command that runs it: `ip netns exec NAME`, `setpriv ...`."""
        if SANITIZED and arguments[:1] == ("relay",):
            arguments = ("relay", "-sandbox", "off", *arguments[1:])
        # A file: a pipe that nobody reads would stop it.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this
        self.process = subprocess.Popen(
            [*before, *command, *arguments],
            cwd=REPO,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    # What it says.

    @property
    def text(self) -> str:
        """All whole lines so far."""
        size = os.fstat(self._said.fileno()).st_size
        text = os.pread(self._said.fileno(), size, 0).decode(errors="replace")
        return text[: text.rfind("\n") + 1]

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def said(self, words: str) -> int:
        """How many lines have these words."""
        return sum(words in line for line in self.lines)

    def wait_for_line(self, pattern: str, timeout: float = TIMEOUT_S, since: int = 0) -> str:
        """Wait for a line, from an index on, that matches a regular expression."""

        def find() -> str | None:
            ended = self.process.poll()
            found = next((line for line in self.lines[since:] if re.search(pattern, line)), None)
            assert found or ended is None, f"it ended with {ended}"
            return found

        try:
            return wait_until(find, f"no line with {pattern!r}", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.text}") from None

    # Its processes.

    def workers(self, listener: str = "") -> list[int]:
        """The processes that serve `6379/tcp`, or all that serve, by their titles."""
        return [process.pid for process in workers_of(self.pid, listener)]

    def has(self, listener: str, count: int) -> None:
        try:
            wait_until(lambda: len(self.workers(listener)) == count)
        except AssertionError as error:
            raise AssertionError(f"{error}: {count} workers of {listener}: {self.text}") from None

    @property
    def fork_server(self) -> int:
        (pid,) = [p.pid for p in descendants(self.pid) if p.title.startswith(NURSERY_TITLE)]
        return pid

    # Its end.

    def stop(self, timeout: float = TIMEOUT_S) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def close(self) -> None:
        """Stop it, if it has not ended. Fails where its exit code is not 0."""
        code = self.stop()
        assert code == 0, f"it ended with {code}; it said:\n{self.text}"


Run = Callable[..., Program]
