"""What a worker can no longer do: read off /proc, and tried from inside."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ambassador
from ambassador import _sandbox
from ambassador._worker import COUNTERS_BYTES, EXIT_NO_SANDBOX
from ambassador.options import Sandbox
from ambassador.supervise import sandbox
from ambassador.values import Protocol
from tests.support.endpoints import Peers, Server, read_exactly
from tests.support.net import free_port
from tests.support.processes import status
from tests.support.program import Program, Run
from tests.support.wait import TIMEOUT_S, wait_until
from tests.support.worker import StartWorker, destination

pytestmark = pytest.mark.native

PACKAGE = Path(ambassador.__file__).parent
OWN_USERS = range(0x7000_0000, 0x8000_0000)  # what systemd's UIDS-GIDS.md calls unassigned
X32 = 1 << 30
I386_GETPID = 20

# The numbers of calls that Python has no function for: x86-64, aarch64.
NUMBERS = {
    "openat": (257, 56),
    "ptrace": (101, 117),
    "execve": (59, 221),
    "setsockopt": (54, 208),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "unshare": (272, 97),
    "process_vm_readv": (310, 270),
    "bind": (49, 200),
    "socketpair": (53, 199),
    "memfd_create": (319, 279),
    "pidfd_open": (434, 434),
    "prctl": (157, 167),
    "setresuid": (117, 147),
    "getpid": (39, 172),
    "connect": (42, 203),
    "shutdown": (48, 210),
    "dup3": (292, 24),
}
_PLACE = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int) -> int:
    """The system call: 0, or its errno."""
    ctypes.set_errno(0)
    result = libc.syscall(NUMBERS[name][_PLACE], *map(ctypes.c_long, arguments))
    return ctypes.get_errno() if result == -1 else 0


def inside(attempt: Callable[[], int], prepare: Callable[[], object] = lambda: 0) -> int:
    """What `attempt` returns in a child that entered the sandbox: 0 to 199, or a negative signal."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            os.close_range(3, 1 << 20) if hasattr(os, "close_range") else os.closerange(3, 1 << 12)
            prepare()
            page = os.memfd_create("counters")
            os.ftruncate(page, COUNTERS_BYTES)
            code = 254 if _sandbox.enter(page) else attempt()
        except OSError as error:
            code = error.errno or 253
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------------------------------- from outside


@pytest.mark.parametrize("protocol", Protocol)
def test_a_worker_holds_no_power(start: StartWorker, peers: Peers, protocol: Protocol) -> None:
    """S1: read off /proc of a worker that serves."""
    server = peers.server() if protocol is Protocol.TCP else peers.udp()
    worker = start(protocol, destination(server))
    said = status(worker.pid)
    (user,) = set(said["Uid"].split())
    assert int(user) in OWN_USERS
    assert said["Gid"].split() == ["65534"] * 4
    assert said["Groups"] == ""
    for caps in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(said[caps], 16) == 0, caps
    assert said["NoNewPrivs"] == "1"
    assert said["Seccomp"] == "2"
    assert Path(f"/proc/{worker.pid}/mem").stat().st_uid == 0  # not dumpable: root's, not its own
    assert worker.sandbox and sandbox.missing_steps(worker.sandbox) == ()
    # Of sockets it has its listener alone: no Docker's, no fork server's.
    sockets = [name for name in worker.descriptors().values() if name.startswith("socket:")]
    assert len(sockets) == 1


def test_supplementary_groups_are_given_up(run: Run) -> None:
    """S1: those of the program, as `docker run --group-add` gives it them."""
    port = free_port()
    program = run(f"{port}/tcp=127.0.0.1:9", before=["setpriv", "--groups", "4,27"])
    program.has(f"{port}/tcp", 1)
    (worker,) = program.workers(f"{port}/tcp")
    assert status(program.process.pid)["Groups"].split() == ["4", "27"]
    assert status(worker)["Groups"] == ""


def test_workers_of_one_host_are_different_users(start_tcp: StartWorker) -> None:
    """S1: a number made of the pid would be the same in every container, and its pipes in one account."""
    users = {status(start_tcp().pid)["Uid"].split()[0] for _ in range(3)}
    assert len(users) == 3
    pids = [start_tcp().pid for _ in range(2)]
    near = [int(status(pid)["Uid"].split()[0]) for pid in pids]
    assert abs(near[0] - near[1]) != abs(pids[0] - pids[1])


@pytest.mark.parametrize("protocol", Protocol)
def test_a_worker_does_not_hold_the_log(start: StartWorker, protocol: Protocol) -> None:
    """S8: no line to forge, no terminal to read."""
    worker = start(protocol)
    assert {worker.descriptors()[number] for number in (0, 1, 2)} == {"/dev/null"}


def test_off_means_off(start_tcp: StartWorker) -> None:
    worker = start_tcp(sandbox=Sandbox.OFF)
    said = status(worker.pid)
    assert (said["Seccomp"], said["Uid"].split()[0]) == ("0", "0")
    assert worker.sandbox == 0


def test_bulk_through_a_sandboxed_worker(start_tcp: StartWorker, peers: Peers) -> None:
    """The pipes of an unprivileged user will do: 256 MB, spliced."""
    server = peers.server()
    worker = start_tcp(destination(server))
    client, backend = peers.pair(worker, server)
    total, block = 256 << 20, bytes(1 << 20)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            for _ in range(total >> 20):
                client.sendall(block)
        os._exit(0)
    received = 0
    began = time.monotonic()
    while received < total:
        received += len(backend.recv(1 << 20))
    print(f"{received / (time.monotonic() - began) / 1e9:.1f} GB/s")
    os.waitpid(child, 0)
    assert worker.counter("pipes_open") >= 1


# ----------------------------------------------------------------------------------------- from inside


def test_it_works_inside() -> None:
    """The child of these tests is one in which what is allowed does work."""

    def attempt() -> int:
        with socket.socket() as one, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            bytearray(10 << 20)
            os.urandom(8)
        return 42

    assert inside(attempt) == 42


BUFFER = ctypes.create_string_buffer(b"/etc/passwd")
ADDRESS = ctypes.addressof(BUFFER)


def _unix_socket() -> int:
    socket.socket(socket.AF_UNIX).close()
    return 0


def _raw_socket() -> int:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close()
    return 0


def _other_protocol() -> int:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()  # MPTCP
    return 0


def _packet_filter() -> int:
    """SO_ATTACH_FILTER, which any user may."""
    program = struct.pack("HHBBI", 0x06, 0, 0, 0, 0)
    buffer = ctypes.create_string_buffer(program)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxP", 1, ctypes.addressof(buffer)))
    return 0


def _notification_pipe() -> int:
    os.pipe2(os.O_EXCL)
    return 0


def _executable_memory() -> int:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
    return 0


def _kill_parent() -> int:
    os.kill(os.getppid(), 0)
    return 0


REFUSED: dict[str, Callable[[], int]] = {
    "unix-socket": _unix_socket,
    "raw-socket": _raw_socket,
    "other-protocol": _other_protocol,
    "packet-filter": _packet_filter,
    "notification-pipe": _notification_pipe,
    "executable-memory": _executable_memory,
    "open": lambda: call("openat", -100, ADDRESS, os.O_RDONLY),
    "kill": _kill_parent,
    "socketpair": lambda: call("socketpair", 1, 1, 0, ADDRESS),
    "bind": lambda: call("bind", 0, ADDRESS, 16),
    "memfd": lambda: call("memfd_create", ADDRESS, 0),
    "pidfd": lambda: call("pidfd_open", 1, 0),
    "become-root": lambda: call("setresuid", 0, 0, 0),
    "dumpable-again": lambda: call("prctl", 4, 1, 0, 0, 0),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_inside(what: str) -> None:
    """S2: fails with EPERM, and the process lives to tell."""
    assert inside(REFUSED[what]) == errno.EPERM


LASTING: dict[str, tuple[int, ...]] = {
    "shutdown": (socket.SHUT_RDWR,),
    "connect": (ADDRESS, 16),
    "setsockopt": (socket.SOL_SOCKET, socket.SO_LINGER, ADDRESS, 8),
}


@pytest.mark.parametrize("name", LASTING)
def test_the_listener_cannot_be_changed(name: str) -> None:
    """S8: its open file is the parent's, and the successor's. On another number the call is allowed."""
    listener, nobody = 3, 100
    assert inside(lambda: call(name, listener, *LASTING[name])) == errno.EPERM
    assert inside(lambda: call(name, nobody, *LASTING[name])) == errno.EBADF


def test_standard_error_alone_can_be_replaced() -> None:
    assert inside(lambda: call("dup3", 1, 2, 0)) == 0
    for source, target in ((3, 2), (1, 3), (3, 4)):
        assert inside(lambda: call("dup3", source, target, 0)) == errno.EPERM  # noqa: B023


FATAL: dict[str, Callable[[], int]] = {
    "execve": lambda: call("execve", ADDRESS, 0, 0),
    "fork": lambda: 0 if os.fork() else os._exit(0),
    "ptrace": lambda: call("ptrace", 0, 0, 0, 0),
    "process-vm": lambda: call("process_vm_readv", 1, 0, 0, 0, 0, 0),
    "unshare": lambda: call("unshare", 0x10000000),
    "io-uring": lambda: call("io_uring_setup", 8, ADDRESS),
    "bpf": lambda: call("bpf", 0, ADDRESS, 0),
}


@pytest.mark.parametrize("what", FATAL)
def test_fatal_inside(what: str) -> None:
    """S2: what only an intruder would try ends the process before it happens."""
    assert inside(FATAL[what]) == -signal.SIGSYS


@pytest.mark.skipif(_PLACE != 0, reason="x32 is a part of x86-64")
def test_x32_is_refused() -> None:
    """The same call under its x32 number is on no list."""
    assert inside(lambda: call("getpid")) == 0
    NUMBERS["x32_getpid"] = (NUMBERS["getpid"][0] | X32, 0)
    assert inside(lambda: call("x32_getpid")) == errno.EPERM


@pytest.mark.skipif(_PLACE != 0, reason="int 0x80 is of x86")
def test_another_architecture_is_fatal() -> None:
    """getpid by int 0x80 carries i386's architecture. Its code is in memory before the sandbox closes."""
    code = b"\xb8" + struct.pack("<I", I386_GETPID) + b"\xcd\x80\xc3"  # mov eax, 20; int 0x80; ret
    memory: list[mmap.mmap] = []
    run: list[Callable[[], int]] = []

    def prepare() -> None:
        memory.append(mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC))
        memory[0].write(code)
        place = ctypes.addressof(ctypes.c_char.from_buffer(memory[0]))
        run.append(ctypes.CFUNCTYPE(ctypes.c_int)(place))

    assert inside(lambda: run[0]() and 0, prepare) == -signal.SIGSYS


@pytest.mark.parametrize("call", ["setsockopt", "getsockopt"])
def test_the_filter_has_every_option_of_the_loops(call: str) -> None:
    """A loop that begins to use another socket option must be allowed it: a refusal would be silent."""
    _, _, rule = (PACKAGE / "_sandbox.pyx").read_text().partition(f"CALL({call},")
    allowed = {
        level: set(re.findall(r"\w+", options))
        for level, options in re.findall(
            r"WHEN\((\w+),\s*ARGUMENT\(2\), ANY_OF_\d\(([^)]*)\), REFUSED\)",
            rule.partition("CALL(")[0],
        )
    }
    found = set()
    for file in (PACKAGE / "_splice.pyx", PACKAGE / "_datagram.pyx", *PACKAGE.glob("_*.pxd")):
        if file.name == "_linux.pxd":
            continue  # declares the call
        text = file.read_text()
        used = re.findall(rf"\b{call}\([^,]+, (\w+), (\w+),", text)
        assert len(used) == len(re.findall(rf"\b{call}\(", text))
        found |= set(used)
    assert found
    for level, option in found:
        assert option in allowed[level], (level, option)


# ------------------------------------------------------------------------------ where something lacks

RESTRICTED = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
{prepare}
os.execv(sys.executable, [sys.executable, "-m", "ambassador", *sys.argv[1:]])
"""

# Root without SETGID (6) and SETUID (7): out of the bounding set, so that the exec takes them away.
WITHOUT_SETUID = """
for capability in (6, 7):
    assert libc.prctl(24, capability, 0, 0, 0) == 0
"""

# Nobody in a group, as `docker run --user 65534:65534 --group-add 7`, with one ambient capability (to read
# this interpreter, which may be in root's home).
AS_NOBODY = """
os.setgroups([7])
libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
assert libc.capset(header, (ctypes.c_uint32 * 6)(4, 4, 4, 0, 0, 0)) == 0  # DAC_READ_SEARCH
assert libc.prctl(47, 2, 2, 0, 0) == 0  # PR_CAP_AMBIENT_RAISE
"""


class Relay(Program):
    """`grand-ambassador relay` under some restriction."""

    def __init__(self, prepare: str, *flags: str) -> None:
        self.port = free_port()
        command = [sys.executable, "-c", RESTRICTED.format(prepare=prepare)]
        route = f"{self.port}/tcp=127.0.0.1:{self.port + 1}"
        super().__init__("relay", *flags, route, command=command)

    def serves(self) -> None:
        socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S).close()


def test_auto_warns_once() -> None:
    relay = Relay(WITHOUT_SETUID, "-workers", "2")
    relay.wait_for_line("workers run without all of their sandbox")
    relay.serves()
    time.sleep(0.3)
    relay.close()
    log = relay.text
    assert log.count("without all of their sandbox") == 1
    assert "uid" in log
    assert "level=error" not in log


def test_required_ends_the_program() -> None:
    relay = Relay(WITHOUT_SETUID, "-sandbox", "required", "-workers", "2")
    assert relay.process.wait(TIMEOUT_S) == 1
    log = relay.text
    assert log.count("the sandbox is required and cannot be had") == 1
    assert "SETUID" in log


def test_required_and_had() -> None:
    relay = Relay("", "-sandbox=required")
    relay.wait_for_line("listening")
    relay.serves()
    relay.close()
    assert "level=warning" not in relay.text


def test_another_user_than_root_has_nothing_to_give_up() -> None:
    """No warning for what only root could do; the rest holds."""
    relay = Relay(AS_NOBODY, "-sandbox=required")
    relay.wait_for_line("listening")
    relay.serves()
    relay.has(f"{relay.port}/tcp", 1)
    said = [status(pid) for pid in relay.workers(f"{relay.port}/tcp")]
    assert [(one["CapEff"], one["Seccomp"], one["Groups"]) for one in said] == [
        ("0" * 16, "2", "7")
    ]
    relay.close()
    log = relay.text
    assert "level=warning" not in log and "level=error" not in log, log


def test_the_worker_has_an_exit_code_of_its_own(start: StartWorker) -> None:
    """And says in its page what was lacking, which the parent still reads."""
    assert EXIT_NO_SANDBOX == 77
    word = 1 << 16 | 8 << _sandbox.MISSING
    assert sandbox.missing_steps(word) == ("uid",)
    assert sandbox.missing_steps(0) == ()
    assert "seccomp" in sandbox.advice(("seccomp",))


def test_connections_still_work_with_everything_on(start: StartWorker, peers: Peers) -> None:
    server, datagrams = peers.server(), peers.udp()
    with Server(server):
        tcp = start(Protocol.TCP, destination(server), sandbox=Sandbox.REQUIRED)
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", tcp.port), TIMEOUT_S) as client:
                client.sendall(b"hello")
                assert read_exactly(client, 5) == b"hello"
    udp = start(Protocol.UDP, destination(datagrams), sandbox=Sandbox.REQUIRED)
    client = peers.udp()
    for number in range(50):
        client.sendto(b"%d" % number, ("127.0.0.1", udp.port))
        data, source = datagrams.recvfrom(100)
        datagrams.sendto(data, source)
        assert client.recv(100) == b"%d" % number
    assert udp.sandbox


def test_a_draining_worker_still_connects(start_tcp: StartWorker, peers: Peers) -> None:
    """The listener's number stays taken, so that no backend's socket gets it: connecting is refused on it."""
    server = peers.server()
    worker = start_tcp(sandbox=Sandbox.REQUIRED)
    with socket.create_connection(("127.0.0.1", worker.port), TIMEOUT_S) as client:
        worker.wait_for(held=1)
        worker.drain(10_000)
        wait_until(lambda: not worker.descriptors()[3].startswith("socket:"), "it does not drain")
        worker.tell(destination(server))
        backend = peers.accept(server)
        backend.sendall(b"still served")
        assert read_exactly(client, 12) == b"still served"
