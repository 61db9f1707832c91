"""The UDP relay loop: one epoll loop that moves datagrams between clients and connected backend sockets.

Theory of operation
-------------------
A *session* is one UDP client's entry: the address it writes from, the address it wrote to, and a backend
socket. That socket is connected, so the kernel ties replies and ICMP errors to the client. Clients write to
the listener, which is read in batches (recvmmsg). A batch is grouped by session and keeps each session's
order. Each session's share leaves in one sendmmsg on its backend socket (send, if it is one datagram). The
replies of all sessions of a turn leave together, in one sendmmsg on the listener.

A run of datagrams of equal size to one session leaves as *one* message with UDP_SEGMENT over an iovec, and
UDP_GRO lets such a run arrive as one: the kernel then walks its stack once for up to 64 datagrams. If a route
refuses that (a segment over its MTU gives EINVAL), the run is sent datagram by datagram and the session
remembers the size.

A container that has just started does not listen yet, and UDP has no handshake to tell. So after a backend
comes the loop *probes*: it queues, as while held, and sends one datagram ahead. If the backend's kernel
refuses it (ICMP, at once if at all), the loop sends it again a little later. If the backend
answers it, or nobody refuses it for PROBE_MS, the loop releases every queue. A session whose backend stays
does not wait for that.

    wait -> for each event: session? receive replies : control? return to Python
         -> send the replies -> receive and forward a batch from clients -> probe -> expire -> free -> publish

Parts, of which each uses only those before it: _udp.pxd (limits, enums, structs), _dial.pxd (backend
sockets), _batch.pxd (receive, send, runs), _session.pxd (table, queue, probe), and this file.

Invariants
----------
- Datagrams keep their boundaries, 0 to 65,507 bytes; one that was truncated is dropped and counted.
- A reply goes only to the client whose datagrams its socket carries, from the address that client wrote to;
  from one of ours if that is a broadcast address. Neither a backend nor this listener is a client.
- Nothing that an old address still sends is forwarded: its socket is closed when the backend changes.
- Buffers belong to the worker, never to a session. What a session queues is bounded in number and time, and
  all queues together in bytes.
- A session that is closed is freed after the events that may still name it.
- Relays send with hop limits that no client has, and take one off each other's: a ring of them ends.
- When the table is full, the longest idle session goes; first of those that never sent again after a reply.
- Counters are written, never read. What decides is a field of the loop.
- Ownership: the loop owns the backend sockets and its mapping of the counters page. The listener and the
  control pipe belong to the caller and must outlive the loop.

Sources: udp(7), ip(7), ipv6(7), recvmmsg(2), sendmmsg(2); net/ipv4/udp.c for what UDP_SEGMENT refuses.
"""

import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from ambassador._access cimport access_replace
from ambassador._backends cimport BACKEND_CAME, address_t, backends_replace
from ambassador._batch cimport (
    message_datagrams,
    message_segment,
    receive,
    receive_map,
    receive_unmap,
    replies_flush,
    send_add,
)
from ambassador._counters cimport (
    COUNTER_BACKENDS,
    COUNTER_GENERATION,
    COUNTER_OWN,
    COUNTER_VERSION,
    COUNTERS_VERSION,
    counters_map,
    counters_unmap,
)
from ambassador._linux cimport (
    AF_INET6,
    EAGAIN,
    EPOLL_CLOEXEC,
    EPOLL_CTL_DEL,
    EPOLLIN,
    MADV_DONTNEED,
    MSG_TRUNC,
    close,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    errno,
    getsockname,
    madvise,
    msghdr,
    munmap,
    sockaddr,
    socklen_t,
)
from ambassador._loop cimport (
    EVENT_CONTROL,
    EVENT_LISTENER,
    HEARTBEAT_MS,
    MAX_EVENTS,
    REASON_CONTROL,
    REASON_DRAINED,
    due_by,
    epoll_add,
    idle_begins,
    loop_wait,
    monotonic_ms,
    pages_map,
)
from ambassador._options cimport MAX_SESSIONS, UDP_TIMEOUT, options_t
from ambassador._record cimport update_read, update_view_t
from ambassador._session cimport (
    free_closed,
    hops_onward,
    key_is_no_client,
    probe_next,
    probe_refused,
    session_close,
    session_count,
    session_find,
    session_forward,
    session_new,
    session_oldest,
    session_raise_hops,
    session_seen,
    sessions_update,
)
from ambassador._slab cimport slabs_free, slabs_init
from ambassador._udp cimport (
    ASSURED,
    BUCKETS,
    BUFFER_BYTES,
    BYTES_FROM_BACKEND,
    BYTES_FROM_CLIENT,
    CLOSED,
    DRAIN_MS,
    DRAIN_RECENT_MS,
    DROPPED_LOOPED,
    DROPPED_NO_SESSION,
    DROPPED_TRUNCATED,
    QUEUED,
    RECEIVE_BATCH,
    RECEIVED_FROM_BACKEND,
    RECEIVED_FROM_CLIENT,
    SEEN_REPLY,
    SESSION_LISTS,
    SESSIONS_ACTIVE,
    SESSIONS_EXPIRED,
    TO_CLIENT,
    UNASSURED_LIST,
    UNASSURED_SHARE,
    key_t,
    loop_t,
    receive_batch_t,
    send_batch_t,
    session_t,
)

CONTROL = REASON_CONTROL
DRAINED = REASON_DRAINED

# --------------------------------------------------------------------------------------------- receive


cdef void session_event(loop_t *loop, session_t *session) noexcept nogil:
    """Receive replies of one backend socket into the batch; they leave with the turn's others."""
    cdef receive_batch_t *batch = loop.receive_batch
    cdef uint32_t i, length, segment, count
    cdef int got
    if session.flags & CLOSED or session.fd < 0:  # by an earlier event of this turn
        return
    got = receive(loop, session.fd, &session.reads)
    if got > 0:
        session_seen(loop, session, SEEN_REPLY)
        if loop.probe == session:
            loop.probe_at = loop.now
    elif loop.probe == session and errno != EAGAIN:
        probe_refused(loop)
    for i in range(batch.used, batch.used + got):
        length = batch.messages[i].msg_len
        segment = message_segment(&batch.messages[i].msg_hdr, NULL, NULL)
        count = message_datagrams(length, segment)
        loop.tally[RECEIVED_FROM_BACKEND] += count
        loop.tally[BYTES_FROM_BACKEND] += length
        if batch.messages[i].msg_hdr.msg_flags & MSG_TRUNC:
            loop.tally[DROPPED_TRUNCATED] += count
        else:
            send_add(loop, session, TO_CLIENT, batch.iov[i].iov_base, length, segment)
    batch.used += got
    if batch.used == RECEIVE_BATCH:
        replies_flush(loop)


cdef session_t *session_of_message(loop_t *loop, uint32_t i) noexcept nogil:
    """Count message `i` of a batch from clients, and find its session. NULL if the message was dropped."""
    cdef receive_batch_t *batch = loop.receive_batch
    cdef msghdr *header = &batch.messages[i].msg_hdr
    cdef address_t *name = &batch.names[i]
    cdef session_t *session
    cdef uint32_t count
    cdef int hops = 0
    cdef uint8_t onward
    cdef key_t key
    memset(&key, 0, sizeof(key))
    count = message_datagrams(batch.messages[i].msg_len, message_segment(header, &key, &hops))
    loop.tally[RECEIVED_FROM_CLIENT] += count
    loop.tally[BYTES_FROM_CLIENT] += batch.messages[i].msg_len
    if header.msg_flags & MSG_TRUNC:
        loop.tally[DROPPED_TRUNCATED] += count
        return NULL
    if name.v6.sin6_family == AF_INET6:
        memcpy(key.client, &name.v6.sin6_addr, 16)
        key.zone = name.v6.sin6_scope_id
        key.port = name.v6.sin6_port
    else:
        memcpy(key.client, &name.v4.sin_addr, 4)
        key.port = name.v4.sin_port
    onward = hops_onward(hops)
    session = session_find(loop, &key)
    if onward == 0 or (session == NULL and key_is_no_client(loop, &key, name)):
        loop.tally[DROPPED_LOOPED] += count
        return NULL
    if session == NULL:
        session = session_new(loop, &key, name, header.msg_namelen)
        if session == NULL:
            loop.tally[DROPPED_NO_SESSION] += count
            return NULL
    if onward > session.hops:
        session_raise_hops(loop, session, onward)
    return session


cdef void clients_receive(loop_t *loop) noexcept nogil:
    """Receive one batch from the listener, group it by session, and forward each session's messages."""
    cdef receive_batch_t *batch = loop.receive_batch
    cdef session_t *touched = NULL
    cdef session_t *session
    cdef int got = receive(loop, loop.listener, &loop.reads)
    cdef uint32_t i
    for i in range(<uint32_t>got):
        session = session_of_message(loop, i)
        if session == NULL:
            continue
        batch.following[i] = 0
        if session.first:
            batch.following[session.last - 1] = i + 1
        else:
            session.first = i + 1
            session.touched = touched
            touched = session
            session_seen(loop, session, ASSURED if session.flags & SEEN_REPLY else 0)
        session.last = i + 1
    while touched != NULL:
        session = touched
        touched = session.touched
        session_forward(loop, session)


# ------------------------------------------------------------------------------------------------ loop


cdef int64_t expires_at(loop_t *loop, int which) noexcept nogil:
    """Return when the longest idle session of a list expires, 0 if the list is empty."""
    cdef session_t *oldest = session_oldest(loop, which)
    cdef int64_t share = UNASSURED_SHARE if which == UNASSURED_LIST else 1
    return oldest.seen + max(loop.option[UDP_TIMEOUT] // share, <int64_t>1) if oldest != NULL else 0


cdef void expire(loop_t *loop) noexcept nogil:
    """Close the sessions that have been idle for too long."""
    cdef int i
    for i in range(SESSION_LISTS):
        while session_oldest(loop, i) != NULL and expires_at(loop, i) <= loop.now:
            session_close(loop, session_oldest(loop, i), SESSIONS_EXPIRED)


cdef int64_t next_due(loop_t *loop) noexcept nogil:
    """Return when something is due: a session's end, a probe, the end of draining, or else the heartbeat."""
    cdef int64_t due = loop.now + HEARTBEAT_MS
    cdef int i
    for i in range(SESSION_LISTS):
        due_by(&due, expires_at(loop, i))
    if loop.probing_until and loop.backends.total_weight and loop.queued:
        due_by(&due, loop.probe_at)
    if loop.draining:
        due_by(&due, loop.drain_at)
    return due


cdef inline void trim_when_idle(loop_t *loop, bint busy) noexcept nogil:
    """Return the buffers' pages to the kernel when a burst is over."""
    if idle_begins(&loop.busy_at, loop.now, busy):
        madvise(loop.receive_batch.buffers, RECEIVE_BATCH * BUFFER_BYTES, MADV_DONTNEED)


cdef inline void publish(loop_t *loop) noexcept nogil:
    """Show the counters to the parent."""
    loop.tally[SESSIONS_ACTIVE] = session_count(loop)
    loop.tally[QUEUED] = loop.queued
    memcpy(loop.page + COUNTER_OWN, loop.tally, sizeof(loop.tally))


cdef int loop_run(loop_t *loop) noexcept nogil:
    """Relay until the control pipe has something to read, or draining is over. -1 with errno if epoll
    fails."""
    cdef epoll_event events[MAX_EVENTS]
    cdef bint control = False, clients
    cdef int count, i
    while True:
        count = loop_wait(loop.epoll, events, next_due(loop), &loop.now, loop.page)
        if count < 0:
            return -1
        trim_when_idle(loop, count > 0)
        loop.turn += 1
        loop.batch_full = count == MAX_EVENTS
        clients = False
        for i in range(count):
            if events[i].data.u64 == EVENT_LISTENER:
                clients = True
            elif events[i].data.u64 == EVENT_CONTROL:
                control = True
            else:
                session_event(loop, <session_t *><uintptr_t>events[i].data.u64)
        replies_flush(loop)
        if clients:
            clients_receive(loop)
        probe_next(loop)
        expire(loop)
        free_closed(loop)  # no event can name them now
        publish(loop)
        if control:
            return REASON_CONTROL
        if loop.draining and loop.drain_at <= loop.now:
            return REASON_DRAINED


# ---------------------------------------------------------------------------------------- the Python API


cdef class UdpLoop:
    """The loop of one worker, over a bound datagram socket.

    `listener` (non-blocking, reporting packet info, as sockets.bind makes it) and `control` (the read end of
    the control pipe, non-blocking) stay the caller's. `counters` is a descriptor of the page that is shared
    with the parent; the loop maps it, and the caller may then close it. The loop relays nothing before its
    first `update`. Raises OSError if the kernel refuses, and MemoryError.
    """

    cdef loop_t loop

    def __cinit__(self, int listener, int control, int counters):
        cdef loop_t *loop = &self.loop
        cdef address_t own
        cdef socklen_t length = sizeof(own)
        memset(loop, 0, sizeof(loop_t))
        loop.epoll = -1
        loop.page = counters_map(counters, True)
        if loop.page == NULL:
            raise OSError(errno, "mmap of the counters page")
        loop.listener, loop.control = listener, control
        if getsockname(listener, <sockaddr *>&own, &length) < 0:
            raise OSError(errno, "getsockname of the listener")
        loop.port = own.v4.sin_port  # at one place in both families
        loop.now = monotonic_ms()
        slabs_init(&loop.memory, sizeof(session_t))
        loop.seed = int.from_bytes(os.urandom(8), "little")
        loop.buckets = <session_t **>pages_map(BUCKETS * sizeof(session_t *))
        loop.receive_batch = receive_map()
        loop.send_batch = <send_batch_t *>pages_map(sizeof(send_batch_t))
        if loop.buckets == NULL or loop.receive_batch == NULL or loop.send_batch == NULL:
            raise MemoryError
        loop.epoll = epoll_create1(EPOLL_CLOEXEC)
        if loop.epoll < 0:
            raise OSError(errno, "epoll_create1")
        if epoll_add(loop.epoll, listener, EPOLLIN, EVENT_LISTENER) < 0:
            raise OSError(errno, "epoll_ctl of the listener")
        if epoll_add(loop.epoll, control, EPOLLIN, EVENT_CONTROL) < 0:
            raise OSError(errno, "epoll_ctl of the control pipe")
        loop.page[COUNTER_VERSION] = COUNTERS_VERSION

    def __dealloc__(self):
        cdef loop_t *loop = &self.loop
        cdef int i
        if loop.page == NULL:
            return
        for i in range(SESSION_LISTS):
            while session_oldest(loop, i) != NULL:
                session_close(loop, session_oldest(loop, i), SESSIONS_EXPIRED)
        free_closed(loop)
        if loop.epoll >= 0:
            close(loop.epoll)
        receive_unmap(loop.receive_batch)
        if loop.send_batch != NULL:
            munmap(loop.send_batch, sizeof(send_batch_t))
        if loop.buckets != NULL:
            munmap(loop.buckets, BUCKETS * sizeof(session_t *))
        slabs_free(&loop.memory)
        free(loop.backends.items)
        free(loop.access.items)
        publish(loop)
        counters_unmap(loop.page)

    def update(self, uint64_t generation, bytes payload):
        """Put the payload of an Update record into force: the whole state. Raises ValueError, MemoryError.

        No backend means hold. If a session's backend is not in the list, its next datagram gets a new socket,
        and nothing that the old one still receives is forwarded.
        """
        cdef loop_t *loop = &self.loop
        cdef update_view_t view
        cdef options_t option
        cdef int change
        update_read(PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload), &view, option)
        if not option[MAX_SESSIONS]:
            raise ValueError("a session table needs room for one session")
        access_replace(&loop.access, &view)
        change = backends_replace(&loop.backends, &view)
        memcpy(loop.option, option, sizeof(options_t))
        with nogil:
            loop.now = monotonic_ms()
            if change:
                sessions_update(loop, change == BACKEND_CAME)
            publish(loop)
        loop.updated = True
        loop.page[COUNTER_BACKENDS] = loop.backends.count
        loop.page[COUNTER_GENERATION] = generation

    def drain(self, uint32_t deadline_ms):
        """Receive no more from clients. `run` returns DRAINED once replies have had time to arrive."""
        cdef loop_t *loop = &self.loop
        cdef session_t *latest
        cdef int i
        if loop.draining:
            return
        epoll_ctl(loop.epoll, EPOLL_CTL_DEL, loop.listener, NULL)
        loop.draining = True
        loop.drain_at = loop.now = monotonic_ms()
        for i in range(SESSION_LISTS):
            latest = <session_t *>loop.lists[i].tail
            if latest != NULL and latest.seen + DRAIN_RECENT_MS > loop.now:
                loop.drain_at = loop.now + min(deadline_ms, <uint32_t>DRAIN_MS)

    def run(self):
        """Relay until Python has something to do: CONTROL or DRAINED. Raises OSError."""
        cdef int reason
        with nogil:
            reason = loop_run(&self.loop)
        if reason < 0:
            raise OSError(errno, "epoll_wait")
        return reason
