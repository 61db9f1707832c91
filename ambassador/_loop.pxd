"""What both loops share: epoll's first steps, the clock, pages of memory.

Inline functions only, so that each loop is still one compiled module that imports nothing.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ambassador._linux cimport (
    CLOCK_MONOTONIC,
    EPOLL_CTL_ADD,
    EPOLL_CTL_MOD,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
    clock_gettime,
    epoll_ctl,
    epoll_event,
    mmap,
    timespec,
)

cdef enum:
    HEARTBEAT_MS = 2000  # an idle loop turns this often, so that the parent can tell it from one that is stuck

cdef enum:  # why a loop returned to Python
    REASON_CONTROL = 1
    REASON_DRAINED = 2


cdef inline void *pages_map(size_t length) noexcept nogil:
    """`length` bytes of zeroes in pages of their own, NULL without memory; the caller unmaps them (munmap).

    They take memory once they are written to. calloc would clear, and so copy, pages of the heap that is shared
    with the fork server.
    """
    cdef void *pages = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    return NULL if pages == MAP_FAILED else pages


cdef inline int64_t monotonic_ms() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec * 1000 + now.tv_nsec // 1000000


cdef inline int epoll_add(int epoll, int fd, uint32_t events, uint64_t data) noexcept nogil:
    """Be told of `events` at `fd` as `data`; -1 with errno."""
    cdef epoll_event event
    event.events = events
    event.data.u64 = data
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)


cdef inline int epoll_change(int epoll, int fd, uint32_t events, uint64_t data) noexcept nogil:
    """Be told of other events at an `fd` that is watched already; -1 with errno."""
    cdef epoll_event event
    event.events = events
    event.data.u64 = data
    return epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event)
