"""The UDP loop's limits, enums, counters and structs. No functions.

_dial.pxd, _batch.pxd, _session.pxd and _datagram.pyx work on these; each may use what stands before it in
this list.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ambassador._access cimport access_t
from ambassador._backends cimport address_t, backends_t
from ambassador._linux cimport iovec, mmsghdr, socklen_t
from ambassador._list cimport link_t, list_t
from ambassador._options cimport options_t
from ambassador._slab cimport slabs_t

# ---------------------------------------------------------------------------------------------- limits

cdef enum:
    BUCKETS = 1 << 16  # of the session table; pages that no session is in take no memory
    RECEIVE_BATCH = 32  # messages of one recvmmsg; with GRO each may be a run of many datagrams
    BUFFER_BYTES = 65536  # of one message: the largest datagram, or the longest run
    HEADER_BYTES = 128  # room for one packet-info, one hop-limit and one segment-size header
    SEND_BATCH = 64  # messages of one sendmmsg
    MAX_RUN_BYTES = 65000  # of one UDP_SEGMENT message: under 65,535 with any header
    MAX_RUN_SEGMENTS = 64  # UDP_MAX_SEGMENTS of kernels before 6.10
    SINGLE_READS = 4  # in a row that found one message: then a read asks for no second
    MAX_QUEUED = 64  # datagrams of one session
    MAX_QUEUED_MS = 5000  # an older datagram is of no use to anybody
    MAX_QUEUED_BYTES = 8 << 20  # of all sessions together
    MAX_HOPS = 224  # what a relay sends first: more than any system starts with but 255
    MIN_HOPS = 160  # what came down to this went through 64 relays: a ring
    FOREIGN_HOPS = 128  # no relay's: systems start with 128 or less, and no path takes 32 off MIN_HOPS
    SOCKET_BUFFER = 1 << 20  # bytes asked for a backend socket; the kernel clamps it
    PROBE_MS = 10  # the kernel of a container on this host refuses within microseconds
    PROBE_RETRY_MS = 15  # doubling: a kernel refuses a peer six times in a row, then once a second
    MAX_PROBE_RETRY_MS = 1000
    UNASSURED_SHARE = 3  # an unassured session lives for this part of udp-timeout: forged ones end early
    MAX_EVICT_LOOKS = 64  # sessions without a socket that are passed over to find one with a socket
    DIAL_ATTEMPTS = 4  # for one session: a socket may meet itself
    REDIAL_MS = 1000  # a session's socket is connected anew no sooner than this
    DRAIN_MS = 100  # replies that are on their way get this long
    DRAIN_RECENT_MS = 1000  # and are expected only if there was traffic this recently

# ----------------------------------------------------------------------------------------------- enums

cdef enum:  # directions
    TO_BACKEND = 0
    TO_CLIENT = 1

cdef enum:  # flags of a session
    SEEN_REPLY = 1  # the backend has answered
    ASSURED = 2  # and the client has sent again after the answer: its address is not forged
    SETTLED = 4  # its backend listened before the latest backend came: it does not wait for the probe
    CLOSED = 8  # freed at the end of the turn
    KERNEL_SOURCE = 16  # the kernel chooses the address that replies leave from

cdef enum:  # lists of sessions, each from the longest idle to the latest
    UNASSURED_LIST = 0
    ASSURED_LIST = 1
    SESSION_LISTS = 2

cdef enum:  # counters, in the order of counters.py; datagrams unless they say bytes
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
    DROPPED_SEND_TO_BACKEND  # the kernel refused it: ENOBUFS, EPERM, EMSGSIZE, no route
    DROPPED_SEND_TO_CLIENT
    DROPPED_NO_BACKEND  # held too long, too many, or -hold 0
    DROPPED_NO_SESSION  # no memory or descriptor for a new client
    DROPPED_NO_LOCAL_PORT  # all are taken
    DROPPED_LOOPED  # from a backend or this listener, or passed on by 64 relays
    REFUSED  # ICMP from a backend: nobody listens
    QUEUED
    GSO_REFUSED  # runs that a route did not take whole
    MESSAGES_TO_BACKEND  # passed to the kernel: a run counts once
    MESSAGES_TO_CLIENT
    COUNTERS_END

# --------------------------------------------------------------------------------------------- structs

cdef struct key_t:  # tells two sessions apart; no padding, so that memcmp is right
    uint64_t client[2]
    uint64_t local[2]
    uint32_t zone
    uint32_t port

cdef struct reads_t:  # how a socket has been read
    uint32_t turn  # of the loop, the last time
    uint8_t single  # reads in a row that asked for more and found one message; SINGLE_READS at most

cdef struct queued_t:  # a datagram that waits for a backend
    queued_t *next
    int64_t since
    uint32_t length
    uint8_t probe_sent  # sent as the probe; sent again only if it was refused
    uint8_t data[1]

cdef struct session_t:
    link_t link  # in one of the lists
    key_t key
    address_t client
    socklen_t client_length
    int fd  # connected to the backend; -1 until there is something to send
    uint64_t backend  # id of the backend that fd is connected to
    int64_t seen  # ms, the latest traffic either way
    int64_t redialled_at  # ms, the latest time that fd was connected anew
    uint16_t gso_max[2]  # per direction: runs of segments this large were refused; 0: none were
    uint8_t flags
    uint8_t hops  # the hop limit of what it sends to the backend; it only rises
    uint8_t queue_length
    uint16_t first  # 1 + index of its first message in the receive batch, 0 for none
    uint16_t last
    reads_t reads
    queued_t *queue_head
    queued_t *queue_tail
    session_t *chain  # in the bucket
    session_t *touched  # the next session of this batch, or of the closed ones

cdef struct receive_batch_t:
    mmsghdr messages[RECEIVE_BATCH]
    iovec iov[RECEIVE_BATCH]
    address_t names[RECEIVE_BATCH]
    uint8_t control[RECEIVE_BATCH][HEADER_BYTES]
    uint16_t following[RECEIVE_BATCH]  # 1 + index of the same session's next message
    uint32_t used  # messages from the first on whose buffers are still to be sent
    uint32_t dirty  # headers from the first on that the kernel has written to
    char *buffers  # RECEIVE_BATCH of them, of BUFFER_BYTES each, in pages of their own

cdef struct send_batch_t:  # each message is one datagram or a run of equal ones
    mmsghdr messages[SEND_BATCH]
    iovec iov[SEND_BATCH]
    uint8_t control[SEND_BATCH][HEADER_BYTES]
    session_t *sessions[SEND_BATCH]
    uint32_t segment[SEND_BATCH]
    uint32_t segments[SEND_BATCH]
    uint32_t bytes[SEND_BATCH]
    uint8_t complete[SEND_BATCH]  # a shorter datagram ended the run
    uint32_t count
    uint32_t iovs

cdef struct loop_t:
    slabs_t memory  # of the sessions
    int64_t now
    int64_t busy_at  # ms, the latest turn with events; 0 once the buffers' pages were given back
    int epoll
    int listener
    int control
    uint16_t port  # of the listener, as in an address
    reads_t reads  # of the listener
    uint32_t turn
    bint batch_full  # more sockets may be ready than this turn was told of
    options_t option
    access_t access
    backends_t backends
    bint updated  # an update has been applied
    uint64_t *page  # shared with the parent; written, never read
    uint64_t tally[COUNTERS_END]  # written, never read: `publish` copies it to the page
    uint64_t seed  # of the hash, so that nobody can choose addresses that collide
    session_t **buckets
    list_t lists[SESSION_LISTS]
    session_t *closed
    uint32_t queued  # datagrams of all sessions
    uint64_t queued_bytes
    receive_batch_t *receive_batch
    send_batch_t *send_batch
    int64_t probing_until  # 0: the backends are known to listen, or were given up on
    session_t *probe  # the session whose first queued datagram was sent as the probe
    int64_t probe_at  # when the probe under way counts as passed, or when the next may start
    uint32_t retry_ms
    int64_t drain_at
    bint draining
