"""What a running worker calls, and faults of its calls, by strace attached to it."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.wait import wait_until


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
    calls = {fault.partition(":")[0] for fault in faults}
    injects = [argument for fault in faults for argument in ("-e", f"inject={fault}")]
    with _attached(pid, ",".join(sorted(calls)), injects) as log:
        yield log


@contextlib.contextmanager
def traced(pid: int, calls: list[str]) -> Iterator[None]:
    """While in here, `calls` is being filled with every call of the process, a line each (strace(1))."""
    with _attached(pid, "all") as log:
        yield
        calls += log.read_text().splitlines()


@contextlib.contextmanager
def _attached(pid: int, calls: str, arguments: Sequence[str] = ()) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "strace")
        command = ["strace", "-qq", "-p", str(pid), "-o", str(log), "-s", "0"]
        command += ["-e", f"trace={calls}", *arguments]
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
