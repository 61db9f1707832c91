"""`grand-ambassador relay` as a user runs it, for what only the whole program does."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from ambassador.values import Protocol

from .harness import SANITIZED, TIMEOUT_S, bind_free, wait_until


class Program:
    """It and its processes, from outside."""

    def __init__(self, *arguments: str, log: Path, before: Sequence[str] = ()) -> None:
        """`before` is a command that runs the program, as setpriv does."""
        self.log = log
        if SANITIZED:
            arguments = ("-sandbox", "off", *arguments)
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "ambassador", "relay", *arguments], stderr=stderr
            )

    def workers(self, listener: str) -> list[int]:
        """The processes that serve `6379/tcp`, by their titles."""
        return self._titled(f"grand-ambassador: {listener} ")

    def has(self, listener: str, count: int) -> None:
        wait_until(
            lambda: len(self.workers(listener)) == count,
            f"{count} workers of {listener}: {self.log.read_text()}",
        )

    @property
    def fork_server(self) -> int:
        (pid,) = self._titled("grand-ambassador: fork server")
        return pid

    def said(self, words: str) -> int:
        """How many lines of the log have these words."""
        return sum(words in line for line in self.log.read_text().splitlines())

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(TIMEOUT_S) == 0

    def _titled(self, title: str) -> list[int]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):  # a zombie has no title
                if process.cmdline()[0].startswith(title):
                    found.append(process.pid)
        return found


Run = Callable[..., Program]


def free_port(protocol: Protocol) -> int:
    listener, sock = bind_free(protocol)
    sock.close()
    return listener.port
