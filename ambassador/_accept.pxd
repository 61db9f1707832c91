"""Accepting: one listener, shared by the workers of a port.

Invariants: the loop never spins for want of descriptors, memory or room; a client over the limit gets a
reset, not silence.

Sources: epoll_ctl(2) for EPOLLEXCLUSIVE; accept(2), "Error handling".
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from ambassador._connection cimport (
    connection_close,
    connection_dial,
    connection_hold,
    connection_new,
    spare_close_all,
)
from ambassador._counters cimport COUNTER_OWN
from ambassador._linux cimport (
    EAGAIN,
    EMFILE,
    ENFILE,
    ENOBUFS,
    ENOMEM,
    EPOLL_CTL_DEL,
    EPOLLEXCLUSIVE,
    EPOLLIN,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    accept4,
    close,
    epoll_ctl,
    errno,
)
from ambassador._loop cimport EVENT_LISTENER, epoll_add
from ambassador._options cimport MAX_CONNECTIONS
from ambassador._ready cimport ready_interest
from ambassador._states cimport connections_active
from ambassador._tcp cimport (
    ACCEPT_BATCH,
    ACCEPT_PAUSE_MS,
    ACCEPTED,
    ACTIVE,
    CLIENT,
    MAX_AHEAD,
    NO_DESCRIPTOR,
    OVER_LIMIT,
    REJECTED,
    RESET,
    STATE_HELD,
    connection_t,
    loop_t,
)


cdef inline int listener_watch(loop_t *loop) noexcept nogil:
    """Have epoll report clients, to one of several workers (EPOLLEXCLUSIVE, which allows no MOD)."""
    return epoll_add(loop.epoll, loop.listener, EPOLLIN | EPOLLEXCLUSIVE, EVENT_LISTENER)


cdef inline void accept_pause(loop_t *loop) noexcept nogil:
    """Leave clients in the kernel's backlog for a while, and never spin."""
    loop.out_of_descriptors = False
    if loop.draining or loop.accept_at:
        return
    epoll_ctl(loop.epoll, EPOLL_CTL_DEL, loop.listener, NULL)
    loop.accept_at = loop.now + ACCEPT_PAUSE_MS


cdef inline void accept_resume(loop_t *loop) noexcept nogil:
    loop.accept_at = 0
    if listener_watch(loop) < 0:  # epoll needs memory too
        loop.accept_at = loop.now + ACCEPT_PAUSE_MS


cdef inline void accept_one(loop_t *loop, int fd) noexcept nogil:
    """Take over `fd`. Dial at once, unless other clients wait or no backend has a weight."""
    cdef bint dials = (
        loop.backends.total_weight > 0 and loop.lists[STATE_HELD].length == 0 and loop.probe == NULL
    )
    cdef connection_t *connection = connection_new(loop, fd, dials)
    if connection == NULL:
        close(fd)
        loop.out_of_descriptors = True
    elif epoll_add(loop.epoll, fd, ready_interest(0), <uintptr_t>connection | CLIENT) < 0:
        connection_close(loop, connection, RESET)
    elif dials:
        connection_dial(loop, connection)
    else:
        connection_hold(loop, connection)


cdef inline uint64_t listener_active(loop_t *loop) noexcept nogil:
    """Return the connections of all workers of the listener."""
    cdef uint64_t active = connections_active(loop)
    cdef uint32_t i
    for i in range(loop.sibling_count):
        active += loop.siblings[i][COUNTER_OWN + ACTIVE]
    return active


cdef inline bint listener_is_full(loop_t *loop) noexcept nogil:
    """Whether all workers of the listener together have MAX_CONNECTIONS.

    Two that accept at one moment may exceed the limit by one each.
    """
    if not loop.option[MAX_CONNECTIONS]:
        return False
    return listener_active(loop) >= <uint64_t>loop.option[MAX_CONNECTIONS]


cdef inline bint listener_is_ahead(loop_t *loop) noexcept nogil:
    """Whether this worker has clearly more connections than its fair share."""
    cdef uint64_t workers = loop.sibling_count + 1
    return connections_active(loop) * workers > listener_active(loop) * 9 // 8 + MAX_AHEAD * workers


cdef inline void listener_yield(loop_t *loop) noexcept nogil:
    """Let the siblings be woken first, if this worker is ahead: connections that stay open must spread.

    The kernel wakes the first waiter that sleeps. A worker that watches anew is the last. It goes on
    accepting, so no client waits for a sibling that is stuck. Once a ms at most: two calls a turn would show.
    """
    if not loop.sibling_count or loop.yielded_at == loop.now or not listener_is_ahead(loop):
        return
    loop.yielded_at = loop.now
    epoll_ctl(loop.epoll, EPOLL_CTL_DEL, loop.listener, NULL)
    accept_resume(loop)


cdef inline void accept_batch(loop_t *loop) noexcept nogil:
    cdef int fd, _one
    for _one in range(ACCEPT_BATCH):
        fd = accept4(loop.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd >= 0 and listener_is_full(loop):
            close(fd)  # a reset: it inherits SO_LINGER 0. Left in the backlog, it would get no answer
            loop.tally[ACCEPTED] += 1
            loop.tally[REJECTED] += 1
            loop.tally[OVER_LIMIT] += 1
        elif fd >= 0:
            accept_one(loop, fd)
            if loop.sibling_count:
                loop.page[COUNTER_OWN + ACTIVE] = connections_active(loop)
        elif errno == EAGAIN:
            return
        elif errno == EMFILE or errno == ENFILE or errno == ENOBUFS or errno == ENOMEM:
            if spare_close_all(loop):
                continue
            loop.tally[NO_DESCRIPTOR] += 1
            loop.out_of_descriptors = True
            return
        # Any other error (ECONNABORTED, EPROTO, EINTR, the network's) is of one connection that is already
        # gone: accept(2), "Error handling".
