"""A connection: its states and lists, hold, dial, keepalive, close, and spare sockets.

While no backend takes connections, clients are held: accepted, and not read. One of them, the probe, tries
the backend every few milliseconds. When it gets through, all are released.

A connection that ended in both directions leaves its backend's socket: closed for good, with all
acknowledged. It becomes spare, with its struct, and connects anew for the next client. That saves the making,
arming, watching and closing of a socket: a seventh of the cost of a short connection.

Invariants: a spare socket is not connected and holds
no bytes and no port. A closed connection's memory is freed after the batch of events that may still name it.

Sources: connect(2) for AF_UNSPEC; net/ipv4/tcp.c, tcp_disconnect, for the options that a socket keeps.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uintptr_t
from libc.string cimport memset

from ambassador._backends cimport backend_t, backends_after, backends_next, backends_usable
from ambassador._direction cimport (
    direction_can_move,
    direction_in_flight,
    direction_pump,
    direction_release,
    direction_send_deferred,
)
from ambassador._linux cimport (
    AF_UNSPEC,
    EADDRNOTAVAIL,
    ECONNREFUSED,
    ECONNRESET,
    EINPROGRESS,
    EMFILE,
    ENFILE,
    ENOBUFS,
    ENOMEM,
    EPIPE,
    IPPROTO_TCP,
    SO_KEEPALIVE,
    SO_LINGER,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_CLOSE,
    TCP_INFO,
    TCP_KEEPCNT,
    TCP_KEEPIDLE,
    TCP_KEEPINTVL,
    TCPI_OPT_TIMESTAMPS,
    close,
    connect,
    errno,
    getsockopt,
    setsockopt,
    sockaddr,
    socket,
    socklen_t,
)
from ambassador._linger cimport linger_begin, linger_is_wanted
from ambassador._list cimport link_t, list_insert
from ambassador._loop cimport due_by, epoll_add
from ambassador._options cimport CONNECT_TIMEOUT, HALF_CLOSE_TIMEOUT, HOLD, IDLE_TIMEOUT, MAX_HELD
from ambassador._ready cimport ready_interest
from ambassador._slab cimport slabs_give, slabs_take
from ambassador._states cimport (
    connection_list,
    connection_move,
    connection_queue,
    connection_unlist,
    first_in,
    next_of,
    socket_arm,
    socket_disarm,
)
from ambassador._tcp cimport (
    ACCEPTED,
    BACKEND,
    BECOMES_SPARE,
    BULK,
    CLIENT,
    CLOSED,
    DESTINATION_CLOSED,
    DIAL_FAILED,
    DISCARDED_TO_BACKEND,
    END_FORWARDED,
    ERROR_QUEUED,
    HALF_CLOSED_TOO_LONG,
    HELD_TOTAL,
    IDLE_CLOSED,
    KEEPALIVE_AFTER_MS,
    KEEPALIVE_COUNT,
    KEEPALIVE_IDLE_S,
    KEEPALIVE_INTERVAL_S,
    KEEPALIVE_SPREAD_S,
    KEEPALIVE_STEP,
    MAX_FAILURES,
    MAX_SPARE,
    NO_DESCRIPTOR,
    NO_LOCAL_PORT,
    PUMP_FAILED,
    PUMP_MORE,
    READ_PAUSED,
    REJECTED,
    REJECTED_REFUSED,
    REJECTED_UNANSWERED,
    RESET,
    RETRY_FIRST_MS,
    RETRY_LAST_MS,
    REUSED,
    STATE_CLOSED,
    STATE_CONNECTING,
    STATE_HELD,
    STATE_OPEN,
    STATE_SPARE,
    TO_BACKEND,
    TO_CLIENT,
    WAS_HELD,
    connection_t,
    loop_t,
)

# --------------------------------------------------------------------------------------- spare sockets


cdef inline bint spare_is_wanted(loop_t *loop) noexcept nogil:
    return loop.spare_count < MAX_SPARE and not loop.draining


cdef inline bint socket_is_reusable(connection_t *connection) noexcept nogil:
    """Whether the backend's socket has ended for good and can be used again.

    It has ended if the kernel owes the backend nothing: all is acknowledged, or the backend has reset its
    side. On one host that is known at once; from another the last acknowledgement is still on its way.

    A bulk socket is not reusable: its buffers keep their size (net/ipv4/tcp.c, tcp_disconnect). Nor is one
    without timestamps: it would go on with its sequence numbers (net/ipv4/tcp_ipv4.c, tcp_v4_connect), and
    only by timestamps can a backend that has this port in TIME_WAIT tell them from a new connection's.
    """
    cdef uint8_t info[6]  # tcp_info (linux/tcp.h) begins with the state; the last of these are the options
    cdef socklen_t length = sizeof(info)
    if connection.ready[BACKEND] & (READ_PAUSED | ERROR_QUEUED):
        return False
    if (connection.direction[TO_BACKEND].flags | connection.direction[TO_CLIENT].flags) & BULK:
        return False
    if getsockopt(connection.fd[BACKEND], IPPROTO_TCP, TCP_INFO, info, &length) < 0:
        return False
    return info[0] == TCP_CLOSE and info[5] & TCPI_OPT_TIMESTAMPS


cdef inline connection_t *spare_take(loop_t *loop) noexcept nogil:
    """Return the latest spare one, as new but for its backend's socket; NULL if there is none."""
    cdef connection_t *connection = <connection_t *>loop.lists[STATE_SPARE].tail
    cdef uint8_t family, sends
    cdef int fd
    if connection == NULL:
        return NULL
    connection_unlist(loop, connection)
    loop.spare_count -= 1
    fd, family, sends = connection.fd[BACKEND], connection.family, connection.sends
    memset(connection, 0, sizeof(connection_t))
    connection.fd[BACKEND], connection.family = fd, family
    connection.sends = sends & 2  # TCP_NODELAY stays set
    return connection


cdef inline uint32_t spare_close_all(loop_t *loop) noexcept nogil:
    """Close the spare sockets, and return how many. free_closed frees their memory."""
    cdef uint32_t count = loop.lists[STATE_SPARE].length
    cdef connection_t *connection
    while loop.lists[STATE_SPARE].head != NULL:
        connection = first_in(loop, STATE_SPARE)
        close(connection.fd[BACKEND])
        connection.marks &= ~BECOMES_SPARE
        connection_move(loop, connection, STATE_CLOSED)  # an event of this batch may still name it
    loop.spare_count -= count
    return count


cdef inline bint socket_reuse(loop_t *loop, connection_t *connection, int family) noexcept nogil:
    """Disconnect the spare socket, so that it can connect anew. If that fails, close it and return False."""
    cdef int fd = connection.fd[BACKEND]
    cdef sockaddr nowhere
    nowhere.sa_family = AF_UNSPEC
    if connection.family == family and connect(fd, &nowhere, sizeof(nowhere)) == 0:
        loop.tally[REUSED] += 1
        return True
    close(fd)
    connection.fd[BACKEND] = -1
    return False


cdef inline connection_t *connection_new(loop_t *loop, int fd, bint dials) noexcept nogil:
    """Return a new connection for the client `fd`, with a spare socket if it `dials`; NULL without memory."""
    cdef connection_t *connection = spare_take(loop) if dials else NULL
    if connection == NULL:
        connection = <connection_t *>slabs_take(&loop.connections)
        if connection == NULL:
            return NULL
        connection.fd[BACKEND] = -1
    connection.fd[CLIENT] = fd
    connection.times.waiting.hold_until = loop.now + loop.option[HOLD]
    connection_list(loop, connection, STATE_CONNECTING)
    loop.tally[ACCEPTED] += 1
    return connection


# ----------------------------------------------------------------------------------------------- close


cdef inline void connection_close(loop_t *loop, connection_t *connection, int counter) noexcept nogil:
    """Close both sockets, with a reset unless they were disarmed. free_closed frees the memory.

    A backend's socket that becomes spare stays open.
    """
    cdef int d
    for d in range(2):
        loop.tally[DISCARDED_TO_BACKEND + d] += direction_in_flight(&connection.direction[d])
        direction_release(loop, &connection.direction[d])
    close(connection.fd[CLIENT])
    if connection.fd[BACKEND] >= 0 and not connection.marks & BECOMES_SPARE:
        close(connection.fd[BACKEND])
    if loop.probe == connection:
        loop.probe = NULL
        loop.probe_at = loop.now
    connection_move(loop, connection, STATE_CLOSED)
    loop.tally[counter] += 1


cdef inline void connection_end(loop_t *loop, connection_t *connection) noexcept nogil:
    """Close it cleanly: both directions have ended, and the kernel delivers what is queued."""
    if linger_is_wanted(loop, connection):
        linger_begin(loop, connection)
        return
    socket_disarm(connection.fd[CLIENT])
    if spare_is_wanted(loop) and socket_is_reusable(connection):
        connection.marks |= BECOMES_SPARE
        loop.spare_count += 1
    else:
        socket_disarm(connection.fd[BACKEND])
    connection_close(loop, connection, CLOSED)


cdef inline void free_closed(loop_t *loop) noexcept nogil:
    """Free the closed connections, or make them spare. One on the ready list waits for its turn."""
    cdef connection_t *connection = first_in(loop, STATE_CLOSED)
    cdef connection_t *following
    while connection != NULL:
        following = next_of(connection)
        if connection.on_ready_list:
            pass
        elif connection.marks & BECOMES_SPARE:
            connection_move(loop, connection, STATE_SPARE)
        else:
            connection_unlist(loop, connection)
            slabs_give(&loop.connections, connection)
        connection = following


# ----------------------------------------------------------------------------------------- hold and dial


cdef inline void connection_reject(loop_t *loop, connection_t *connection) noexcept nogil:
    """Reset a client that no backend took, and count why the latest dial failed."""
    if loop.reject_counter:
        loop.tally[loop.reject_counter] += 1
    connection_close(loop, connection, REJECTED)


cdef inline void connection_hold(loop_t *loop, connection_t *connection) noexcept nogil:
    """Put it into the held list, sorted by the end of the window. Reject it without a window or room."""
    cdef link_t *after = loop.lists[STATE_HELD].tail
    if (
        connection.times.waiting.hold_until <= loop.now
        or loop.lists[STATE_HELD].length >= loop.option[MAX_HELD]
    ):
        connection_reject(loop, connection)
        return
    while (
        after != NULL
        and (<connection_t *>after).times.waiting.hold_until > connection.times.waiting.hold_until
    ):
        after = after.previous
    connection_unlist(loop, connection)
    connection.state = STATE_HELD
    list_insert(&loop.lists[STATE_HELD], &connection.link, after)
    connection.failures = 0
    if not connection.marks & WAS_HELD:
        connection.marks |= WAS_HELD
        loop.tally[HELD_TOTAL] += 1


cdef inline void connection_hang_up(connection_t *connection) noexcept nogil:
    """Close the backend's socket."""
    if connection.fd[BACKEND] >= 0:
        close(connection.fd[BACKEND])
        connection.fd[BACKEND] = -1
    connection.ready[BACKEND] = 0


cdef inline void connection_cancel_dial(loop_t *loop, connection_t *connection) noexcept nogil:
    """Close the backend's socket and hold the client again."""
    connection_hang_up(connection)
    if loop.probe == connection:
        loop.probe = NULL
    connection_hold(loop, connection)


cdef inline bint dial_was_taken(int error) noexcept nogil:
    """Whether a dial ended in the reset of a connection that the backend had accepted.

    The kernel says ECONNRESET, EPIPE if the backend had ended its side before, and ECONNREFUSED only if it
    never accepted (net/ipv4/tcp_input.c, tcp_reset). All else is a timeout, the network's or our own.
    """
    return error == ECONNRESET or error == EPIPE


cdef inline bint connection_has_next(loop_t *loop, connection_t *connection, int error) noexcept nogil:
    """Count a dial that failed. Return True if the next backend is to be dialled.

    Otherwise the connection was held, or closed. `error` is 0 after CONNECT_TIMEOUT.
    """
    loop.tally[DIAL_FAILED] += 1
    if error == EADDRNOTAVAIL:
        loop.tally[NO_LOCAL_PORT] += 1
        connection_close(loop, connection, RESET)
        return False
    if error == EMFILE or error == ENFILE or error == ENOBUFS or error == ENOMEM:
        loop.tally[NO_DESCRIPTOR] += 1
        loop.out_of_descriptors = True
        spare_close_all(loop)
    else:
        loop.reject_counter = REJECTED_REFUSED if error == ECONNREFUSED else REJECTED_UNANSWERED
        if connection.failures + 1 < <int>min(backends_usable(&loop.backends), <uint32_t>MAX_FAILURES):
            connection.failures += 1
            connection_hang_up(connection)
            return True
    if loop.probe == connection or loop.probe_at <= loop.now:
        loop.probe_at = loop.now + loop.retry_ms
        loop.retry_ms = min(2 * loop.retry_ms, RETRY_LAST_MS)
    connection_cancel_dial(loop, connection)
    return False


cdef inline int backend_socket(connection_t *connection, int family) noexcept nogil:
    """Give it a new socket, armed and with Nagle's delay; -1 with errno."""
    cdef int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP)
    if fd < 0:
        return -1
    socket_arm(fd)
    connection.fd[BACKEND], connection.family, connection.sends = fd, <uint8_t>family, 0
    return 0


cdef inline int connection_try(
    loop_t *loop, connection_t *connection, backend_t *backend
) noexcept nogil:
    """Start to connect to this backend. Return 0, or the errno if that failed at once."""
    cdef int family = backend.address.v4.sin_family
    cdef bint reused = connection.fd[BACKEND] >= 0 and socket_reuse(loop, connection, family)
    cdef int fd
    connection.backend = backend.id
    connection.times.waiting.connect_by = loop.now + loop.option[CONNECT_TIMEOUT]
    connection_move(loop, connection, STATE_CONNECTING)
    if not reused and backend_socket(connection, family) < 0:
        return errno
    fd = connection.fd[BACKEND]
    if connect(fd, <sockaddr *>&backend.address, backend.length) < 0 and errno != EINPROGRESS:
        return errno
    # Epoll watches a spare socket already.
    if not reused and epoll_add(loop.epoll, fd, ready_interest(0), <uintptr_t>connection | BACKEND) < 0:
        return errno
    return 0


cdef inline bint connection_dial_from(
    loop_t *loop, connection_t *connection, backend_t *backend
) noexcept nogil:
    """Start to connect to the backend, or to the next one if that fails at once. Return False if all did."""
    cdef int error = connection_try(loop, connection, backend)
    while error:
        if not connection_has_next(loop, connection, error):
            return False
        error = connection_try(loop, connection, backends_after(&loop.backends, connection.backend))
    return True


cdef inline bint connection_dial(loop_t *loop, connection_t *connection) noexcept nogil:
    """Start to connect to a backend. Return False if all failed at once, and the connection moved on.

    There must be a backend with a weight.
    """
    return connection_dial_from(loop, connection, backends_next(&loop.backends))


cdef inline void connection_dial_failed(loop_t *loop, connection_t *connection, int error) noexcept nogil:
    """Dial the next backend. If each has had its turn, hold the client."""
    if connection_has_next(loop, connection, error):
        connection_dial_from(loop, connection, backends_after(&loop.backends, connection.backend))


cdef inline void connection_connected(loop_t *loop, connection_t *connection) noexcept nogil:
    """Open it. The backend takes others too: release every held one."""
    cdef uint32_t _one
    connection_move(loop, connection, STATE_OPEN)
    connection.times.open.keepalive_at = loop.now + KEEPALIVE_AFTER_MS
    connection.times.open.moved_at = loop.now
    if loop.option[IDLE_TIMEOUT]:
        due_by(&loop.expire_at, loop.now + loop.option[IDLE_TIMEOUT])
    if loop.keepalive_next == NULL:
        loop.keepalive_next = connection
    loop.retry_ms = RETRY_FIRST_MS
    loop.reject_counter = 0
    if loop.probe == connection:
        loop.probe = NULL
    # One that fails at once returns to its own place in the list, so the length now bounds the loop.
    for _one in range(loop.lists[STATE_HELD].length):
        if loop.lists[STATE_HELD].head == NULL or not loop.backends.total_weight:
            return
        if not connection_dial(loop, first_in(loop, STATE_HELD)):
            return


cdef inline bint probe_is_wanted(loop_t *loop) noexcept nogil:
    return loop.probe == NULL and loop.backends.total_weight > 0 and loop.lists[STATE_HELD].head != NULL


# ------------------------------------------------------------------------------------------------ open


cdef inline void connection_keep_alive(loop_t *loop, connection_t *connection) noexcept nogil:
    """Have the kernel probe the backend while it is silent, and the client, whose socket inherits the rest.

    The kernel's timers of a minute are 2 s coarse. With one idle time for all, thousands of connections would
    be probed at once and most probes dropped (net.core.netdev_max_backlog), again with each retry, until
    healthy connections are reset.
    """
    cdef int on = 1, idle, interval = KEEPALIVE_INTERVAL_S, count = KEEPALIVE_COUNT
    cdef int fd = connection.fd[BACKEND]
    loop.keepalive_turn += KEEPALIVE_STEP
    idle = KEEPALIVE_IDLE_S + loop.keepalive_turn % KEEPALIVE_SPREAD_S
    setsockopt(connection.fd[CLIENT], IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count))
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on))


cdef inline void connection_pump(loop_t *loop, connection_t *connection) noexcept nogil:
    """Pump both directions. Close it if one failed or both ended; queue it if there is more to move."""
    cdef bint spare_wanted = spare_is_wanted(loop), more = False
    cdef int d, result
    loop.moved = False
    for d in range(2):
        result = direction_pump(loop, connection, d, spare_wanted)
        if result == PUMP_FAILED:
            connection_close(loop, connection, RESET)
            return
        more = more or result == PUMP_MORE
    if loop.moved and loop.option[IDLE_TIMEOUT]:
        connection.times.open.moved_at = loop.now
    # If direction 1 found its destination closed, that source became ready after direction 0 had its turn.
    if (
        connection.direction[TO_CLIENT].flags & DESTINATION_CLOSED
        and direction_can_move(connection, TO_BACKEND)
    ):
        more = True
    if (connection.direction[TO_BACKEND].flags & connection.direction[TO_CLIENT].flags) & END_FORWARDED:
        connection_end(loop, connection)
    elif more:
        connection_queue(loop, connection)


cdef inline bint connection_send_deferred(loop_t *loop, connection_t *connection, int d) noexcept nogil:
    """Send what the direction deferred. Return False if that failed and closed the connection."""
    cdef int result = direction_send_deferred(loop, connection, d)
    if result == PUMP_FAILED:
        connection_close(loop, connection, RESET)
    elif result == PUMP_MORE:
        connection_queue(loop, connection)
    return result != PUMP_FAILED


cdef inline void flush_deferred(loop_t *loop) noexcept nogil:
    """Send all that was deferred, in the order in which it was read."""
    cdef uint32_t i
    loop.deferring = False
    for i in range(loop.deferred_count):
        connection_send_deferred(loop, loop.workspace.deferred[i].connection, loop.workspace.deferred[i].d)
    loop.deferred_count = loop.deferred_bytes = 0


cdef inline void pump_ready_list(loop_t *loop) noexcept nogil:
    """Pump each that is on the ready list now. One with more to move goes to its end."""
    cdef connection_t *connection = loop.ready_head
    cdef connection_t *following
    loop.ready_head = loop.ready_tail = NULL
    while connection != NULL:
        following = connection.next_ready
        connection.on_ready_list = False
        if connection.state == STATE_OPEN:
            connection_pump(loop, connection)
        connection = following


cdef inline int64_t connection_time_left(loop_t *loop, connection_t *connection, int *counter) noexcept nogil:
    """Return the ms until its first deadline, INT64_MAX if it has none, and set the `counter` for it."""
    cdef inline int64_t left = INT64_MAX, since
    cdef int d
    if loop.option[IDLE_TIMEOUT]:
        left = connection.times.open.moved_at + loop.option[IDLE_TIMEOUT] - loop.now
        counter[0] = IDLE_CLOSED
    if loop.option[HALF_CLOSE_TIMEOUT]:
        for d in range(2):
            if connection.direction[d].flags & END_FORWARDED:
                since = <uint32_t>(<uint32_t>loop.now - connection.direction[d].ended_at)
                if loop.option[HALF_CLOSE_TIMEOUT] - since < left:
                    left = loop.option[HALF_CLOSE_TIMEOUT] - since
                    counter[0] = HALF_CLOSED_TOO_LONG
    return left
