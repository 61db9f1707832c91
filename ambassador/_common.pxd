"""What both relay loops share: the clock, the counters page, the list of backends, epoll's first steps.

Inline functions only, so that each loop is still one compiled module that imports nothing.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from ambassador._linux cimport (
    AF_INET,
    AF_INET6,
    CLOCK_MONOTONIC,
    EPOLL_CTL_ADD,
    EPOLL_CTL_MOD,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    clock_gettime,
    epoll_ctl,
    epoll_event,
    htons,
    mmap,
    munmap,
    sockaddr_in,
    sockaddr_in6,
    socklen_t,
    timespec,
)

cdef enum:
    # Words of the counters page that mean the same in every loop; a loop's own follow from COUNTER_OWN.
    COUNTER_VERSION = 0
    COUNTER_GENERATION = 1  # of the list of backends in force
    COUNTER_BACKENDS = 2  # how many there are in it
    COUNTER_HEARTBEAT = 3  # CLOCK_MONOTONIC in ms at the latest turn of the loop; 0 until the first
    COUNTER_SANDBOX = 7  # what the worker gave up (_sandbox.pyx); 0 until it has
    COUNTER_OWN = 8

cdef enum:
    COUNTERS_VERSION = 1
    COUNTERS_BYTES = 4096  # of one worker's page; the file has one for each slot of the listener
    COUNTERS_WORDS = COUNTERS_BYTES // 8
    HEARTBEAT_MS = 2000  # an idle loop turns this often, so that the parent can tell it from one that is stuck

ctypedef union address_t:
    sockaddr_in v4
    sockaddr_in6 v6

cdef struct backend_t:
    uint64_t identity  # the supervisor's number for this run of this container at this address
    socklen_t length
    address_t address


cdef struct backends_t:  # the newest list; replaced whole
    backend_t *items
    uint32_t count
    uint32_t turn


cdef inline uint64_t *counters_map(int fd, uint32_t slot, uint32_t slots) noexcept nogil:
    """The page of `slot` among those behind `fd`, all of them mapped; NULL with errno if it cannot be had."""
    cdef void *pages = mmap(NULL, slots * COUNTERS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    return NULL if pages == MAP_FAILED else <uint64_t *>pages + slot * COUNTERS_WORDS


cdef inline void counters_unmap(uint64_t *page, uint32_t slot, uint32_t slots) noexcept nogil:
    munmap(page - slot * COUNTERS_WORDS, slots * COUNTERS_BYTES)


cdef inline void *pages_map(size_t length) noexcept nogil:
    """`length` bytes of zeroes in pages of their own, NULL without memory; the caller unmaps them (munmap).

    They are memory only once they are written to. Not calloc: what it finds in the heap that the worker was
    born with it must clear, and so copy.
    """
    cdef void *pages = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    return NULL if pages == MAP_FAILED else pages


cdef inline int64_t monotonic_ms() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1000 + now.tv_nsec // 1000000


cdef inline void backend_set(
    backend_t *backend, const unsigned char *packed, size_t length, int port, int zone, uint64_t identity
) noexcept:
    """`packed` is an address in network order: 4 bytes for IPv4, 16 for IPv6."""
    memset(backend, 0, sizeof(backend_t))
    backend.identity = identity
    if length == 4:
        backend.address.v4.sin_family = AF_INET
        backend.address.v4.sin_port = htons(port)
        memcpy(&backend.address.v4.sin_addr, packed, 4)
        backend.length = sizeof(sockaddr_in)
    else:
        backend.address.v6.sin6_family = AF_INET6
        backend.address.v6.sin6_port = htons(port)
        backend.address.v6.sin6_scope_id = zone
        memcpy(&backend.address.v6.sin6_addr, packed, 16)
        backend.length = sizeof(sockaddr_in6)


cdef inline int backends_replace(backends_t *backends, list given) except -1:
    """The new list, each `(packed address, port, zone index, identity)`. Raises MemoryError."""
    cdef uint32_t count = len(given), i
    cdef backend_t *fresh = <backend_t *>calloc(count + 1, sizeof(backend_t))
    if fresh == NULL:
        raise MemoryError
    for i in range(count):
        packed, port, zone, identity = given[i]
        backend_set(&fresh[i], packed, len(packed), port, zone, identity)
    free(backends.items)
    backends.items, backends.count = fresh, count
    return 0


cdef inline backend_t *backends_next(backends_t *backends) noexcept nogil:
    """Each in its turn. There must be one."""
    cdef backend_t *backend = &backends.items[backends.turn % backends.count]
    backends.turn += 1
    return backend


cdef inline bint backends_have(backends_t *backends, uint64_t identity) noexcept nogil:
    cdef uint32_t i
    for i in range(backends.count):
        if backends.items[i].identity == identity:
            return True
    return False


cdef inline int watch(int epoll, int fd, uint32_t events, uint64_t data) noexcept nogil:
    """Be told of `events` at `fd` as `data`; -1 with errno."""
    cdef epoll_event event
    event.events = events
    event.data.u64 = data
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)


cdef inline int watch_again(int epoll, int fd, uint32_t events, uint64_t data) noexcept nogil:
    """Be told of other events at an `fd` that is watched already; -1 with errno."""
    cdef epoll_event event
    event.events = events
    event.data.u64 = data
    return epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event)
