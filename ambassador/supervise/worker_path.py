"""The data path in user space: a listener's sockets, and the slots of the workers that relay for it.

Invariants:

- One live worker per slot at most, besides those that were told to drain.
- The sockets outlive the workers, so a port that was bound never refuses.
- Every worker has the same Update. TCP workers accept from one socket. UDP workers have one each, in a
  SO_REUSEPORT group, so that the kernel keeps a client on its worker.
- Whatever cannot be had (port, descriptor, memory, process) is in `state()`, and is tried again when `due`.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from functools import partial

from ambassador.control import Start, Update, pack
from ambassador.datapath import Condition, PathState
from ambassador.model import Backend, ListenAddress, ListenerSpec
from ambassador.options import Sandbox
from ambassador.reconcile import needs_new_workers
from ambassador.supervise import sockets
from ambassador.supervise.forkserver import ForkServerGone
from ambassador.supervise.listener import RunningListener
from ambassador.supervise.losses import Losses, Totals
from ambassador.supervise.port_limits import PortLimits
from ambassador.supervise.slot import WorkerSlot
from ambassador.supervise.timings import Timings
from ambassador.supervise.worker import WorkerProcess
from ambassador.supervise.workers import Workers
from ambassador.system.processes import PortOwners
from ambassador.system.titles import title_of
from ambassador.values import Protocol

log = logging.getLogger(__name__)

MAX_TITLE = 1000


class WorkerPath:
    """A DataPath, and what a Job asks of it: `due` and `run`. Owns the sockets and the slots."""

    def __init__(
        self,
        listener: RunningListener,
        *,
        workers: Workers,
        limits: PortLimits,
        owners: PortOwners,
        sandbox: Sandbox,
        timings: Timings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        protocol = listener.spec.listen.protocol
        self._listener = listener
        self._spec = listener.spec
        self._workers = workers
        self._limits = limits
        self._owners = owners
        self._sandbox = sandbox
        self._timings = timings
        self._clock = clock
        self._protocol = protocol
        self._open = False
        self._sockets: list[socket.socket] = []
        self._slots: list[WorkerSlot] = []
        self._leaving: list[WorkerSlot] = []  # closed when their worker, which drains, has exited
        self._totals = Totals(protocol)
        self._losses = Losses(protocol)
        self._queue_drops = sockets.QueueDrops()
        self._bind_at = 0.0
        self._bind_errno = 0  # of the last attempt
        self._bind_delay = 0.0
        self._problem = ""  # the last one that was logged, and still stands
        self._error = ("", 0.0)

    # -- DataPath

    def refuses(self, spec: ListenerSpec) -> str:
        if spec.listen.first_port != spec.listen.last_port:
            return f"{spec.listen} is a range, which is not relayed yet: expose single ports"
        try:
            pack(self._update(spec, tuple((0, backend) for backend in spec.backends)))
        except ValueError as error:
            return str(error)
        return ""

    def open(self, spec: ListenerSpec) -> None:
        self._spec, self._open, self._bind_at = spec, True, 0.0
        self._slots = self._slots or self._new_slots()
        self.run(self._clock())

    def update(self, spec: ListenerSpec) -> None:
        """New workers if an option needs them, else an Update to those that run.

        TCP: the new workers accept from the same socket. The former ones accept no more, and finish what is
        open within `drain`. UDP: another number of workers needs another number of sockets, so the group is
        bound anew beside the former one; the former workers read no more from clients.
        """
        former, self._spec = self._spec, spec
        update = self._update(spec, self._listener.backends())
        for slot in (*self._slots, *self._leaving):
            if slot.worker is not None:
                slot.worker.update(update)
                self._workers.flush(slot.worker)
        if needs_new_workers(spec.options, former.options):
            self._replace_workers()

    def close(self, deadline_ms: int) -> None:
        self.report_losses()
        self._open = False
        self._close_sockets()
        self._stop(self._slots, deadline_ms)
        self._slots = []

    def counters(self) -> dict[str, int]:
        return self._totals.sum(slot.counters() for slot in (*self._slots, *self._leaving))

    def state(self) -> PathState:
        return PathState(self._condition(), *self._error)

    def _condition(self) -> Condition:
        if not self._open:
            return Condition.DRAINING
        if not self._sockets:
            return Condition.CANNOT_LISTEN
        if self.degraded:
            return Condition.DEGRADED
        if any(backend.weight for backend in self._spec.backends):
            return Condition.FORWARDING
        return Condition.HOLDING

    # -- for jobs

    def due(self) -> float | None:
        """When a worker is to be started, or the port to be bound; None if all is well."""
        moments = [slot.start_at for slot in self._slots if slot.start_at is not None]
        return max(min(moments), self._bind_at) if moments else None

    def run(self, now: float) -> None:
        """Bind the port and start the workers that are due. A failure is retried."""
        for place, slot in enumerate(self._slots):
            if slot.start_at is not None and slot.start_at <= now and self._bound(now):
                self._start(place, slot, now)

    @property
    def degraded(self) -> bool:
        """Whether workers keep exiting here."""
        return any(slot.degraded for slot in self._slots)

    def processes(self) -> list[WorkerProcess]:
        """The workers that serve; not those that drain."""
        return [slot.worker for slot in self._slots if slot.worker is not None]

    def fields(self) -> dict[str, object]:
        """The listener, for the log."""
        return self._listener.fields()

    def report_losses(self) -> None:
        """Log what was lost since the last report, a line each."""
        for row, count in self._losses.risen(self.counters()):
            log.warning("%s", row.loss, extra={"fields": self.fields() | {"count": count}})
        if self._protocol is Protocol.UDP and (count := self._queue_drops.risen(self._sockets)):
            message = "datagrams dropped, queue full: raise net.core.rmem_max"
            log.warning(message, extra={"fields": self.fields() | {"count": count}})

    def recover(self, now: float) -> None:
        """Log if a degraded port's workers have run long enough."""
        if not self.degraded:
            return
        for slot in self._slots:
            slot.recover(now)
        if not self.degraded:
            message = "workers run again, the port is not degraded"
            log.info(message, extra={"fields": self.fields()})

    # -- the port

    def _bound(self, now: float) -> bool:
        if self._sockets or self._bind_at > now:
            return bool(self._sockets)
        return self._bind(now, [])

    def _bind(self, now: float, beside: list[socket.socket]) -> bool:
        listen, workers = self._spec.listen, self._spec.options.workers
        try:
            self._sockets = sockets.bind_group(listen, workers, beside=beside)
        except (OSError, MemoryError) as error:
            self._bind_failed(error, now)
            return False
        self._problem, self._bind_errno, self._bind_delay = "", 0, 0.0
        log.info("listening", extra={"fields": self.fields()})
        return True

    def _bind_failed(self, error: OSError | MemoryError, now: float) -> None:
        """Try again later. Why is found out once for each error: who has the port is dear to know."""
        first, last = self._timings.bind_retry, self._timings.bind_retry_last
        self._bind_delay = min(self._bind_delay * 2, last) if self._bind_delay else first
        self._bind_at = now + self._bind_delay
        number = error.errno if isinstance(error, OSError) else errno.ENOMEM
        if number != self._bind_errno:
            self._bind_errno = number or 0
            reason = _bind_problem(self._spec.listen, error, self._owners)
            self._failed("cannot listen, trying again", reason, now)
        else:
            self._error = (self._error[0], now)

    def _close_sockets(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets = []

    def _check_socket(self, now: float) -> None:
        """After a worker's death: its open file was also the listener's, and is its successor's."""
        check = sockets.restore_listener if self._protocol is Protocol.TCP else sockets.is_intact
        if all(map(check, self._sockets)):
            return
        self._failed("listening socket lost, binding again", "a worker may have closed it", now)
        former = self._sockets
        self._stop(self._slots, self._spec.options.drain)
        self._slots = self._new_slots()
        if self._protocol is Protocol.UDP:
            self._bind_beside(former, now)
        else:
            self._close_sockets()
            self._bind_at = now

    def _bind_beside(self, former: list[socket.socket], now: float) -> None:
        """A new UDP group in place of a former one, whose workers still drain."""
        self._sockets = []
        self._bind(now, former)
        for sock in former:
            sock.close()

    # -- workers

    def _new_slots(self) -> list[WorkerSlot]:
        return [
            WorkerSlot(self._protocol, self._timings) for _ in range(self._spec.options.workers)
        ]

    def _replace_workers(self) -> None:
        now = self._clock()
        self._stop(self._slots, self._spec.options.drain)
        self._slots = self._new_slots()
        if self._protocol is Protocol.UDP and self._sockets:
            self._bind_beside(self._sockets, now)
        self.run(now)

    def _start(self, place: int, slot: WorkerSlot, now: float) -> None:
        process = None
        siblings: list[int] = []
        try:
            for other in self._slots:
                if other is not slot:  # one by one: what is open is closed also if the next fails
                    siblings.append(other.page.reopen_read_only())  # noqa: PERF401
            start = Start(self._protocol, place, len(self._slots), self._sandbox)
            update = self._update(self._spec, self._listener.backends())
            process = WorkerProcess(start, update, slot.page)
            sock = self._sockets[place % len(self._sockets)]
            passed = process.passed_fds(sock.fileno(), siblings)
            self._workers.fork(process, passed, partial(self._exited, slot))
        except ForkServerGone:
            slot.retry_at(max(now, self._workers.repair_at or now))
        except BlockingIOError:  # the fork server is stopped or starved
            slot.retry_at(now + self._timings.fork_server_busy_retry)
        except (OSError, MemoryError) as error:
            slot.retry_at(now + self._timings.start_retry)
            reason = f"{_reason(error)}; raise the limits on descriptors and memory"
            self._failed("cannot start a worker, trying again", reason, now)
        else:
            self._problem = ""
            slot.assign(process, now)
            self._workers.flush(process)
        finally:
            if process is not None and slot.worker is not process:
                process.close()
            for fd in siblings:
                os.close(fd)

    def _exited(self, slot: WorkerSlot, how: str) -> None:
        """The slot's worker has exited, or could not be forked."""
        now, pid = self._clock(), slot.worker.pid if slot.worker is not None else 0
        self._totals.add(slot.end_counters())
        if slot in self._leaving:
            self._leaving.remove(slot)
            slot.close()
            return
        self.report_losses()
        was_degraded = self.degraded
        delay = slot.worker_exited(now)
        listen = self._spec.listen
        fields = {"port": listen.ports, "protocol": listen.protocol.value, "pid": pid}
        fields |= {"reason": how, "restart_in": f"{delay:g}s"}
        self._error = (how, now)
        log.error("worker exited, restarting", extra={"fields": fields})
        if self.degraded and not was_degraded:
            message = "workers keep exiting, the port is degraded"
            log.error(message, extra={"fields": self.fields()})
        if pid:
            self._check_socket(now)

    def _stop(self, slots: list[WorkerSlot], deadline_ms: int) -> None:
        for slot in slots:
            if slot.worker is None:
                slot.close()
            else:
                self._leaving.append(slot)
                self._workers.stop(slot.worker, deadline_ms)

    def _update(self, spec: ListenerSpec, backends: tuple[tuple[int, Backend], ...]) -> Update:
        options = self._limits.resolve(spec.options)
        return Update(self._listener.generation, options, backends, spec.access, _title(spec))

    def _failed(self, message: str, reason: str, now: float) -> None:
        """Keep it for `state`, and log it unless it is what was logged last."""
        self._error = (reason, now)
        if reason != self._problem:
            log.error(message, extra={"fields": self.fields() | {"reason": reason}})
        self._problem = reason


def _title(spec: ListenerSpec) -> str:
    """`grand-ambassador: 6379/tcp redis -> 172.17.0.3:6379`; a fixed address is not said twice."""
    where = ", ".join(map(str, spec.backends)) or "hold"
    target = where if spec.target == where else f"{spec.target} -> {where}"
    return title_of(f"{spec.listen} {target}")[:MAX_TITLE]


def _reason(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "no memory"


def _bind_problem(listen: ListenAddress, error: BaseException, owners: PortOwners) -> str:
    number = error.errno if isinstance(error, OSError) else errno.ENOMEM
    if number == errno.EADDRINUSE:
        return f"{listen} is in use by {owners.find(listen)}; stop it, or run in a container"
    if number == errno.EACCES:
        return (
            f"{listen.protocol.upper()} ports below 1024 need the capability NET_BIND_SERVICE: run as "
            f"root or with --cap-add NET_BIND_SERVICE, or --sysctl net.ipv4.ip_unprivileged_port_start=0"
        )
    if number == errno.EADDRNOTAVAIL:
        return f"{listen}: no interface has this address; add it, or write another"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"{listen}: too few descriptors, raise ulimit -n"
    return f"{listen}: {_reason(error)}"
