"""The TCP relay loop: one edge-triggered epoll loop that moves bytes between pairs of sockets.

Theory of operation
-------------------
A *connection* is two sockets, the client's and the backend's, and two *directions*. A direction has a
source and a destination and moves bytes in one of two ways. It starts by copying: recv into a buffer
that belongs to the worker, send at once. After FULL_READS reads of FULL_READ bytes it is bulk, and it
borrows a pipe and splices; after SMALL_MOVES small moves it copies again. Splicing loses below about
8-16 KiB a move and won twofold at 64 KiB and over in the experiments before this loop.

Each socket is added to epoll once, edge-triggered: what the kernel said of it is kept in `ready` until a
call answers EAGAIN. Only a source whose bytes pile up before a full destination is modified: each segment
that arrives would wake the loop for nothing, so it is muted until it has been emptied. A direction that has
spent its budget goes to the ready list, so that one bulk stream does not starve the rest.

A batch of several events is handled in two steps: the small reads first, one behind the other into the
worker's buffer, then all their sends. The receivers then wake once for several messages, and the kernel's
code for each step stays in the cache.

    wait -> for each event: listener? note : control? note : connection? pump
         -> send what was lent -> turn the ready list -> retry what is held -> expire
         -> free or park what was closed -> accept -> return to Python if it is asked for

A connection that has ended in both directions leaves its backend's socket behind: closed for good, with all
acknowledged, but not given up. It is *parked* with its struct and connects anew for the next client, which
spares making, arming and watching a socket, and its end: a seventh of what a short connection costs.

While no backend takes connections, clients are *held*: accepted, and not read. One of them, the probe,
tries the backend every few milliseconds; when it gets through, all are released.

Invariants
----------
- What was read first leaves first: nothing is read from a source while its direction has bytes in flight.
- A pipe that holds bytes is never in the pool; an idle connection has no pipe and no buffer.
- The end comes last: a direction forwards end of file only with nothing in flight.
- A client that sees a clean end has got every byte. Every socket is armed (SO_LINGER with time 0, on the
  client's side inherited from the listener), so whatever ends a connection, SIGKILL of this process
  included, ends it with a reset; only a connection whose two directions have ended is disarmed first.
- What is lent of the worker's buffer is sent, or kept elsewhere, before the batch ends.
- A closed connection's memory is freed after the batch of events that may still name it.
- A connection is in exactly one list: connecting, held, open, closed or parked.
- A parked socket is not connected and holds no bytes and no port. It is taken up only after all events of a
  batch, so none of its former life meets the new one.
- Ownership: the loop owns every descriptor it accepts or makes, and its mapping of the counters page. The
  listener and the control pipe belong to the caller and must outlive the loop.

Sources: epoll(7), splice(2), socket(7), tcp(7), connect(2) for AF_UNSPEC; net/ipv4/tcp.c for what SO_LINGER 0
does at close, and for what tcp_disconnect leaves of a socket (its options) and what it does not.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from ambassador._access cimport access_replace, access_t
from ambassador._backends cimport (
    backend_t,
    backends_have,
    backends_next,
    backends_replace,
    backends_t,
)
from ambassador._counters cimport (
    COUNTER_BACKENDS,
    COUNTER_GENERATION,
    COUNTER_HEARTBEAT,
    COUNTER_OWN,
    COUNTER_VERSION,
    COUNTERS_VERSION,
    MAX_SIBLINGS,
    counters_map,
    counters_unmap,
)
from ambassador._linux cimport (
    AF_UNSPEC,
    EADDRNOTAVAIL,
    EAGAIN,
    ECONNRESET,
    EINPROGRESS,
    EINTR,
    EINVAL,
    EMFILE,
    ENFILE,
    ENOBUFS,
    ENOMEM,
    ENOSYS,
    EPERM,
    EPOLL_CLOEXEC,
    EPOLL_CTL_DEL,
    EPOLLERR,
    EPOLLET,
    EPOLLEXCLUSIVE,
    EPOLLHUP,
    EPOLLIN,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
    F_GETPIPE_SZ,
    F_SETPIPE_SZ,
    IPPROTO_TCP,
    MADV_DONTNEED,
    MSG_DONTWAIT,
    MSG_MORE,
    MSG_NOSIGNAL,
    O_CLOEXEC,
    O_NONBLOCK,
    SHUT_WR,
    SO_ERROR,
    SO_KEEPALIVE,
    SO_LINGER,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    SPLICE_F_NONBLOCK,
    TCP_CLOSE,
    TCP_INFO,
    TCP_KEEPCNT,
    TCP_KEEPIDLE,
    TCP_KEEPINTVL,
    TCP_NODELAY,
    TCPI_OPT_TIMESTAMPS,
    accept4,
    close,
    connect,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    epoll_wait,
    errno,
    fcntl,
    getsockopt,
    linger,
    madvise,
    munmap,
    pipe2,
    recv,
    send,
    setsockopt,
    shutdown,
    sockaddr,
    socket,
    socklen_t,
    splice,
)
from ambassador._loop cimport (
    EVENT_CONTROL,
    EVENT_LISTENER,
    HEARTBEAT_MS,
    MAX_EVENTS,
    REASON_CONTROL,
    REASON_DRAINED,
    epoll_add,
    epoll_change,
    monotonic_ms,
    pages_map,
)
from ambassador._options cimport (
    CONNECT_TIMEOUT,
    HALF_CLOSE_TIMEOUT,
    HOLD,
    IDLE_TIMEOUT,
    MAX_CONNECTIONS,
    MAX_HELD,
    PIPE_BYTES,
    options_t,
)
from ambassador._record cimport update_read, update_view_t
from ambassador._slab cimport slabs_free, slabs_give, slabs_init, slabs_t, slabs_take

# ---------------------------------------------------------------------------------------------- limits

cdef enum:
    COPY_BYTES = 65536  # of one read while copying; also what counts as a full read
    LENT_MOST = 256  # small reads that wait for the end of their batch; further ones are sent at once
    FULL_READ = COPY_BYTES // 2  # bytes; a little less than the buffer is full too, as segments do not fit it
    FULL_READS = 3  # in a row, and a direction is bulk (HAProxy's rule)
    SMALL_MOVE = 16384  # bytes; below this a splice costs more than a copy
    SMALL_MOVES = 3  # in a row, and a direction copies again
    TURN_BYTES = 1 << 20  # a direction moves at most about this much before others get their turn
    PIPE_SMALLEST = 65536  # bytes; a smaller pipe is worse than copying
    SPLICE_BYTES = 1 << 30  # no limit of ours: a pipe's slots are the limit, and hold up to a large page each
    POOL_PIPES = 64  # kept open while a burst lasts: 64 x 1 MiB is the default user's share
    MAX_SPARE = 64  # sockets of backends that wait for their next connection while a burst lasts
    ACCEPT_BATCH = 4  # connections a turn: HAProxy measured 4 better than 64
    RETRY_FIRST_MS = 10  # a starting server listens within tens of milliseconds of its container's start
    RETRY_LAST_MS = 100
    ACCEPT_PAUSE_MS = 100  # with no descriptor left, accepting rests this long
    KEEPALIVE_AFTER_MS = 10000  # short connections need none, and six calls are a third of their cost
    KEEPALIVE_IDLE_S = 30  # and less than KEEPALIVE_SPREAD_S more, each connection another
    KEEPALIVE_SPREAD_S = 61
    KEEPALIVE_STEP = 23  # has no divisor in common with the spread, so all of it is used, evenly
    KEEPALIVE_INTERVAL_S = 10
    KEEPALIVE_COUNT = 6
    SWEEP_SHARE = 16  # sweeps are this share of a deadline apart, so it is kept to 6 %

cdef enum:  # of every socket of a connection
    EVENTS = EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET
    # Without EPOLLPRI too: what wakes for bytes names it (net/core/sock.c, sock_def_readable), and epoll
    # would then tell that the socket is writable, with each segment.
    EVENTS_MUTED = EPOLLOUT | EPOLLRDHUP | EPOLLET

cdef enum:
    CLIENT = 0
    BACKEND = 1

cdef enum:
    TO_BACKEND = 0  # direction d reads from socket d and writes to socket 1 - d
    TO_CLIENT = 1

cdef enum:  # what epoll said of a socket and no call has contradicted since
    READABLE = 1
    WRITABLE = 2
    ENDED = 4  # a FIN, an error or urgent data is queued: a short read is not the last
    FINISHED = 16  # a FIN is queued and no error: behind a short read there is nothing else
    URGENT = 32  # reads end at the urgent mark, and a splice never gets past it: a short read says nothing
    FAILED = 8  # an error: once its end of file was read, no read will tell of it
    MUTED = 64  # epoll was told not to tell of bytes

cdef enum:  # flags of a direction
    SPLICING = 1
    SOURCE_ENDED = 2
    ENDED_FORWARDED = 4
    BROKEN = 8  # the destination takes no more: what is left to read the other way, then a reset
    LENT = 16  # its spill is a part of the worker's buffer, until the end of the batch
    BULK = 32  # it was spliced once: the kernel has given its sockets large buffers

cdef enum:  # what a pump came to
    PUMP_WAIT = 0  # for an event
    PUMP_MORE = 1  # the budget is spent
    PUMP_FAILED = 2  # the connection must be reset

cdef enum:
    COPY_NO_MEMORY = -2  # bytes were read and there was no room to keep them

cdef enum:  # lists, and states of a connection
    CONNECTING = 0
    HELD = 1
    OPEN = 2
    CLOSED = 3
    PARKED = 4
    LISTS = 5

cdef enum:  # words of the counters page
    ACCEPTED = 0
    ACTIVE
    CLOSED_CLEAN
    RESET
    REJECTED  # never got a backend: hold window over, hold list full, or no hold
    HELD_NOW
    HELD_EVER
    DIAL_FAILED
    NO_LOCAL_PORT
    NO_DESCRIPTOR
    RECEIVED_FROM_CLIENT  # bytes; received = sent + in flight + discarded, per direction
    RECEIVED_FROM_BACKEND
    SENT_TO_BACKEND
    SENT_TO_CLIENT
    DISCARDED_TO_BACKEND
    DISCARDED_TO_CLIENT
    PIPES_OPEN
    OVER_LIMIT  # of the rejected: beyond the port's limit
    IDLE_CLOSED  # of those that were reset
    HALF_CLOSED_TOO_LONG  # likewise
    SPARE  # sockets; those that are still to be parked included
    REUSED  # dialled with one of them
    COUNTERS_END

CONTROL = REASON_CONTROL
DRAINED = REASON_DRAINED

# --------------------------------------------------------------------------------------------- structs

cdef struct pipe_t:
    int read_end
    int write_end
    uint32_t capacity  # bytes, read back from the kernel
    uint32_t bytes  # in flight
    pipe_t *next

cdef struct direction_t:
    pipe_t *pipe  # borrowed; NULL unless splicing with bytes in flight
    char *spill  # the unsent rest of a copied read; NULL when none
    uint32_t spill_start
    uint32_t spill_end
    uint8_t flags
    uint8_t streak  # full reads while copying, small moves while splicing
    uint32_t ended_at  # low bits of the ms at which its end was forwarded

cdef struct connection_t:
    int fd[2]  # CLIENT, BACKEND; the backend's is -1 while held
    uint8_t ready[2]
    uint8_t state
    uint8_t queued  # on the ready list
    uint8_t was_held
    uint8_t sent  # writes to the backend, 2 at most; with the second TCP_NODELAY is set
    uint8_t parks  # once closed: its backend's socket is to be parked
    uint8_t family  # of its backend's socket
    direction_t direction[2]  # TO_BACKEND, TO_CLIENT
    uint64_t backend  # id of the one that was dialled
    int64_t hold_until  # ms; no new attempt after this; once open with an idle limit, when a byte last moved
    int64_t deadline  # ms; of this attempt to connect, and once open the moment to begin keepalive
    connection_t *previous
    connection_t *next
    connection_t *next_ready

cdef struct lent_t:  # a direction whose spill is a part of the worker's buffer
    connection_t *connection
    int d

cdef struct workspace_t:  # in pages of its own, which are memory only once they are used
    char buffer[2 * COPY_BYTES]  # for every copied read of this worker: room for one behind what is lent
    lent_t lent[LENT_MOST]

cdef struct list_t:
    connection_t *head
    connection_t *tail
    uint32_t length

cdef struct relay_t:
    int epoll
    int listener
    int control
    options_t option
    access_t access
    uint64_t *page  # shared with the parent; written, never read
    uint64_t **siblings  # the pages of the listener's other workers, to read
    uint32_t sibling_count
    uint64_t tally[COUNTERS_END]
    bint no_splice  # this kernel will not, or a seccomp filter
    slabs_t connections
    workspace_t *workspace
    uint32_t lent_bytes  # at the start of its buffer, COPY_BYTES at most
    uint32_t lent_count
    bint lending  # a batch of several events is being handled
    int64_t worked_at  # ms; 0 once the buffer and the pooled pipes have been given back
    pipe_t *pool
    uint32_t pooled
    list_t lists[LISTS]
    uint32_t keepalive_turn
    connection_t *young  # the first open one whose backend is not probed yet; all behind it are younger
    connection_t *ready_head
    connection_t *ready_tail
    backends_t backends
    connection_t *probe  # the held connection that is trying the backend
    int64_t probe_at
    uint32_t retry_ms
    int64_t now
    int64_t sweep_at  # when an idle or half-closed one may be due; 0: none can
    int64_t accept_at  # when to accept again; 0 while accepting
    int64_t drain_at
    bint draining

# ------------------------------------------------------------------------------------------------ pool


cdef pipe_t *pipe_borrow(relay_t *relay) noexcept nogil:
    """An empty pipe, or NULL where no good one is to be had (then the direction copies)."""
    cdef pipe_t *pipe = relay.pool
    cdef int ends[2]
    cdef int capacity
    if pipe != NULL:  # the one that was used last: its pages are still warm
        relay.pool = pipe.next
        relay.pooled -= 1
        return pipe
    pipe = <pipe_t *>malloc(sizeof(pipe_t))
    if pipe == NULL:
        return NULL
    if pipe2(ends, O_NONBLOCK | O_CLOEXEC) < 0:
        free(pipe)
        return NULL
    # EPERM past pipe-user-pages-soft, and past it new pipes are a page or two: read back what we got.
    fcntl(ends[1], F_SETPIPE_SZ, <int>relay.option[PIPE_BYTES])
    capacity = fcntl(ends[1], F_GETPIPE_SZ)
    if capacity < PIPE_SMALLEST and capacity < relay.option[PIPE_BYTES]:
        close(ends[0])
        close(ends[1])
        free(pipe)
        return NULL
    pipe.read_end, pipe.write_end = ends[0], ends[1]
    pipe.capacity, pipe.bytes = capacity, 0
    relay.tally[PIPES_OPEN] += 1
    return pipe


cdef void pipe_close(relay_t *relay, pipe_t *pipe) noexcept nogil:
    close(pipe.read_end)
    close(pipe.write_end)
    free(pipe)
    relay.tally[PIPES_OPEN] -= 1


cdef void pipe_return(relay_t *relay, pipe_t *pipe) noexcept nogil:
    """To the pool if it is empty and there is room; otherwise it is closed, bytes and all."""
    if pipe.bytes == 0 and relay.pooled < POOL_PIPES:
        pipe.next = relay.pool
        relay.pool = pipe
        relay.pooled += 1
    else:
        pipe_close(relay, pipe)


cdef void pool_empty(relay_t *relay) noexcept nogil:
    """Close the pipes that nobody has borrowed."""
    cdef pipe_t *pipe
    while relay.pool != NULL:
        pipe = relay.pool
        relay.pool = pipe.next
        pipe_close(relay, pipe)
    relay.pooled = 0


# ------------------------------------------------------------------------------------------- direction


cdef inline uint32_t direction_in_flight(direction_t *direction) noexcept nogil:
    if direction.pipe != NULL:
        return direction.pipe.bytes
    return direction.spill_end - direction.spill_start


cdef void direction_release(relay_t *relay, direction_t *direction) noexcept nogil:
    """Give back what a direction borrowed; what it still held is lost."""
    if direction.pipe != NULL:
        pipe_return(relay, direction.pipe)
        direction.pipe = NULL
    if direction.spill != NULL:
        if not direction.flags & LENT:
            free(direction.spill)
        direction.flags &= ~LENT
        direction.spill = NULL
    direction.spill_start = direction.spill_end = 0


cdef int direction_break(relay_t *relay, connection_t *connection, int d) noexcept nogil:
    """The destination takes no more. Its own last words may still be queued: read them, then reset."""
    cdef direction_t *direction = &connection.direction[d]
    relay.tally[DISCARDED_TO_BACKEND + d] += direction_in_flight(direction)
    direction_release(relay, direction)
    direction.flags |= BROKEN
    connection.ready[1 - d] |= READABLE | ENDED
    connection.ready[1 - d] &= ~FINISHED  # a reset follows, not a FIN: its words must not wait for one
    if connection.direction[1 - d].flags & (SOURCE_ENDED | BROKEN):
        return PUMP_FAILED
    return PUMP_WAIT


cdef int direction_flush(relay_t *relay, connection_t *connection, int d) noexcept nogil:
    """Send what is in flight. PUMP_MORE when all of it went, PUMP_WAIT when the destination is full."""
    cdef direction_t *direction = &connection.direction[d]
    cdef int destination = connection.fd[1 - d]
    cdef ssize_t moved
    while direction_in_flight(direction):
        if direction.pipe != NULL:
            moved = splice(
                direction.pipe.read_end, NULL, destination, NULL, direction.pipe.bytes, SPLICE_F_NONBLOCK
            )
        else:
            moved = send(
                destination,
                direction.spill + direction.spill_start,
                direction.spill_end - direction.spill_start,
                MSG_NOSIGNAL | MSG_DONTWAIT,
            )
        if moved > 0:
            relay.tally[SENT_TO_BACKEND + d] += moved
            if direction.pipe != NULL:
                direction.pipe.bytes -= <uint32_t>moved
            else:
                direction.spill_start += <uint32_t>moved
        elif moved < 0 and errno == EINTR:
            continue
        elif moved < 0 and errno == EAGAIN:
            connection.ready[1 - d] &= ~WRITABLE
            return PUMP_WAIT
        elif moved < 0 and (errno == EINVAL or errno == ENOSYS or errno == ENOMEM or errno == ENOBUFS):
            return PUMP_FAILED  # the call failed, not the destination: no event will ever tell of it
        else:
            return direction_break(relay, connection, d)
    if direction.spill != NULL:
        free(direction.spill)
        direction.spill = NULL
        direction.spill_start = direction.spill_end = 0
    return PUMP_MORE


cdef void source_drained(relay_t *relay, connection_t *connection, int d) noexcept nogil:
    """Nothing more to read for now: the next event will tell. A change asks epoll to look again, so what
    came between the last read and this is told of too (epoll_ctl(2), fs/eventpoll.c, ep_modify).
    """
    connection.ready[d] &= ~READABLE
    if connection.ready[d] & MUTED:
        connection.ready[d] &= ~MUTED
        epoll_change(relay.epoll, connection.fd[d], EVENTS, <uintptr_t>connection | d)


cdef int direction_send(
    relay_t *relay, connection_t *connection, int d, const char *bytes, uint32_t length, int flags
) noexcept nogil:
    """Send `bytes`; what the destination does not take is kept as a spill. COPY_NO_MEMORY if it cannot be."""
    cdef direction_t *direction = &connection.direction[d]
    cdef ssize_t sent
    cdef int on = 1
    # The first write is never delayed (net/ipv4/tcp_output.c, tcp_nagle_check: nothing small is under way),
    # and connections of one request spare the call. The client's socket inherits the option.
    if d == TO_BACKEND and connection.sent < 2:
        connection.sent += 1
        if connection.sent == 2:
            setsockopt(connection.fd[BACKEND], IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))
    sent = max(send(connection.fd[1 - d], bytes, length, flags), 0)  # flushing the rest finds the reason
    relay.tally[SENT_TO_BACKEND + d] += sent
    if sent == length:
        return 0
    length -= <uint32_t>sent
    direction.spill = <char *>malloc(length)
    if direction.spill == NULL:
        relay.tally[DISCARDED_TO_BACKEND + d] += length
        return COPY_NO_MEMORY
    memcpy(direction.spill, bytes + sent, length)
    direction.spill_start, direction.spill_end = 0, length
    return 0


cdef ssize_t direction_copy(relay_t *relay, connection_t *connection, int d) noexcept nogil:
    """One read into the worker's buffer, sent at once or lent until the end of the batch.

    The bytes read, 0 at the end, -1 with errno, or COPY_NO_MEMORY.
    """
    cdef direction_t *direction = &connection.direction[d]
    cdef char *room = relay.workspace.buffer + relay.lent_bytes
    cdef ssize_t got = recv(connection.fd[d], room, COPY_BYTES, MSG_DONTWAIT)
    cdef int flags = MSG_NOSIGNAL | MSG_DONTWAIT
    if got <= 0:
        return got
    relay.tally[RECEIVED_FROM_CLIENT + d] += got
    if got < FULL_READ:
        direction.streak = 0
    elif relay.option[PIPE_BYTES] and not relay.no_splice:
        direction.streak += 1
        if direction.streak >= FULL_READS:
            direction.streak = 0
            direction.flags |= SPLICING | BULK
    if got < COPY_BYTES:
        # The queue was emptied (epoll(7)), unless an end is queued behind the bytes.
        if connection.ready[d] & (FINISHED | URGENT) == FINISHED:
            direction.flags |= SOURCE_ENDED
            flags |= MSG_MORE  # the FIN follows at once, in the same segment
        elif not connection.ready[d] & ENDED:
            source_drained(relay, connection, d)
            if direction_lend(relay, connection, d, room, <uint32_t>got):
                return got
    if direction_send(relay, connection, d, room, <uint32_t>got, flags) < 0:
        return COPY_NO_MEMORY
    return got


cdef inline bint direction_lend(
    relay_t *relay, connection_t *connection, int d, char *room, uint32_t length
) noexcept nogil:
    """Leave `length` bytes where they were read until the end of the batch. False: they must be sent now."""
    cdef direction_t *direction = &connection.direction[d]
    if not relay.lending or relay.lent_count == LENT_MOST or relay.lent_bytes + length > COPY_BYTES:
        return False
    direction.flags |= LENT
    direction.spill, direction.spill_start, direction.spill_end = room, 0, length
    relay.workspace.lent[relay.lent_count].connection = connection
    relay.workspace.lent[relay.lent_count].d = d
    relay.lent_count += 1
    relay.lent_bytes += length
    return True


cdef void lent_send(relay_t *relay, connection_t *connection, int d) noexcept nogil:
    """Send what a direction was lent, if it still has it: an event of the batch may have ended it."""
    cdef direction_t *direction = &connection.direction[d]
    cdef const char *bytes = direction.spill
    cdef uint32_t length = direction.spill_end
    if not direction.flags & LENT:
        return
    direction.flags &= ~LENT
    direction.spill, direction.spill_end = NULL, 0
    if direction_send(relay, connection, d, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT) < 0:
        connection_drop(relay, connection, RESET)
    elif direction.spill != NULL or direction_can_move(connection, d):
        connection_queue(relay, connection)


cdef void lent_send_all(relay_t *relay) noexcept nogil:
    """The end of a batch, in the order in which the bytes were read."""
    cdef uint32_t i
    relay.lending = False
    for i in range(relay.lent_count):
        lent_send(relay, relay.workspace.lent[i].connection, relay.workspace.lent[i].d)
    relay.lent_count = relay.lent_bytes = 0


cdef ssize_t direction_fill(relay_t *relay, connection_t *connection, int d) noexcept nogil:
    """One splice from the source into an empty pipe. As direction_copy, which it becomes without one."""
    cdef direction_t *direction = &connection.direction[d]
    cdef ssize_t got
    if direction.pipe == NULL:
        direction.pipe = pipe_borrow(relay)
        if direction.pipe == NULL:
            direction.flags &= ~SPLICING
            return direction_copy(relay, connection, d)
    got = splice(
        connection.fd[d], NULL, direction.pipe.write_end, NULL, SPLICE_BYTES, SPLICE_F_NONBLOCK
    )
    if got > 0:
        relay.tally[RECEIVED_FROM_CLIENT + d] += got
        direction.pipe.bytes = <uint32_t>got
        if got >= SMALL_MOVE:
            direction.streak = 0
        else:
            direction.streak += 1
            if direction.streak >= SMALL_MOVES:
                direction.streak = 0
                direction.flags &= ~SPLICING
    elif got == 0:  # the end, or an urgent mark before it (net/ipv4/tcp.c, tcp_splice_read): recv can tell
        direction.flags &= ~SPLICING
        direction.streak = 0
        direction_release(relay, direction)
        return direction_copy(relay, connection, d)
    elif errno == EINVAL or errno == ENOSYS or errno == EPERM:
        relay.no_splice = True  # copy from now on
        direction.flags &= ~SPLICING
        direction_release(relay, direction)
        return direction_copy(relay, connection, d)
    return got


cdef int direction_pump(relay_t *relay, connection_t *connection, int d) noexcept nogil:
    """Move until the source is empty, the destination is full, the budget is spent, or an end."""
    cdef direction_t *direction = &connection.direction[d]
    cdef int64_t budget = TURN_BYTES
    cdef ssize_t got
    cdef int flushed
    while True:
        if direction.flags & SOURCE_ENDED and connection.ready[d] & FAILED:
            return PUMP_FAILED  # a reset behind its own end of file
        if direction.flags & (BROKEN | ENDED_FORWARDED | LENT):
            return PUMP_WAIT
        if direction_in_flight(direction):
            if not connection.ready[1 - d] & WRITABLE:
                return PUMP_WAIT
            flushed = direction_flush(relay, connection, d)
            if flushed != PUMP_MORE:
                return flushed
        if direction.flags & SOURCE_ENDED:
            return direction_end(relay, connection, d)
        if not connection.ready[d] & READABLE or not connection.ready[1 - d] & WRITABLE:
            direction_release(relay, direction)
            return PUMP_WAIT
        if budget <= 0:
            return PUMP_MORE
        if direction.flags & SPLICING and not connection.ready[d] & URGENT:
            got = direction_fill(relay, connection, d)
        else:
            direction_release(relay, direction)
            got = direction_copy(relay, connection, d)
        if got > 0:
            budget -= got
        elif got == 0:  # end of file: forwarded once nothing is in flight
            direction.flags |= SOURCE_ENDED
        elif got == COPY_NO_MEMORY:
            return PUMP_FAILED
        elif errno == EAGAIN:
            source_drained(relay, connection, d)
        elif errno != EINTR:  # a reset, or the network's word that the peer is gone
            return PUMP_FAILED


cdef int direction_end(relay_t *relay, connection_t *connection, int d) noexcept nogil:
    """Forward end of file. Only here does anybody see a clean end."""
    cdef direction_t *direction = &connection.direction[d]
    direction_release(relay, direction)
    if connection.direction[1 - d].flags & BROKEN:
        return PUMP_FAILED  # this peer's FIN was followed by a reset: not everything arrived
    if not connection.direction[1 - d].flags & ENDED_FORWARDED:
        if shutdown(connection.fd[1 - d], SHUT_WR) < 0:
            return PUMP_FAILED
    elif d == TO_BACKEND and park_has_room(relay):
        # Elsewhere the second end needs no call of its own: closing the socket says it. Where this one fails
        # the backend has reset its side, which is the end of the socket too.
        shutdown(connection.fd[BACKEND], SHUT_WR)
    direction.flags |= ENDED_FORWARDED
    direction.ended_at = <uint32_t>relay.now
    if relay.option[HALF_CLOSE_TIMEOUT]:
        sweep_by(relay, relay.now + relay.option[HALF_CLOSE_TIMEOUT])
    return PUMP_WAIT


# ------------------------------------------------------------------------------------------ connection


cdef void list_remove(relay_t *relay, connection_t *connection) noexcept nogil:
    cdef list_t *members = &relay.lists[connection.state]
    if relay.young == connection:
        relay.young = connection.next
    if connection.previous != NULL:
        connection.previous.next = connection.next
    else:
        members.head = connection.next
    if connection.next != NULL:
        connection.next.previous = connection.previous
    else:
        members.tail = connection.previous
    members.length -= 1


cdef void list_insert(
    relay_t *relay, connection_t *connection, connection_t *after, int state
) noexcept nogil:
    """Into the list of `state`, behind `after` (NULL: at the head)."""
    cdef list_t *members = &relay.lists[state]
    connection.state = state
    connection.previous = after
    connection.next = after.next if after != NULL else members.head
    if connection.next != NULL:
        connection.next.previous = connection
    else:
        members.tail = connection
    if after != NULL:
        after.next = connection
    else:
        members.head = connection
    members.length += 1


cdef void connection_move(relay_t *relay, connection_t *connection, int state) noexcept nogil:
    list_remove(relay, connection)
    list_insert(relay, connection, relay.lists[state].tail, state)


cdef inline bint park_has_room(relay_t *relay) noexcept nogil:
    return relay.tally[SPARE] < MAX_SPARE and not relay.draining


cdef bint backend_rests(connection_t *connection) noexcept nogil:
    """Whether the backend's socket has ended for good and is fit to be used again.

    It has where the kernel owes the backend nothing more: all is acknowledged, or the backend has reset its
    side. On one host that is known at once; from another the last acknowledgement is still on its way.

    Not fit is one that was bulk: what its buffers have grown to stays (net/ipv4/tcp.c, tcp_disconnect). Nor
    is one without timestamps: it would go on with its sequence numbers (net/ipv4/tcp_ipv4.c, tcp_v4_connect),
    which a backend that still has this port in TIME_WAIT can tell from a new connection's by timestamps only.
    """
    cdef uint8_t info[6]  # tcp_info (linux/tcp.h) begins with the state; the last of these are the options
    cdef socklen_t length = sizeof(info)
    if connection.ready[BACKEND] & (MUTED | FAILED):
        return False
    if (connection.direction[TO_BACKEND].flags | connection.direction[TO_CLIENT].flags) & BULK:
        return False
    if getsockopt(connection.fd[BACKEND], IPPROTO_TCP, TCP_INFO, info, &length) < 0:
        return False
    return info[0] == TCP_CLOSE and info[5] & TCPI_OPT_TIMESTAMPS


cdef connection_t *park_take(relay_t *relay) noexcept nogil:
    """The one that was parked last, as new but for its backend's socket; NULL if there is none."""
    cdef connection_t *connection = relay.lists[PARKED].tail
    cdef uint8_t family, sent
    cdef int fd
    if connection == NULL:
        return NULL
    list_remove(relay, connection)
    relay.tally[SPARE] -= 1
    fd, family, sent = connection.fd[BACKEND], connection.family, connection.sent
    memset(connection, 0, sizeof(connection_t))
    connection.fd[BACKEND], connection.family = fd, family
    connection.sent = sent & 2  # TCP_NODELAY stays set
    return connection


cdef uint32_t park_empty(relay_t *relay) noexcept nogil:
    """Close what is parked; its memory goes with that of the closed. How many sockets that were."""
    cdef uint32_t count = relay.lists[PARKED].length
    cdef connection_t *connection
    while relay.lists[PARKED].head != NULL:
        connection = relay.lists[PARKED].head
        close(connection.fd[BACKEND])
        connection.parks = False
        connection_move(relay, connection, CLOSED)  # an event of this batch may name it still
    relay.tally[SPARE] -= count
    return count


cdef void connection_drop(relay_t *relay, connection_t *connection, int counter) noexcept nogil:
    """Close both sockets, with a reset unless they were disarmed; the memory goes at the batch's end.

    A backend's socket that is to be parked stays as it is.
    """
    cdef int d
    for d in range(2):
        relay.tally[DISCARDED_TO_BACKEND + d] += direction_in_flight(&connection.direction[d])
        direction_release(relay, &connection.direction[d])
    close(connection.fd[CLIENT])
    if connection.fd[BACKEND] >= 0 and not connection.parks:
        close(connection.fd[BACKEND])
    if relay.probe == connection:
        relay.probe = NULL
        relay.probe_at = relay.now
    if connection.state == HELD:
        relay.tally[HELD_NOW] -= 1
    connection_move(relay, connection, CLOSED)
    relay.tally[ACTIVE] -= 1
    relay.tally[counter] += 1


cdef void connection_finish(relay_t *relay, connection_t *connection) noexcept nogil:
    """Both directions have ended: the kernel may deliver what is queued in its own time."""
    socket_disarm(connection.fd[CLIENT])
    if park_has_room(relay) and backend_rests(connection):
        connection.parks = True
        relay.tally[SPARE] += 1
    else:
        socket_disarm(connection.fd[BACKEND])
    connection_drop(relay, connection, CLOSED_CLEAN)


cdef inline void socket_disarm(int fd) noexcept nogil:
    cdef linger disarmed
    disarmed.l_onoff = disarmed.l_linger = 0
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &disarmed, sizeof(disarmed))


cdef void connection_queue(relay_t *relay, connection_t *connection) noexcept nogil:
    """Onto the ready list, once."""
    if connection.queued:
        return
    connection.queued = True
    connection.next_ready = NULL
    if relay.ready_tail != NULL:
        relay.ready_tail.next_ready = connection
    else:
        relay.ready_head = connection
    relay.ready_tail = connection


cdef void connection_pump(relay_t *relay, connection_t *connection) noexcept nogil:
    cdef int d, result
    cdef bint more = False
    cdef uint64_t moved = bytes_moved(relay) if relay.option[IDLE_TIMEOUT] else 0
    for d in range(2):
        result = direction_pump(relay, connection, d)
        if result == PUMP_FAILED:
            connection_drop(relay, connection, RESET)
            return
        more = more or result == PUMP_MORE
    if relay.option[IDLE_TIMEOUT] and moved != bytes_moved(relay):
        connection.hold_until = relay.now
    # A direction that broke marked the other's source readable, which has had its turn already if d was 1.
    if connection.direction[TO_CLIENT].flags & BROKEN and direction_can_move(connection, TO_BACKEND):
        more = True
    if (connection.direction[TO_BACKEND].flags & connection.direction[TO_CLIENT].flags) & ENDED_FORWARDED:
        connection_finish(relay, connection)
    elif more:
        connection_queue(relay, connection)


cdef inline bint direction_can_move(connection_t *connection, int d) noexcept nogil:
    return connection.ready[d] & READABLE and connection.ready[1 - d] & WRITABLE


cdef inline uint64_t bytes_moved(relay_t *relay) noexcept nogil:
    """Of all connections, in or out: what differs after a pump is of the one that was pumped."""
    return (
        relay.tally[RECEIVED_FROM_CLIENT] + relay.tally[RECEIVED_FROM_BACKEND]
        + relay.tally[SENT_TO_BACKEND] + relay.tally[SENT_TO_CLIENT]
    )


cdef void connection_hold(relay_t *relay, connection_t *connection) noexcept nogil:
    """Into the held list, which is sorted by the end of the window, or out if there is no window."""
    cdef connection_t *after = relay.lists[HELD].tail
    if connection.hold_until <= relay.now or relay.lists[HELD].length >= relay.option[MAX_HELD]:
        connection_drop(relay, connection, REJECTED)
        return
    while after != NULL and after.hold_until > connection.hold_until:
        after = after.previous
    list_remove(relay, connection)
    list_insert(relay, connection, after, HELD)
    relay.tally[HELD_NOW] += 1
    if not connection.was_held:
        connection.was_held = True
        relay.tally[HELD_EVER] += 1


cdef void connection_undial(relay_t *relay, connection_t *connection) noexcept nogil:
    """Give up an attempt to connect; the client goes back to being held."""
    if connection.fd[BACKEND] >= 0:
        close(connection.fd[BACKEND])
        connection.fd[BACKEND] = -1
    connection.ready[BACKEND] = 0
    if relay.probe == connection:
        relay.probe = NULL
    connection_hold(relay, connection)


cdef void connection_dial_failed(relay_t *relay, connection_t *connection, int error) noexcept nogil:
    relay.tally[DIAL_FAILED] += 1
    if error == EADDRNOTAVAIL:
        relay.tally[NO_LOCAL_PORT] += 1
        connection_drop(relay, connection, RESET)
        return
    if error == EMFILE or error == ENFILE or error == ENOBUFS or error == ENOMEM:
        relay.tally[NO_DESCRIPTOR] += 1
        park_empty(relay)
        accept_pause(relay)
    if relay.probe == connection or relay.probe_at <= relay.now:
        relay.probe_at = relay.now + relay.retry_ms
        relay.retry_ms = min(2 * relay.retry_ms, RETRY_LAST_MS)
    connection_undial(relay, connection)


cdef bint backend_again(relay_t *relay, connection_t *connection, int family) noexcept nogil:
    """Disconnect what was parked, so that it can connect anew; False if it will not do, and it is closed."""
    cdef int fd = connection.fd[BACKEND]
    cdef sockaddr nowhere
    nowhere.sa_family = AF_UNSPEC
    if connection.family == family and connect(fd, &nowhere, sizeof(nowhere)) == 0:
        relay.tally[REUSED] += 1
        return True
    close(fd)
    connection.fd[BACKEND] = -1
    return False


cdef int backend_socket(connection_t *connection, int family) noexcept nogil:
    """A new one, armed and with Nagle's delay; -1 with errno."""
    cdef linger armed
    cdef int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP)
    if fd < 0:
        return -1
    armed.l_onoff, armed.l_linger = 1, 0
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &armed, sizeof(armed))
    connection.fd[BACKEND], connection.family, connection.sent = fd, <uint8_t>family, 0
    return 0


cdef bint connection_dial(relay_t *relay, connection_t *connection) noexcept nogil:
    """Start to connect to the next backend. False if that failed at once and the connection moved on."""
    cdef backend_t *backend = backends_next(&relay.backends)
    cdef int family = backend.address.v4.sin_family
    cdef bint again = connection.fd[BACKEND] >= 0 and backend_again(relay, connection, family)
    cdef int fd
    if connection.state == HELD:
        relay.tally[HELD_NOW] -= 1
    connection.deadline = relay.now + relay.option[CONNECT_TIMEOUT]
    connection_move(relay, connection, CONNECTING)
    if not again and backend_socket(connection, family) < 0:
        connection_dial_failed(relay, connection, errno)
        return False
    fd = connection.fd[BACKEND]
    connection.backend = backend.id
    if connect(fd, <sockaddr *>&backend.address, backend.length) < 0 and errno != EINPROGRESS:
        connection_dial_failed(relay, connection, errno)
        return False
    # What was parked is watched already.
    if not again and epoll_add(relay.epoll, fd, EVENTS, <uintptr_t>connection | BACKEND) < 0:
        connection_dial_failed(relay, connection, errno)
        return False
    return True


cdef void connection_keep_alive(relay_t *relay, connection_t *connection) noexcept nogil:
    """Have the kernel probe the backend while it is silent, and the client, whose socket inherits the rest.

    The kernel's timers of a minute are 2 s coarse: thousands of connections with one idle time would be
    probed in one go, most probes dropped (net.core.netdev_max_backlog), and so with each retry, until
    healthy connections are given up.
    """
    cdef int on = 1, idle, interval = KEEPALIVE_INTERVAL_S, count = KEEPALIVE_COUNT
    cdef int fd = connection.fd[BACKEND]
    relay.keepalive_turn += KEEPALIVE_STEP
    idle = KEEPALIVE_IDLE_S + relay.keepalive_turn % KEEPALIVE_SPREAD_S
    setsockopt(connection.fd[CLIENT], IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count))
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on))


cdef void connection_connected(relay_t *relay, connection_t *connection) noexcept nogil:
    """The backend took it. So it takes others: release every one that is held."""
    cdef uint32_t _one
    connection_move(relay, connection, OPEN)
    connection.deadline = relay.now + KEEPALIVE_AFTER_MS
    if relay.option[IDLE_TIMEOUT]:
        connection.hold_until = relay.now
        sweep_by(relay, relay.now + relay.option[IDLE_TIMEOUT])
    if relay.young == NULL:
        relay.young = connection
    relay.retry_ms = RETRY_FIRST_MS
    if relay.probe == connection:
        relay.probe = NULL
    # One that fails at once is back in the list, at its own place: the list's length now is the bound.
    for _one in range(relay.lists[HELD].length):
        if relay.lists[HELD].head == NULL or not relay.backends.total_weight:
            return
        if not connection_dial(relay, relay.lists[HELD].head):
            return


cdef void connection_event(
    relay_t *relay, connection_t *connection, int side, uint32_t events
) noexcept nogil:
    cdef int error = 0
    cdef socklen_t length = sizeof(error)
    cdef uint8_t known = connection.ready[side]
    if connection.state >= CLOSED:  # by an earlier event of this batch, or parked
        return
    if events & (EPOLLIN | EPOLLRDHUP | EPOLLERR | EPOLLHUP):
        connection.ready[side] |= READABLE
    if events & (EPOLLOUT | EPOLLERR | EPOLLHUP):
        connection.ready[side] |= WRITABLE
    if events & (EPOLLRDHUP | EPOLLERR | EPOLLHUP | EPOLLPRI):
        connection.ready[side] |= ENDED
        if events & EPOLLPRI:
            connection.ready[side] |= URGENT
        # Nobody tells a muted one of urgent data: there may be more than one read before the end.
        if events & (EPOLLRDHUP | EPOLLERR | EPOLLHUP) == EPOLLRDHUP and not known & MUTED:
            connection.ready[side] |= FINISHED
        lent_send(relay, connection, 1 - side)  # if that fails, the end it has queued is no clean one
        if connection.state == CLOSED:
            return
    if events & EPOLLERR:
        connection.ready[side] |= FAILED
    if connection.state == OPEN and connection.ready[side] == known:
        # Bytes behind others that wait for their destination: more will come, and each would wake us.
        if known & READABLE and not known & (MUTED | ENDED) and not connection.queued:
            connection.ready[side] |= MUTED
            epoll_change(relay.epoll, connection.fd[side], EVENTS_MUTED, <uintptr_t>connection | side)
        return
    if connection.state != OPEN:
        if side == CLIENT:
            if events & (EPOLLERR | EPOLLHUP):  # reset: nobody waits for an answer any more
                connection_drop(relay, connection, RESET)
            return
        if events & (EPOLLERR | EPOLLHUP):
            getsockopt(connection.fd[BACKEND], SOL_SOCKET, SO_ERROR, &error, &length)
            if error != ECONNRESET:
                connection_dial_failed(relay, connection, error)
                return
            # It took the connection and reset it before we looked. What it said first is still queued, and
            # FAILED sees to it that the end behind that is not taken for a clean one.
        connection_connected(relay, connection)
    connection_pump(relay, connection)


# ------------------------------------------------------------------------------------------------ loop


cdef int listener_watch(relay_t *relay) noexcept nogil:
    """Be told of connections, one of several workers at a time (EPOLLEXCLUSIVE, which allows no MOD)."""
    return epoll_add(relay.epoll, relay.listener, EPOLLIN | EPOLLEXCLUSIVE, EVENT_LISTENER)


cdef void accept_pause(relay_t *relay) noexcept nogil:
    """Descriptors or memory are gone: leave the backlog to the kernel for a while, never spin."""
    if relay.draining or relay.accept_at:
        return
    epoll_ctl(relay.epoll, EPOLL_CTL_DEL, relay.listener, NULL)
    relay.accept_at = relay.now + ACCEPT_PAUSE_MS


cdef void accept_resume(relay_t *relay) noexcept nogil:
    relay.accept_at = 0
    if listener_watch(relay) < 0:  # epoll needs memory too
        relay.accept_at = relay.now + ACCEPT_PAUSE_MS


cdef void accept_one(relay_t *relay, int fd) noexcept nogil:
    """Owns `fd`. Dials at once, unless others wait already or there is nobody to dial."""
    cdef bint dials = relay.backends.total_weight > 0 and relay.lists[HELD].length == 0 and relay.probe == NULL
    cdef connection_t *connection = NULL
    if dials:
        connection = park_take(relay)
    if connection == NULL:
        connection = <connection_t *>slabs_take(&relay.connections)
        if connection == NULL:
            close(fd)
            accept_pause(relay)
            return
        connection.fd[BACKEND] = -1
    connection.fd[CLIENT] = fd
    connection.hold_until = relay.now + relay.option[HOLD]
    list_insert(relay, connection, relay.lists[CONNECTING].tail, CONNECTING)
    relay.tally[ACCEPTED] += 1
    relay.tally[ACTIVE] += 1
    if epoll_add(relay.epoll, fd, EVENTS, <uintptr_t>connection | CLIENT) < 0:
        connection_drop(relay, connection, RESET)
    elif dials:
        connection_dial(relay, connection)
    else:
        connection_hold(relay, connection)


cdef bint port_is_full(relay_t *relay) noexcept nogil:
    """In all workers of this port together. Two that accept at one moment may pass the limit by one each."""
    cdef uint64_t active = relay.tally[ACTIVE]
    cdef uint32_t i
    if not relay.option[MAX_CONNECTIONS]:
        return False
    for i in range(relay.sibling_count):
        active += relay.siblings[i][COUNTER_OWN + ACTIVE]
    return active >= <uint64_t>relay.option[MAX_CONNECTIONS]


cdef void accept_rejected(relay_t *relay, int fd) noexcept nogil:
    """A reset, since the socket has inherited SO_LINGER 0. Not left in the backlog: that would be silence."""
    close(fd)
    relay.tally[ACCEPTED] += 1
    relay.tally[REJECTED] += 1
    relay.tally[OVER_LIMIT] += 1


cdef void accept_batch(relay_t *relay) noexcept nogil:
    cdef int fd, _one
    for _one in range(ACCEPT_BATCH):
        fd = accept4(relay.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd >= 0 and port_is_full(relay):
            accept_rejected(relay, fd)
        elif fd >= 0:
            accept_one(relay, fd)
            if relay.sibling_count:
                relay.page[COUNTER_OWN + ACTIVE] = relay.tally[ACTIVE]
        elif errno == EAGAIN:
            return
        elif errno == EMFILE or errno == ENFILE or errno == ENOBUFS or errno == ENOMEM:
            if park_empty(relay):
                continue
            relay.tally[NO_DESCRIPTOR] += 1
            accept_pause(relay)
            return
        # Anything else (ECONNABORTED, EPROTO, EINTR, the network's errors) is of one connection that is
        # gone already: accept(2), "Error handling".


cdef void ready_turn(relay_t *relay) noexcept nogil:
    """One turn each for those on the ready list now; who is not done goes to its end."""
    cdef connection_t *connection = relay.ready_head
    cdef connection_t *following
    relay.ready_head = relay.ready_tail = NULL
    while connection != NULL:
        following = connection.next_ready
        connection.queued = False
        if connection.state == OPEN:
            connection_pump(relay, connection)
        connection = following


cdef inline void sweep_by(relay_t *relay, int64_t due) noexcept nogil:
    if not relay.sweep_at or due < relay.sweep_at:
        relay.sweep_at = due


cdef int64_t connection_left(relay_t *relay, connection_t *connection, int *counter) noexcept nogil:
    """Milliseconds until one of its deadlines, which `counter` counts; it has one at least."""
    cdef int64_t left = INT64_MAX, since
    cdef int d
    if relay.option[IDLE_TIMEOUT]:
        left = connection.hold_until + relay.option[IDLE_TIMEOUT] - relay.now
        counter[0] = IDLE_CLOSED
    if relay.option[HALF_CLOSE_TIMEOUT]:
        for d in range(2):
            if connection.direction[d].flags & ENDED_FORWARDED:
                since = <uint32_t>(<uint32_t>relay.now - connection.direction[d].ended_at)
                if relay.option[HALF_CLOSE_TIMEOUT] - since < left:
                    left = relay.option[HALF_CLOSE_TIMEOUT] - since
                    counter[0] = HALF_CLOSED_TOO_LONG
    return left


cdef void sweep(relay_t *relay) noexcept nogil:
    """Reset what was silent or half-closed for too long.

    All that are open are looked at, so that a byte costs no reordering of any list; but only when one may be
    due, and not more often than is needed for the precision.
    """
    cdef connection_t *connection = relay.lists[OPEN].head
    cdef connection_t *following
    cdef int64_t left, soonest = INT64_MAX, apart = INT64_MAX
    cdef int counter = RESET
    while connection != NULL:
        following = connection.next
        left = connection_left(relay, connection, &counter)
        if left <= 0:
            relay.tally[counter] += 1
            connection_drop(relay, connection, RESET)
        else:
            soonest = min(soonest, left)
        connection = following
    if relay.option[IDLE_TIMEOUT]:
        apart = relay.option[IDLE_TIMEOUT]
    if relay.option[HALF_CLOSE_TIMEOUT]:
        apart = min(apart, <int64_t>relay.option[HALF_CLOSE_TIMEOUT])
    relay.sweep_at = 0 if soonest == INT64_MAX else relay.now + max(soonest, apart // SWEEP_SHARE)


cdef void expire(relay_t *relay) noexcept nogil:
    """Everything that is due now. Each list is sorted by its deadline, so only heads are looked at."""
    cdef connection_t *connection
    while relay.lists[CONNECTING].head != NULL and relay.lists[CONNECTING].head.deadline <= relay.now:
        connection_dial_failed(relay, relay.lists[CONNECTING].head, 0)
    while relay.lists[HELD].head != NULL and relay.lists[HELD].head.hold_until <= relay.now:
        connection_drop(relay, relay.lists[HELD].head, REJECTED)
    while relay.young != NULL and relay.young.deadline <= relay.now:
        connection_keep_alive(relay, relay.young)
        relay.young = relay.young.next
    if relay.sweep_at and relay.sweep_at <= relay.now:
        sweep(relay)
    if relay.accept_at and relay.accept_at <= relay.now:
        accept_resume(relay)
    if probe_wanted(relay) and relay.probe_at <= relay.now:
        connection = relay.probe = relay.lists[HELD].head
        connection_dial(relay, connection)


cdef inline bint probe_wanted(relay_t *relay) noexcept nogil:
    return relay.probe == NULL and relay.backends.total_weight > 0 and relay.lists[HELD].head != NULL


cdef inline bint relay_drained(relay_t *relay) noexcept nogil:
    if not relay.draining:
        return False
    return relay.drain_at <= relay.now or not (
        relay.lists[CONNECTING].length or relay.lists[HELD].length or relay.lists[OPEN].length
    )


cdef int next_timeout(relay_t *relay) noexcept nogil:
    """Milliseconds until something is due: 0 if work is waiting, until the next heartbeat if idle."""
    cdef int64_t due = -1
    if relay.ready_head != NULL or relay_drained(relay):
        return 0
    if relay.lists[CONNECTING].head != NULL:
        due = relay.lists[CONNECTING].head.deadline
    if relay.lists[HELD].head != NULL and (due < 0 or relay.lists[HELD].head.hold_until < due):
        due = relay.lists[HELD].head.hold_until
    if probe_wanted(relay) and (due < 0 or relay.probe_at < due):
        due = relay.probe_at
    if relay.young != NULL and (due < 0 or relay.young.deadline < due):
        due = relay.young.deadline
    if relay.sweep_at and (due < 0 or relay.sweep_at < due):
        due = relay.sweep_at
    if relay.accept_at and (due < 0 or relay.accept_at < due):
        due = relay.accept_at
    if relay.draining and (due < 0 or relay.drain_at < due):
        due = relay.drain_at
    if due < 0:
        return HEARTBEAT_MS
    return <int>min(max(due - relay.now, 0), HEARTBEAT_MS)


cdef void free_closed(relay_t *relay) noexcept nogil:
    """No event of the finished batch can name them any more; those on the ready list wait their turn."""
    cdef connection_t *connection = relay.lists[CLOSED].head
    cdef connection_t *following
    while connection != NULL:
        following = connection.next
        if connection.queued:
            pass
        elif connection.parks:
            connection_move(relay, connection, PARKED)
        else:
            list_remove(relay, connection)
            slabs_give(&relay.connections, connection)
        connection = following


cdef inline void burst_over(relay_t *relay, int count) noexcept nogil:
    """Give back what a burst needed when there has been nothing to do for a heartbeat."""
    if count > 0 or relay.ready_head != NULL:
        relay.worked_at = relay.now
    elif relay.worked_at and relay.worked_at + HEARTBEAT_MS <= relay.now:
        relay.worked_at = 0
        madvise(relay.workspace, sizeof(workspace_t), MADV_DONTNEED)
        pool_empty(relay)
        park_empty(relay)


cdef inline void publish(relay_t *relay) noexcept nogil:
    """Show the tally to the parent and the siblings."""
    memcpy(relay.page + COUNTER_OWN, relay.tally, sizeof(relay.tally))


cdef int relay_run(relay_t *relay) noexcept nogil:
    """Until the control pipe has something to read, or draining is over. -1 with errno if epoll fails."""
    cdef epoll_event events[MAX_EVENTS]
    cdef connection_t *connection
    cdef int count, i
    cdef uint64_t data
    cdef bint control = False, clients
    while True:
        count = epoll_wait(relay.epoll, events, MAX_EVENTS, next_timeout(relay))
        if count < 0 and errno != EINTR:
            return -1
        relay.now = monotonic_ms()
        relay.lending = count > 1
        clients = False
        relay.page[COUNTER_HEARTBEAT] = relay.now
        burst_over(relay, count)
        for i in range(max(count, 0)):
            data = events[i].data.u64
            if data == EVENT_LISTENER:
                clients = True
            elif data == EVENT_CONTROL:
                control = True
            else:
                connection = <connection_t *><uintptr_t>(data & ~<uint64_t>1)
                connection_event(relay, connection, data & 1, events[i].events)
        lent_send_all(relay)
        ready_turn(relay)
        expire(relay)
        free_closed(relay)
        if clients and not relay.accept_at:
            accept_batch(relay)
        publish(relay)
        if control:
            return REASON_CONTROL
        if relay_drained(relay):
            return REASON_DRAINED


cdef void options_apply(relay_t *relay, options_t option) noexcept nogil:
    """New options. A deadline that is new or nearer is looked for at once; one that is held keeps its window."""
    cdef connection_t *connection = relay.lists[OPEN].head
    cdef bint sweeps = (
        option[IDLE_TIMEOUT] != relay.option[IDLE_TIMEOUT]
        or option[HALF_CLOSE_TIMEOUT] != relay.option[HALF_CLOSE_TIMEOUT]
    )
    if option[IDLE_TIMEOUT] and not relay.option[IDLE_TIMEOUT]:  # until now nobody noted when a byte moved
        while connection != NULL:
            connection.hold_until = relay.now
            connection = connection.next
    memcpy(relay.option, option, sizeof(options_t))
    if sweeps:
        relay.sweep_at = relay.now if option[IDLE_TIMEOUT] or option[HALF_CLOSE_TIMEOUT] else 0


cdef int siblings_map(relay_t *relay, tuple siblings) except -1:
    """Map the pages of the listener's other workers. Raises OSError and MemoryError."""
    cdef int fd
    if not siblings:
        return 0
    if len(siblings) > MAX_SIBLINGS:
        raise ValueError(f"{len(siblings)} siblings are over {MAX_SIBLINGS}")
    relay.siblings = <uint64_t **>malloc(len(siblings) * sizeof(uint64_t *))
    if relay.siblings == NULL:
        raise MemoryError
    for fd in siblings:
        relay.siblings[relay.sibling_count] = counters_map(fd, False)
        if relay.siblings[relay.sibling_count] == NULL:
            raise OSError(errno, "mmap of a sibling's counters")
        relay.sibling_count += 1
    return 0


cdef void relay_repointed(relay_t *relay) noexcept nogil:
    """The backends changed: what was open to one that is gone is reset, what was on its way is held."""
    cdef connection_t *connection
    cdef connection_t *following
    cdef int state
    for state in range(CONNECTING, OPEN + 1):
        connection = relay.lists[state].head
        while connection != NULL:
            following = connection.next
            if state == HELD or backends_have(&relay.backends, connection.backend):
                pass
            elif state == OPEN:
                connection_drop(relay, connection, RESET)
            else:
                connection_undial(relay, connection)
            connection = following
    free_closed(relay)
    park_empty(relay)
    relay.retry_ms = RETRY_FIRST_MS
    relay.probe_at = relay.now


# ---------------------------------------------------------------------------------------- the Python API


cdef class TcpLoop:
    """The loop of one worker, over a listening socket.

    `listener` (listening, non-blocking, with SO_LINGER 0 set) and `control` (the read end of the control pipe,
    non-blocking) stay the caller's. `counters` is a descriptor of the page that is shared with the parent, and
    `siblings` are those of the listener's other workers; the loop maps them, and the caller may close them then.
    The loop relays nothing before its first `update`. Raises OSError if the kernel refuses, and MemoryError.
    """

    cdef relay_t relay

    def __cinit__(self, int listener, int control, int counters, tuple siblings=()):
        memset(&self.relay, 0, sizeof(relay_t))
        self.relay.epoll = -1
        self.relay.page = counters_map(counters, True)
        if self.relay.page == NULL:
            raise OSError(errno, "mmap of the counters page")
        self.relay.listener, self.relay.control = listener, control
        siblings_map(&self.relay, siblings)
        self.relay.retry_ms = RETRY_FIRST_MS
        self.relay.now = monotonic_ms()
        slabs_init(&self.relay.connections, sizeof(connection_t))
        self.relay.workspace = <workspace_t *>pages_map(sizeof(workspace_t))
        if self.relay.workspace == NULL:
            raise MemoryError
        self.relay.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.relay.epoll < 0:
            raise OSError(errno, "epoll_create1")
        if listener_watch(&self.relay) < 0:
            raise OSError(errno, "epoll_ctl of the listener")
        if epoll_add(self.relay.epoll, control, EPOLLIN, EVENT_CONTROL) < 0:
            raise OSError(errno, "epoll_ctl of the control pipe")
        self.relay.page[COUNTER_VERSION] = COUNTERS_VERSION

    def __dealloc__(self):
        cdef relay_t *relay = &self.relay
        cdef int state
        cdef uint32_t i
        if relay.page == NULL:
            return
        for state in range(OPEN + 1):
            while relay.lists[state].head != NULL:
                connection_drop(relay, relay.lists[state].head, RESET)
        ready_turn(relay)
        free_closed(relay)  # parks, too
        park_empty(relay)
        free_closed(relay)
        pool_empty(relay)
        if relay.epoll >= 0:
            close(relay.epoll)
        slabs_free(&relay.connections)
        if relay.workspace != NULL:
            munmap(relay.workspace, sizeof(workspace_t))
        free(relay.backends.items)
        free(relay.access.items)
        for i in range(relay.sibling_count):
            counters_unmap(relay.siblings[i])
        free(relay.siblings)
        publish(relay)
        counters_unmap(relay.page)

    def update(self, uint64_t generation, bytes payload):
        """The whole state from now on, as an Update record carries it. Raises ValueError for what is none.

        No backend means hold. Connections to a backend that is not in the list are reset; attempts to connect
        to one start anew.
        """
        cdef update_view_t view
        cdef options_t option
        cdef bint changed
        update_read(PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload), &view, option)
        access_replace(&self.relay.access, &view)
        changed = backends_replace(&self.relay.backends, &view)
        with nogil:
            self.relay.now = monotonic_ms()
            options_apply(&self.relay, option)
            if changed:
                relay_repointed(&self.relay)
            publish(&self.relay)
        self.relay.page[COUNTER_BACKENDS] = self.relay.backends.count
        self.relay.page[COUNTER_GENERATION] = generation

    def drain(self, uint32_t deadline_ms):
        """Accept no more; `run` returns DRAINED when all connections have ended, or after the deadline."""
        if not self.relay.draining:
            epoll_ctl(self.relay.epoll, EPOLL_CTL_DEL, self.relay.listener, NULL)
        self.relay.draining = True
        self.relay.accept_at = 0
        self.relay.drain_at = monotonic_ms() + deadline_ms

    def run(self):
        """Relay until there is something for Python to do: CONTROL or DRAINED. Raises OSError."""
        cdef int reason
        with nogil:
            reason = relay_run(&self.relay)
        if reason < 0:
            raise OSError(errno, "epoll_wait")
        return reason
