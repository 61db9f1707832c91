"""Brings an engine up from Debian's packages, in a root and in namespaces of its own.

    with Engine("podman5-rootless") as engine:
        engine.start()
        engine.docker("run", ...)

Needs root, debootstrap, a Debian archive, cgroup2 and overlayfs. Invariants:

- An engine shares the kernel and its own folder of the cache with the machine, nothing else: no
  network, firewall, mount, process or socket. So it reaches no registry either.
- It ends with us, whatever ends us: its first process waits for our end of a pipe, and the kernel
  ends the others of a PID namespace with the first.
- The root of a Debian suite is made once, and no engine writes to it. All else of an engine goes
  with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple, Self

from tests.support.processes import descendants

REPO = Path(__file__).resolve().parents[2]
CACHE = REPO / ".cache" / "engines"

SOCKET = "/srv/engine/docker.sock"
"""Inside; nobody outside needs it."""

SPACES = ("--net", "--mount", "--pid", "--cgroup", "--ipc", "--uts")
START_S = 60.0
POLL_S = 0.1
USER = "1000"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/share/docker.io/contrib"


class Kind(NamedTuple):
    program: str
    suite: str
    rootless: bool


_PACKAGED = {
    "docker20": ("docker", "bookworm"),
    "docker26": ("docker", "trixie"),
    "docker28": ("docker", "sid"),
    "podman5": ("podman", "trixie"),
    "podman58": ("podman", "sid"),
    "podman6": ("podman", "experimental"),
}
KINDS = {
    name + suffix: Kind(*packaged, rootless=bool(suffix))
    for name, packaged in _PACKAGED.items()
    for suffix in ("", "-rootless")
}

PACKAGES = (
    "ca-certificates iproute2 iptables nftables procps util-linux docker.io rootlesskit uidmap "
    "slirp4netns fuse-overlayfs"
)
PACKAGES_SINCE_TRIXIE = (
    "docker-cli docker-compose crun podman netavark aardvark-dns catatonit passt"
)

MAKE_ROOT = f"""
suite=$1 root=$2 mirror=$3 packages=$4
release=$suite; [ "$suite" = experimental ] && release=sid
debootstrap --variant=minbase "$release" "$root" ${{mirror:+"$mirror"}}
cd "$root"
[ "$suite" = "$release" ] ||
    sed "s/ $release / $suite /" etc/apt/sources.list >etc/apt/sources.list.d/more.list
cp /etc/resolv.conf etc/resolv.conf
# The clock may be ahead of a frozen mirror; and no package may start its service.
echo 'Acquire::Check-Valid-Until "false";' >etc/apt/apt.conf.d/99valid
printf '#!/bin/sh\\nexit 101\\n' >usr/sbin/policy-rc.d; chmod +x usr/sbin/policy-rc.d
mount -t proc proc proc; mount --rbind /dev dev
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
chroot . apt-get -q update
chroot . apt-get -q install -y --no-install-recommends -t "$suite" $packages
chroot . apt-get clean
chroot . useradd -m -u {USER} -s /bin/sh user
for file in subuid subgid; do echo user:100000:65536 >etc/$file; done
mkdir -p etc/containers srv/engine var/lib/engine .old
echo '{{"default": [{{"type": "insecureAcceptAnything"}}]}}' >etc/containers/policy.json
printf '[containers]\\npids_limit=0\\n[engine]\\ncgroup_manager="cgroupfs"\\nevents_logger="file"\\n' \\
    >etc/containers/containers.conf
"""

# Prints the PID that the machine knows it by when all is ready, then waits for the end of its input.
FIRST_PROCESS = f"""
read -r pid _ </proc/self/stat
state=$1 lower=$2
cd "$state"; mkdir upper work root data
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$state/upper,workdir=$state/work" root
cd root
mount -t proc proc proc; mount --rbind /dev dev; mount -t tmpfs -o mode=1777 none dev/shm
mount -t sysfs none sys; mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs -o mode=755 none run; mount -t tmpfs -o mode=1777 none tmp
mount --bind "$state/data" var/lib/engine
if [ -e dev/net/tun ]; then  # for everybody, as udev makes it
    mknod -m 666 run/tun c 10 200; mount --bind run/tun dev/net/tun
fi
pivot_root . .old; cd /; umount -l /.old
cd /sys/fs/cgroup; mkdir init user; echo 1 >init/cgroup.procs
for controller in $(cat cgroup.controllers); do
    echo "+$controller" >cgroup.subtree_control || true
done
# A way out that leads nowhere: slirp4netns, pasta and the host's gateway want a default route.
ip link set lo up; ip link add out0 type veth peer name out1; ip link set out1 up
ip addr add 192.0.2.1/24 dev out0; ip -6 addr add 2001:db8::1/64 dev out0 nodad
ip link set out0 up; ip route add default via 192.0.2.2; ip -6 route add default via 2001:db8::2
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
mkdir -p /run/user/{USER}
[ "$3" = root ] ||
    chown -R {USER}:{USER} /run/user/{USER} /srv/engine /var/lib/engine /sys/fs/cgroup/user
echo "$pid"
# The kernel reaps for a parent that ignores its children.
exec env --ignore-signal=CHLD cat >/dev/null
"""


class UnavailableError(Exception):
    """Something needed cannot be had here; the message says what to do."""


def make_root(suite: str) -> Path:
    """Make sure of the Debian root with the engines of a suite; a minute or two the first time."""
    root = CACHE / "roots" / suite
    if root.exists():
        return root
    for program in ("debootstrap", "unshare", "nsenter"):
        if shutil.which(program) is None:
            raise UnavailableError(f"missing here: apt-get install {program}")
    made = root.with_name(f"{suite}.partial")
    log = root.with_name(f"{suite}.log")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    packages = PACKAGES if suite == "bookworm" else f"{PACKAGES} {PACKAGES_SINCE_TRIXIE}"
    # In namespaces of its own: if it is interrupted, its mounts and processes go with it.
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", MAKE_ROOT]
    with log.open("wb") as output:
        done = subprocess.run(
            [*command, "make-root", suite, str(made), _mirror(), packages],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        raise UnavailableError(f"no root of Debian {suite}: see {log}")
    made.rename(root)
    return root


def _mirror() -> str:
    """The Debian archive that this machine uses; debootstrap knows one if there is none."""
    layout = "$(ORIGIN) $(COMPONENT) $(CODENAME) $(REPO_URI)"
    done = subprocess.run(
        ["apt-get", "indextargets", "--format", layout, "Created-By: Packages"],
        check=False,
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        origin, component, suite, *uri = line.split()
        if (origin, component) == ("Debian", "main") and "-" not in suite:
            return uri[0]
    return ""


class Engine:
    """One engine; a context manager that leaves nothing behind."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind = KINDS[name]
        self._state = CACHE / name
        digest = hashlib.sha256(str(self._state).encode()).hexdigest()[:8]
        self._cgroup = _cgroup_mount() / f"grand-ambassador-engine-{digest}"
        self._daemon: subprocess.Popen[bytes] | None = None
        self._first: subprocess.Popen[str] | None = None
        self._pid = 0

    def __enter__(self) -> Self:
        root = make_root(self.kind.suite)
        self._remove()  # an earlier run may have been killed
        self._state.mkdir(parents=True)
        self._cgroup.mkdir()
        user = "user" if self.kind.rootless else "root"
        command = [*_join(self._cgroup), "unshare", *SPACES, "--fork"]
        command += ["sh", "-euc", FIRST_PROCESS, "engine", str(self._state), str(root), user]
        with (self._state / "world.log").open("wb") as log:
            self._first = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._first.stdout is not None
        line = self._first.stdout.readline()
        if not line:
            reason = (self._state / "world.log").read_text().strip()
            self.__exit__()
            raise UnavailableError(f"no namespaces for {self.name}: {reason}")
        self._pid = int(line)
        return self

    def __exit__(self, *_: object) -> None:
        if self._first is not None:
            self._first.communicate(timeout=START_S)  # closes its input
        if self._daemon is not None:
            self._daemon.wait(START_S)
        self._remove()

    def _remove(self) -> None:
        for _ in range(100):  # what was killed a moment ago leaves its cgroup a moment later
            for folder in sorted(self._cgroup.rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            with contextlib.suppress(OSError):
                self._cgroup.rmdir()
            if not self._cgroup.exists():
                break
            time.sleep(POLL_S)
        shutil.rmtree(self._state, ignore_errors=True)

    # The daemon

    def start(self) -> None:
        """Start the daemon; returns when it answers."""
        with (self._state / "daemon.log").open("ab") as log:
            self._daemon = subprocess.Popen(
                self._inside(
                    *self._daemon_command(), cgroup="user" if self.kind.rootless else "init"
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_S
        while not self.docker("version", "--format", "{{.Server.Version}}", check=False):
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                tail = (self._state / "daemon.log").read_text(errors="replace").strip()[-600:]
                raise UnavailableError(f"{self.name} does not answer: {tail}")
            time.sleep(POLL_S)
        if self.kind.program == "podman":
            self.run("chmod", "660", SOCKET)  # as podman.socket has it

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the daemon, and not its containers; returns when it is gone."""
        assert self._daemon is not None
        for process in descendants(self._daemon.pid):
            program = Path((process.title.split() or [""])[0]).name
            if program in ("dockerd", "rootlesskit", "podman"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        self._daemon.wait(START_S)

    def _daemon_command(self) -> list[str]:
        if self.kind.program == "docker":
            command = ["dockerd-rootless.sh"] if self.kind.rootless else ["dockerd", "--group=root"]
            command += ["--data-root=/var/lib/engine", f"--host=unix://{SOCKET}"]
            command += ["--exec-opt=native.cgroupdriver=cgroupfs"]
        else:
            command = ["podman", "--root=/var/lib/engine/storage"]
            command += ["system", "service", "--time=0", f"unix://{SOCKET}"]
        if not self.kind.rootless:
            return command
        as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "env"]
        as_user += ["HOME=/home/user", "USER=user", f"XDG_RUNTIME_DIR=/run/user/{USER}"]
        return [*as_user, "DOCKERD_ROOTLESS_ROOTLESSKIT_NET=slirp4netns", *command]

    # Commands

    def _inside(self, *command: str, cgroup: str = "init") -> list[str]:
        """A command to be run in the engine's namespaces, as root."""
        environment = ["env", "-i", f"PATH={PATH}", "HOME=/root", f"DOCKER_HOST=unix://{SOCKET}"]
        enter = ["nsenter", f"--target={self._pid}", *SPACES, "--", *environment]
        return [*_join(self._cgroup / cgroup), *enter, *command]

    def run(
        self, *command: str, check: bool = True, stdin: str | None = None, timeout_s: float = 90
    ) -> str:
        """Run a command inside; its standard output, stripped. RuntimeError if it fails."""
        done = subprocess.run(
            self._inside(*command),
            check=False,
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            words = " ".join(word if len(word) < 80 else "..." for word in command[:8])
            raise RuntimeError(f"{words}: {(done.stderr or done.stdout).strip()[-300:]}")
        return done.stdout.strip()

    def docker(self, *arguments: str, check: bool = True, stdin: str | None = None) -> str:
        """The docker client of the engine's own Debian release."""
        return self.run("docker", *arguments, check=check, stdin=stdin)

    def load(self, archive: Path) -> None:
        """Load images that `docker save` wrote."""
        with archive.open("rb") as images:
            subprocess.run(
                self._inside("docker", "load", "--quiet"),
                check=True,
                stdin=images,
                stdout=subprocess.DEVNULL,
                timeout=180,
            )


def _join(cgroup: Path) -> list[str]:
    """What runs a command in a cgroup. From outside: a cgroup namespace may admit no newcomers."""
    return ["sh", "-c", 'echo $$ >"$0/cgroup.procs"; exec "$@"', str(cgroup)]


def _cgroup_mount() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise UnavailableError("no cgroup2 is mounted here: mount -t cgroup2 none FOLDER")
