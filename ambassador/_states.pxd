"""The lists of connections, one for each state, the ready list, and what the close of a socket says.

Invariant: a connection is in exactly one list, that of its state.
"""

from libc.stdint cimport uint32_t

from ambassador._linux cimport SO_LINGER, SOL_SOCKET, linger, setsockopt
from ambassador._list cimport list_append, list_remove
from ambassador._tcp cimport STATE_CONNECTING, STATE_HELD, STATE_OPEN, connection_t, loop_t


cdef inline connection_t *first_in(loop_t *loop, int state) noexcept nogil:
    return <connection_t *>loop.lists[state].head


cdef inline connection_t *next_of(connection_t *connection) noexcept nogil:
    return <connection_t *>connection.link.next


cdef inline uint32_t connections_active(loop_t *loop) noexcept nogil:
    """Return how many have not ended."""
    return (
        loop.lists[STATE_CONNECTING].length + loop.lists[STATE_HELD].length + loop.lists[STATE_OPEN].length
    )


cdef inline void connection_unlist(loop_t *loop, connection_t *connection) noexcept nogil:
    if loop.keepalive_next == connection:
        loop.keepalive_next = next_of(connection)
    list_remove(&loop.lists[connection.state], &connection.link)


cdef inline void connection_list(loop_t *loop, connection_t *connection, int state) noexcept nogil:
    """Append it to the list of `state`."""
    connection.state = state
    list_append(&loop.lists[state], &connection.link)


cdef inline void connection_move(loop_t *loop, connection_t *connection, int state) noexcept nogil:
    connection_unlist(loop, connection)
    connection_list(loop, connection, state)


cdef inline void connection_queue(loop_t *loop, connection_t *connection) noexcept nogil:
    """Append it to the ready list, once."""
    if connection.on_ready_list:
        return
    connection.on_ready_list = True
    connection.next_ready = NULL
    if loop.ready_tail != NULL:
        loop.ready_tail.next_ready = connection
    else:
        loop.ready_head = connection
    loop.ready_tail = connection


cdef inline void socket_arm(int fd) noexcept nogil:
    """Have close(2) end the connection with a reset."""
    cdef linger armed
    armed.l_onoff, armed.l_linger = 1, 0
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &armed, sizeof(armed))


cdef inline void socket_disarm(int fd) noexcept nogil:
    """Let close(2) end the connection without a reset."""
    cdef linger disarmed
    disarmed.l_onoff = disarmed.l_linger = 0
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &disarmed, sizeof(disarmed))
