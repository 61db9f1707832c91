"""Debian's packages for the other scripts, and the way these scripts speak to a person.

`python3 scripts/debian.py need ip=iproute2 strace=strace` installs the package of every command
that is not on PATH. Standard library only: it runs before any virtual environment exists.

Invariants:

- Nothing is installed that is already there, and nothing at all where this is not Debian (or a
  derivative) or the caller is not root: then one line says what to install.
- Installing a package never starts its service: a test needs the program `redis-server`, the
  machine does not need a redis on port 6379.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# Debian keeps administrators' programs here, and a plain user's or a CI's PATH may lack them.
ADMIN_PATHS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
POLICY = Path("/usr/sbin/policy-rc.d")
LISTS = Path("/var/lib/apt/lists")
LISTS_FRESH_SECONDS = 3600

_started = time.monotonic()


class UnavailableError(Exception):
    """Something needed cannot be had here; the message says how to get it."""


def say(text: str) -> None:
    """Tell the person at the terminal what is happening, with the seconds since the start."""
    # One write, line end included: two threads may speak at the same time.
    sys.stderr.write(f"[{time.monotonic() - _started:5.1f} s] {text}\n")
    sys.stderr.flush()


def find(command: str) -> str | None:
    """The path of a command, also where only root's PATH would show it."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *ADMIN_PATHS))
    return shutil.which(command, path=path)


def can_install() -> bool:
    """True for root on Debian or a derivative."""
    return os.geteuid() == 0 and find("apt-get") is not None


def install(packages: Sequence[str]) -> None:
    """Install packages with apt-get; raises UnavailableError with one line that says what to do."""
    wanted = " ".join(packages)
    if not can_install():
        raise UnavailableError(
            f"missing here: {wanted}. As root on Debian: apt-get install {wanted}"
        )
    if not _lists_are_fresh():
        say("apt-get update")
        # One dead third-party source must not stop us: whether the lists are good enough is judged
        # by the install below.
        _apt_get("update", check=False)
    say(f"apt-get install {wanted}")
    with _no_services_started():
        done = _apt_get("install", "-y", "--no-install-recommends", *packages, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnavailableError(f"apt-get install {wanted} failed: {reason}")


def need(commands: dict[str, str]) -> None:
    """Make sure of commands, each given with the package that brings it."""
    missing = sorted({package for command, package in commands.items() if find(command) is None})
    if missing:
        install(missing)


def _lists_are_fresh() -> bool:
    # The list files carry the server's dates; the folder apt fetches into carries ours.
    try:
        age = time.time() - (LISTS / "partial").stat().st_mtime
    except OSError:
        return False
    return age < LISTS_FRESH_SECONDS and any(LISTS.glob("*_Packages*"))


def _apt_get(*args: str, check: bool) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *args],
        check=check,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
    )


@contextlib.contextmanager
def _no_services_started() -> Iterator[None]:
    """Answer "not now" (101) to every package script that asks whether to start a service."""
    if POLICY.exists():  # the machine has a policy of its own: it is not ours to change
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)


def main(argv: Sequence[str]) -> int:
    if len(argv) < 2 or argv[0] != "need" or not all("=" in pair for pair in argv[1:]):
        print("usage: debian.py need COMMAND=PACKAGE ...", file=sys.stderr)
        return 2
    try:
        need(dict(pair.split("=", 1) for pair in argv[1:]))
    except UnavailableError as error:
        print(f"debian.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
