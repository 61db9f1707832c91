"""One direction of a connection: bytes from a source to a destination. It closes nothing.

A direction copies first: recv into the loop's buffer, send at once. After FULL_READS full reads it is bulk:
it borrows a pipe and splices. After SMALL_MOVES small moves it copies again. Splicing loses below about 8-16
KiB a move and won twofold at 64 KiB and over in the experiments before this loop.

If a batch has several events, small reads are deferred: they stay in the buffer, one behind the other, and
are sent at the end of the batch. Receivers then wake once for several messages, and the kernel's code for
each step stays in the cache.

Invariants: nothing is read while bytes of the direction are in flight; its end is forwarded only with nothing
in flight; a direction that waits for its source has no pipe and no buffer.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from ambassador._linux cimport (
    EAGAIN,
    EINTR,
    EINVAL,
    ENOBUFS,
    ENOMEM,
    ENOSYS,
    EPERM,
    IPPROTO_TCP,
    MSG_DONTWAIT,
    MSG_MORE,
    MSG_NOSIGNAL,
    SHUT_WR,
    SPLICE_F_NONBLOCK,
    TCP_NODELAY,
    errno,
    recv,
    send,
    setsockopt,
    shutdown,
    splice,
)
from ambassador._loop cimport due_by
from ambassador._options cimport HALF_CLOSE_TIMEOUT, PIPE_BYTES
from ambassador._pipes cimport pipe_borrow, pipe_return
from ambassador._ready cimport (
    ready_only_fin,
    ready_set,
    ready_short_read_empties,
    ready_to_move,
    ready_to_splice,
)
from ambassador._tcp cimport (
    BACKEND,
    BULK,
    COPY_BYTES,
    DEFERRED,
    DESTINATION_CLOSED,
    DISCARDED_TO_BACKEND,
    END_FORWARDED,
    END_QUEUED,
    ERROR_QUEUED,
    FIN_QUEUED,
    FULL_READ,
    FULL_READS,
    MAX_DEFERRED,
    NO_MEMORY,
    PUMP_FAILED,
    PUMP_MORE,
    PUMP_WAIT,
    READ_PAUSED,
    READ_READY,
    RECEIVED_FROM_CLIENT,
    SENT_TO_BACKEND,
    SMALL_MOVE,
    SMALL_MOVES,
    SOURCE_ENDED,
    SPLICE_BYTES,
    SPLICING,
    TO_BACKEND,
    TURN_BYTES,
    WRITE_READY,
    connection_t,
    direction_t,
    loop_t,
)


cdef inline uint32_t direction_in_flight(direction_t *direction) noexcept nogil:
    """Return the bytes that were read and not sent."""
    if direction.pipe != NULL:
        return direction.pipe.bytes
    return direction.unsent_end - direction.unsent_start


cdef inline bint direction_can_move(connection_t *connection, int d) noexcept nogil:
    return ready_to_move(connection.ready[d], connection.ready[1 - d])


cdef inline void direction_release(loop_t *loop, direction_t *direction) noexcept nogil:
    """Give back the pipe and the buffer. Bytes in flight are lost."""
    if direction.pipe != NULL:
        pipe_return(loop, direction.pipe)
        direction.pipe = NULL
    if direction.unsent != NULL:
        if not direction.flags & DEFERRED:
            free(direction.unsent)
        direction.flags &= ~DEFERRED
        direction.unsent = NULL
    direction.unsent_start = direction.unsent_end = 0


cdef inline void source_emptied(loop_t *loop, connection_t *connection, int d) noexcept nogil:
    """Clear READ_READY; the next event sets it again."""
    ready_set(loop, connection, d, connection.ready[d] & ~(READ_READY | READ_PAUSED))


cdef inline int destination_closed(loop_t *loop, connection_t *connection, int d) noexcept nogil:
    """A write failed. The destination's last bytes may still be queued: read them, then reset."""
    cdef direction_t *direction = &connection.direction[d]
    loop.tally[DISCARDED_TO_BACKEND + d] += direction_in_flight(direction)
    direction_release(loop, direction)
    direction.flags |= DESTINATION_CLOSED
    connection.ready[1 - d] |= READ_READY | END_QUEUED
    connection.ready[1 - d] &= ~FIN_QUEUED  # a reset follows, not a FIN: its last bytes must not wait for one
    if connection.direction[1 - d].flags & (SOURCE_ENDED | DESTINATION_CLOSED):
        return PUMP_FAILED
    return PUMP_WAIT


cdef inline int direction_flush(loop_t *loop, connection_t *connection, int d) noexcept nogil:
    """Send the bytes in flight. Return PUMP_MORE if all are sent, PUMP_WAIT if the destination is full."""
    cdef direction_t *direction = &connection.direction[d]
    cdef int destination = connection.fd[1 - d]
    cdef ssize_t sent
    while direction_in_flight(direction):
        if direction.pipe != NULL:
            sent = splice(
                direction.pipe.read_end, NULL, destination, NULL, direction.pipe.bytes, SPLICE_F_NONBLOCK
            )
        else:
            sent = send(
                destination,
                direction.unsent + direction.unsent_start,
                direction.unsent_end - direction.unsent_start,
                MSG_NOSIGNAL | MSG_DONTWAIT,
            )
        if sent > 0:
            loop.moved = True
            loop.tally[SENT_TO_BACKEND + d] += sent
            if direction.pipe != NULL:
                direction.pipe.bytes -= <uint32_t>sent
            else:
                direction.unsent_start += <uint32_t>sent
        elif sent < 0 and errno == EINTR:
            continue
        elif sent < 0 and errno == EAGAIN:
            connection.ready[1 - d] &= ~WRITE_READY
            return PUMP_WAIT
        elif sent < 0 and (errno == EINVAL or errno == ENOSYS or errno == ENOMEM or errno == ENOBUFS):
            return PUMP_FAILED  # the call failed, not the destination: no event will report it
        else:
            return destination_closed(loop, connection, d)
    if direction.unsent != NULL:
        free(direction.unsent)
        direction.unsent = NULL
        direction.unsent_start = direction.unsent_end = 0
    return PUMP_MORE


cdef inline int direction_send(
    loop_t *loop, connection_t *connection, int d, const char *bytes, uint32_t length, int flags
) noexcept nogil:
    """Send `bytes`, and keep what the destination does not take. Return 0, or NO_MEMORY to keep it."""
    cdef direction_t *direction = &connection.direction[d]
    cdef ssize_t sent
    cdef int on = 1
    # The first write is never delayed (net/ipv4/tcp_output.c, tcp_nagle_check: nothing small is under way),
    # and connections of one request save the call. The client's socket inherits the option.
    if d == TO_BACKEND and connection.sends < 2:
        connection.sends += 1
        if connection.sends == 2:
            setsockopt(connection.fd[BACKEND], IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))
    sent = max(send(connection.fd[1 - d], bytes, length, flags), 0)  # the flush of the rest finds the reason
    loop.tally[SENT_TO_BACKEND + d] += sent
    if sent == length:
        return 0
    length -= <uint32_t>sent
    direction.unsent = <char *>malloc(length)
    if direction.unsent == NULL:
        loop.tally[DISCARDED_TO_BACKEND + d] += length
        return NO_MEMORY
    memcpy(direction.unsent, bytes + sent, length)
    direction.unsent_start, direction.unsent_end = 0, length
    return 0


cdef inline bint direction_defer(
    loop_t *loop, connection_t *connection, int d, char *bytes, uint32_t length
) noexcept nogil:
    """Leave `bytes` in the loop's buffer until the end of the batch. Return False to send them now."""
    cdef direction_t *direction = &connection.direction[d]
    if not loop.deferring or loop.deferred_count == MAX_DEFERRED or loop.deferred_bytes + length > COPY_BYTES:
        return False
    direction.flags |= DEFERRED
    direction.unsent, direction.unsent_start, direction.unsent_end = bytes, 0, length
    loop.workspace.deferred[loop.deferred_count].connection = connection
    loop.workspace.deferred[loop.deferred_count].d = d
    loop.deferred_count += 1
    loop.deferred_bytes += length
    return True


cdef inline int direction_send_deferred(loop_t *loop, connection_t *connection, int d) noexcept nogil:
    """Send the deferred bytes, if an earlier event of the batch has not. Return PUMP_MORE to pump it next."""
    cdef direction_t *direction = &connection.direction[d]
    cdef const char *bytes = direction.unsent
    cdef uint32_t length = direction.unsent_end
    if not direction.flags & DEFERRED:
        return PUMP_WAIT
    direction.flags &= ~DEFERRED
    direction.unsent, direction.unsent_end = NULL, 0
    if direction_send(loop, connection, d, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT) < 0:
        return PUMP_FAILED
    return PUMP_MORE if direction.unsent != NULL or direction_can_move(connection, d) else PUMP_WAIT


cdef inline ssize_t direction_read(loop_t *loop, connection_t *connection, int d) noexcept nogil:
    """Copy: one read into the loop's buffer, sent at once or deferred.

    Return the bytes read, 0 at the end, -1 with errno, or NO_MEMORY.
    """
    cdef direction_t *direction = &connection.direction[d]
    cdef char *bytes = loop.workspace.buffer + loop.deferred_bytes
    cdef ssize_t got = recv(connection.fd[d], bytes, COPY_BYTES, MSG_DONTWAIT)
    cdef int flags = MSG_NOSIGNAL | MSG_DONTWAIT
    if got <= 0:
        return got
    loop.tally[RECEIVED_FROM_CLIENT + d] += got
    if got < FULL_READ:
        direction.streak = 0
    elif loop.option[PIPE_BYTES] and not loop.no_splice:
        direction.streak += 1
        if direction.streak >= FULL_READS:
            direction.streak = 0
            direction.flags |= SPLICING | BULK
    if got < COPY_BYTES:
        if ready_only_fin(connection.ready[d]):
            direction.flags |= SOURCE_ENDED
            flags |= MSG_MORE  # the FIN follows at once, in the same segment
        elif ready_short_read_empties(connection.ready[d]):
            source_emptied(loop, connection, d)
            if direction_defer(loop, connection, d, bytes, <uint32_t>got):
                return got
    if direction_send(loop, connection, d, bytes, <uint32_t>got, flags) < 0:
        return NO_MEMORY
    return got


cdef inline ssize_t direction_read_instead(loop_t *loop, connection_t *connection, int d) noexcept nogil:
    """Give up splicing, and copy. Return as direction_read."""
    connection.direction[d].flags &= ~SPLICING
    direction_release(loop, &connection.direction[d])
    return direction_read(loop, connection, d)


cdef inline ssize_t direction_splice(loop_t *loop, connection_t *connection, int d) noexcept nogil:
    """Splice once from the source into an empty pipe. Return as direction_read."""
    cdef direction_t *direction = &connection.direction[d]
    cdef ssize_t got
    if direction.pipe == NULL:
        direction.pipe = pipe_borrow(loop)
        if direction.pipe == NULL:
            return direction_read_instead(loop, connection, d)
    got = splice(
        connection.fd[d], NULL, direction.pipe.write_end, NULL, SPLICE_BYTES, SPLICE_F_NONBLOCK
    )
    if got > 0:
        loop.tally[RECEIVED_FROM_CLIENT + d] += got
        direction.pipe.bytes = <uint32_t>got
        if got >= SMALL_MOVE:
            direction.streak = 0
        else:
            direction.streak += 1
            if direction.streak >= SMALL_MOVES:
                direction.streak = 0
                direction.flags &= ~SPLICING
    elif got == 0:  # the end, or an urgent mark before it (net/ipv4/tcp.c, tcp_splice_read): recv can tell
        direction.streak = 0
        return direction_read_instead(loop, connection, d)
    elif errno == EINVAL or errno == ENOSYS or errno == EPERM:
        loop.no_splice = True
        return direction_read_instead(loop, connection, d)
    return got


cdef inline int direction_end(
    loop_t *loop, connection_t *connection, int d, bint spare_wanted
) noexcept nogil:
    """Forward end of file. Only here does a peer see a clean end."""
    cdef direction_t *direction = &connection.direction[d]
    direction_release(loop, direction)
    if connection.direction[1 - d].flags & DESTINATION_CLOSED:
        return PUMP_FAILED  # a reset followed this peer's FIN: not everything arrived
    if not connection.direction[1 - d].flags & END_FORWARDED:
        if shutdown(connection.fd[1 - d], SHUT_WR) < 0:
            return PUMP_FAILED
    elif d == TO_BACKEND and spare_wanted:
        # Without a spare socket the second end needs no call of its own: the close of the socket says it. If
        # the call fails, the backend has reset its side, which ends the socket too.
        shutdown(connection.fd[BACKEND], SHUT_WR)
    direction.flags |= END_FORWARDED
    direction.ended_at = <uint32_t>loop.now
    if loop.option[HALF_CLOSE_TIMEOUT]:
        due_by(&loop.expire_at, loop.now + loop.option[HALF_CLOSE_TIMEOUT])
    return PUMP_WAIT


cdef inline int direction_pump(
    loop_t *loop, connection_t *connection, int d, bint spare_wanted
) noexcept nogil:
    """Move bytes until the source is empty, the destination is full, the budget is spent, or an end.

    `spare_wanted`: end the backend's socket so that it can be used again.
    """
    cdef direction_t *direction = &connection.direction[d]
    cdef int64_t budget = TURN_BYTES
    cdef ssize_t got
    cdef int flushed
    while True:
        if direction.flags & SOURCE_ENDED and connection.ready[d] & ERROR_QUEUED:
            return PUMP_FAILED  # a reset behind its own end of file
        if direction.flags & (DESTINATION_CLOSED | END_FORWARDED | DEFERRED):
            return PUMP_WAIT
        if direction_in_flight(direction):
            if not connection.ready[1 - d] & WRITE_READY:
                return PUMP_WAIT
            flushed = direction_flush(loop, connection, d)
            if flushed != PUMP_MORE:
                return flushed
        if direction.flags & SOURCE_ENDED:
            return direction_end(loop, connection, d, spare_wanted)
        if not direction_can_move(connection, d):
            direction_release(loop, direction)
            return PUMP_WAIT
        if budget <= 0:
            return PUMP_MORE
        if direction.flags & SPLICING and ready_to_splice(connection.ready[d]):
            got = direction_splice(loop, connection, d)
        else:
            direction_release(loop, direction)
            got = direction_read(loop, connection, d)
        if got > 0:
            loop.moved = True
            budget -= got
        elif got == 0:  # end of file: forwarded once nothing is in flight
            direction.flags |= SOURCE_ENDED
        elif got == NO_MEMORY:
            return PUMP_FAILED
        elif errno == EAGAIN:
            source_emptied(loop, connection, d)
        elif errno != EINTR:  # a reset, or the network's report that the peer is gone
            return PUMP_FAILED
