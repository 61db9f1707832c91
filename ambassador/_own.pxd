"""A connection to itself: while nobody listens at a local port, connect(2) may meet its own socket.

The kernel takes a local port for each connect. If it takes the very port that is dialled, at the same
address, the socket connects to itself (a simultaneous open, RFC 9293 3.5): it echoes, and it occupies the
port that the backend needs. Only a backend at a local address, with a port in the kernel's range, can be met
so; all others cost nothing.
"""

from libc.stdint cimport uint16_t, uint32_t
from libc.stdlib cimport strtol
from libc.string cimport memcmp

from ambassador._backends cimport address_t, backend_t, backends_find, backends_t
from ambassador._linux cimport (
    AF_INET,
    O_CLOEXEC,
    O_RDONLY,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    close,
    connect,
    getsockname,
    ntohs,
    open,
    read,
    sockaddr,
    socket,
    socklen_t,
)
from ambassador._tcp cimport BACKEND, connection_t, loop_t


cdef inline void local_ports(uint16_t *first, uint16_t *last) noexcept nogil:
    """Read the kernel's range of local ports, all if it does not say. A worker in its sandbox cannot."""
    cdef char text[64]
    cdef char *end = text
    cdef ssize_t got = -1
    cdef int fd = open("/proc/sys/net/ipv4/ip_local_port_range", O_RDONLY | O_CLOEXEC)
    first[0], last[0] = 1, 65535
    if fd < 0:
        return
    got = read(fd, text, sizeof(text) - 1)
    close(fd)
    if got > 0:
        text[got] = 0
        first[0] = <uint16_t>strtol(text, &end, 10)
        last[0] = <uint16_t>strtol(end, NULL, 10)


cdef inline bint has_address(int fd, backend_t *backend, bint port_too) noexcept nogil:
    """Whether the socket's own address is the backend's."""
    cdef address_t own
    cdef socklen_t length = sizeof(own)
    if getsockname(fd, <sockaddr *>&own, &length) < 0 or own.v4.sin_family != backend.address.v4.sin_family:
        return False
    if port_too and own.v4.sin_port != backend.address.v4.sin_port:  # at one place in both families
        return False
    if own.v4.sin_family == AF_INET:
        return own.v4.sin_addr.s_addr == backend.address.v4.sin_addr.s_addr
    return memcmp(&own.v6.sin6_addr, &backend.address.v6.sin6_addr, sizeof(own.v6.sin6_addr)) == 0


cdef inline bint address_is_local(backend_t *backend) noexcept nogil:
    """Whether the address is one of this host's: then the route to it starts there. Nothing is sent."""
    cdef int fd = socket(backend.address.v4.sin_family, SOCK_DGRAM | SOCK_CLOEXEC, 0)
    cdef bint local = False
    if fd >= 0:
        local = (
            connect(fd, <sockaddr *>&backend.address, backend.length) == 0
            and has_address(fd, backend, False)
        )
        close(fd)
    return local


cdef inline void backends_mark_own(loop_t *loop) noexcept nogil:
    """Note which backends a socket of ours may meet in their place."""
    cdef backends_t *backends = &loop.backends
    cdef uint32_t i
    cdef int port
    for i in range(backends.count):
        port = ntohs(backends.items[i].address.v4.sin_port)
        backends.items[i].may_be_own = (
            port >= loop.first_local_port
            and port <= loop.last_local_port
            and address_is_local(&backends.items[i])
        )


cdef inline bint connection_met_itself(loop_t *loop, connection_t *connection) noexcept nogil:
    cdef backend_t *backend = backends_find(&loop.backends, connection.backend)
    return (
        backend != NULL and backend.may_be_own and has_address(connection.fd[BACKEND], backend, True)
    )
