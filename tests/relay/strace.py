"""Faults of system calls, by strace attached to a running worker."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .harness import wait_until


def _tracer(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("TracerPid:"):
            return int(line.split()[1])
    raise AssertionError("no TracerPid in /proc")


@contextlib.contextmanager
def injected(pid: int, *faults: str) -> Iterator[Path]:
    """While in here, system calls of the process fail: `splice:error=EINVAL:when=1+3` (strace(1)).

    Gives the file where strace writes the calls it has seen, those it changed marked `(INJECTED)`.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "strace")
        calls = {fault.partition(":")[0] for fault in faults}
        command = ["strace", "-qq", "-p", str(pid), "-o", str(log), "-s", "0"]
        command += ["-e", "trace=" + ",".join(sorted(calls))]
        for fault in faults:
            command += ["-e", f"inject={fault}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            try:
                wait_until(
                    lambda: _tracer(pid) or strace.poll() is not None, "strace does not attach"
                )
                assert strace.poll() is None, strace.stderr and strace.stderr.read()
                yield log
            finally:
                strace.terminate()
                strace.wait(10)


def injections(log: Path, call: str) -> int:
    """How often the call was changed, so far."""
    lines = log.read_text().splitlines()
    return sum(line.startswith(call) and "INJECTED" in line for line in lines)
