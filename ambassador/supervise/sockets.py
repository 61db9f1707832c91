"""Listening sockets: bound once by the parent, on all interfaces, and lent to workers.

Invariants:

- One socket takes IPv6 and IPv4 (`IPV6_V6ONLY` off, ipv6(7)); where the machine has no IPv6, IPv4 alone.
- What an accepted connection needs is set on the listener and inherited (net/ipv4/tcp_minisocks.c clones
  the socket), so accepting costs no further system call: TCP_NODELAY, keepalive, and SO_LINGER 0, which
  arms the connection: should its worker die, the client sees a reset and never a clean end.
- Every socket here is non-blocking and close-on-exec.
"""

from __future__ import annotations

import errno
import socket
import struct

from ambassador.model import Listener
from ambassador.values import Protocol

KEEPALIVE_IDLE_S = 60
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_COUNT = 6
"""A client that vanished is noticed after 60 + 6 x 10 seconds without a byte. Of a connection that is older
than 10 s its worker sets another idle time (_splice.pyx, connection_keep_alive), 30 to 90 s."""

DATAGRAM_BUFFER = 4 << 20
"""Bytes asked for a datagram listener; the kernel clamps it to net.core.{r,w}mem_max."""

BACKLOG = 65_535
"""The kernel clamps it to net.core.somaxconn (listen(2))."""

UDP_GRO = 104  # linux/udp.h
IP_PKTINFO = 8  # linux/in.h; the socket module names none of these
IP_RECVTTL = 12

_NO_IPV6 = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT}


def bind(listener: Listener, *, gro: bool = True, shared: bool = False) -> socket.socket:
    """A socket that takes what is sent to `listener`; the caller owns and closes it.

    `gro` lets the kernel hand over runs of equal datagrams at once (UDP_GRO, udp(7)); `shared` lets
    others of the same user bind the port as well (SO_REUSEPORT). Raises OSError: EADDRINUSE where somebody
    has the port, EACCES for a port below 1024 without CAP_NET_BIND_SERVICE.
    """
    try:
        return _bind(socket.AF_INET6, listener, gro, shared)
    except OSError as error:
        if error.errno not in _NO_IPV6:
            raise
        return _bind(socket.AF_INET, listener, gro, shared)


def bind_group(listener: Listener, workers: int) -> list[socket.socket]:
    """Sockets for `workers` workers: for TCP one, from which all accept; for UDP one to each.

    The kernel shares UDP clients out between them and keeps each where it is. As `bind` otherwise.
    """
    if listener.protocol is Protocol.TCP or workers == 1:
        return [bind(listener)]
    # SO_REUSEPORT would share the port with another program of the same user as gladly as among
    # ourselves; binding without it first finds that out.
    bind(listener).close()
    group: list[socket.socket] = []
    try:
        while len(group) < workers:
            group.append(bind(listener, shared=True))
    except OSError:
        for sock in group:
            sock.close()
        raise
    return group


def _bind(
    family: socket.AddressFamily, listener: Listener, gro: bool, shared: bool
) -> socket.socket:
    tcp = listener.protocol is Protocol.TCP
    sock = socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if tcp:
            _prepare_stream(sock)
        else:
            _prepare_datagram(sock, family, gro)
        sock.bind(("", listener.port))
        if tcp:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _prepare_stream(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT of a former life
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _prepare_datagram(sock: socket.socket, family: socket.AddressFamily, gro: bool) -> None:
    # The address a client wrote to, so that replies leave from it (ip(7) IP_PKTINFO, ipv6(7)). A
    # dual-stack socket reports IPv4 arrivals in the IPv6 form, as mapped addresses.
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    # The hop limit it arrived with: what goes round between two relays is to end (also on an IPv6 socket,
    # for what arrives over IPv4).
    sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DATAGRAM_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, DATAGRAM_BUFFER)
    if gro:
        try:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        except OSError:
            pass  # before Linux 5.0: datagrams arrive one by one, which is all the same to the loop
