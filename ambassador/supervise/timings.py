"""How long the supervising side waits for what. Tests shorten these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds.

    The second exit in a row delays the next start by `restart_first`, and each further one by twice as
    much, up to `restart_last`. A worker that runs for `stable` resets the delay.
    """

    restart_first: float = 0.1
    restart_last: float = 10.0
    stable: float = 10.0
    bind_retry: float = 1.0  # then twice as long each time,
    bind_retry_last: float = 10.0  # up to this
    start_retry: float = 1.0  # no descriptor, no memory
    fork_server_busy_retry: float = 0.2  # it is stopped or starved
    report: float = (
        5.0  # between two reports of losses: each is in the log, and a flood is few lines
    )
    kill_grace: float = 0.25  # from a draining worker's deadline to SIGKILL
    sandbox_first: float = 0.02  # until the first worker is asked for its sandbox, then doubling,
    sandbox_last: float = 1.0  # up to this
    watchdog_timeout: float = 3.0  # an idle worker writes its heartbeat every 2 s (HEARTBEAT_MS)
    watchdog_busy_timeout: float = 30.0  # one that runs, or waits for a disk, may only be starved
    watchdog_min_interval: float = 0.25  # between two checks, however many workers there are
    watchdog_late: float = (
        1.0  # a check that is this late says that this process was stopped or starved
    )
