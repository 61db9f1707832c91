"""Finds a Docker Engine for the demo and the tests, or starts a private one.

    python3 scripts/engine.py up       ends with DOCKER_HOST=unix:///... on standard output
    python3 scripts/engine.py down     stops the private Engine and removes everything it made
    python3 scripts/engine.py status   says which Engine `up` would use (exit code 1: none runs)

`up` takes the first that answers: DOCKER_HOST, /var/run/docker.sock, this repository's private
Engine; failing those it starts the private one (on Debian as root it installs docker.io first).
Where no Engine can be had it says so in one line and exits with code 2. Standard library only: it
runs on the system's python3 before any virtual environment exists.

Invariants:

- An Engine that this script did not start is used, never changed or stopped.
- Everything private is named after the repository's path, so that two checkouts on one machine
  have two Engines that do not touch each other: the data in .engine/, sockets and pid file in a
  short folder under /run (a Unix socket's path may have 107 bytes, a clone's may be longer), one
  bridge, and one range of addresses that no route of the machine used before.
- A process is only signalled after its command line has shown that it is ours: a pid file may be
  older than the process that has its number now.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import debian
from debian import UnavailableError, say

REPO = Path(__file__).resolve().parent.parent
DEFAULT_SOCKET = Path("/var/run/docker.sock")
RUN = Path("/run")
RUN_PREFIX = "grand-ambassador-"

START_SECONDS = 60.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.05

# 172.17/16 is left to an ordinary Engine's docker0, whether it runs now or not.
CANDIDATE_SUBNETS = [ipaddress.IPv4Network(f"172.{n}.0.0/16") for n in range(18, 32)]
CANDIDATE_SUBNETS += [ipaddress.IPv4Network(f"10.{n}.0.0/16") for n in range(200, 250)]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("docker", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def request(path: str, target: str, method: str = "GET", limit: float = 5.0) -> tuple[int, bytes]:
    """One request to the Engine whose Unix socket is `path`; raises OSError where it fails."""
    connection = _UnixConnection(path, limit)
    try:
        connection.request(method, target)
        response = connection.getresponse()
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP answer on {path}: {error!r}") from error
    finally:
        connection.close()


def request_json(path: str, target: str, limit: float = 5.0) -> Any:
    """A GET whose answer is JSON; raises OSError where it fails or is refused."""
    status, body = request(path, target, limit=limit)
    if status != 200:
        raise OSError(f"GET {target}: status {status}")
    return json.loads(body)


def answers(host: str) -> bool:
    """True if an Engine answers at this DOCKER_HOST."""
    if host.startswith("unix://"):
        try:
            return request(host.removeprefix("unix://"), "/_ping")[0] == 200
        except OSError:
            return False
    # tcp:// with or without TLS, ssh://: the client knows how, and which certificates.
    docker = debian.find("docker")
    if docker is None:
        return False
    try:
        done = subprocess.run(
            [docker, "-H", host, "version"], capture_output=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def running_engine() -> str | None:
    """The DOCKER_HOST of an Engine that is not ours to start or stop."""
    chosen = os.environ.get("DOCKER_HOST")
    if chosen:
        if answers(chosen):
            return chosen
        say(f"DOCKER_HOST={chosen} does not answer, looking further")
    default = f"unix://{DEFAULT_SOCKET}"
    return default if answers(default) else None


def wait_until(condition: Callable[[], bool], limit: float) -> bool:
    """Poll until the condition holds; False when the limit passed first."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


class PrivateEngine:
    """The Engine of one checkout: where its parts are, how it starts and how it goes."""

    def __init__(self, repo: Path) -> None:
        self.repo = repo
        digest = hashlib.sha256(os.fsencode(repo)).hexdigest()[:8]
        self.run = RUN / f"{RUN_PREFIX}{digest}"
        self.socket = self.run / "docker.sock"
        self.pid_file = self.run / "dockerd.pid"
        self.exec_root = self.run / "exec"
        self.record = self.run / "engine.json"
        self.files = repo / ".engine"
        self.data_root = self.files / "data"
        self.log = self.files / "dockerd.log"
        self.bridge = f"ga-{digest}"
        self.host = f"unix://{self.socket}"

    # What is there

    def pid(self) -> int | None:
        """The pid of this Engine's dockerd, or None if it does not run."""
        try:
            pid = int(self.pid_file.read_text())
        except (OSError, ValueError):
            return None
        return pid if str(self.socket) in _command_line(pid) else None

    def exists(self) -> bool:
        return self.run.exists() or self.files.exists()

    def subnet(self) -> ipaddress.IPv4Network | None:
        """The range that this Engine took when it made its bridge."""
        try:
            return ipaddress.IPv4Network(json.loads(self.record.read_text())["subnet"])
        except (OSError, ValueError, KeyError):
            return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One `up` or `down` at a time for this checkout."""
        path = RUN / f"{self.run.name}.lock"
        with path.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                say("waiting for another engine.py of this repository")
                fcntl.flock(handle, fcntl.LOCK_EX)
            # The file stays: removing it under a waiter would give two of them a lock each.
            yield

    # Starting

    def up(self) -> None:
        """Make it answer. Raises UnavailableError where that cannot be done."""
        pid = self.pid()
        if pid is not None:
            if wait_until(lambda: answers(self.host), 10):
                return
            say(f"dockerd (pid {pid}) hangs; starting it anew")
            self._stop_daemon()
        elif self.pid_file.exists():
            say("the private Engine died or the machine was restarted; starting it anew")
        self._install()
        # A daemon that was killed leaves a containerd that it cannot find again, mounts and sockets.
        self._clear_run()
        self._make_folders()
        subnet = self._make_bridge()
        extra: list[str] = []
        while (reason := self._start_daemon(subnet, extra)) is not None:
            remedy = _remedy(reason, extra)
            if remedy is None:
                raise UnavailableError(
                    f"dockerd does not start here ({reason}; more in {self.log}). Start a Docker "
                    "Engine by other means and set DOCKER_HOST"
                )
            say(f"dockerd: {reason}; trying {' '.join(remedy)}")
            extra += remedy

    def _install(self) -> None:
        try:
            debian.need({"dockerd": "docker.io", "ip": "iproute2", "iptables": "iptables"})
            # Debian 12's docker.io has the client inside, Debian 13's only recommends it.
            debian.need({"docker": "docker-cli"})
        except UnavailableError as error:
            raise UnavailableError(f"no Docker Engine can be had here ({error})") from error

    def _make_folders(self) -> None:
        for folder in (self.run, self.exec_root, self.files, self.data_root):
            folder.mkdir(parents=True, exist_ok=True)
        self.run.chmod(0o711)  # the socket has its own mode
        # The machine's own /etc/docker/daemon.json is about another Engine.
        (self.files / "daemon.json").write_text("{}\n")

    def _make_bridge(self) -> ipaddress.IPv4Network:
        """A bridge of our own: docker0 belongs to an Engine that may run later, or did before."""
        subnet = self.subnet()
        addresses = {i.network for name, i in _bridge_addresses() if name == self.bridge}
        if subnet is not None and any(net.subnet_of(subnet) for net in addresses):
            return subnet
        with (RUN / f"{RUN_PREFIX}subnets.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # two checkouts must not choose the same one
            _ip("link", "del", self.bridge, check=False)
            subnet = _free_subnet()
            containers = next(subnet.subnets(new_prefix=17))
            # A fixed MAC, as Docker gives its own bridges. Else a bridge takes the lowest of its ports',
            # and a container that comes or goes has the others' packets to this host lost for a while.
            digits = f"0242{self.bridge.removeprefix('ga-')}"
            mac = ":".join(digits[i : i + 2] for i in range(0, 12, 2))
            _ip("link", "add", self.bridge, "address", mac, "type", "bridge")
            _ip("addr", "add", f"{containers[1]}/{containers.prefixlen}", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
        document = {"repo": str(self.repo), "bridge": self.bridge, "subnet": str(subnet)}
        self.record.write_text(json.dumps(document) + "\n")
        return subnet

    def _start_daemon(self, subnet: ipaddress.IPv4Network, extra: Sequence[str]) -> str | None:
        """Start dockerd; None when it answers, else the reason it gave for giving up."""
        # One half for the bridge, the other for networks that tests create: nothing of this Engine
        # lies outside the one range that was free.
        pool = list(subnet.subnets(new_prefix=17))[1]
        command = [
            debian.find("dockerd") or "dockerd",
            f"--host={self.host}",
            f"--pidfile={self.pid_file}",
            f"--data-root={self.data_root}",
            f"--exec-root={self.exec_root}",
            f"--config-file={self.files / 'daemon.json'}",
            f"--bridge={self.bridge}",
            f"--default-address-pool=base={pool},size=24",
            # Where the system's containerd runs, dockerd uses it: keep to a namespace of our own.
            f"--containerd-namespace={self.bridge}",
            f"--containerd-plugins-namespace={self.bridge}-plugins",
            *extra,
        ]
        path = os.pathsep.join((*debian.ADMIN_PATHS, os.environ.get("PATH", os.defpath)))
        environment = {**os.environ, "PATH": path}
        environment.pop("DOCKER_HOST", None)
        say("starting a private Docker Engine (dockerd)")
        with self.log.open("ab") as log:
            beginning = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,  # it outlives this script and its terminal
            )
        ready = wait_until(lambda: answers(self.host) or process.poll() is not None, START_SECONDS)
        if ready and process.poll() is None:
            say(f"private Engine ready: pid {process.pid}, containers in {subnet}")
            return None
        self._stop_daemon()
        if process.poll() is None:  # it had not come as far as its pid file
            process.kill()
            process.wait()
        with self.log.open("rb") as log:
            log.seek(beginning)
            return _last_words(log.read().decode(errors="replace"))

    # Stopping

    def down(self) -> None:
        """Stop it and remove all it made. Does nothing where nothing is left."""
        if not self.exists():
            return
        subnet = self.subnet()
        if self.pid() is not None:
            self._remove_containers()
            say("stopping the private Engine")
            self._stop_daemon()
        self._clear_run()
        if subnet is not None:
            _remove_bridges(subnet)
        say(f"removing {self.files} and {self.run}")
        shutil.rmtree(self.files, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)
        if self.exists():
            raise UnavailableError(f"could not remove all of {self.files} and {self.run}")

    def _remove_containers(self) -> None:
        try:
            for container in request_json(str(self.socket), "/containers/json?all=1"):
                target = f"/containers/{container['Id']}?force=1&v=1"
                request(str(self.socket), target, "DELETE", limit=30)
            for network in request_json(str(self.socket), "/networks"):
                if network["Name"] not in ("bridge", "host", "none"):
                    request(str(self.socket), f"/networks/{network['Id']}", "DELETE", limit=30)
        except OSError as error:
            say(f"could not remove every container ({error}); going on")

    def _stop_daemon(self) -> None:
        pid = self.pid()
        if pid is not None:
            _end([pid], signal.SIGTERM, signal.SIGKILL)

    def _clear_run(self) -> None:
        """End containerd, its shims and what ran in them; remove what a daemon keeps while it runs."""
        ours = [pid for pid in _pids() if _mentions(pid, self.exec_root)]
        if ours:
            # No TERM first: a container's first process ignores it unless it has a handler.
            _end(_with_descendants(ours), signal.SIGKILL)
        self._unmount()
        shutil.rmtree(self.exec_root, ignore_errors=True)
        self.pid_file.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)

    def _unmount(self) -> None:
        places = []
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            # Spaces and the like in a path are written as octal escapes.
            place = Path(line.split()[4].encode().decode("unicode_escape"))
            if place.is_relative_to(self.data_root) or place.is_relative_to(self.run):
                places.append(place)
        for place in sorted(places, key=lambda p: len(p.parts), reverse=True):
            subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


# Processes


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _mentions(pid: int, folder: Path) -> bool:
    return any(f"{folder}/" in word for word in _command_line(pid).split("\0"))


def _pids() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]


def _with_descendants(roots: Sequence[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid in _pids():
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name, in parentheses, may hold anything; the parent is the second field after it.
            stat = Path(f"/proc/{pid}/stat").read_text()
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(pid)
    found = list(roots)
    for pid in found:  # grows as it is read
        found += [child for child in children.get(pid, []) if child not in found]
    return found


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def _end(pids: Sequence[int], *numbers: signal.Signals) -> None:
    for number in numbers:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if wait_until(lambda: not any(map(_alive, pids)), STOP_SECONDS):
            return


# The network


def _ip(*args: str, check: bool = True) -> str:
    done = subprocess.run(
        [debian.find("ip") or "ip", *args], capture_output=True, text=True, check=False
    )
    if check and done.returncode != 0:
        raise UnavailableError(f"ip {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


def _bridge_addresses() -> list[tuple[str, ipaddress.IPv4Interface]]:
    found = []
    for line in _ip("-4", "-o", "addr", "show", "type", "bridge", check=False).splitlines():
        words = line.split()
        found.append((words[1], ipaddress.IPv4Interface(words[3])))
    return found


def _free_subnet() -> ipaddress.IPv4Network:
    taken = []
    for line in _ip("-4", "route", "show", "table", "all").splitlines():
        for word in line.split()[:2]:  # "NETWORK ...", or "local ADDRESS ..."
            with contextlib.suppress(ValueError):
                taken.append(ipaddress.IPv4Network(word))
    # A default or another very wide route is where everything else goes, not a range in use.
    taken = [net for net in taken if net.prefixlen > 8]
    for candidate in CANDIDATE_SUBNETS:
        if not any(candidate.overlaps(net) for net in taken):
            return candidate
    raise UnavailableError("no private range of addresses is free on this machine")


def _remove_bridges(subnet: ipaddress.IPv4Network) -> None:
    """Our bridge and those of networks that a crashed daemon left, with their iptables rules."""
    bridges = {name for name, address in _bridge_addresses() if address.ip in subnet}
    _remove_rules(lambda word: word in bridges or _is_within(word, subnet))
    for name in bridges:
        _ip("link", "del", name, check=False)


def _remove_rules(is_ours: Callable[[str], bool]) -> None:
    iptables = debian.find("iptables")
    if iptables is None:
        return
    for table in ("filter", "nat"):
        listed = subprocess.run(
            [iptables, "-w", "-t", table, "-S"], capture_output=True, text=True, check=False
        )
        for rule in listed.stdout.splitlines():
            words = rule.split()
            if words[0] == "-A" and any(map(is_ours, words)):
                delete = [iptables, "-w", "-t", table, "-D", *words[1:]]
                subprocess.run(delete, check=False, capture_output=True)


def _is_within(word: str, subnet: ipaddress.IPv4Network) -> bool:
    """True for ADDRESS, ADDRESS/PREFIX and ADDRESS:PORT inside a range."""
    try:
        return ipaddress.IPv4Network(word.partition(":")[0]).subnet_of(subnet)
    except ValueError:
        return False


# What dockerd says


def _last_words(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    failed = [line for line in lines if "failed to start" in line]
    reason = (failed or lines or ["no reason given"])[-1]
    return reason.removeprefix("failed to start daemon: ")[:300]


def _remedy(reason: str, tried: Sequence[str]) -> list[str] | None:
    """More arguments that may help against this reason, each tried once."""
    words = reason.lower()
    remedies = [
        # Newer Engines do not fall back by themselves where the file system is an overlay already.
        (("driver", "snapshotter", "overlay"), "--storage-driver=vfs"),
        # No NAT in the kernel: containers still reach each other, which is all that we ask.
        (("iptables", "nat chain", "ip6tables"), "--iptables=false"),
    ]
    for signs, argument in remedies:
        if argument not in tried and any(sign in words for sign in signs):
            return [argument]
    return None


# Commands


def remove_orphans() -> None:
    """Stop the private Engines of checkouts that were deleted without `make clean`."""
    for record in RUN.glob(f"{RUN_PREFIX}*/engine.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            repo = Path(json.loads(record.read_text())["repo"])
            orphan = PrivateEngine(repo)
            if not repo.exists() and orphan.record == record:
                say(f"{repo} is gone; removing the Engine it left")
                with orphan.locked():
                    orphan.down()


def up(*, private: bool = False) -> str:
    """Find or start an Engine; its DOCKER_HOST. Raises UnavailableError where none can be had.

    `private`: this checkout's own, whatever else runs.
    """
    host = None if private else running_engine()
    if host is not None:
        say(f"using the Docker Engine at {host}")
        return host
    mine = PrivateEngine(REPO)
    if answers(mine.host):
        say(f"using this repository's private Engine at {mine.host}")
        return mine.host
    if sys.platform != "linux":
        raise UnavailableError("no Docker Engine answers here: start Docker, or set DOCKER_HOST")
    if os.geteuid() != 0:
        raise UnavailableError(
            "no Docker Engine answers here and starting one needs root: run as root, or "
            "install Docker and join its group, or set DOCKER_HOST"
        )
    remove_orphans()
    with mine.locked():
        mine.up()
    return mine.host


def down() -> None:
    mine = PrivateEngine(REPO)
    if not mine.exists():
        say("no private Engine here")
        return
    if os.geteuid() != 0:
        raise UnavailableError("the private Engine belongs to root: run this as root")
    with mine.locked():
        mine.down()


def status() -> int:
    mine = PrivateEngine(REPO)
    host = running_engine() or (mine.host if answers(mine.host) else None)
    if host is None:
        print("no Docker Engine runs; `engine.py up` finds or starts one")
        return 1
    print(f"host: {host}")
    if host.startswith("unix://"):
        path = host.removeprefix("unix://")
        info = request_json(path, "/info", limit=10)
        print(f"version: {info['ServerVersion']}, storage: {info['Driver']}")
        print(f"containers: {info['Containers']} ({info['ContainersRunning']} running)")
    if host == mine.host:
        print(f"private: pid {mine.pid()}, bridge {mine.bridge}, addresses {mine.subnet()}")
        print(f"log: {mine.log}")
    return 0


def main(argv: Sequence[str]) -> int:
    if list(argv) not in (["up"], ["up", "--private"], ["down"], ["status"]):
        print("usage: engine.py up [--private] | down | status", file=sys.stderr)
        return 2
    try:
        if argv[0] == "status":
            return status()
        if argv[0] == "down":
            down()
        else:
            print(f"DOCKER_HOST={up(private='--private' in argv)}")
    except (UnavailableError, OSError) as error:
        print(f"engine.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
