"""The ready bits of a socket: what epoll reported and no call has contradicted since.

Epoll is edge-triggered, so a bit stays set until a call answers EAGAIN.

    bit            set by                                          cleared by
    READ_READY     IN, RDHUP, ERR, HUP; a failed write to it       EAGAIN; a short read with nothing behind it
    WRITE_READY    OUT, ERR, HUP                                   EAGAIN of a send
    END_QUEUED     RDHUP, ERR, HUP, PRI; a failed write to it      -
    FIN_QUEUED     RDHUP without ERR and HUP, if not READ_PAUSED   a failed write to it
    ERROR_QUEUED   ERR                                             -
    URGENT_QUEUED  PRI                                             -
    READ_PAUSED    more bytes behind a full destination            source read empty

Six pure functions say what events make of the bits and what the bits mean. Sources: epoll(7), epoll_ctl(2).
"""

from libc.stdint cimport uint8_t, uint32_t, uintptr_t

from ambassador._linux cimport EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP
from ambassador._loop cimport epoll_change
from ambassador._tcp cimport (
    END_QUEUED,
    ERROR_QUEUED,
    FIN_QUEUED,
    READ_PAUSED,
    READ_READY,
    URGENT_QUEUED,
    WRITE_READY,
    connection_t,
    loop_t,
)

cdef enum:
    END_EVENTS = EPOLLRDHUP | EPOLLERR | EPOLLHUP | EPOLLPRI  # set END_QUEUED


cdef inline uint8_t ready_after(uint8_t bits, uint32_t events) noexcept nogil:
    """Return the bits after epoll reported `events`."""
    cdef uint8_t after = bits
    if events & (EPOLLIN | EPOLLRDHUP | EPOLLERR | EPOLLHUP):
        after |= READ_READY
    if events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
        after |= WRITE_READY
    if events & END_EVENTS:
        after |= END_QUEUED
        if events & EPOLLERR:
            after |= ERROR_QUEUED
        if events & EPOLLPRI:
            after |= URGENT_QUEUED
        # A paused source does not report urgent data, so more than one read may be left before the FIN.
        if events & (EPOLLRDHUP | EPOLLERR | EPOLLHUP) == EPOLLRDHUP and not bits & READ_PAUSED:
            after |= FIN_QUEUED
    return after


cdef inline bint ready_to_move(uint8_t source, uint8_t destination) noexcept nogil:
    return source & READ_READY and destination & WRITE_READY


cdef inline bint ready_to_splice(uint8_t bits) noexcept nogil:
    """Return False if a splice would stop at an urgent mark, which only recv gets past."""
    return not bits & URGENT_QUEUED


cdef inline bint ready_short_read_empties(uint8_t bits) noexcept nogil:
    """Return True if nothing is queued behind a short read (epoll(7))."""
    return not bits & END_QUEUED


cdef inline bint ready_only_fin(uint8_t bits) noexcept nogil:
    """Return True if only the FIN is queued behind a short read. Reads end at an urgent mark too."""
    return bits & (FIN_QUEUED | URGENT_QUEUED) == FIN_QUEUED


cdef inline uint32_t ready_interest(uint8_t bits) noexcept nogil:
    """Return the events that epoll is to report."""
    if bits & READ_PAUSED:
        # Without EPOLLPRI too: each segment's wakeup names it (net/core/sock.c, sock_def_readable), and epoll
        # would then report the socket as writable.
        return EPOLLOUT | EPOLLRDHUP | EPOLLET
    return EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET


cdef inline void ready_set(loop_t *loop, connection_t *connection, int side, uint8_t bits) noexcept nogil:
    """Set the bits of a socket, and tell epoll if they change its interest.

    A change makes epoll look again, so bytes that arrive in between are reported (fs/eventpoll.c, ep_modify).
    """
    cdef uint32_t interest = ready_interest(bits)
    cdef bint changes = interest != ready_interest(connection.ready[side])
    connection.ready[side] = bits
    if changes:
        epoll_change(loop.epoll, connection.fd[side], interest, <uintptr_t>connection | side)
