"""Where a benchmark stands: a network namespace of its own, with the congestion control that was asked for.

The namespace keeps other traffic of the machine out, and its ports free. The congestion control is the
machine's single largest influence on TCP here: under BBR each stream is paced by timers of its own, which
costs bulk streams a third of their throughput on loopback and doubles what the samples differ by. Linux
comes with cubic, so that is what is measured unless something else is asked for.

Every other setting is inherited from the machine or is what a new namespace has, as a container's would be.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

CONGESTION = "cubic"
_INSIDE = "BENCH_INSIDE"
_SETTINGS = Path("/proc/sys/net/ipv4")
_CURRENT = _SETTINGS / "tcp_congestion_control"
_ALLOWED = _SETTINGS / "tcp_allowed_congestion_control"
_AVAILABLE = _SETTINGS / "tcp_available_congestion_control"


def inside() -> bool:
    """Whether this process stands in such a namespace already."""
    return _INSIDE in os.environ


def congestion() -> str:
    """What new TCP sockets of this process get."""
    return _CURRENT.read_text().strip()


def stand(wanted: str) -> None:
    """Run this program anew in a namespace, and exit as it does; returns at once in there.

    Without root it returns too, where it is: with the machine's own setting. SystemExit(2) where the kernel
    does not know `wanted`.
    """
    if inside():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        _CURRENT.write_text(wanted)
        return
    if os.geteuid() != 0:
        print(f"not root: on the machine's own loopback, with {congestion()}", file=sys.stderr)
        return
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # some are modules
        subprocess.run(["modprobe", "-q", f"tcp_{wanted}"], check=False)
    available = _AVAILABLE.read_text().split()
    if wanted not in available:
        print(f"no congestion control {wanted!r} here: {' '.join(available)}", file=sys.stderr)
        raise SystemExit(2)
    with _allowed(wanted):
        sys.exit(_run(["unshare", "--net", sys.executable, *sys.orig_argv[1:]]))


def share(prefix: Sequence[str]) -> None:
    """Give the namespace that `prefix` runs commands in the same congestion control."""
    subprocess.run(
        [*prefix, "sysctl", "-qw", f"net.ipv4.{_CURRENT.name}={congestion()}"],
        check=True,
        stdin=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def _allowed(wanted: str) -> Iterator[None]:
    """Only what everybody may choose can be a namespace's own (net/ipv4/tcp_cong.c)."""
    before = _ALLOWED.read_text().strip()
    if wanted in before.split():
        yield
        return
    _ALLOWED.write_text(f"{before} {wanted}")
    try:
        yield
    finally:
        _ALLOWED.write_text(before)


def _run(command: Sequence[str]) -> int:
    with subprocess.Popen(command, env={**os.environ, _INSIDE: "1"}) as child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells the child itself
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        return child.wait()
