"""Sockets to a backend: made and connected, or connected anew.

A socket takes a local port, and the kernel may give it the very port that it dials. It is then connected to
itself: nobody listens there, and the client would be answered with its own bytes.
"""

from libc.stdint cimport uintptr_t
from libc.string cimport memset

from ambassador._backends cimport address_is, address_t, backend_t, backends_find
from ambassador._linux cimport (
    AF_INET6,
    AF_UNSPEC,
    EADDRNOTAVAIL,
    ECONNREFUSED,
    EINVAL,
    ENETDOWN,
    ENETUNREACH,
    ENODEV,
    EPOLLIN,
    IP_TTL,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPPROTO_UDP,
    IPV6_UNICAST_HOPS,
    SO_RCVBUF,
    SO_SNDBUF,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_NONBLOCK,
    SOL_SOCKET,
    UDP_GRO,
    close,
    connect,
    errno,
    getsockname,
    setsockopt,
    sockaddr,
    socket,
    socklen_t,
)
from ambassador._loop cimport epoll_add
from ambassador._options cimport GSO
from ambassador._udp cimport REDIAL_MS, SETTLED, SOCKET_BUFFER, TO_BACKEND, loop_t, session_t


cdef inline void socket_set_hops(int fd, backend_t *backend, int hops) noexcept nogil:
    if backend.address.v4.sin_family == AF_INET6:
        setsockopt(fd, IPPROTO_IPV6, IPV6_UNICAST_HOPS, &hops, sizeof(hops))
    else:
        setsockopt(fd, IPPROTO_IP, IP_TTL, &hops, sizeof(hops))


cdef inline int socket_connect(int fd, backend_t *backend) noexcept nogil:
    """Connect to the backend. 0 or an errno; ECONNREFUSED if it has met itself."""
    cdef address_t own
    cdef socklen_t length = sizeof(own)
    if connect(fd, <sockaddr *>&backend.address, backend.length) < 0:
        return errno
    if getsockname(fd, <sockaddr *>&own, &length) == 0 and address_is(&own, &backend.address):
        return ECONNREFUSED
    return 0


cdef inline int socket_dial(loop_t *loop, session_t *session, backend_t *backend) noexcept nogil:
    """Give the session a socket that is connected to the backend. 0 or an errno."""
    cdef int on = 1, bytes = SOCKET_BUFFER, error
    cdef int fd = socket(
        backend.address.v4.sin_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_UDP
    )
    if fd < 0:
        return errno
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes))
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes))
    if loop.option[GSO]:
        setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof(on))
    socket_set_hops(fd, backend, session.hops)
    error = socket_connect(fd, backend)
    if error == 0 and epoll_add(loop.epoll, fd, EPOLLIN, <uintptr_t>session) < 0:
        error = errno
    if error:
        close(fd)
        return error
    session.fd = fd
    session.backend = backend.id
    session.gso_max[TO_BACKEND] = 0
    return 0


cdef inline bint socket_redial(loop_t *loop, session_t *session, int error) noexcept nogil:
    """Connect the session's socket anew if a send failed because its own address or route is gone.

    Whether to send again. A connected socket keeps the source address of its first connect(2), also when this
    machine no longer has it. If it cannot be connected, the socket is closed; the next datagram dials.
    """
    cdef backend_t *backend = backends_find(&loop.backends, session.backend)
    cdef sockaddr nobody
    if error not in (EINVAL, EADDRNOTAVAIL, ENETUNREACH, ENETDOWN, ENODEV):
        return False
    if backend == NULL or session.fd < 0 or loop.now - session.redialled_at < REDIAL_MS:
        return False
    session.redialled_at = loop.now
    session.gso_max[TO_BACKEND] = 0
    memset(&nobody, 0, sizeof(nobody))
    nobody.sa_family = AF_UNSPEC
    if connect(session.fd, &nobody, sizeof(nobody)) == 0 and socket_connect(session.fd, backend) == 0:
        return True
    close(session.fd)
    session.fd = -1
    session.flags &= ~SETTLED
    return False
