"""The TCP loop's limits, enums, counters and structs. Its parts cimport all of it.

`loop.tally` and the page are written and never read: what decides is a field of the loop.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ambassador._access cimport access_t
from ambassador._backends cimport backends_t
from ambassador._list cimport link_t, list_t
from ambassador._options cimport options_t
from ambassador._slab cimport slabs_t

# ---------------------------------------------------------------------------------------------- limits

cdef enum:
    COPY_BYTES = 65536  # of one read while copying
    FULL_READ = COPY_BYTES // 2  # bytes; segments do not fit the buffer, so a full read may be shorter
    FULL_READS = 3  # in a row make a direction bulk (HAProxy's rule)
    SMALL_MOVE = 16384  # bytes; below this a splice costs more than a copy
    SMALL_MOVES = 3  # in a row make a direction copy again
    TURN_BYTES = 1 << 20  # a direction moves about this much before others get their turn
    MAX_DEFERRED = 256  # small reads that wait for the end of their batch; further ones are sent at once

cdef enum:
    MIN_PIPE_BYTES = 65536  # a smaller pipe is worse than copying
    SPLICE_BYTES = 1 << 30  # no limit: a pipe's slots are the limit, and each holds up to a large page
    PIPES_AGAIN_MS = 1000  # after the kernel gave none: each try costs up to five calls
    MAX_POOLED_PIPES = 64  # kept open during a burst: 64 x 1 MiB is the default user's share

cdef enum:
    MAX_SPARE = 64  # backend sockets kept for the next client during a burst
    ACCEPT_BATCH = 4  # connections a turn: HAProxy measured 4 better than 64
    MAX_AHEAD = 4  # connections over its fair share, and an eighth of that, that a worker may have
    ACCEPT_PAUSE_MS = 100  # without a free descriptor
    RETRY_FIRST_MS = 10  # a starting server listens within tens of milliseconds of its container's start
    RETRY_LAST_MS = 100
    MAX_FAILURES = 255  # backends that one client tries before it is held

cdef enum:
    KEEPALIVE_AFTER_MS = 10000  # short connections need none, and its six calls are a third of their cost
    KEEPALIVE_IDLE_S = 30  # plus 0 to KEEPALIVE_SPREAD_S - 1, different for each connection
    KEEPALIVE_SPREAD_S = 61
    KEEPALIVE_STEP = 23  # shares no divisor with the spread, so it reaches every value
    KEEPALIVE_INTERVAL_S = 10
    KEEPALIVE_COUNT = 6
    LINGER_MS = 60000  # a socket with a queue is kept so long after its end, before a drain
    MAX_LINGERING = 64  # of these; a drain keeps all
    SETTLE_MS = 200  # a drain gives the kernel this time after the last end that it did not see
    EXPIRE_SHARE = 16  # idle connections are looked at every 1/16 of their deadline, so it is kept to 6 %

# ----------------------------------------------------------------------------------------------- enums

cdef enum:  # sides: direction d reads from side d and writes to side 1 - d
    CLIENT = 0
    BACKEND = 1

cdef enum:  # directions
    TO_BACKEND = 0
    TO_CLIENT = 1

cdef enum:  # states of a connection, each with a list
    STATE_CONNECTING = 0
    STATE_HELD
    STATE_OPEN
    STATE_CLOSED
    STATE_SPARE
    STATE_LINGERING  # ended and counted; the kernel still has bytes for the client
    STATES

cdef enum:  # ready bits of a socket: who sets and clears them is in _ready.pxd
    READ_READY = 1  # read again
    WRITE_READY = 2  # write again
    END_QUEUED = 4  # a short read is not the last one
    ERROR_QUEUED = 8  # after end of file: reset
    FIN_QUEUED = 16  # behind a short read is only the FIN
    URGENT_QUEUED = 32  # splice stops at the mark: copy
    READ_PAUSED = 64  # epoll does not report bytes

cdef enum:  # flags of a direction
    SPLICING = 1
    SOURCE_ENDED = 2  # end of file was read
    END_FORWARDED = 4
    DESTINATION_CLOSED = 8  # no write succeeds; its last bytes are still read, then a reset follows
    DEFERRED = 16  # `unsent` is a part of the loop's buffer, until the end of the batch
    BULK = 32  # was spliced once: the kernel has given its sockets large buffers

cdef enum:  # marks of a connection
    WAS_HELD = 1
    BECOMES_SPARE = 2  # once closed

cdef enum:  # results of a pump
    PUMP_WAIT = 0  # for an event
    PUMP_MORE = 1  # call again: the budget is spent
    PUMP_FAILED = 2  # reset the connection

cdef enum:
    NO_MEMORY = -2  # bytes were read, and there is no memory to keep them

cdef enum:  # counters: the rows of counters.py TCP, in their order (a test compares)
    ACCEPTED = 0
    ACTIVE
    CLOSED
    RESET
    REJECTED
    HELD
    HELD_TOTAL
    DIAL_FAILED
    REJECTED_REFUSED
    REJECTED_UNANSWERED
    NO_LOCAL_PORT
    NO_DESCRIPTOR
    RECEIVED_FROM_CLIENT  # + d: received = sent + in flight + discarded
    RECEIVED_FROM_BACKEND
    SENT_TO_BACKEND  # + d
    SENT_TO_CLIENT
    DISCARDED_TO_BACKEND  # + d
    DISCARDED_TO_CLIENT
    PIPES_OPEN
    OVER_LIMIT
    IDLE_CLOSED
    HALF_CLOSED_TOO_LONG
    SPARE
    REUSED
    COUNTERS_END

# --------------------------------------------------------------------------------------------- structs

cdef struct pipe_t:
    int read_end
    int write_end
    uint32_t capacity  # bytes, read back from the kernel
    uint32_t bytes  # in flight
    pipe_t *next

cdef struct direction_t:
    pipe_t *pipe  # borrowed; NULL unless splicing with bytes in flight
    char *unsent  # the unsent rest of a copied read; NULL if there is none
    uint32_t unsent_start
    uint32_t unsent_end
    uint8_t flags
    uint8_t streak  # full reads while copying, small moves while splicing
    uint32_t ended_at  # low bits of the ms at which its end was forwarded

cdef struct waiting_t:
    int64_t hold_until  # ms; after this no attempt to connect begins
    int64_t connect_by  # ms; deadline of the attempt under way

cdef struct open_t:
    int64_t moved_at  # ms; when a byte last moved; set only if there is an idle timeout
    int64_t keepalive_at  # ms; when to begin keepalive

cdef union times_t:
    waiting_t waiting  # connecting or held
    open_t open
    int64_t linger_until  # ms; after this the kernel is left alone with what is queued

cdef struct connection_t:  # 128 bytes, two cache lines
    link_t link
    int fd[2]  # CLIENT, BACKEND; the backend's is -1 while held
    uint8_t ready[2]
    uint8_t state
    uint8_t on_ready_list
    uint8_t marks  # WAS_HELD, BECOMES_SPARE
    uint8_t sends  # to the backend, counted up to 2
    uint8_t failures  # backends that failed since it was accepted, held or released
    uint8_t family  # of the backend's socket
    direction_t direction[2]  # TO_BACKEND, TO_CLIENT
    uint64_t backend  # id of the one that was dialled
    times_t times
    connection_t *next_ready

cdef struct deferred_t:
    connection_t *connection
    int d

cdef struct workspace_t:  # in pages of its own, which take memory only once they are used
    char buffer[2 * COPY_BYTES]  # for every copied read: room for one behind the deferred bytes
    deferred_t deferred[MAX_DEFERRED]

cdef struct loop_t:
    int epoll
    int listener
    int control
    options_t option
    access_t access
    backends_t backends
    int64_t now  # ms
    # Shown to others.
    uint64_t tally[COUNTERS_END]
    uint64_t *page  # shared with the parent
    uint64_t **siblings  # pages of the listener's other workers, to read
    uint32_t sibling_count
    # Connections.
    slabs_t connections
    list_t lists[STATES]
    connection_t *ready_head
    connection_t *ready_tail
    connection_t *keepalive_next  # the first open one without keepalive; all behind it are younger
    uint32_t keepalive_turn
    uint32_t spare_count  # spare sockets, with those of connections that become spare
    connection_t *probe  # the held connection that tries the backend
    uint32_t retry_ms
    int reject_counter  # REJECTED_..., as the latest dial failed; 0 if none has since a backend came
    uint16_t first_local_port  # the kernel's range of local ports
    uint16_t last_local_port
    # Moving bytes.
    workspace_t *workspace
    uint32_t deferred_bytes  # at the start of the buffer, COPY_BYTES at most
    uint32_t deferred_count
    bint deferring  # a batch of several events is being handled
    bint moved  # a byte, in the pump under way
    bint no_splice  # the kernel or a seccomp filter refuses it
    pipe_t *pool
    uint32_t pooled
    int64_t pipes_at  # until then the kernel is not asked for pipes
    # When; 0 is never.
    int64_t probe_at
    int64_t expire_at  # when an idle or half-closed connection may be due
    int64_t accept_at  # when accepting resumes
    int64_t yielded_at  # when this worker last went behind its siblings at the listener
    int64_t ended_at  # when a connection last ended without being asked for its queue
    int64_t drain_at
    int64_t busy_at
    bint draining
    bint out_of_descriptors  # or of memory: pause accepting
