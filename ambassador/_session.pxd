"""Sessions: the table, queues, forwarding, and the probe of a backend that has just come.

Invariants: a session is in the table and in one list until it is closed; a session that is part of the batch
in hand is never evicted; `loop.queued` and `loop.queued_bytes` are the sums over all queues.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

from ambassador._backends cimport (
    address_t,
    backend_t,
    backends_find,
    backends_have,
    backends_have_address,
    backends_next,
)
from ambassador._batch cimport message_datagrams, message_segment, send_add, send_flush
from ambassador._dial cimport socket_dial, socket_set_hops
from ambassador._linux cimport (
    EAGAIN,
    ECONNREFUSED,
    EMFILE,
    ENFILE,
    ENOBUFS,
    ENOMEM,
    MSG_DONTWAIT,
    SOL_SOCKET,
    SO_ERROR,
    close,
    errno,
    getsockopt,
    send,
    socklen_t,
)
from ambassador._list cimport list_append, list_remove, list_t
from ambassador._options cimport HOLD, MAX_SESSIONS
from ambassador._slab cimport slabs_give, slabs_take
from ambassador._udp cimport (
    ASSURED,
    ASSURED_LIST,
    BUCKETS,
    BYTES_TO_BACKEND,
    CLOSED,
    DIAL_ATTEMPTS,
    DROPPED_NO_BACKEND,
    DROPPED_NO_LOCAL_PORT,
    DROPPED_NO_SESSION,
    DROPPED_SEND_TO_BACKEND,
    FOREIGN_HOPS,
    MAX_EVICT_LOOKS,
    MAX_HOPS,
    MAX_PROBE_RETRY_MS,
    MAX_QUEUED,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_MS,
    MESSAGES_TO_BACKEND,
    MIN_HOPS,
    PROBE_MS,
    PROBE_RETRY_MS,
    REFUSED,
    SENT_TO_BACKEND,
    SESSION_LISTS,
    SESSIONS_CREATED,
    SESSIONS_EVICTED,
    SETTLED,
    TO_BACKEND,
    UNASSURED_LIST,
    key_t,
    loop_t,
    queued_t,
    receive_batch_t,
    session_t,
)

# ----------------------------------------------------------------------------------------------- queue


cdef inline void session_dequeue(loop_t *loop, session_t *session, int counter) noexcept nogil:
    """Free the oldest queued datagram. Count it as sent if it was the probe, else under `counter`, 0 for
    none."""
    cdef queued_t *item = session.queue_head
    if item.probe_sent:
        loop.tally[SENT_TO_BACKEND] += 1
        loop.tally[BYTES_TO_BACKEND] += item.length
        loop.tally[MESSAGES_TO_BACKEND] += 1
    elif counter:
        loop.tally[counter] += 1
    session.queue_head = item.next
    if session.queue_head == NULL:
        session.queue_tail = NULL
    session.queue_length -= 1
    loop.queued -= 1
    loop.queued_bytes -= item.length
    free(item)


cdef inline void session_age_queue(loop_t *loop, session_t *session) noexcept nogil:
    """Drop the datagrams that have waited too long."""
    cdef int64_t oldest = loop.now - min(loop.option[HOLD], <int64_t>MAX_QUEUED_MS)
    while session.queue_head != NULL and session.queue_head.since < oldest:
        session_dequeue(loop, session, DROPPED_NO_BACKEND)


cdef inline void session_queue(loop_t *loop, session_t *session, char *data, uint32_t length) noexcept nogil:
    """Keep one datagram until there is a backend, or drop it if a bound is reached."""
    cdef queued_t *item = NULL
    session_age_queue(loop, session)
    if (
        loop.option[HOLD]
        and session.queue_length < MAX_QUEUED
        and loop.queued_bytes + length <= MAX_QUEUED_BYTES
    ):
        item = <queued_t *>malloc(sizeof(queued_t) + length)
    if item == NULL:
        loop.tally[DROPPED_NO_BACKEND] += 1
        return
    item.next = NULL
    item.since = loop.now
    item.length = length
    item.probe_sent = False
    memcpy(item.data, data, length)
    if session.queue_tail != NULL:
        session.queue_tail.next = item
    else:
        session.queue_head = item
    session.queue_tail = item
    session.queue_length += 1
    loop.queued += 1
    loop.queued_bytes += length


# ----------------------------------------------------------------------------------------------- table


cdef inline uint32_t key_hash(loop_t *loop, key_t *key) noexcept nogil:
    cdef uint64_t *words = <uint64_t *>key
    cdef uint64_t hash = loop.seed
    cdef uint32_t i
    for i in range(sizeof(key_t) // sizeof(uint64_t)):
        hash = (hash ^ words[i]) * <uint64_t>0x9E3779B97F4A7C15
        hash ^= hash >> 29
    return <uint32_t>(hash >> 32) & (BUCKETS - 1)


cdef inline list_t *session_list(loop_t *loop, session_t *session) noexcept nogil:
    return &loop.lists[ASSURED_LIST if session.flags & ASSURED else UNASSURED_LIST]


cdef inline uint32_t session_count(loop_t *loop) noexcept nogil:
    return loop.lists[UNASSURED_LIST].length + loop.lists[ASSURED_LIST].length


cdef inline session_t *session_oldest(loop_t *loop, int which) noexcept nogil:
    """Return the longest idle session of a list, NULL if it is empty."""
    return <session_t *>loop.lists[which].head


cdef inline session_t *session_newer(session_t *session) noexcept nogil:
    """Return the next session of the same list, NULL behind the last."""
    return <session_t *>session.link.next


cdef inline void session_seen(loop_t *loop, session_t *session, uint8_t flag) noexcept nogil:
    """Note traffic, and `flag` with it: the session is the latest of its list."""
    list_remove(session_list(loop, session), &session.link)
    session.flags |= flag
    session.seen = loop.now
    list_append(session_list(loop, session), &session.link)


cdef inline void session_close_socket(session_t *session) noexcept nogil:
    if session.fd >= 0:
        close(session.fd)
        session.fd = -1
    session.flags &= ~SETTLED


cdef inline void session_close(loop_t *loop, session_t *session, int counter) noexcept nogil:
    """Remove it from the table and count it under `counter`; free_closed frees its memory."""
    cdef session_t **place = &loop.buckets[key_hash(loop, &session.key)]
    while place[0] != session:
        place = &place[0].chain
    place[0] = session.chain
    list_remove(session_list(loop, session), &session.link)
    while session.queue_head != NULL:
        session_dequeue(loop, session, DROPPED_NO_BACKEND)
    session_close_socket(session)
    if loop.probe == session:
        loop.probe = NULL
        loop.probe_at = loop.now
    session.flags |= CLOSED
    session.touched = loop.closed
    loop.closed = session
    loop.tally[counter] += 1


cdef inline void free_closed(loop_t *loop) noexcept nogil:
    """Free the closed sessions. After the events of a turn: they may name one."""
    cdef session_t *session
    while loop.closed != NULL:
        session = loop.closed
        loop.closed = session.touched
        slabs_give(&loop.memory, session)


cdef inline bint session_evict(loop_t *loop, session_t *spared, bint socket, bint assured) noexcept nogil:
    """Make room for another client. False if there is no session to evict but `spared`.

    `socket`: prefer one that has a socket. `assured`: without an unassured one, take an assured one.
    """
    cdef session_t *victim = session_oldest(loop, UNASSURED_LIST)
    cdef uint32_t looks = 0
    while victim != NULL and (
        victim == spared or (socket and victim.fd < 0 and looks < MAX_EVICT_LOOKS)
    ):
        victim = session_newer(victim)
        looks += 1
    if victim == NULL and assured:  # only now: newcomers must not drive out assured sessions
        victim = session_oldest(loop, ASSURED_LIST)
    # A session of the batch in hand stays: its messages are about to be sent.
    if victim == NULL or victim == spared or victim.first or (socket and victim.fd < 0):
        return False
    session_close(loop, victim, SESSIONS_EVICTED)
    return True


cdef inline session_t *session_find(loop_t *loop, key_t *key) noexcept nogil:
    """Return the client's session, NULL if there is none."""
    cdef session_t *session = loop.buckets[key_hash(loop, key)]
    while session != NULL and memcmp(&session.key, key, sizeof(key_t)) != 0:
        session = session.chain
    return session


cdef inline session_t *session_new(
    loop_t *loop, key_t *key, address_t *client, socklen_t length
) noexcept nogil:
    """Return a session for a client that has none. NULL without room or memory."""
    cdef session_t **bucket = &loop.buckets[key_hash(loop, key)]
    cdef session_t *session
    if session_count(loop) >= loop.option[MAX_SESSIONS] and not session_evict(loop, NULL, False, True):
        return NULL
    session = <session_t *>slabs_take(&loop.memory)
    if session == NULL:
        return NULL
    session.key = key[0]
    session.client = client[0]
    session.client_length = length
    session.fd = -1
    session.seen = loop.now
    session.chain = bucket[0]
    bucket[0] = session
    list_append(session_list(loop, session), &session.link)
    loop.tally[SESSIONS_CREATED] += 1
    return session


cdef inline bint key_is_no_client(loop_t *loop, key_t *key, address_t *client) noexcept nogil:
    """Whether the source is a backend or this listener: what is sent there comes back, without end.

    One forged datagram is enough if the backend answers whatever it gets.
    """
    if key.port == loop.port and memcmp(key.client, key.local, sizeof(key.client)) == 0:
        return True
    return backends_have_address(&loop.backends, client)


cdef inline uint8_t hops_onward(int hops) noexcept nogil:
    """Return the hop limit for a datagram that came with `hops`; 0 if it went round between relays.

    Relays count down from MAX_HOPS, where no system starts. All else is a client's and starts there, also
    one that came with 1: it is meant for this machine (RFC 1122, 3.2.1.7).
    """
    if hops > MAX_HOPS or hops <= FOREIGN_HOPS:
        return MAX_HOPS
    return <uint8_t>(hops - 1) if hops > MIN_HOPS else 0


cdef inline void session_raise_hops(loop_t *loop, session_t *session, uint8_t hops) noexcept nogil:
    """Let it send with a higher hop limit. Never a lower one: a datagram in a ring always comes with less."""
    cdef backend_t *backend = backends_find(&loop.backends, session.backend)
    session.hops = hops
    if session.fd >= 0 and backend != NULL:
        socket_set_hops(session.fd, backend, hops)


# --------------------------------------------------------------------------------------------- backend


cdef inline int session_dial(loop_t *loop, session_t *session) noexcept nogil:
    """Give it a socket that is connected to the next backend. 0, or the counter of what that drops."""
    cdef backend_t *backend
    cdef int error = 0, _attempt
    cdef bint evicted = False, lacking
    if loop.backends.total_weight == 0:
        return DROPPED_NO_BACKEND
    backend = backends_next(&loop.backends)
    for _attempt in range(DIAL_ATTEMPTS):
        error = socket_dial(loop, session, backend)
        if error == 0:
            return 0
        if error == ECONNREFUSED:  # it met itself: another port
            continue
        if error == EAGAIN:  # no local port; others may take the one that this frees: assured sessions stay
            evicted = session_evict(loop, session, True, False)
        else:
            lacking = error == EMFILE or error == ENFILE
            evicted = lacking and not evicted and session_evict(loop, session, True, True)
        if not evicted:
            break
    if error == EAGAIN:
        return DROPPED_NO_LOCAL_PORT
    if error == EMFILE or error == ENFILE or error == ENOMEM or error == ENOBUFS:
        return DROPPED_NO_SESSION
    return DROPPED_SEND_TO_BACKEND


cdef inline void session_release(loop_t *loop, session_t *session) noexcept nogil:
    """Send its queue to its backend, in order, before anything newer."""
    cdef queued_t *item
    session_age_queue(loop, session)
    item = session.queue_head
    while item != NULL:
        if not item.probe_sent:
            send_add(loop, session, TO_BACKEND, item.data, item.length, item.length)
        item = item.next
    send_flush(loop, TO_BACKEND)
    while session.queue_head != NULL:
        session_dequeue(loop, session, 0)  # the flush has counted it


# ----------------------------------------------------------------------------------------------- probe


cdef inline void probe_send(loop_t *loop, session_t *session) noexcept nogil:
    """Send the first datagram that `session` has queued; keep it until the outcome is known.

    It is counted only then: it may have to be sent again.
    """
    cdef queued_t *item = session.queue_head
    cdef ssize_t sent
    if session.fd < 0 and session_dial(loop, session):
        loop.probe_at = loop.now + loop.retry_ms
        return
    sent = send(session.fd, item.data, item.length, MSG_DONTWAIT)
    if sent < 0 and errno == ECONNREFUSED:  # ICMP's answer to an earlier datagram
        loop.tally[REFUSED] += 1
        sent = send(session.fd, item.data, item.length, MSG_DONTWAIT)
    item.probe_sent = sent >= 0
    loop.probe = session
    loop.probe_at = loop.now + PROBE_MS


cdef inline void probe_refused(loop_t *loop) noexcept nogil:
    """The probe did not arrive: send it again later."""
    if loop.probe.queue_head != NULL:
        loop.probe.queue_head.probe_sent = False
    loop.probe = NULL
    loop.probe_at = loop.now + loop.retry_ms
    loop.retry_ms = min(2 * loop.retry_ms, MAX_PROBE_RETRY_MS)


cdef inline void probe_check(loop_t *loop) noexcept nogil:
    """Before the probe's socket is closed: its refusal may have come since the last turn."""
    cdef int error = 0
    cdef socklen_t length = sizeof(error)
    if loop.probe == NULL or loop.probe.fd < 0:
        return
    if getsockopt(loop.probe.fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 and error == ECONNREFUSED:
        loop.tally[REFUSED] += 1
        probe_refused(loop)


cdef inline void probe_passed(loop_t *loop) noexcept nogil:
    """The backend listens: release every queue."""
    cdef session_t *session
    cdef session_t *newer
    cdef int i
    loop.probing_until = 0
    for i in range(SESSION_LISTS):
        session = session_oldest(loop, i)
        # Dialling may evict, even the next one: the queues behind it then wait for their next datagram.
        while session != NULL and not session.flags & CLOSED:
            newer = session_newer(session)
            if session.queue_head != NULL and (session.fd >= 0 or session_dial(loop, session) == 0):
                session_release(loop, session)
            session = newer
    loop.probe = NULL


cdef inline void probe_next(loop_t *loop) noexcept nogil:
    """Do what is due: accept the probe that nobody refused, give up, or send the next probe."""
    cdef session_t *session
    cdef int i
    if not loop.probing_until or loop.backends.total_weight == 0:
        return
    if (
        loop.probing_until <= loop.now
        or not loop.option[HOLD]
        or (loop.probe != NULL and loop.probe_at <= loop.now)
    ):
        probe_passed(loop)
        return
    if loop.probe != NULL or loop.probe_at > loop.now or loop.queued == 0:
        return
    for i in range(SESSION_LISTS):
        session = session_oldest(loop, i)
        while session != NULL:
            if session.queue_head != NULL:
                probe_send(loop, session)
                return
            session = session_newer(session)


cdef inline void probe_restart(loop_t *loop) noexcept nogil:
    """Probe anew from now on; only if -hold lets datagrams wait for that."""
    # Nobody has refused the probe to the last backend: it counts as sent, and is not sent twice.
    if loop.probe != NULL and loop.probe.queue_head != NULL and loop.probe.queue_head.probe_sent:
        session_dequeue(loop, loop.probe, 0)
    loop.probe = NULL
    loop.probe_at = loop.now
    loop.retry_ms = PROBE_RETRY_MS
    loop.probing_until = 0
    # The first list names, as a rule, a target that has been running for long.
    if loop.option[HOLD] and loop.updated and loop.backends.total_weight:
        loop.probing_until = loop.now + min(loop.option[HOLD], <int64_t>MAX_QUEUED_MS)


# --------------------------------------------------------------------------------------------- forward


cdef inline void session_enqueue(
    loop_t *loop, session_t *session, char *data, uint32_t length, uint32_t segment
) noexcept nogil:
    """Queue the datagrams of one message, and send the first as the probe if one is due."""
    cdef uint32_t start = 0
    if message_datagrams(length, segment) == 1:
        session_queue(loop, session, data, length)
    else:
        while start < length:
            session_queue(loop, session, data + start, min(segment, length - start))
            start += segment
    if loop.probing_until and loop.probe == NULL and loop.probe_at <= loop.now:
        if session.queue_head != NULL and loop.backends.total_weight:
            probe_send(loop, session)


cdef inline bint session_must_wait(loop_t *loop, session_t *session) noexcept nogil:
    """Whether its datagrams wait: it needs a backend and there is none, or the backend is being probed."""
    if session.fd < 0 and loop.backends.total_weight == 0:
        return True
    return loop.probing_until != 0 and not session.flags & SETTLED


cdef inline void session_forward(loop_t *loop, session_t *session) noexcept nogil:
    """Send this batch's messages of one client on, or queue them while the session must wait."""
    cdef receive_batch_t *batch = loop.receive_batch
    cdef uint32_t i, length, segment, count
    cdef uint32_t following = session.first
    cdef int dropped
    while following:  # until its end session.first keeps an eviction away
        i = following - 1
        following = batch.following[i]
        length = batch.messages[i].msg_len
        segment = message_segment(&batch.messages[i].msg_hdr, NULL, NULL)
        count = message_datagrams(length, segment)
        if (
            session_must_wait(loop, session)
            and loop.probing_until
            and loop.probe != NULL
            and session.queue_length + count > MAX_QUEUED
        ):
            # No refusal so far, and no room to wait for one: better too early than not at all. Who waits has
            # nothing in the send batch, which is of one session.
            probe_passed(loop)
        if session_must_wait(loop, session):
            session_enqueue(loop, session, <char *>batch.iov[i].iov_base, length, segment)
            continue
        if session.fd < 0:
            dropped = session_dial(loop, session)
            if dropped:
                loop.tally[dropped] += count
                continue
        if session.queue_head != NULL:
            session_release(loop, session)
        send_add(loop, session, TO_BACKEND, batch.iov[i].iov_base, length, segment)
    send_flush(loop, TO_BACKEND)
    session.first = 0


# ---------------------------------------------------------------------------------------------- update


cdef inline void sessions_update(loop_t *loop, bint came) noexcept nogil:
    """Close the sockets to backends that are gone; their sessions stay. Probe if a backend came.

    A session whose client is a backend now ends: its answers would go round.
    """
    cdef session_t *session
    cdef session_t *newer
    cdef int i
    probe_check(loop)
    for i in range(SESSION_LISTS):
        session = session_oldest(loop, i)
        while session != NULL:
            newer = session_newer(session)
            if session.fd >= 0 and not backends_have(&loop.backends, session.backend):
                session_close_socket(session)
            elif session.fd >= 0 and not loop.probing_until:
                session.flags |= SETTLED
            if came and backends_have_address(&loop.backends, &session.client):
                session_close(loop, session, SESSIONS_EVICTED)
            session = newer
    if came or loop.backends.total_weight == 0 or (loop.probe != NULL and loop.probe.fd < 0):
        probe_restart(loop)
    probe_next(loop)
    free_closed(loop)
