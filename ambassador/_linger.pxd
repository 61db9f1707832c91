"""Lingering: a client's socket is kept after its end while the kernel still has bytes for it.

A container's interface goes with its last process, and the kernel's queues with it: a slow client would get
neither its last bytes nor an end. So a worker that drains keeps the sockets of connections that have ended
until all is acknowledged; the deadline resets what is left. A tail that takes long is a bulk transfer's: such
a socket is kept from its end on, for LINGER_MS at most, so that a drain later finds it. The small ends just
before a drain get SETTLE_MS.

Not kept: anything else. A short connection makes no call for this. Until the drain is over, a worker that is
killed leaves a lingering socket to the kernel, which goes on delivering.
"""

from libc.stdint cimport int64_t, uint32_t

from ambassador._direction cimport direction_release
from ambassador._linux cimport (
    IPPROTO_TCP,
    SHUT_WR,
    TCP_CLOSE,
    TCP_INFO,
    close,
    getsockopt,
    shutdown,
    socklen_t,
)
from ambassador._loop cimport due_by
from ambassador._states cimport (
    connection_move,
    connections_active,
    first_in,
    socket_arm,
    socket_disarm,
)
from ambassador._tcp cimport (
    BACKEND,
    BULK,
    CLIENT,
    CLOSED,
    LINGER_MS,
    MAX_LINGERING,
    SETTLE_MS,
    STATE_CLOSED,
    STATE_LINGERING,
    TO_BACKEND,
    TO_CLIENT,
    connection_t,
    loop_t,
)

cdef enum:  # words of tcp_info (linux/tcp.h)
    INFO_UNACKED = 6  # segments
    INFO_NOT_SENT = 36  # bytes; since Linux 4.6
    INFO_WORDS = 37


cdef inline bint linger_is_wanted(loop_t *loop, connection_t *connection) noexcept nogil:
    """Whether the client's queue is not empty, of a connection that has ended. Asks only who may have one."""
    cdef uint32_t info[INFO_WORDS]
    cdef socklen_t length = sizeof(info)
    if not loop.draining and not connection.direction[TO_CLIENT].flags & BULK:
        loop.ended_at = loop.now
        return False
    info[INFO_UNACKED] = info[INFO_NOT_SENT] = 0
    if getsockopt(connection.fd[CLIENT], IPPROTO_TCP, TCP_INFO, info, &length) < 0:
        return False
    return info[INFO_NOT_SENT] or info[INFO_UNACKED]


cdef inline void linger_end(loop_t *loop, connection_t *connection) noexcept nogil:
    """Close the client's socket. What is still queued is the kernel's to deliver."""
    close(connection.fd[CLIENT])
    connection_move(loop, connection, STATE_CLOSED)


cdef inline void linger_begin(loop_t *loop, connection_t *connection) noexcept nogil:
    """End the connection cleanly, but keep the client's socket."""
    direction_release(loop, &connection.direction[TO_BACKEND])
    direction_release(loop, &connection.direction[TO_CLIENT])
    socket_disarm(connection.fd[BACKEND])
    close(connection.fd[BACKEND])
    socket_disarm(connection.fd[CLIENT])
    shutdown(connection.fd[CLIENT], SHUT_WR)  # if the close was to say it
    if loop.lists[STATE_LINGERING].length >= MAX_LINGERING and not loop.draining:
        linger_end(loop, first_in(loop, STATE_LINGERING))
    connection_move(loop, connection, STATE_LINGERING)
    connection.times.linger_until = loop.now + LINGER_MS
    loop.tally[CLOSED] += 1


cdef inline void linger_event(loop_t *loop, connection_t *connection) noexcept nogil:
    """Close it if the client has acknowledged all, or has reset it."""
    cdef uint32_t info[INFO_WORDS]
    cdef socklen_t length = sizeof(info)
    if getsockopt(connection.fd[CLIENT], IPPROTO_TCP, TCP_INFO, info, &length) < 0 or (
        (<unsigned char *>info)[0] == TCP_CLOSE
    ):
        linger_end(loop, connection)


cdef inline void linger_end_all(loop_t *loop) noexcept nogil:
    """Close those that are left: with a reset after a drain, since the queues may go with the container."""
    while loop.lists[STATE_LINGERING].head != NULL:
        if loop.draining:
            socket_arm(first_in(loop, STATE_LINGERING).fd[CLIENT])
        linger_end(loop, first_in(loop, STATE_LINGERING))


cdef inline void linger_expire(loop_t *loop) noexcept nogil:
    """Leave those that took too long to the kernel, unless a drain is on."""
    cdef connection_t *head = first_in(loop, STATE_LINGERING)
    while head != NULL and not loop.draining and head.times.linger_until <= loop.now:
        linger_end(loop, head)
        head = first_in(loop, STATE_LINGERING)


cdef inline void linger_due(loop_t *loop, int64_t *due) noexcept nogil:
    """Bring `due` forward to when lingering or settling has something to do."""
    if not loop.draining and loop.lists[STATE_LINGERING].head != NULL:
        due_by(due, first_in(loop, STATE_LINGERING).times.linger_until)
    if loop.draining:
        due_by(due, loop.drain_at)
        if loop.ended_at + SETTLE_MS > loop.now:
            due_by(due, loop.ended_at + SETTLE_MS)


cdef inline bint drained(loop_t *loop) noexcept nogil:
    """Whether a drain is over: at its deadline, or if nothing is open, lingers or has just ended."""
    if not loop.draining or loop.drain_at <= loop.now:
        return loop.draining
    return not (
        connections_active(loop)
        or loop.lists[STATE_LINGERING].length
        or loop.ended_at + SETTLE_MS > loop.now
    )
