"""What the operating system says of processes and ports. The only importer of psutil."""

from __future__ import annotations

import psutil

from ambassador.model import Listener
from ambassador.system.processes import ProcessState
from ambassador.values import Protocol

_RUNNING = {psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP, psutil.STATUS_WAKING}
_ENDED = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


def process_state(pid: int) -> ProcessState:
    try:
        state = psutil.Process(pid).status()
    except psutil.Error:  # hidden (hidepid of proc(5)), or buried since
        return ProcessState.WAITING
    if state in _RUNNING:
        return ProcessState.RUNNING
    return ProcessState.ENDED if state in _ENDED else ProcessState.WAITING


def port_owner(listener: Listener) -> str:
    """Who has the port, for a person: `redis-server (pid 4711)`; says so where that cannot be seen."""
    try:
        for entry in psutil.net_connections(kind=listener.protocol.value):
            listening = listener.protocol is Protocol.UDP or entry.status == psutil.CONN_LISTEN
            if entry.laddr and entry.laddr.port == listener.port and listening and not entry.raddr:
                if entry.pid is None:
                    break
                return f"{psutil.Process(entry.pid).name()} (pid {entry.pid})"
    except (psutil.Error, OSError):
        pass
    return "a process that cannot be seen from here"
