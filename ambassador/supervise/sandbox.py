"""What the parent makes of the word in which a worker says what it gave up (_sandbox.pyx). No I/O.

The word is 0 until the worker has entered its sandbox.
"""

from __future__ import annotations

from ambassador import _sandbox


def missing_steps(word: int) -> tuple[str, ...]:
    """The steps that were wanted and do not hold, by name; none if the sandbox is whole."""
    missing = word >> _sandbox.MISSING
    return tuple(name for bit, name in enumerate(_sandbox.STEPS) if missing >> bit & 1)


def advice(steps: tuple[str, ...]) -> str:
    """What to do about it."""
    if set(steps) == {"seccomp"}:
        return "use a kernel and container runtime that allow a seccomp filter"
    return (
        "run as root with the capabilities SETUID, SETGID, SETPCAP and KILL, "
        "or as another user than root"
    )
