"""Finds a Docker Engine for the demo and the tests, or starts a private one.

    python3 scripts/engine.py up              prints DOCKER_HOST=unix:///...
    python3 scripts/engine.py up --private    the same, and always the private Engine
    python3 scripts/engine.py down            removes the private Engine and all that it made

`up` takes the first that answers: DOCKER_HOST, /var/run/docker.sock, the private Engine of this
checkout. If none answers it starts the private one; as root on Debian it installs docker.io first.
If no Engine can be had it says so in one line and exits with code 2.

- An Engine that this script did not start is used, never changed or stopped.
- Two checkouts have two Engines that share nothing. The path of the checkout names the bridge and
  a folder in /run, which holds the sockets (the path of a socket has at most 107 bytes). The data
  is in .engine/. Each Engine has a range of addresses that no route of the machine used.
- A process is signalled only after its command line has shown that it belongs to this Engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

import debian
from debian import REPO, UnavailableError, run, say

DEFAULT_HOST = "unix:///var/run/docker.sock"
RUN = Path("/run")
RUN_PREFIX = "grand-ambassador-"
START_S = 60.0
STOP_S = 15.0
POLL_S = 0.05

# 172.17.0.0/16 is left to the docker0 of an ordinary Engine, which may start later.
SUBNETS = [IPv4Network(f"172.{n}.0.0/16") for n in range(18, 32)]
SUBNETS += [IPv4Network(f"10.{n}.0.0/16") for n in range(200, 250)]

# What dockerd cannot do on some machines: words of its last line, and an argument that helps.
REMEDIES = (
    # A newer Engine does not fall back by itself if the file system is an overlay already.
    (("driver", "snapshotter", "overlay"), "--storage-driver=vfs"),
    # The kernel has no NAT: containers still reach each other, which is enough.
    (("iptables", "nat chain", "ip6tables"), "--iptables=false"),
)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("docker", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def get(host: str, target: str, timeout_s: float = 5.0) -> int:
    """Return the status of a GET to the Engine at a unix:// host; 0 if there is no answer."""
    connection = _UnixConnection(host.removeprefix("unix://"), timeout_s)
    try:
        connection.request("GET", target)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def answers(host: str) -> bool:
    """Tell whether an Engine answers at this DOCKER_HOST."""
    if host.startswith("unix://"):
        return get(host, "/_ping") == 200
    # The client knows how to use tcp:// and ssh://, and which certificates.
    try:
        return run("docker", "-H", host, "version", timeout_s=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def running_engine() -> str | None:
    """Return the DOCKER_HOST of an Engine that is not ours to start or stop."""
    chosen = os.environ.get("DOCKER_HOST")
    if chosen and answers(chosen):
        return chosen
    if chosen:
        say(f"DOCKER_HOST={chosen} does not answer, looking further")
    return DEFAULT_HOST if answers(DEFAULT_HOST) else None


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Poll until the condition holds; return False after the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


class PrivateEngine:
    """The Engine of this checkout."""

    def __init__(self) -> None:
        digest = hashlib.sha256(os.fsencode(REPO)).hexdigest()[:8]
        self.bridge = f"ga-{digest}"
        self.run = RUN / f"{RUN_PREFIX}{digest}"
        self.exec_root = self.run / "exec"
        self.host = f"unix://{self.run}/docker.sock"
        self.files = REPO / ".engine"
        self.data = self.files / "data"
        self.log = self.files / "dockerd.log"

    def up(self) -> None:
        """Start it; it answers when this returns. Raises UnavailableError if that fails."""
        if self._processes():
            if wait_until(lambda: answers(self.host), 10):
                return
            say("the private Engine does not answer; starting it anew")
        try:
            debian.need({"dockerd": "docker.io", "ip": "iproute2", "iptables": "iptables"})
            # Debian 12 has the client in docker.io, Debian 13 only recommends its package.
            debian.need({"docker": "docker-cli"})
        except UnavailableError as error:
            raise UnavailableError(f"no Docker Engine can be had here ({error})") from error
        self._end()
        for folder in (self.exec_root, self.data):
            folder.mkdir(parents=True, exist_ok=True)
        self.run.chmod(0o711)  # the socket has a mode of its own
        (self.files / "daemon.json").write_text("{}\n")  # /etc/docker is another Engine's
        subnet = self._make_bridge()
        extra: list[str] = []
        while reason := self._start_daemon(subnet, extra):
            words = reason.lower()
            remedies = [arg for signs, arg in REMEDIES if any(sign in words for sign in signs)]
            if not remedies or remedies[0] in extra:
                raise UnavailableError(
                    f"dockerd does not start here ({reason}; more in {self.log}). Start a Docker "
                    "Engine by other means and set DOCKER_HOST"
                )
            say(f"dockerd: {reason}; trying {remedies[0]}")
            extra.append(remedies[0])

    def down(self) -> None:
        """Stop it and remove all that it made."""
        if not self.run.exists() and not self.files.exists():
            return
        say(f"removing the private Engine: {self.files}, {self.run}, {self.bridge}")
        self._end()
        if subnet := self._subnet():
            _remove_network(subnet)
        for folder in filter(Path.exists, (self.files, self.run)):
            shutil.rmtree(folder)

    # Processes and mounts

    def _processes(self) -> list[int]:
        """Return dockerd, containerd, its shims, and all that they started."""
        found: list[int] = []
        children: dict[int, list[int]] = {}
        # The shims of the system's containerd name only our namespace.
        signs = (str(self.exec_root), f"-namespace\0{self.bridge}\0")
        for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
            command_line = _read(f"/proc/{pid}/cmdline")
            if any(sign in command_line for sign in signs):
                found.append(pid)
            # The name, in parentheses, may hold anything; the parent is the second field after it.
            fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
            if fields:
                children.setdefault(int(fields[1]), []).append(pid)
        for pid in found:  # grows as it is read
            found += [child for child in children.get(pid, []) if child not in found]
        return found

    def _end(self) -> None:
        """Kill what runs of it, and unmount what that leaves. Does nothing if there is nothing."""
        # No SIGTERM: the first process of a container may ignore it, and what dockerd does not
        # clean up is cleaned up here.
        deadline = time.monotonic() + STOP_S
        while pids := self._processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_until(partial(_all_dead, pids), 5)
            if time.monotonic() > deadline:
                raise UnavailableError(f"processes of {self.run} do not end: {pids}")
        places = []
        for line in _read("/proc/self/mountinfo").splitlines():
            # A space in a path is written as an octal escape.
            place = Path(line.split()[4].encode().decode("unicode_escape"))
            if place.is_relative_to(self.data) or place.is_relative_to(self.run):
                places.append(place)
        for place in sorted(places, reverse=True):
            run("umount", "-l", str(place))
        shutil.rmtree(self.exec_root, ignore_errors=True)
        for name in ("docker.sock", "dockerd.pid"):
            (self.run / name).unlink(missing_ok=True)

    def _start_daemon(self, subnet: IPv4Network, extra: Sequence[str]) -> str:
        """Start dockerd; return "" if it answers, else the reason that it gave for its end."""
        # One half is for the bridge, the other for networks that tests create: the Engine uses no
        # address outside its range.
        pool = list(subnet.subnets())[1]
        command = [
            debian.find("dockerd") or "dockerd",
            f"--host={self.host}",
            f"--pidfile={self.run / 'dockerd.pid'}",
            f"--data-root={self.data}",
            f"--exec-root={self.exec_root}",
            f"--config-file={self.files / 'daemon.json'}",
            f"--bridge={self.bridge}",
            f"--default-address-pool=base={pool},size=24",
            # dockerd uses the system's containerd if there is one: keep to a namespace of our own.
            f"--containerd-namespace={self.bridge}",
            f"--containerd-plugins-namespace={self.bridge}-plugins",
            *extra,
        ]
        environment = {**os.environ, "PATH": debian.ADMIN_PATH}
        environment.pop("DOCKER_HOST", None)
        say("starting a private Docker Engine (dockerd)")
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,  # it outlives this script and its terminal
            )
        wait_until(lambda: answers(self.host) or process.poll() is not None, START_S)
        if process.poll() is None and answers(self.host):
            say(f"private Engine ready: pid {process.pid}, containers in {subnet}")
            return ""
        process.kill()
        process.wait()
        self._end()
        lines = self.log.read_text(errors="replace").splitlines()
        failed = [line for line in lines if "failed to start" in line] or lines
        return debian.last_lines("\n".join(failed)).removeprefix("failed to start daemon: ")[:300]

    # The network

    def _subnet(self) -> IPv4Network | None:
        """Return the range that this Engine has; None without a bridge."""
        own = [address.network for name, address in _bridges() if name == self.bridge]
        return own[0].supernet() if own else None

    def _make_bridge(self) -> IPv4Network:
        """Make a bridge of our own: docker0 belongs to an ordinary Engine."""
        if subnet := self._subnet():
            return subnet
        _ip("link", "del", self.bridge, check=False)
        subnet = _free_subnet()
        containers = next(subnet.subnets())
        # A fixed MAC, as Docker gives its own bridges. Else a bridge takes the lowest MAC of its
        # ports, and packets to this host are lost whenever that changes.
        digits = f"0242{self.bridge.removeprefix('ga-')}"
        mac = ":".join(digits[i : i + 2] for i in range(0, 12, 2))
        _ip("link", "add", self.bridge, "address", mac, "type", "bridge")
        _ip("addr", "add", f"{containers[1]}/{containers.prefixlen}", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        return subnet


def _read(path: str) -> str:
    """Return the text of a file; "" if it is gone."""
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def _all_dead(pids: Sequence[int]) -> bool:
    return not any(_read(f"/proc/{pid}/cmdline") for pid in pids)  # a zombie has none


def _ip(*args: str, check: bool = True) -> str:
    done = run("ip", *args)
    if check and done.returncode != 0:
        raise UnavailableError(f"ip {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


def _bridges() -> list[tuple[str, IPv4Interface]]:
    lines = _ip("-4", "-o", "addr", "show", "type", "bridge").splitlines()
    return [(words[1], IPv4Interface(words[3])) for words in map(str.split, lines)]


def _free_subnet() -> IPv4Network:
    taken = []
    for word in _ip("-4", "route", "show", "table", "all").split():
        with contextlib.suppress(ValueError):
            taken.append(IPv4Network(word))
    for subnet in SUBNETS:
        # A very wide route is where everything else goes, not a range in use.
        if not any(subnet.overlaps(net) for net in taken if net.prefixlen > 8):
            return subnet
    raise UnavailableError("no private range of addresses is free on this machine")


def _remove_network(subnet: IPv4Network) -> None:
    """Remove the bridge, those of networks that were left, and their packet filter rules."""
    bridges = {name for name, address in _bridges() if address.ip in subnet}

    def is_ours(word: str) -> bool:
        with contextlib.suppress(ValueError):  # ADDRESS, ADDRESS/PREFIX, ADDRESS:PORT
            return IPv4Network(word.partition(":")[0]).subnet_of(subnet)
        return word in bridges

    for program in filter(debian.find, ("iptables", "ip6tables")):
        for table in ("filter", "nat", "raw"):
            for rule in run(program, "-w", "-t", table, "-S").stdout.splitlines():
                words = rule.split()
                if words[0] == "-A" and any(map(is_ours, words)):
                    run(program, "-w", "-t", table, "-D", *words[1:])
    for name in bridges:
        _ip("link", "del", name, check=False)


# Commands


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One `up` or `down` at a time on this machine: two must not choose the same range."""
    # The file stays. If it were removed while another waits for it, two could hold it.
    with (RUN / f"{RUN_PREFIX}engines.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another engine.py on this machine")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def up(*, private: bool = False) -> str:
    """Find or start an Engine; return its DOCKER_HOST. Raises UnavailableError."""
    host = None if private else running_engine()
    if host is None:
        mine = PrivateEngine()
        host = mine.host
        if not answers(host):
            if sys.platform != "linux" or os.geteuid() != 0:
                raise UnavailableError(
                    "no Docker Engine answers, and starting one needs Linux and root: run as "
                    "root, or install Docker and join its group, or set DOCKER_HOST"
                )
            with _locked():
                mine.up()
    say(f"using the Docker Engine at {host}")
    return host


def down() -> None:
    mine = PrivateEngine()
    if not mine.files.exists() and not mine.run.exists():
        return
    if os.geteuid() != 0:
        raise UnavailableError("the private Engine belongs to root: run this as root")
    with _locked():
        mine.down()


def main(arguments: Sequence[str]) -> int:
    if arguments not in (["up"], ["up", "--private"], ["down"]):
        print("usage: engine.py up [--private] | down", file=sys.stderr)
        return 2
    try:
        if arguments == ["down"]:
            down()
        else:
            print(f"DOCKER_HOST={up(private='--private' in arguments)}")
    except (UnavailableError, OSError) as error:
        print(f"engine.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
