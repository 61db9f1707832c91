"""A Docker Engine of one test's own, to be killed and started again; the shared one goes on.

Invariants:

- Its data, its sockets, its bridge and its range of addresses are nobody else's; iptables stays as it
  is, so its containers reach this machine and each other only.
- Containers live on while it is away (live-restore), as they do where a daemon is upgraded.
- `remove` leaves nothing: no process, no mount, no bridge, no file.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import docker
from docker.errors import DockerException

from tests.support.engine import DEMO, Engine
from tests.support.processes import descendants, read_process
from tests.support.wait import wait_until

START_S = 60.0
ADMIN_PATH = os.pathsep.join(("/usr/local/sbin", "/usr/sbin", "/sbin", os.environ["PATH"]))


class OwnEngine:
    """`start`, `kill`, `stop` and hang the daemon; `engine` speaks to it while it runs."""

    def __init__(self) -> None:
        # In /run: the path of a socket must be short.
        self.run = Path(tempfile.mkdtemp(prefix="gat-", dir="/run"))
        self.data = Path(tempfile.mkdtemp(prefix="gat-engine-"))
        self.socket = self.run / "docker.sock"
        self.host = f"unix://{self.socket}"
        self.bridge = f"gat{os.getpid() % 10**7}"
        self.log = self.data / "dockerd.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._make_bridge()

    def _make_bridge(self) -> None:
        taken = []
        for word in _ip("-4", "route", "show", "table", "all").split():
            with contextlib.suppress(ValueError):
                taken.append(ipaddress.IPv4Network(word))
        while True:
            subnet = ipaddress.IPv4Network(
                f"10.{random.randrange(256)}.{random.randrange(256)}.0/24"
            )
            if not any(net.overlaps(subnet) for net in taken if net.prefixlen > 8):
                break
        mac = "02:42:" + ":".join(f"{part:02x}" for part in subnet[1].packed)
        _ip("link", "add", self.bridge, "address", mac, "type", "bridge")
        _ip("addr", "add", f"{subnet[1]}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    # The daemon

    def start(self) -> None:
        """Start it; it answers when this returns."""
        config = self.data / "daemon.json"
        config.write_text('{"live-restore": true}\n')
        command = [
            "dockerd",
            f"--host={self.host}",
            f"--config-file={config}",
            f"--data-root={self.data / 'data'}",
            f"--exec-root={self.run / 'exec'}",
            f"--pidfile={self.run / 'pid'}",
            f"--bridge={self.bridge}",
            "--iptables=false",
            "--ip-masq=false",
            f"--containerd-namespace={self.bridge}",
            f"--containerd-plugins-namespace={self.bridge}-plugins",
        ]
        (self.run / "pid").unlink(missing_ok=True)  # of one that was killed
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": ADMIN_PATH},
                start_new_session=True,
            )
        self._process = process

        def ready() -> bool:
            if process.poll() is not None:
                end = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
                raise AssertionError(f"dockerd ended with {process.returncode}:\n{end}")
            return self._answers()

        wait_until(ready, "dockerd to answer", START_S)

    def _answers(self) -> bool:
        try:
            client = docker.DockerClient(base_url=self.host, timeout=5)
        except DockerException:
            return False
        client.close()
        return True

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            # Its containerd dies with it. Where nobody reaps that (a container's first process may
            # not) the next dockerd takes the zombie for a containerd that works.
            (self.run / "exec/containerd/containerd.pid").unlink(missing_ok=True)

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """While in here the daemon is stopped (SIGSTOP): its sockets accept, and nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """SIGTERM. What it leaves of its socket is removed."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(START_S)
        self.socket.unlink(missing_ok=True)

    @property
    def engine(self) -> Engine:
        return Engine(self.host)

    def load_image(self, source: Engine) -> None:
        """Have the demo image of another Engine."""
        environment = {**os.environ, "DOCKER_HOST": source.host}
        with subprocess.Popen(
            ["docker", "save", DEMO], env=environment, stdout=subprocess.PIPE
        ) as save:
            subprocess.run(
                ["docker", "load", "--quiet"],
                check=True,
                env={**environment, "DOCKER_HOST": self.host},
                stdin=save.stdout,
                capture_output=True,
            )

    # The end

    def remove(self) -> None:
        self.kill()
        for _ in range(3):  # a shim may start something while it is looked for
            for pid in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self._processes(), "the end of its processes")
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        ours = [m for m in mounts if m.startswith((f"{self.run}/", f"{self.data}/"))]
        for mount in sorted(ours, key=len, reverse=True):
            subprocess.run(["umount", "-l", mount], check=False, capture_output=True)
        _ip("link", "del", self.bridge)
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(self.data, ignore_errors=True)

    def _processes(self) -> list[int]:
        """containerd and shims, by their command lines, and what runs in the containers."""
        found = []
        for pid in (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
            process = read_process(pid)
            if process is not None and process.state != "Z" and f"{self.run}/" in process.title:
                found += [pid, *(child.pid for child in descendants(pid))]
        return found


def _ip(*args: str) -> str:
    return subprocess.run(
        ["ip", *args], check=True, capture_output=True, text=True, env={"PATH": ADMIN_PATH}
    ).stdout
