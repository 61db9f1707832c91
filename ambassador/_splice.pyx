"""The TCP loop: one edge-triggered epoll loop that moves bytes between pairs of sockets.

Theory of operation
-------------------
A *connection* is two sockets, the client's and the backend's, and two *directions*, each with a source and a
destination. Each socket is added to epoll once. What epoll reports is kept in its ready bits until a call
answers EAGAIN. If bytes pile up behind a full destination, the source is paused until it has been emptied;
else each segment would wake the loop. A direction that has spent its budget goes to the ready list, so that
one bulk stream does not starve the rest.

Parts, from the bottom; none calls up:

    _tcp         limits, enums, structs
    _pipes       the pool of pipes for splice
    _ready       the ready bits of a socket
    _direction   read, send, splice, defer, end: what a direction does; it closes nothing
    _states      the lists of connections
    _linger      sockets with a queue, kept for a drain
    _own         a connection to itself
    _connection  hold, dial, keepalive, close, spare sockets
    _accept      accepting, in turn with the siblings
    this file    events, expiry, the loop, the Python API

Invariants, beside those of the parts
-------------------------------------
- A client that sees a clean end has got every byte. Every socket is armed (SO_LINGER with time 0; the
  client's inherits it from the listener), so whatever ends a connection, SIGKILL of this process included,
  ends it with a reset. Only a connection whose two directions have ended is disarmed first.
- Deferred bytes are sent, or kept elsewhere, before the batch ends.
- A spare socket is used only after all events of a batch: none of its former connection meets the new one.
- Ownership: the loop owns every descriptor that it accepts or makes, and its mappings. The listener and the
  control pipe belong to the caller and must outlive the loop.

Sources: epoll(7), splice(2), socket(7), tcp(7); net/ipv4/tcp.c for what SO_LINGER 0 does at close.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from ambassador._accept cimport accept_batch, accept_pause, accept_resume, listener_watch, listener_yield
from ambassador._access cimport access_replace
from ambassador._backends cimport backends_have, backends_replace
from ambassador._connection cimport *
from ambassador._counters cimport (
    COUNTER_BACKENDS, COUNTER_GENERATION, COUNTER_OWN, COUNTER_VERSION, COUNTERS_VERSION, counters_map,
    counters_unmap, siblings_map, siblings_unmap,
)
from ambassador._linger cimport drained, linger_due, linger_end_all, linger_event, linger_expire
from ambassador._linux cimport (
    ECONNREFUSED, EPOLL_CLOEXEC, EPOLL_CTL_DEL, EPOLLERR, EPOLLHUP, EPOLLIN, MADV_DONTNEED, SO_ERROR,
    SOL_SOCKET, close, epoll_create1, epoll_ctl, epoll_event, errno, getsockopt, madvise, munmap, socklen_t,
)
from ambassador._loop cimport (
    EVENT_CONTROL, EVENT_LISTENER, HEARTBEAT_MS, MAX_EVENTS, REASON_CONTROL, REASON_DRAINED, due_by,
    epoll_add, idle_begins, loop_wait, monotonic_ms, pages_map,
)
from ambassador._options cimport HALF_CLOSE_TIMEOUT, IDLE_TIMEOUT, options_t
from ambassador._own cimport backends_mark_own, connection_met_itself, local_ports
from ambassador._pipes cimport pool_close
from ambassador._ready cimport *
from ambassador._record cimport update_read, update_view_t
from ambassador._slab cimport slabs_free, slabs_init
from ambassador._states cimport *
from ambassador._tcp cimport *

CONTROL = REASON_CONTROL
DRAINED = REASON_DRAINED
CONNECTION_BYTES = sizeof(connection_t)

cdef uint16_t first_local_port, last_local_port
local_ports(&first_local_port, &last_local_port)  # in the fork server: a worker's sandbox forbids it

# ---------------------------------------------------------------------------------------------- events


cdef void connection_event(loop_t *loop, uint64_t data, uint32_t events) noexcept nogil:
    """Note the events of one socket, and move what can move."""
    cdef connection_t *connection = <connection_t *><uintptr_t>(data & ~<uint64_t>1)
    cdef int side = data & 1, error = 0
    cdef socklen_t length = sizeof(error)
    cdef uint8_t known = connection.ready[side], bits = ready_after(known, events)
    if connection.state >= STATE_CLOSED:  # closed by an earlier event of this batch, or spare
        if connection.state == STATE_LINGERING and side == CLIENT:
            linger_event(loop, connection)
        return
    connection.ready[side] = bits
    # What was deferred goes to this socket first: if that fails, its end is no clean one.
    if events & END_EVENTS and not connection_send_deferred(loop, connection, 1 - side):
        return
    if connection.state == STATE_OPEN and bits == known:
        # More bytes behind those that wait for their destination: each segment would wake the loop.
        if known & READ_READY and not known & (READ_PAUSED | END_QUEUED) and not connection.on_ready_list:
            ready_set(loop, connection, side, known | READ_PAUSED)
        return
    if connection.state != STATE_OPEN:
        if side == CLIENT:
            if events & (EPOLLERR | EPOLLHUP):  # a reset: the client no longer waits for an answer
                connection_close(loop, connection, RESET)
            return
        if events & (EPOLLERR | EPOLLHUP):
            getsockopt(connection.fd[BACKEND], SOL_SOCKET, SO_ERROR, &error, &length)
            if not dial_was_taken(error):
                connection_dial_failed(loop, connection, error)
                return
            # Its bytes are still queued, and ERROR_QUEUED makes the end behind them a reset.
        elif connection_met_itself(loop, connection):
            connection_dial_failed(loop, connection, ECONNREFUSED)
            return
        connection_connected(loop, connection)
    connection_pump(loop, connection)


# ---------------------------------------------------------------------------------------------- expiry


cdef void expire_idle(loop_t *loop) noexcept nogil:
    """Reset the connections that were silent or half-closed for too long.

    This looks at every open one, so that a byte reorders no list; but only if one may be due, and not more
    often than the precision needs.
    """
    cdef connection_t *connection = first_in(loop, STATE_OPEN)
    cdef connection_t *following
    cdef int64_t left, soonest = INT64_MAX, interval = INT64_MAX
    cdef int counter = RESET
    while connection != NULL:
        following = next_of(connection)
        left = connection_time_left(loop, connection, &counter)
        if left <= 0:
            loop.tally[counter] += 1
            connection_close(loop, connection, RESET)
        else:
            soonest = min(soonest, left)
        connection = following
    if loop.option[IDLE_TIMEOUT]:
        interval = loop.option[IDLE_TIMEOUT]
    if loop.option[HALF_CLOSE_TIMEOUT]:
        interval = min(interval, loop.option[HALF_CLOSE_TIMEOUT])
    loop.expire_at = 0 if soonest == INT64_MAX else loop.now + max(soonest, interval // EXPIRE_SHARE)


cdef void expire(loop_t *loop) noexcept nogil:
    """Do all that is due now. Each list is sorted by its deadline, so only the heads matter."""
    cdef connection_t *head = first_in(loop, STATE_CONNECTING)
    while head != NULL and head.times.waiting.connect_by <= loop.now:
        connection_dial_failed(loop, head, 0)
        head = first_in(loop, STATE_CONNECTING)
    head = first_in(loop, STATE_HELD)
    while head != NULL and head.times.waiting.hold_until <= loop.now:
        connection_reject(loop, head)
        head = first_in(loop, STATE_HELD)
    while loop.keepalive_next != NULL and loop.keepalive_next.times.open.keepalive_at <= loop.now:
        connection_keep_alive(loop, loop.keepalive_next)
        loop.keepalive_next = next_of(loop.keepalive_next)
    if loop.expire_at and loop.expire_at <= loop.now:
        expire_idle(loop)
    linger_expire(loop)
    if loop.accept_at and loop.accept_at <= loop.now:
        accept_resume(loop)
    if probe_is_wanted(loop) and loop.probe_at <= loop.now:
        loop.probe = first_in(loop, STATE_HELD)
        connection_dial(loop, loop.probe)


# ------------------------------------------------------------------------------------------------ loop


cdef inline int64_t next_due(loop_t *loop) noexcept nogil:
    """Return when something is due, in ms: now if work is left, with the next heartbeat if all is idle."""
    cdef int64_t due = loop.now + HEARTBEAT_MS
    if loop.ready_head != NULL or drained(loop):
        return loop.now
    if loop.lists[STATE_CONNECTING].head != NULL:
        due_by(&due, first_in(loop, STATE_CONNECTING).times.waiting.connect_by)
    if loop.lists[STATE_HELD].head != NULL:
        due_by(&due, first_in(loop, STATE_HELD).times.waiting.hold_until)
    if probe_is_wanted(loop):
        due_by(&due, loop.probe_at)
    if loop.keepalive_next != NULL:
        due_by(&due, loop.keepalive_next.times.open.keepalive_at)
    due_by(&due, loop.expire_at)
    due_by(&due, loop.accept_at)
    linger_due(loop, &due)
    return due


cdef inline void trim_when_idle(loop_t *loop, int count) noexcept nogil:
    """Give back the memory and the descriptors of a burst, a heartbeat after it."""
    if idle_begins(&loop.busy_at, loop.now, count > 0 or loop.ready_head != NULL):
        madvise(loop.workspace, sizeof(workspace_t), MADV_DONTNEED)
        pool_close(loop)
        spare_close_all(loop)


cdef inline void publish(loop_t *loop) noexcept nogil:
    """Copy the tally to the page. Gauges are read off what they measure."""
    loop.tally[ACTIVE] = connections_active(loop)
    loop.tally[HELD] = loop.lists[STATE_HELD].length
    loop.tally[SPARE] = loop.spare_count
    memcpy(loop.page + COUNTER_OWN, loop.tally, sizeof(loop.tally))


cdef int loop_run(loop_t *loop) noexcept nogil:
    """Return REASON_CONTROL if the control pipe is readable, REASON_DRAINED, or -1 with errno from epoll."""
    cdef epoll_event events[MAX_EVENTS]
    cdef bint control = False, clients
    cdef int count, i
    while True:
        count = loop_wait(loop.epoll, events, next_due(loop), &loop.now, loop.page)  # clock, heartbeat
        if count < 0:
            return -1
        trim_when_idle(loop, count)
        loop.deferring, clients = count > 1, False
        for i in range(count):  # note what is ready, and pump
            if events[i].data.u64 == EVENT_LISTENER:
                clients = True
            elif events[i].data.u64 == EVENT_CONTROL:
                control = True
            else:
                connection_event(loop, events[i].data.u64, events[i].events)
        flush_deferred(loop)  # send the batch
        pump_ready_list(loop)  # go on where work is left
        expire(loop)
        free_closed(loop)  # no event can name them now
        if clients and not loop.accept_at and not loop.out_of_descriptors:
            accept_batch(loop)
            listener_yield(loop)
        if loop.out_of_descriptors:
            accept_pause(loop)
        publish(loop)
        if control or drained(loop):
            return REASON_CONTROL if control else REASON_DRAINED


cdef void apply_options(loop_t *loop, options_t option) noexcept nogil:
    """Take new options. A new deadline is checked at once; a held client keeps its window."""
    cdef connection_t *connection = first_in(loop, STATE_OPEN)
    cdef bint changes = (
        option[IDLE_TIMEOUT] != loop.option[IDLE_TIMEOUT]
        or option[HALF_CLOSE_TIMEOUT] != loop.option[HALF_CLOSE_TIMEOUT]
    )
    if option[IDLE_TIMEOUT] and not loop.option[IDLE_TIMEOUT]:  # moved_at was not kept until now
        while connection != NULL:
            connection.times.open.moved_at = loop.now
            connection = next_of(connection)
    memcpy(loop.option, option, sizeof(options_t))
    if changes:
        loop.expire_at = loop.now if option[IDLE_TIMEOUT] or option[HALF_CLOSE_TIMEOUT] else 0


cdef void apply_backends(loop_t *loop) noexcept nogil:
    """Reset what is open to a backend that is no longer in the list; hold what is connecting to one."""
    cdef connection_t *connection
    cdef connection_t *following
    cdef int state
    for state in range(STATE_CONNECTING, STATE_CLOSED):
        connection = first_in(loop, state)
        while connection != NULL:
            following = next_of(connection)
            if state == STATE_HELD or backends_have(&loop.backends, connection.backend):
                pass
            elif state == STATE_OPEN:
                connection_close(loop, connection, RESET)
            else:
                connection_cancel_dial(loop, connection)
            connection = following
    free_closed(loop)
    spare_close_all(loop)
    loop.retry_ms = RETRY_FIRST_MS
    loop.reject_counter = 0
    loop.probe_at = loop.now
    backends_mark_own(loop)


# ---------------------------------------------------------------------------------------------- Python


def ready_functions(uint8_t bits, uint8_t destination, uint32_t events):
    """For tests: return what the pure functions of _ready.pxd return, in their order there."""
    return (
        ready_after(bits, events),
        ready_to_move(bits, destination), ready_to_splice(bits),
        ready_short_read_empties(bits), ready_only_fin(bits), ready_interest(bits),
    )


cdef class TcpLoop:
    """The loop of one worker, over a listening socket.

    `listener` (listening, non-blocking, with SO_LINGER 0 set) and `control` (the read end of the control
    pipe, non-blocking) stay the caller's. `counters` is a descriptor of the worker's page, and `siblings` are
    those of the listener's other workers. The loop maps them; the caller may close them then. The loop
    accepts nobody before its first `update`. Raises OSError if the kernel refuses, and MemoryError.
    """

    cdef loop_t loop

    def __cinit__(self, int listener, int control, int counters, tuple siblings=()):
        cdef loop_t *loop = &self.loop
        memset(loop, 0, sizeof(loop_t))
        loop.epoll = -1
        loop.page = counters_map(counters, True)
        if loop.page == NULL:
            raise OSError(errno, "mmap of the counters page")
        loop.listener, loop.control = listener, control
        if siblings:
            siblings_map(siblings, &loop.siblings, &loop.sibling_count)
        loop.retry_ms = RETRY_FIRST_MS
        loop.first_local_port, loop.last_local_port = first_local_port, last_local_port
        loop.now = monotonic_ms()
        slabs_init(&loop.connections, sizeof(connection_t))
        loop.workspace = <workspace_t *>pages_map(sizeof(workspace_t))
        if loop.workspace == NULL:
            raise MemoryError
        loop.epoll = epoll_create1(EPOLL_CLOEXEC)
        if loop.epoll < 0:
            raise OSError(errno, "epoll_create1")
        if listener_watch(loop) < 0 or epoll_add(loop.epoll, control, EPOLLIN, EVENT_CONTROL) < 0:
            raise OSError(errno, "epoll_ctl of the listener or the control pipe")
        loop.page[COUNTER_VERSION] = COUNTERS_VERSION

    def __dealloc__(self):
        cdef loop_t *loop = &self.loop
        cdef int state
        if loop.page == NULL:
            return
        for state in range(STATE_CLOSED):
            while loop.lists[state].head != NULL:
                connection_close(loop, first_in(loop, state), RESET)
        linger_end_all(loop)
        pump_ready_list(loop)  # empties it: none is open
        free_closed(loop)  # makes spare ones, too
        spare_close_all(loop)
        free_closed(loop)
        pool_close(loop)
        if loop.epoll >= 0:
            close(loop.epoll)
        slabs_free(&loop.connections)
        if loop.workspace != NULL:
            munmap(loop.workspace, sizeof(workspace_t))
        free(loop.backends.items)
        free(loop.access.items)
        siblings_unmap(loop.siblings, loop.sibling_count)
        publish(loop)
        counters_unmap(loop.page)

    def update(self, uint64_t generation, bytes payload):
        """Take the whole new state, the payload of an Update record. Raises ValueError if it is none.

        No backend means hold. Connections to a backend that is not in the list are reset; attempts to connect
        to one start anew. A backend of weight 0 keeps what is open.
        """
        cdef update_view_t view
        cdef options_t option
        cdef bint changed
        update_read(PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload), &view, option)
        access_replace(&self.loop.access, &view)
        changed = backends_replace(&self.loop.backends, &view)
        with nogil:
            self.loop.now = monotonic_ms()
            apply_options(&self.loop, option)
            if changed:
                apply_backends(&self.loop)
            publish(&self.loop)
        self.loop.page[COUNTER_BACKENDS] = self.loop.backends.count
        self.loop.page[COUNTER_GENERATION] = generation

    def drain(self, uint32_t deadline_ms):
        """Accept no more. `run` returns DRAINED when all connections have ended, or after the deadline."""
        if not self.loop.draining:
            epoll_ctl(self.loop.epoll, EPOLL_CTL_DEL, self.loop.listener, NULL)
        self.loop.draining = True
        self.loop.accept_at = 0
        self.loop.drain_at = monotonic_ms() + deadline_ms

    def run(self):
        """Relay until Python has something to do. Return CONTROL or DRAINED. Raises OSError."""
        cdef int reason
        with nogil:
            reason = loop_run(&self.loop)
        if reason < 0:
            raise OSError(errno, "epoll_wait")
        return reason
