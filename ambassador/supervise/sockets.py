"""Listening sockets: bound once by the parent, and passed to workers.

Invariants:

- Without an address one socket takes IPv6 and IPv4 (`IPV6_V6ONLY` off, ipv6(7)); if the machine has no IPv6,
  IPv4 alone.
- What an accepted connection needs is set on the listener and inherited (net/ipv4/tcp_minisocks.c clones
  the socket), so accepting costs no further system call: TCP_NODELAY, keepalive, and SO_LINGER 0, which
  arms the connection: if its worker dies, the client sees a reset and never a clean end.
- Every socket here is non-blocking and close-on-exec.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from ambassador.model import ListenAddress
from ambassador.values import Protocol

KEEPALIVE_IDLE_S = 60
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_COUNT = 6
"""A client that vanished is noticed after 60 + 6 x 10 seconds without a byte. If a connection is older than
10 s, its worker sets another idle time, 30 to 90 s (_splice.pyx, connection_keep_alive)."""

DATAGRAM_BUFFER = 4 << 20
"""Bytes asked for a datagram listener; without CAP_NET_ADMIN clamped to net.core.{r,w}mem_max."""

BACKLOG = 65_535
"""The kernel clamps it to net.core.somaxconn (listen(2))."""

UDP_GRO = 104  # linux/udp.h
IP_PKTINFO = 8  # linux/in.h; the socket module names none of these
IP_RECVTTL = 12
SO_SNDBUFFORCE = 32  # asm-generic/socket.h
SO_RCVBUFFORCE = 33
SO_MEMINFO = 55
_MEMINFO = struct.Struct("9I")  # linux/sock_diag.h; the last is SK_MEMINFO_DROPS

_NO_IPV6 = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT}


_STREAM_OPTIONS: tuple[tuple[int, int, int], ...] = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),  # else TIME_WAIT of an earlier run keeps the port
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)
_LINGER = struct.pack("ii", 1, 0)


def bind(listen: ListenAddress, *, gro: bool = True, shared: bool = False) -> socket.socket:
    """A socket that takes what is sent to `listen`, which has one port; the caller closes it.

    `gro` lets the kernel hand over runs of equal datagrams at once (UDP_GRO, udp(7)). `shared` lets others of
    the same user bind the port as well (SO_REUSEPORT). Raises OSError: EADDRINUSE if another socket has the
    port, EACCES for a port below 1024 without CAP_NET_BIND_SERVICE, EADDRNOTAVAIL if the machine has no such
    address.
    """
    if listen.address:
        family = socket.AF_INET6 if ":" in listen.address else socket.AF_INET
        return _bind(family, listen, gro, shared)
    try:
        return _bind(socket.AF_INET6, listen, gro, shared)
    except OSError as error:
        if error.errno not in _NO_IPV6:
            raise
        return _bind(socket.AF_INET, listen, gro, shared)


def bind_group(
    listen: ListenAddress, workers: int, *, beside: Sequence[socket.socket] = ()
) -> list[socket.socket]:
    """Sockets for `workers` workers: for TCP one, from which all accept; for UDP one to each.

    The kernel shares UDP clients out between the sockets and keeps each client on its socket. `beside` is a
    former UDP group of the same port, which the new one joins. Raises OSError, as `bind` does.
    """
    if not beside and (listen.protocol is Protocol.TCP or workers == 1):
        return [bind(listen)]
    for sock in beside:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if not beside:
        # SO_REUSEPORT would also share the port with another program of the same user. Binding without
        # it first finds such a program.
        bind(listen).close()
    group: list[socket.socket] = []
    try:
        while len(group) < workers:
            group.append(bind(listen, shared=True))
    except BaseException:
        for sock in group:
            sock.close()
        raise
    return group


def restore_listener(sock: socket.socket) -> bool:
    """Make a TCP socket of `bind` listen again, with its options. False if it cannot be restored.

    Every worker shares the open file, so each can shut it down or change its options (SO_LINGER).
    """
    try:
        _prepare_stream(sock)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.listen(BACKLOG)
        sock.setblocking(False)
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def is_intact(sock: socket.socket) -> bool:
    """Whether a UDP socket of `bind` still hears everybody: connected or shut down, it does not.

    Every worker shares the open file of its socket.
    """
    try:
        sock.getpeername()
    except OSError as error:
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        return error.errno == errno.ENOTCONN and not poll.poll(0)
    return False


def _bind(
    family: socket.AddressFamily, listen: ListenAddress, gro: bool, shared: bool
) -> socket.socket:
    tcp = listen.protocol is Protocol.TCP
    sock = socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bool(listen.address))
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if tcp:
            _prepare_stream(sock)
        else:
            _prepare_datagram(sock, family, gro)
        sock.bind(_sockaddr(family, listen))
        if tcp:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _sockaddr(family: socket.AddressFamily, listen: ListenAddress) -> tuple[str | int, ...]:
    if family == socket.AF_INET:
        return listen.address, listen.first_port
    address, _, zone = listen.address.partition("%")
    return address, listen.first_port, 0, int(zone or 0)


def _prepare_stream(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
    for level, name, value in _STREAM_OPTIONS:
        sock.setsockopt(level, name, value)


def _prepare_datagram(sock: socket.socket, family: socket.AddressFamily, gro: bool) -> None:
    # The address a client wrote to, so that replies leave from it (ip(7) IP_PKTINFO, ipv6(7)). A
    # dual-stack socket reports IPv4 arrivals in the IPv6 form, as mapped addresses.
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    # For a broadcast, a local address to answer from; also on an IPv6 socket, for what arrives over IPv4.
    sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    # The hop limit it arrived with, to end what goes round between two relays. Also on an IPv6 socket, for
    # what arrives over IPv4.
    sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    for force, ask in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, DATAGRAM_BUFFER)
        except PermissionError:  # without CAP_NET_ADMIN
            sock.setsockopt(socket.SOL_SOCKET, ask, DATAGRAM_BUFFER)
    if gro:
        try:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        except OSError:
            pass  # before Linux 5.0: datagrams arrive one by one, which is all the same to the loop


class QueueDrops:
    """What the kernel dropped because the queue of a datagram listener was full."""

    def __init__(self) -> None:
        self._reported: WeakKeyDictionary[socket.socket, int] = WeakKeyDictionary()

    def risen(self, listeners: Iterable[socket.socket]) -> int:
        """How many were dropped since the last call."""
        return sum(map(self._risen, listeners))

    def _risen(self, sock: socket.socket) -> int:
        try:
            info = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, _MEMINFO.size))
        except (OSError, struct.error):  # before Linux 4.12
            return 0
        now = int(info[-1])
        rise = (now - self._reported.get(sock, 0)) % (1 << 32)
        self._reported[sock] = now
        return rise
