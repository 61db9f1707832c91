"""What both relay loops share: the clock, and a backend's address ready for connect(2).

Inline functions only, so that each loop is still one compiled module that imports nothing.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset

from ambassador._linux cimport (
    AF_INET,
    AF_INET6,
    CLOCK_MONOTONIC,
    MAP_FAILED,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    clock_gettime,
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
    COUNTER_OWN = 8

cdef enum:
    COUNTERS_VERSION = 1
    COUNTERS_BYTES = 4096

ctypedef union address_t:
    sockaddr_in v4
    sockaddr_in6 v6

cdef struct backend_t:
    uint64_t identity  # the supervisor's number for this run of this container at this address
    socklen_t length
    address_t address


cdef inline uint64_t *counters_map(int fd) noexcept nogil:
    """The counters page behind `fd`, NULL with errno where it cannot be had."""
    cdef void *page = mmap(NULL, COUNTERS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    return NULL if page == MAP_FAILED else <uint64_t *>page


cdef inline void counters_unmap(uint64_t *page) noexcept nogil:
    munmap(page, COUNTERS_BYTES)


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
