"""The UDP relay loop: one epoll loop that moves datagrams between clients and connected backend sockets.

Theory of operation
-------------------
A *session* is one UDP client's entry: the address it writes from, the address it wrote to, and a backend
socket that is connected, so that the kernel ties replies and ICMP errors to the client. Clients write to
the listener, which is read in batches (recvmmsg). A batch is grouped by session, keeping each session's
order, and each session's share leaves in one sendmmsg on its backend socket (send, if it is a datagram
alone). Replies of all sessions of a
turn leave together, in one sendmmsg on the listener.

Runs of datagrams of equal size to one session leave as *one* message with UDP_SEGMENT over an iovec, and
UDP_GRO lets such runs arrive as one: the kernel then walks its stack once for up to 64 datagrams. Where a
route refuses that (a segment over its MTU gives EINVAL), the run is sent datagram by datagram and the
session remembers the size.

A container that has just started does not listen yet, and UDP has no handshake to tell. So after a repoint
the relay is *unsure*: it queues, as while held, and one datagram goes ahead on *trial*. If the backend's
kernel refuses it (ICMP, at once where it happens at all) it is sent again a little later; if it is answered,
or nothing is said for TRIAL_MS, everything that waits is released.

    wait -> for each event: session? read replies : control? return to Python
         -> send the replies -> read, group and forward a batch from clients -> try -> expire -> free

Invariants
----------
- Datagrams keep their boundaries, 0 to 65,507 bytes; one that was truncated is dropped and counted.
- A reply goes only to the client whose datagrams its socket carries, from the address that client wrote to.
- Nothing that an old address still sends is forwarded: its socket is closed when the backend changes.
- Buffers belong to the worker, never to a session. What a session queues while held is bounded in number
  and time, and all queues together in bytes.
- A session that ended is freed after the batch of events that may still name it.
- Each relaying takes one off a datagram's hop limit, as a router does: what two relays send each other ends.
- When the table is full, the session that proved least goes: first the longest idle of those that never
  answered a reply (a forged source cannot), then the longest idle of all.
- Ownership: the loop owns the backend sockets and its mapping of the counters page. The listener and the
  control pipe belong to the caller and must outlive the loop.

Sources: udp(7), ip(7), ipv6(7), recvmmsg(2), sendmmsg(2); net/ipv4/udp.c for what UDP_SEGMENT refuses.
"""

import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

from ambassador._access cimport access_replace, access_t
from ambassador._backends cimport (
    address_t,
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
    counters_map,
    counters_unmap,
)
from ambassador._linux cimport (
    AF_INET6,
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_LEN,
    CMSG_NXTHDR,
    CMSG_SPACE,
    EAGAIN,
    ECONNREFUSED,
    EINTR,
    EINVAL,
    EIO,
    EMFILE,
    EMSGSIZE,
    ENFILE,
    EPOLL_CLOEXEC,
    EPOLL_CTL_DEL,
    EPOLLIN,
    IP_PKTINFO,
    IP_TTL,
    IPPROTO_IP,
    IPPROTO_IPV6,
    IPPROTO_UDP,
    IPV6_HOPLIMIT,
    IPV6_PKTINFO,
    IPV6_UNICAST_HOPS,
    MADV_DONTNEED,
    MSG_DONTWAIT,
    MSG_TRUNC,
    SO_RCVBUF,
    SO_SNDBUF,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_NONBLOCK,
    SOL_SOCKET,
    UDP_GRO,
    UDP_SEGMENT,
    close,
    cmsghdr,
    connect,
    epoll_create1,
    epoll_ctl,
    epoll_event,
    epoll_wait,
    errno,
    in6_pktinfo,
    in_pktinfo,
    iovec,
    mmsghdr,
    msghdr,
    madvise,
    munmap,
    recvmmsg,
    send,
    sendmmsg,
    sendmsg,
    setsockopt,
    sockaddr,
    socket,
    socklen_t,
)
from ambassador._loop cimport (
    HEARTBEAT_MS,
    REASON_CONTROL,
    REASON_DRAINED,
    epoll_add,
    monotonic_ms,
    pages_map,
)
from ambassador._options cimport GSO, HOLD, MAX_SESSIONS, UDP_TIMEOUT, options_t
from ambassador._record cimport update_read, update_view_t
from ambassador._slab cimport slabs_free, slabs_give, slabs_init, slabs_t, slabs_take

# ---------------------------------------------------------------------------------------------- limits

cdef enum:
    BUCKETS = 1 << 16  # of the session table; pages that no session is in take no memory
    BATCH = 32  # messages of one recvmmsg; with GRO each may be a run of many datagrams
    BUFFER_BYTES = 65536  # of one message: the largest datagram, or the longest run
    CONTROL_BYTES = 128  # room for one packet-info, one hop-limit and one segment-size header
    OUTBOX = 64  # messages of one sendmmsg
    RUN_BYTES = 65000  # of one UDP_SEGMENT message: under 65,535 with any header
    RUN_SEGMENTS = 64  # UDP_MAX_SEGMENTS of kernels before 6.10
    EVENT_BATCH = 256
    SINGLE_READS = 4  # in a row that found one message, and no second is asked for
    QUEUE_DATAGRAMS = 64  # of one session while held
    QUEUE_MS = 5000  # older ones are of no use to anybody
    QUEUE_BYTES = 8 << 20  # of all sessions together
    HOPS = 64  # a session starts with no more, so what goes round in a ring of relays ends
    SOCKET_BUFFER = 1 << 20  # bytes asked for a backend socket; the kernel clamps it
    TRIAL_MS = 10  # the kernel of a container on this host refuses within microseconds
    RETRY_FIRST_MS = 15  # doubling: a kernel refuses a peer six times in a row, then once a second
    RETRY_LAST_MS = 1000
    DRAIN_MS = 100  # replies that are on their way get this long
    DRAIN_RECENT_MS = 1000  # and are expected only where there was traffic this recently

cdef enum:
    TO_BACKEND = 0
    TO_CLIENT = 1

cdef enum:  # flags of a session
    REPLIED = 1  # the backend has answered
    ESTABLISHED = 2  # and the client has gone on after the answer: its address is no forgery
    ENDED = 4  # freed at the end of the batch

cdef enum:  # classes of sessions, each a list from the longest idle to the latest
    UNPROVEN = 0
    PROVEN = 1
    CLASSES = 2

cdef enum:  # epoll_event.data where it is no session
    EVENT_LISTENER = 0
    EVENT_CONTROL = 1

cdef enum:  # words of the counters page; datagrams unless they say bytes
    SESSIONS_CREATED = 0
    SESSIONS_ACTIVE
    SESSIONS_EXPIRED
    SESSIONS_EVICTED
    RECEIVED_FROM_CLIENT
    RECEIVED_FROM_BACKEND
    SENT_TO_BACKEND
    SENT_TO_CLIENT
    BYTES_FROM_CLIENT
    BYTES_FROM_BACKEND
    BYTES_TO_BACKEND
    BYTES_TO_CLIENT
    DROPPED_TRUNCATED
    DROPPED_SEND_TO_BACKEND  # the kernel took it not: ENOBUFS, EPERM, EMSGSIZE, no route
    DROPPED_SEND_TO_CLIENT
    DROPPED_NO_BACKEND  # held too long, too many, or -hold 0
    DROPPED_NO_SESSION  # no memory or descriptor for a new client
    DROPPED_LOOPED  # passed on as often as its hop limit allowed
    REFUSED  # the backend's ICMP said that nobody listens
    QUEUED_NOW
    GSO_REFUSED  # runs that a route would not take whole
    MESSAGES_TO_BACKEND  # what the kernel was handed: a run counts once
    MESSAGES_TO_CLIENT
    COUNTERS_END

CONTROL = REASON_CONTROL
DRAINED = REASON_DRAINED

# --------------------------------------------------------------------------------------------- structs

cdef struct key_t:  # what tells two sessions apart; no padding, so that memcmp is right
    uint64_t client[2]
    uint64_t local[2]
    uint32_t zone
    uint32_t port

cdef struct reads_t:  # how a socket has been read
    uint32_t turn  # of the loop, the last time
    uint8_t single  # in a row that asked for more and found one message; SINGLE_READS at most

cdef struct queued_t:
    queued_t *next
    int64_t since
    uint32_t length
    uint8_t gone_ahead  # sent on trial; not again, unless it was refused
    uint8_t data[1]

cdef struct session_t:
    key_t key
    address_t client
    socklen_t client_length
    int fd  # connected to the backend; -1 until there is something to send to one
    uint64_t backend  # id of the one that fd is connected to
    int64_t seen  # ms, the latest traffic either way
    uint16_t whole_limit[2]  # per direction: runs of segments this large were refused; 0: none were
    uint8_t flags
    uint8_t hops  # the hop limit of what it sends to the backend
    uint8_t queue_length
    uint16_t first  # 1 + index of this batch's first message, 0 for none
    uint16_t last
    reads_t reads
    queued_t *queue_head
    queued_t *queue_tail
    session_t *chain  # in the bucket
    session_t *older
    session_t *newer
    session_t *touched  # the next session of this batch, or of those that ended

cdef struct inbox_t:  # BATCH messages to receive into
    mmsghdr messages[BATCH]
    iovec iov[BATCH]
    address_t names[BATCH]
    uint8_t control[BATCH][CONTROL_BYTES]
    uint16_t following[BATCH]  # 1 + index of the same session's next message
    uint32_t spent  # headers from the first on that the kernel has written to
    char *buffers  # BATCH of them, of BUFFER_BYTES each, in pages of their own

cdef struct outbox_t:  # OUTBOX messages to send, each one datagram or a run of equal ones
    mmsghdr messages[OUTBOX]
    iovec iov[OUTBOX]
    uint8_t control[OUTBOX][CONTROL_BYTES]
    session_t *sessions[OUTBOX]
    uint32_t segment[OUTBOX]
    uint32_t segments[OUTBOX]
    uint32_t bytes[OUTBOX]
    uint8_t closed[OUTBOX]  # a shorter datagram ended the run
    uint32_t count
    uint32_t iovs

cdef struct class_t:
    session_t *oldest
    session_t *newest

cdef struct relay_t:
    slabs_t memory  # of the sessions
    int64_t worked_at  # ms; 0 once the buffers' pages have been given back
    int epoll
    int listener
    int control
    reads_t reads  # of the listener
    uint32_t turn
    bint crowded  # more sockets may be ready than this turn was told of
    options_t option
    access_t access
    uint64_t *page  # shared with the parent; written, never read
    uint64_t tally[COUNTERS_END]
    bint updated  # an update has been applied
    uint64_t seed  # of the hash, so that nobody can choose addresses that collide
    uint32_t mask
    session_t **buckets
    class_t classes[CLASSES]
    session_t *ended
    backends_t backends
    uint64_t queued_bytes
    inbox_t *inbox
    uint32_t inbox_used
    outbox_t *outbox
    int64_t unsure_until  # 0 once the backend is known to listen, or is given up on
    session_t *trial  # the one whose first queued datagram has gone ahead
    int64_t trial_at  # when the trial under way counts as passed, or when the next begins
    uint32_t retry_ms
    int64_t now
    int64_t drain_at
    bint draining

# ------------------------------------------------------------------------------------------ the outbox


cdef void outbox_clear(outbox_t *box) noexcept nogil:
    box.count = box.iovs = 0


cdef void outbox_append(
    outbox_t *box, session_t *session, void *data, uint32_t length, uint32_t segment, uint32_t segments
) noexcept nogil:
    """A new message. The caller has seen to it that there is room."""
    cdef uint32_t place = box.count
    box.sessions[place] = session
    box.segment[place] = segment
    box.segments[place] = segments
    box.bytes[place] = length
    box.closed[place] = length != segment * segments
    box.iov[box.iovs].iov_base = data
    box.iov[box.iovs].iov_len = length
    memset(&box.messages[place], 0, sizeof(mmsghdr))
    box.messages[place].msg_hdr.msg_iov = &box.iov[box.iovs]
    box.messages[place].msg_hdr.msg_iovlen = 1
    box.count += 1
    box.iovs += 1


cdef bint outbox_join(
    outbox_t *box, session_t *session, void *data, uint32_t length, uint32_t segment, uint32_t segments
) noexcept nogil:
    """Put it behind the last message as a part of the same run, if it fits one."""
    cdef uint32_t place = box.count - 1
    if box.count == 0 or box.sessions[place] != session or box.closed[place] or length == 0:
        return False
    if segment != box.segment[place] and not (segments == 1 and length < box.segment[place]):
        return False
    if box.segments[place] + segments > RUN_SEGMENTS or box.bytes[place] + length > RUN_BYTES:
        return False
    box.iov[box.iovs].iov_base = data
    box.iov[box.iovs].iov_len = length
    box.iovs += 1
    box.messages[place].msg_hdr.msg_iovlen += 1
    box.segments[place] += segments
    box.bytes[place] += length
    box.closed[place] = box.bytes[place] != box.segments[place] * box.segment[place]
    return True


cdef void outbox_add(
    relay_t *relay, session_t *session, int d, void *data, uint32_t length, uint32_t segment
) noexcept nogil:
    """`data` holds datagrams of `segment` bytes, the last one maybe shorter; it must live until the flush."""
    cdef outbox_t *box = relay.outbox
    cdef uint32_t segments = 1, start = 0, size
    cdef bint whole = relay.option[GSO] and (session.whole_limit[d] == 0 or segment < session.whole_limit[d])
    if segment and segment < length:
        segments = (length + segment - 1) // segment
    else:
        segment = length
    if whole and outbox_join(box, session, data, length, segment, segments):
        return
    if segments == 1 or (whole and segments <= RUN_SEGMENTS and length <= RUN_BYTES):
        outbox_append(box, session, data, length, segment, segments)
        if box.count == OUTBOX or box.iovs == OUTBOX:
            outbox_flush(relay, d)
        return
    while start < length:
        size = min(segment, length - start)
        outbox_append(box, session, <char *>data + start, size, size, 1)
        if box.count == OUTBOX or box.iovs == OUTBOX:
            outbox_flush(relay, d)
        start += segment


cdef void outbox_address(relay_t *relay, uint32_t place, int d) noexcept nogil:
    """The headers of one message: whom to, where from, and the size of its segments if it is a run."""
    cdef outbox_t *box = relay.outbox
    cdef session_t *session = box.sessions[place]
    cdef msghdr *header = &box.messages[place].msg_hdr
    cdef cmsghdr *item
    cdef in6_pktinfo *local6
    cdef in_pktinfo *local4
    cdef size_t used = 0
    if d == TO_BACKEND and box.segments[place] == 1:
        return
    header.msg_control = &box.control[place][0]
    header.msg_controllen = CONTROL_BYTES
    memset(header.msg_control, 0, CONTROL_BYTES)
    item = CMSG_FIRSTHDR(header)
    if d == TO_CLIENT:
        header.msg_name = &session.client
        header.msg_namelen = session.client_length
        if session.client.v6.sin6_family == AF_INET6:
            item.cmsg_level, item.cmsg_type = IPPROTO_IPV6, IPV6_PKTINFO
            item.cmsg_len = CMSG_LEN(sizeof(in6_pktinfo))
            local6 = <in6_pktinfo *>CMSG_DATA(item)
            memcpy(&local6.ipi6_addr, session.key.local, 16)
            used += CMSG_SPACE(sizeof(in6_pktinfo))
        else:
            item.cmsg_level, item.cmsg_type = IPPROTO_IP, IP_PKTINFO
            item.cmsg_len = CMSG_LEN(sizeof(in_pktinfo))
            local4 = <in_pktinfo *>CMSG_DATA(item)
            memcpy(&local4.ipi_spec_dst, session.key.local, 4)
            used += CMSG_SPACE(sizeof(in_pktinfo))
        item = CMSG_NXTHDR(header, item)
    if box.segments[place] > 1:
        item.cmsg_level, item.cmsg_type = IPPROTO_UDP, UDP_SEGMENT
        item.cmsg_len = CMSG_LEN(sizeof(uint16_t))
        (<uint16_t *>CMSG_DATA(item))[0] = box.segment[place]
        used += CMSG_SPACE(sizeof(uint16_t))
    header.msg_controllen = used


cdef void outbox_split(relay_t *relay, int fd, uint32_t place, int d) noexcept nogil:
    """Send a run one datagram at a time: its route would not take it whole."""
    cdef outbox_t *box = relay.outbox
    cdef msghdr header = box.messages[place].msg_hdr
    cdef iovec *run = header.msg_iov
    cdef size_t parts = header.msg_iovlen, i, start
    cdef iovec piece
    # The packet info comes first and stays; the size of the segments, behind it, goes.
    header.msg_controllen -= CMSG_SPACE(sizeof(uint16_t))
    header.msg_iov = &piece
    header.msg_iovlen = 1
    for i in range(parts):
        start = 0
        while start < run[i].iov_len:
            piece.iov_base = <char *>run[i].iov_base + start
            piece.iov_len = min(<size_t>box.segment[place], run[i].iov_len - start)
            start += piece.iov_len
            if sendmsg(fd, &header, MSG_DONTWAIT) < 0:
                relay.tally[DROPPED_SEND_TO_BACKEND + d] += 1
            else:
                relay.tally[SENT_TO_BACKEND + d] += 1
                relay.tally[BYTES_TO_BACKEND + d] += piece.iov_len
                relay.tally[MESSAGES_TO_BACKEND + d] += 1


cdef inline int outbox_send(outbox_t *box, int fd, uint32_t place, int d) noexcept nogil:
    """Messages from `place` on, as sendmmsg(2) answers. A lone datagram to a backend needs no header."""
    if place + 1 < box.count or d == TO_CLIENT or box.segments[place] > 1:
        return sendmmsg(fd, &box.messages[place], box.count - place, MSG_DONTWAIT)
    if send(fd, box.messages[place].msg_hdr.msg_iov.iov_base, box.bytes[place], MSG_DONTWAIT) < 0:
        return -1
    return 1


cdef void outbox_flush(relay_t *relay, int d) noexcept nogil:
    """Send everything in it. To a backend, all messages are of one session; to clients, of any."""
    cdef outbox_t *box = relay.outbox
    cdef uint32_t place = 0, i
    cdef bint retried = False
    cdef int sent
    cdef int fd = relay.listener
    if box.count and d == TO_BACKEND:
        fd = box.sessions[0].fd
    for i in range(box.count):
        outbox_address(relay, i, d)
    while place < box.count:
        sent = outbox_send(box, fd, place, d)
        if sent > 0:
            for i in range(place, place + sent):
                relay.tally[SENT_TO_BACKEND + d] += box.segments[i]
                relay.tally[BYTES_TO_BACKEND + d] += box.bytes[i]
            relay.tally[MESSAGES_TO_BACKEND + d] += sent
            place += sent
            retried = False
        elif errno == EINTR:
            continue
        elif (errno == ECONNREFUSED or (errno == EMSGSIZE and box.segments[place] == 1)) and not retried:
            # ICMP's answer to an earlier datagram, maybe, and not to this one.
            relay.tally[REFUSED] += errno == ECONNREFUSED
            retried = True
        elif box.segments[place] > 1 and (errno == EINVAL or errno == EIO or errno == EMSGSIZE):
            relay.tally[GSO_REFUSED] += 1
            box.sessions[place].whole_limit[d] = box.segment[place]
            outbox_split(relay, fd, place, d)
            place += 1
        else:
            relay.tally[DROPPED_SEND_TO_BACKEND + d] += box.segments[place]
            place += 1
            retried = False
    outbox_clear(box)


# ------------------------------------------------------------------------------------------- the inbox


cdef void inbox_arm(inbox_t *box, uint32_t count) noexcept nogil:
    """Give the first `count` headers their room again: the kernel writes what it used into them."""
    cdef uint32_t i
    for i in range(count):
        box.messages[i].msg_hdr.msg_namelen = sizeof(address_t)
        box.messages[i].msg_hdr.msg_controllen = CONTROL_BYTES
        box.messages[i].msg_hdr.msg_flags = 0


cdef int inbox_receive(relay_t *relay, int fd, reads_t *reads) noexcept nogil:
    """Receive behind what is in use. How many messages came (0 for none, or an error of the past).

    To ask for a message that is not there costs 0.2 us. So where they come one at a time no second is asked
    for. If there is one, epoll tells so in the very next turn, which takes all, and those after it too: so
    only where that turn is sure to have room for this socket.
    """
    cdef inbox_t *box = relay.inbox
    cdef uint32_t most = BATCH - relay.inbox_used
    cdef bint again = reads.turn + 1 == relay.turn
    cdef int got
    inbox_arm(box, box.spent)
    box.spent = 0
    if reads.single == SINGLE_READS and not (again or relay.crowded or relay.draining):
        most = 1
    reads.turn = relay.turn
    while True:
        got = recvmmsg(fd, &box.messages[relay.inbox_used], most, MSG_DONTWAIT, NULL)
        if got >= 0 or errno != EINTR:
            break
    if got < 0 and errno == ECONNREFUSED:
        relay.tally[REFUSED] += 1
    if got <= 0:
        return 0
    box.spent = relay.inbox_used + got
    if got > 1 or (again and reads.single == SINGLE_READS):
        reads.single = 0
    elif most > 1:
        reads.single = min(reads.single + 1, SINGLE_READS)
    return got


cdef uint32_t message_segment(msghdr *header, key_t *key, int *hops) noexcept nogil:
    """The size of a run's datagrams, 0 if it is a single one; fills in where it was sent to, and the hop
    limit that it arrived with.
    """
    cdef cmsghdr *item = CMSG_FIRSTHDR(header)
    cdef uint32_t segment = 0
    while item != NULL:
        if item.cmsg_level == IPPROTO_UDP and item.cmsg_type == UDP_GRO:
            segment = (<int *>CMSG_DATA(item))[0]
        elif key == NULL:
            pass
        elif item.cmsg_level == IPPROTO_IPV6 and item.cmsg_type == IPV6_PKTINFO:
            memcpy(key.local, &(<in6_pktinfo *>CMSG_DATA(item)).ipi6_addr, 16)
        elif item.cmsg_level == IPPROTO_IP and item.cmsg_type == IP_PKTINFO:
            memcpy(key.local, &(<in_pktinfo *>CMSG_DATA(item)).ipi_spec_dst, 4)
        elif (
            item.cmsg_level == IPPROTO_IP and item.cmsg_type == IP_TTL
            or item.cmsg_level == IPPROTO_IPV6 and item.cmsg_type == IPV6_HOPLIMIT
        ):
            hops[0] = (<int *>CMSG_DATA(item))[0]
        item = CMSG_NXTHDR(header, item)
    return segment


cdef inline uint32_t message_datagrams(uint32_t length, uint32_t segment) noexcept nogil:
    if segment == 0 or segment >= length:
        return 1
    return (length + segment - 1) // segment


# --------------------------------------------------------------------------------------------- session


cdef uint32_t key_hash(relay_t *relay, key_t *key) noexcept nogil:
    cdef uint64_t *words = <uint64_t *>key
    cdef uint64_t hash = relay.seed
    cdef uint32_t i
    for i in range(sizeof(key_t) // sizeof(uint64_t)):
        hash = (hash ^ words[i]) * <uint64_t>0x9E3779B97F4A7C15
        hash ^= hash >> 29
    return <uint32_t>(hash >> 32) & relay.mask


cdef void class_remove(relay_t *relay, session_t *session) noexcept nogil:
    cdef class_t *members = &relay.classes[PROVEN if session.flags & ESTABLISHED else UNPROVEN]
    if session.older != NULL:
        session.older.newer = session.newer
    else:
        members.oldest = session.newer
    if session.newer != NULL:
        session.newer.older = session.older
    else:
        members.newest = session.older


cdef void class_add(relay_t *relay, session_t *session) noexcept nogil:
    """As the latest of its class."""
    cdef class_t *members = &relay.classes[PROVEN if session.flags & ESTABLISHED else UNPROVEN]
    session.older = members.newest
    session.newer = NULL
    if members.newest != NULL:
        members.newest.newer = session
    else:
        members.oldest = session
    members.newest = session


cdef void session_seen(relay_t *relay, session_t *session, uint8_t proof) noexcept nogil:
    class_remove(relay, session)
    session.flags |= proof
    session.seen = relay.now
    class_add(relay, session)


cdef void session_dequeue(relay_t *relay, session_t *session, int counter) noexcept nogil:
    """Let go of the oldest that is queued, and count it: as `counter` says, unless it went ahead."""
    cdef queued_t *item = session.queue_head
    if item.gone_ahead:
        relay.tally[SENT_TO_BACKEND] += 1
        relay.tally[BYTES_TO_BACKEND] += item.length
        relay.tally[MESSAGES_TO_BACKEND] += 1
    elif counter:
        relay.tally[counter] += 1
    session.queue_head = item.next
    if session.queue_head == NULL:
        session.queue_tail = NULL
    session.queue_length -= 1
    relay.queued_bytes -= item.length
    relay.tally[QUEUED_NOW] -= 1
    free(item)


cdef void session_hang_up(session_t *session) noexcept nogil:
    if session.fd >= 0:
        close(session.fd)
        session.fd = -1


cdef void session_end(relay_t *relay, session_t *session, int counter) noexcept nogil:
    """Out of the table; its memory goes at the end of the batch."""
    cdef session_t **place = &relay.buckets[key_hash(relay, &session.key)]
    while place[0] != session:
        place = &place[0].chain
    place[0] = session.chain
    class_remove(relay, session)
    while session.queue_head != NULL:
        session_dequeue(relay, session, DROPPED_NO_BACKEND)
    session_hang_up(session)
    if relay.trial == session:
        relay.trial = NULL
        relay.trial_at = relay.now
    session.flags |= ENDED
    session.touched = relay.ended
    relay.ended = session
    relay.tally[SESSIONS_ACTIVE] -= 1
    relay.tally[counter] += 1


cdef bint session_evict(relay_t *relay, session_t *spared) noexcept nogil:
    """Make room for another client. False when there is nobody but `spared` to evict."""
    cdef session_t *victim = relay.classes[UNPROVEN].oldest
    if victim != NULL and victim == spared:
        victim = victim.newer
    if victim == NULL:  # only where there is no other: newcomers must not drive out those that are proven
        victim = relay.classes[PROVEN].oldest
    # One that is part of the batch in hand stays: its messages are about to be sent.
    if victim == NULL or victim == spared or victim.first:
        return False
    session_end(relay, victim, SESSIONS_EVICTED)
    return True


cdef session_t *session_find(relay_t *relay, key_t *key, address_t *client, socklen_t length) noexcept nogil:
    """The client's session, made if there is none; NULL where none can be made."""
    cdef session_t **bucket = &relay.buckets[key_hash(relay, key)]
    cdef session_t *session = bucket[0]
    while session != NULL:
        if memcmp(&session.key, key, sizeof(key_t)) == 0:
            return session
        session = session.chain
    if relay.tally[SESSIONS_ACTIVE] >= <uint64_t>relay.option[MAX_SESSIONS] and not session_evict(relay, NULL):
        return NULL
    session = <session_t *>slabs_take(&relay.memory)
    if session == NULL:
        return NULL
    session.key = key[0]
    session.client = client[0]
    session.client_length = length
    session.fd = -1
    session.seen = relay.now
    session.chain = bucket[0]
    bucket[0] = session
    class_add(relay, session)
    relay.tally[SESSIONS_CREATED] += 1
    relay.tally[SESSIONS_ACTIVE] += 1
    return session


cdef bint session_dial(relay_t *relay, session_t *session) noexcept nogil:
    """Give it a socket that is connected to the next backend. False where there is none or it fails."""
    cdef backend_t *backend
    cdef int on = 1, bytes = SOCKET_BUFFER, hops = session.hops, fd
    if relay.backends.total_weight == 0:
        return False
    backend = backends_next(&relay.backends)
    fd = socket(backend.address.v4.sin_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_UDP)
    if fd < 0 and (errno == EMFILE or errno == ENFILE) and session_evict(relay, session):
        fd = socket(backend.address.v4.sin_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_UDP)
    if fd < 0:
        return False
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes))
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes))
    if relay.option[GSO]:
        setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof(on))
    if backend.address.v4.sin_family == AF_INET6:
        setsockopt(fd, IPPROTO_IPV6, IPV6_UNICAST_HOPS, &hops, sizeof(hops))
    else:
        setsockopt(fd, IPPROTO_IP, IP_TTL, &hops, sizeof(hops))
    if (
        connect(fd, <sockaddr *>&backend.address, backend.length) < 0
        or epoll_add(relay.epoll, fd, EPOLLIN, <uintptr_t>session) < 0
    ):
        close(fd)
        return False
    session.fd = fd
    session.backend = backend.id
    session.whole_limit[TO_BACKEND] = 0
    return True


cdef void session_age_queue(relay_t *relay, session_t *session) noexcept nogil:
    """Drop what has waited too long."""
    cdef int64_t oldest = relay.now - min(<int64_t>relay.option[HOLD], <int64_t>QUEUE_MS)
    while session.queue_head != NULL and session.queue_head.since < oldest:
        session_dequeue(relay, session, DROPPED_NO_BACKEND)


cdef void session_queue(relay_t *relay, session_t *session, char *data, uint32_t length) noexcept nogil:
    """Keep one datagram until there is a backend, within bounds."""
    cdef queued_t *item = NULL
    session_age_queue(relay, session)
    if (
        relay.option[HOLD]
        and session.queue_length < QUEUE_DATAGRAMS
        and relay.queued_bytes + length <= QUEUE_BYTES
    ):
        item = <queued_t *>malloc(sizeof(queued_t) + length)
    if item == NULL:
        relay.tally[DROPPED_NO_BACKEND] += 1
        return
    item.next = NULL
    item.since = relay.now
    item.length = length
    item.gone_ahead = False
    memcpy(item.data, data, length)
    if session.queue_tail != NULL:
        session.queue_tail.next = item
    else:
        session.queue_head = item
    session.queue_tail = item
    session.queue_length += 1
    relay.queued_bytes += length
    relay.tally[QUEUED_NOW] += 1


cdef void session_release(relay_t *relay, session_t *session) noexcept nogil:
    """There is a backend: send what was queued, in its order, before anything newer."""
    cdef queued_t *item
    session_age_queue(relay, session)
    item = session.queue_head
    while item != NULL:
        if not item.gone_ahead:
            outbox_add(relay, session, TO_BACKEND, item.data, item.length, item.length)
        item = item.next
    outbox_flush(relay, TO_BACKEND)
    while session.queue_head != NULL:
        session_dequeue(relay, session, 0)  # the flush has counted it


cdef void trial_begin(relay_t *relay, session_t *session) noexcept nogil:
    """Send the first datagram that `session` has queued; it stays in the queue until the outcome is known.

    Only then is it counted: it may have to be sent again.
    """
    cdef queued_t *item = session.queue_head
    cdef ssize_t sent
    if session.fd < 0 and not session_dial(relay, session):
        relay.trial_at = relay.now + relay.retry_ms
        return
    sent = send(session.fd, item.data, item.length, MSG_DONTWAIT)
    if sent < 0 and errno == ECONNREFUSED:  # ICMP's answer to an earlier one
        relay.tally[REFUSED] += 1
        sent = send(session.fd, item.data, item.length, MSG_DONTWAIT)
    item.gone_ahead = sent >= 0
    relay.trial = session
    relay.trial_at = relay.now + TRIAL_MS


cdef void trial_refused(relay_t *relay) noexcept nogil:
    """What went ahead did not arrive."""
    if relay.trial.queue_head != NULL:
        relay.trial.queue_head.gone_ahead = False
    relay.trial = NULL
    relay.trial_at = relay.now + relay.retry_ms
    relay.retry_ms = min(2 * relay.retry_ms, RETRY_LAST_MS)


cdef void trial_passed(relay_t *relay) noexcept nogil:
    """The backend listens: release everything that waits for it."""
    cdef session_t *session
    cdef session_t *newer
    cdef int i
    relay.unsure_until = 0
    for i in range(CLASSES):
        session = relay.classes[i].oldest
        # Dialling may evict, even the next one: the queues behind it then wait for their next datagram.
        while session != NULL and not session.flags & ENDED:
            newer = session.newer
            if session.queue_head != NULL and (session.fd >= 0 or session_dial(relay, session)):
                session_release(relay, session)
            session = newer
    relay.trial = NULL


cdef void try_backend(relay_t *relay) noexcept nogil:
    """What is due of the trial: it passed in silence, it is over for good, or another begins."""
    cdef session_t *session
    cdef int i
    if not relay.unsure_until or relay.backends.total_weight == 0:
        return
    if relay.unsure_until <= relay.now or (relay.trial != NULL and relay.trial_at <= relay.now):
        trial_passed(relay)
        return
    if relay.trial != NULL or relay.trial_at > relay.now or relay.tally[QUEUED_NOW] == 0:
        return
    for i in range(CLASSES):
        session = relay.classes[i].oldest
        while session != NULL:
            if session.queue_head != NULL:
                trial_begin(relay, session)
                return
            session = session.newer


cdef void session_keep(
    relay_t *relay, session_t *session, char *data, uint32_t length, uint32_t segment
) noexcept nogil:
    """Queue the datagrams of one message, and let the first go ahead if it is time to try the backend."""
    cdef uint32_t start = 0
    if message_datagrams(length, segment) == 1:
        session_queue(relay, session, data, length)
    else:
        while start < length:
            session_queue(relay, session, data + start, min(segment, length - start))
            start += segment
    if relay.unsure_until and relay.trial == NULL and relay.trial_at <= relay.now:
        if session.queue_head != NULL and relay.backends.total_weight:
            trial_begin(relay, session)


cdef void session_forward(relay_t *relay, session_t *session) noexcept nogil:
    """Send on this batch's messages of one client, or queue them while there is no backend, or none sure."""
    cdef inbox_t *box = relay.inbox
    cdef uint32_t i, length, segment, count
    cdef uint32_t following = session.first
    session.first = 0
    while following:
        i = following - 1
        following = box.following[i]
        length = box.messages[i].msg_len
        segment = message_segment(&box.messages[i].msg_hdr, NULL, NULL)
        count = message_datagrams(length, segment)
        # No refusal so far, and no room to wait for one: better too early than not at all.
        if relay.unsure_until and relay.trial != NULL and session.queue_length + count > QUEUE_DATAGRAMS:
            trial_passed(relay)
        if relay.unsure_until or relay.backends.total_weight == 0:
            session_keep(relay, session, <char *>box.iov[i].iov_base, length, segment)
            continue
        if session.fd < 0 and not session_dial(relay, session):
            relay.tally[DROPPED_NO_SESSION] += count
            continue
        if session.queue_head != NULL:
            session_release(relay, session)
        outbox_add(relay, session, TO_BACKEND, box.iov[i].iov_base, length, segment)
    outbox_flush(relay, TO_BACKEND)


cdef void session_receive(relay_t *relay, session_t *session) noexcept nogil:
    """Take replies of one backend socket into the inbox; they leave with the turn's others."""
    cdef inbox_t *box = relay.inbox
    cdef uint32_t i, length, segment, count
    cdef int got
    if session.flags & ENDED or session.fd < 0:  # ended by an earlier event of this batch
        return
    got = inbox_receive(relay, session.fd, &session.reads)
    if got > 0:
        session_seen(relay, session, REPLIED)
        if relay.trial == session:
            relay.trial_at = relay.now
    elif relay.trial == session and errno != EAGAIN:
        trial_refused(relay)
    for i in range(relay.inbox_used, relay.inbox_used + got):
        length = box.messages[i].msg_len
        segment = message_segment(&box.messages[i].msg_hdr, NULL, NULL)
        count = message_datagrams(length, segment)
        relay.tally[RECEIVED_FROM_BACKEND] += count
        relay.tally[BYTES_FROM_BACKEND] += length
        if box.messages[i].msg_hdr.msg_flags & MSG_TRUNC:
            relay.tally[DROPPED_TRUNCATED] += count
        else:
            outbox_add(relay, session, TO_CLIENT, box.iov[i].iov_base, length, segment)
    relay.inbox_used += got
    if relay.inbox_used == BATCH:
        replies_send(relay)


# ------------------------------------------------------------------------------------------------ loop


cdef void replies_send(relay_t *relay) noexcept nogil:
    outbox_flush(relay, TO_CLIENT)
    relay.inbox_used = 0


cdef void clients_receive(relay_t *relay) noexcept nogil:
    """One batch from the listener: find each message's session, then let each session forward its own."""
    cdef inbox_t *box = relay.inbox
    cdef session_t *touched = NULL
    cdef session_t *session
    cdef int got = inbox_receive(relay, relay.listener, &relay.reads)
    cdef int i, hops
    cdef uint32_t segment, count
    cdef key_t key
    for i in range(got):
        memset(&key, 0, sizeof(key))
        hops = HOPS + 1
        segment = message_segment(&box.messages[i].msg_hdr, &key, &hops)
        count = message_datagrams(box.messages[i].msg_len, segment)
        relay.tally[RECEIVED_FROM_CLIENT] += count
        relay.tally[BYTES_FROM_CLIENT] += box.messages[i].msg_len
        if box.messages[i].msg_hdr.msg_flags & MSG_TRUNC:
            relay.tally[DROPPED_TRUNCATED] += count
            continue
        if box.names[i].v6.sin6_family == AF_INET6:
            memcpy(key.client, &box.names[i].v6.sin6_addr, 16)
            key.zone = box.names[i].v6.sin6_scope_id
            key.port = box.names[i].v6.sin6_port
        else:
            memcpy(key.client, &box.names[i].v4.sin_addr, 4)
            key.port = box.names[i].v4.sin_port
        if hops <= 1:
            relay.tally[DROPPED_LOOPED] += count
            continue
        session = session_find(relay, &key, &box.names[i], box.messages[i].msg_hdr.msg_namelen)
        if session != NULL and session.fd < 0:
            session.hops = <uint8_t>min(hops - 1, <int>HOPS)
        if session == NULL:
            relay.tally[DROPPED_NO_SESSION] += count
            continue
        box.following[i] = 0
        if session.first:
            box.following[session.last - 1] = i + 1
        else:
            session.first = i + 1
            session.touched = touched
            touched = session
            session_seen(relay, session, ESTABLISHED if session.flags & REPLIED else 0)
        session.last = i + 1
    while touched != NULL:
        session = touched
        touched = session.touched
        session_forward(relay, session)


cdef void expire(relay_t *relay) noexcept nogil:
    cdef int i
    for i in range(CLASSES):
        while relay.classes[i].oldest != NULL and relay.classes[i].oldest.seen + relay.option[UDP_TIMEOUT] <= relay.now:
            session_end(relay, relay.classes[i].oldest, SESSIONS_EXPIRED)


cdef int next_timeout(relay_t *relay) noexcept nogil:
    """Milliseconds until something is due: a session's end, a trial, or else the next heartbeat."""
    cdef int64_t due = -1
    cdef int i
    for i in range(CLASSES):
        if relay.classes[i].oldest == NULL:
            continue
        if due < 0 or relay.classes[i].oldest.seen + relay.option[UDP_TIMEOUT] < due:
            due = relay.classes[i].oldest.seen + relay.option[UDP_TIMEOUT]
    if relay.unsure_until and relay.backends.total_weight and relay.tally[QUEUED_NOW]:
        if due < 0 or relay.trial_at < due:
            due = relay.trial_at
    if relay.draining and (due < 0 or relay.drain_at < due):
        due = relay.drain_at
    if due < 0:
        return HEARTBEAT_MS
    return <int>min(max(due - relay.now, 0), HEARTBEAT_MS)


cdef void free_ended(relay_t *relay) noexcept nogil:
    cdef session_t *session
    while relay.ended != NULL:
        session = relay.ended
        relay.ended = session.touched
        slabs_give(&relay.memory, session)


cdef inline void buffers_trim(relay_t *relay, int count) noexcept nogil:
    """Give the pages of a burst back when there has been nothing to do for a heartbeat."""
    if count > 0:
        relay.worked_at = relay.now
    elif relay.worked_at and relay.worked_at + HEARTBEAT_MS <= relay.now:
        relay.worked_at = 0
        madvise(relay.inbox.buffers, BATCH * BUFFER_BYTES, MADV_DONTNEED)


cdef inline void publish(relay_t *relay) noexcept nogil:
    """Show the tally to the parent."""
    memcpy(relay.page + COUNTER_OWN, relay.tally, sizeof(relay.tally))


cdef int relay_run(relay_t *relay) noexcept nogil:
    """Until the control pipe has something to read, or draining is over. -1 with errno if epoll fails."""
    cdef epoll_event events[EVENT_BATCH]
    cdef int count, i
    cdef bint control = False, clients
    while True:
        count = epoll_wait(relay.epoll, events, EVENT_BATCH, next_timeout(relay))
        if count < 0 and errno != EINTR:
            return -1
        relay.now = monotonic_ms()
        relay.page[COUNTER_HEARTBEAT] = relay.now
        clients = False
        relay.turn += 1
        relay.crowded = count == EVENT_BATCH
        buffers_trim(relay, count)
        for i in range(max(count, 0)):
            if events[i].data.u64 == EVENT_LISTENER:
                clients = True
            elif events[i].data.u64 == EVENT_CONTROL:
                control = True
            else:
                session_receive(relay, <session_t *><uintptr_t>events[i].data.u64)
        replies_send(relay)
        if clients:
            clients_receive(relay)
        try_backend(relay)
        expire(relay)
        free_ended(relay)
        publish(relay)
        if control:
            return REASON_CONTROL
        if relay.draining and relay.drain_at <= relay.now:
            return REASON_DRAINED


cdef void relay_repointed(relay_t *relay) noexcept nogil:
    """Sessions keep their clients; those whose backend is gone let go of it, and the new one is tried."""
    cdef session_t *session
    cdef int i
    for i in range(CLASSES):
        session = relay.classes[i].oldest
        while session != NULL:
            if session.fd >= 0 and not backends_have(&relay.backends, session.backend):
                session_hang_up(session)
            session = session.newer
    # Nobody has refused what went ahead to the last backend: it counts as sent, and is not sent twice.
    if relay.trial != NULL and relay.trial.queue_head != NULL and relay.trial.queue_head.gone_ahead:
        session_dequeue(relay, relay.trial, 0)
    relay.trial = NULL
    relay.trial_at = relay.now
    relay.retry_ms = RETRY_FIRST_MS
    # The first list of all names, as a rule, a target that has been running for long.
    relay.unsure_until = 0
    if relay.option[HOLD] and relay.updated:
        relay.unsure_until = relay.now + min(<int64_t>relay.option[HOLD], <int64_t>QUEUE_MS)
    try_backend(relay)
    free_ended(relay)


# ---------------------------------------------------------------------------------------- the Python API


cdef class UdpLoop:
    """The loop of one worker, over a bound datagram socket.

    `listener` (non-blocking, reporting packet info; sockets.bind makes such a one) and `control` (the read
    end of the control pipe, non-blocking) stay the caller's. `counters` is a descriptor of the page that is
    shared with the parent; the loop maps it, and the caller may close it then. The loop relays nothing before
    its first `update`. Raises OSError if the kernel refuses, and MemoryError.
    """

    cdef relay_t relay

    def __cinit__(self, int listener, int control, int counters):
        cdef uint32_t i
        cdef inbox_t *box
        memset(&self.relay, 0, sizeof(relay_t))
        self.relay.epoll = -1
        self.relay.page = counters_map(counters, True)
        if self.relay.page == NULL:
            raise OSError(errno, "mmap of the counters page")
        self.relay.listener, self.relay.control = listener, control
        self.relay.now = monotonic_ms()
        slabs_init(&self.relay.memory, sizeof(session_t))
        self.relay.seed = int.from_bytes(os.urandom(8), "little")
        self.relay.mask = BUCKETS - 1
        self.relay.buckets = <session_t **>pages_map(BUCKETS * sizeof(session_t *))
        self.relay.inbox = box = <inbox_t *>pages_map(sizeof(inbox_t))
        self.relay.outbox = <outbox_t *>pages_map(sizeof(outbox_t))
        if self.relay.buckets == NULL or self.relay.inbox == NULL or self.relay.outbox == NULL:
            raise MemoryError
        box.buffers = <char *>pages_map(BATCH * BUFFER_BYTES)
        if box.buffers == NULL:
            raise MemoryError
        for i in range(<uint32_t>BATCH):
            box.iov[i].iov_base = box.buffers + i * BUFFER_BYTES
            box.iov[i].iov_len = BUFFER_BYTES
            box.messages[i].msg_hdr.msg_iov = &box.iov[i]
            box.messages[i].msg_hdr.msg_iovlen = 1
            box.messages[i].msg_hdr.msg_control = &box.control[i][0]
            box.messages[i].msg_hdr.msg_name = &box.names[i]
        inbox_arm(box, BATCH)
        self.relay.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.relay.epoll < 0:
            raise OSError(errno, "epoll_create1")
        if epoll_add(self.relay.epoll, listener, EPOLLIN, EVENT_LISTENER) < 0:
            raise OSError(errno, "epoll_ctl of the listener")
        if epoll_add(self.relay.epoll, control, EPOLLIN, EVENT_CONTROL) < 0:
            raise OSError(errno, "epoll_ctl of the control pipe")
        self.relay.page[COUNTER_VERSION] = COUNTERS_VERSION

    def __dealloc__(self):
        cdef relay_t *relay = &self.relay
        cdef int i
        if relay.page == NULL:
            return
        for i in range(CLASSES):
            while relay.classes[i].oldest != NULL:
                session_end(relay, relay.classes[i].oldest, SESSIONS_EXPIRED)
        free_ended(relay)
        if relay.epoll >= 0:
            close(relay.epoll)
        if relay.inbox != NULL and relay.inbox.buffers != NULL:
            munmap(relay.inbox.buffers, BATCH * BUFFER_BYTES)
        if relay.inbox != NULL:
            munmap(relay.inbox, sizeof(inbox_t))
        if relay.outbox != NULL:
            munmap(relay.outbox, sizeof(outbox_t))
        if relay.buckets != NULL:
            munmap(relay.buckets, (relay.mask + 1) * sizeof(session_t *))
        slabs_free(&relay.memory)
        free(relay.backends.items)
        free(relay.access.items)
        publish(relay)
        counters_unmap(relay.page)

    def update(self, uint64_t generation, bytes payload):
        """The whole state from now on, as an Update record carries it. Raises ValueError for what is none.

        No backend means hold. A session to a backend that is not in the list gets a new socket with its next
        datagram; nothing that the old one still receives is forwarded.
        """
        cdef update_view_t view
        cdef options_t option
        cdef bint changed
        update_read(PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload), &view, option)
        if not option[MAX_SESSIONS]:
            raise ValueError("a session table needs room for one")
        access_replace(&self.relay.access, &view)
        changed = backends_replace(&self.relay.backends, &view)
        memcpy(self.relay.option, option, sizeof(options_t))
        with nogil:
            self.relay.now = monotonic_ms()
            if changed:
                relay_repointed(&self.relay)
            publish(&self.relay)
        self.relay.updated = True
        self.relay.page[COUNTER_BACKENDS] = self.relay.backends.count
        self.relay.page[COUNTER_GENERATION] = generation

    def drain(self, uint32_t deadline_ms):
        """Read no more from clients; `run` returns DRAINED once replies have had time to arrive."""
        cdef int i
        cdef bint recent = False
        if self.relay.draining:
            return
        epoll_ctl(self.relay.epoll, EPOLL_CTL_DEL, self.relay.listener, NULL)
        self.relay.draining = True
        self.relay.now = monotonic_ms()
        for i in range(CLASSES):
            if self.relay.classes[i].newest != NULL:
                recent = recent or self.relay.classes[i].newest.seen + DRAIN_RECENT_MS > self.relay.now
        self.relay.drain_at = self.relay.now + (min(deadline_ms, <uint32_t>DRAIN_MS) if recent else 0)

    def run(self):
        """Relay until there is something for Python to do: CONTROL or DRAINED. Raises OSError."""
        cdef int reason
        with nogil:
            reason = relay_run(&self.relay)
        if reason < 0:
            raise OSError(errno, "epoll_wait")
        return reason
