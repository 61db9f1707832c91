"""What the knobs of the machine do to the ambassador: the table in docs/performance.md.

`python -m bench.knobs` as root. Each measurement has a network namespace of its own, so the machine's own
settings stay; only `net.core.rmem_max` is the whole machine's, and is put back afterwards.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SO_RCVBUFFORCE = 33  # <asm-generic/socket.h>; Python has no name for it
RMEM_MAX = Path("/proc/sys/net/core/rmem_max")
FRONT, BACK = 17_100, 17_101
HERE = "127.0.0.1"
SHORT = 5_000  # connections, one after the other
BURST = 1_000  # connections, or datagrams, while the worker is stopped

Result = dict[str, float]


@contextmanager
def relay(protocol: str) -> Iterator[int]:
    """An ambassador in front of BACK; gives the process ID of its worker."""
    command = [sys.executable, "-m", "ambassador", "relay", f"{FRONT}/{protocol}={HERE}:{BACK}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
        try:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                for process in psutil.Process(parent.pid).children(recursive=True):
                    if process.cmdline()[:1] and f"{FRONT}/{protocol}" in process.cmdline()[0]:
                        time.sleep(0.5)
                        yield process.pid
                        return
                time.sleep(0.05)
            raise SystemExit("the ambassador has no worker")
        finally:
            parent.terminate()


def short_connections() -> Result:
    """One after the other, the client ends each: the port towards the backend rests a minute in TIME_WAIT."""
    failed = 0
    with relay("tcp"), socket.create_server((HERE, BACK), backlog=1024) as server:
        for _ in range(SHORT):
            try:
                with socket.create_connection((HERE, FRONT), timeout=2) as client:
                    client.settimeout(2)
                    server.settimeout(0.2)
                    accepted, _ = server.accept()
                    client.close()
                    accepted.recv(1)
                    accepted.close()
            except OSError:
                failed += 1
                if failed >= BURST:
                    break
    return {"failed": failed}


def backlog() -> Result:
    """As many at once as come while the worker is stopped for a moment: how many get through."""
    with relay("tcp") as worker, socket.create_server((HERE, BACK), backlog=4096):
        os.kill(worker, signal.SIGSTOP)
        clients = [socket.socket() for _ in range(BURST)]
        with selectors.DefaultSelector() as selector:
            for client in clients:
                client.setblocking(False)
                client.connect_ex((HERE, FRONT))
                selector.register(client, selectors.EVENT_WRITE)
            end, open_ = time.monotonic() + 0.5, 0
            while open_ < BURST and time.monotonic() < end:
                for key, _ in selector.select(0.1):
                    selector.unregister(key.fileobj)
                    open_ += 1
        os.kill(worker, signal.SIGCONT)
        for client in clients:
            client.close()
    return {"at once": open_}


def datagrams() -> Result:
    """A burst of 1,200 bytes each while the worker is stopped: how many the backend gets afterwards."""
    with relay("udp") as worker, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(
            socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24
        )  # the knob is not for this one
        server.bind((HERE, BACK))
        server.settimeout(0.5)
        os.kill(worker, signal.SIGSTOP)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for _ in range(BURST):
                client.sendto(bytes(1200), (HERE, FRONT))
            os.kill(worker, signal.SIGCONT)
            got = 0
            try:
                while server.recv(2048):
                    got += 1
            except TimeoutError:
                pass
    return {"arrived": got}


def held() -> Result:
    """What it says it can hold."""
    command = [sys.executable, "-m", "ambassador", "relay", f"{FRONT}/tcp={HERE}:{BACK}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        line = next(line for line in parent.stderr if "can hold" in line)
        parent.terminate()
    return {"connections": float(line.rpartition("connections=")[2].split()[0])}


MEASURES: dict[str, Callable[[], Result]] = {
    "short": short_connections, "backlog": backlog, "datagrams": datagrams, "held": held,
}  # fmt: skip

_PORTS = {"net.ipv4.ip_local_port_range": "40000 41999"}
CASES: list[tuple[str, str, dict[str, str]]] = [
    ("held", "nofile 1,024", {"nofile": "1024"}),
    ("held", "nofile 20,000", {"nofile": "20000"}),
    ("backlog", "somaxconn 128", {"net.core.somaxconn": "128"}),
    ("backlog", "somaxconn 4,096", {"net.core.somaxconn": "4096"}),
    ("short", "2,000 local ports, tcp_tw_reuse 0", {**_PORTS, "net.ipv4.tcp_tw_reuse": "0"}),
    ("short", "2,000 local ports, tcp_tw_reuse 1", {**_PORTS, "net.ipv4.tcp_tw_reuse": "1"}),
    ("short", "28,000 local ports, tcp_tw_reuse 0", {"net.ipv4.tcp_tw_reuse": "0"}),
    ("datagrams", "rmem_max 212,992", {"rmem_max": "212992"}),
    ("datagrams", "rmem_max 4,194,304", {"rmem_max": "4194304"}),
]


def measure(name: str, knobs: dict[str, str]) -> Result:
    """In a namespace of its own."""
    before = RMEM_MAX.read_text()
    try:
        if "rmem_max" in knobs:
            RMEM_MAX.write_text(knobs["rmem_max"])
        command = ["unshare", "-n", sys.executable, "-m", "bench.knobs", name, json.dumps(knobs)]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        result: Result = json.loads(done.stdout)
        return result
    finally:
        RMEM_MAX.write_text(before)


def inside(name: str, knobs: dict[str, str]) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    limit = int(knobs.get("nofile", resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    for key, value in knobs.items():
        if key.startswith("net."):
            Path("/proc/sys", *key.split(".")).write_text(value)
    print(json.dumps(MEASURES[name]()))


def main(arguments: list[str]) -> None:
    if arguments:
        inside(arguments[0], json.loads(arguments[1]))
        return
    print("| with | measured | |\n|---|---|---:|")
    for name, title, knobs in CASES:
        for what, value in measure(name, knobs).items():
            print(f"| {title} | {_SAYS[name]}: {what} | {value:,.0f} |", flush=True)


_SAYS = {
    "short": f"{SHORT:,} short connections in a row",
    "backlog": f"{BURST:,} connects while the worker is stopped",
    "datagrams": f"{BURST:,} datagrams of 1,200 B while the worker is stopped",
    "held": "what a port can hold",
}

if __name__ == "__main__":
    main(sys.argv[1:])
