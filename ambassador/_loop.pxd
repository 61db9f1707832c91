"""What both loops share: epoll, the clock, the heartbeat, deadlines, pages of memory.

Inline functions only, so that each loop is still one compiled module that imports nothing.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ambassador._counters cimport COUNTER_HEARTBEAT
from ambassador._linux cimport (
    CLOCK_MONOTONIC,
    EINTR,
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
    epoll_wait,
    errno,
    mmap,
    timespec,
)

cdef enum:
    HEARTBEAT_MS = 2000  # an idle loop turns this often, so that the parent can tell it from a stuck one
    MAX_EVENTS = 256  # of one turn

cdef enum:  # epoll_event.data of the loop's own descriptors; all else is a pointer
    EVENT_LISTENER = 0
    EVENT_CONTROL = 1

cdef enum:  # why a loop returned to Python
    REASON_CONTROL = 1
    REASON_DRAINED = 2


cdef inline void *pages_map(size_t length) noexcept nogil:
    """`length` bytes of zeroes in pages of their own, NULL without memory; the caller unmaps them (munmap).

    They take memory once they are written to. calloc would clear, and so copy, pages of the heap that is
    shared with the fork server.
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


cdef inline void due_by(int64_t *due, int64_t when) noexcept nogil:
    """Bring `due` forward to `when`. In both, 0 is never."""
    if when and (not due[0] or when < due[0]):
        due[0] = when


cdef inline int loop_wait(
    int epoll, epoll_event *events, int64_t due, int64_t *now, uint64_t *page
) noexcept nogil:
    """Wait until `due`, a heartbeat at most, for up to MAX_EVENTS events. Then set clock and heartbeat.

    Return how many events there are, 0 after a signal, -1 with errno if epoll fails.
    """
    cdef int timeout = <int>min(max(due - now[0], 0), HEARTBEAT_MS)
    cdef int count = epoll_wait(epoll, events, MAX_EVENTS, timeout)
    if count < 0:
        if errno != EINTR:
            return -1
        count = 0
    now[0] = monotonic_ms()
    page[COUNTER_HEARTBEAT] = now[0]
    return count


cdef inline bint idle_begins(int64_t *busy_at, int64_t now, bint busy) noexcept nogil:
    """Note whether the loop is busy. Return True once, a heartbeat after it last was: then trim memory."""
    if busy:
        busy_at[0] = now
    elif busy_at[0] and busy_at[0] + HEARTBEAT_MS <= now:
        busy_at[0] = 0
        return True
    return False
