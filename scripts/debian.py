"""Installs Debian packages for the other scripts, and prints their messages.

    python3 scripts/debian.py ip=iproute2 strace=strace

installs the package of each command that is missing. Like every script here it needs the standard
library only: it runs before any virtual environment exists.

- A command that is there installs nothing. If this is not Debian, or the caller is not root, one
  line says what to install.
- Installing a package does not start its service: the tests need the program redis-server, and
  this machine needs no redis at port 6379.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# A user's or a CI's PATH may lack the directories of the administrator's programs.
ADMIN_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
POLICY = Path("/usr/sbin/policy-rc.d")

_started = time.monotonic()


class UnavailableError(Exception):
    """Something is missing here; the message says how to get it."""


def say(text: str) -> None:
    """Print a line of progress, with the seconds since the start."""
    # One write with its line end: two threads may print at the same time.
    sys.stderr.write(f"[{time.monotonic() - _started:5.1f} s] {text}\n")
    sys.stderr.flush()


def find(command: str) -> str | None:
    """Return the path of a command, or None."""
    return shutil.which(command, path=ADMIN_PATH)


def run(
    *command: str,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    timeout_s: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; the caller looks at its exit code.

    `env` is added to the environment. With `log` the output goes to that file.
    """
    with log.open("w") if log else contextlib.nullcontext() as output:
        return subprocess.run(
            [find(command[0]) or command[0], *command[1:]],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output or subprocess.PIPE,
            stderr=output or subprocess.PIPE,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "PATH": ADMIN_PATH, **(env or {})},
            cwd=REPO,
        )


def last_lines(log: str, count: int = 1) -> str:
    """Return the end of an output."""
    return "\n".join(log.strip().splitlines()[-count:]) or "it said nothing"


def need(commands: Mapping[str, str]) -> None:
    """Install the package of each missing command; raises UnavailableError if that fails."""
    packages = sorted({package for command, package in commands.items() if not find(command)})
    if not packages:
        return
    wanted = " ".join(packages)
    if os.geteuid() != 0 or not find("apt-get"):
        raise UnavailableError(f"missing: {wanted}. As root on Debian: apt-get install {wanted}")
    say(f"apt-get install {wanted}")
    install = ("install", "-y", "--no-install-recommends", *packages)
    with _services_stay_stopped():
        done = _apt_get(*install)
        if done.returncode != 0:
            # The package lists are absent or old.
            say("apt-get update")
            _apt_get("update")
            done = _apt_get(*install)
    if done.returncode != 0:
        raise UnavailableError(f"apt-get install {wanted} failed: {last_lines(done.stderr)}")


def _apt_get(*args: str) -> subprocess.CompletedProcess[str]:
    env = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    return run("apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *args, env=env)


@contextlib.contextmanager
def _services_stay_stopped() -> Iterator[None]:
    """Answer 101, "not allowed", to each package script that asks whether to start a service."""
    if POLICY.exists():  # the machine has a policy of its own
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def main() -> int:
    try:
        need(dict(pair.split("=", 1) for pair in sys.argv[1:]))
    except UnavailableError as error:
        print(f"debian.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
