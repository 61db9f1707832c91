"""The counters page of a worker: its common words, and how it is mapped.

Each slot of a listener has a page of its own. The worker in the slot writes it; the parent and the workers of
the other slots read it. A loop counts in private memory and copies that to the page once a turn. It never
reads its page, so no other process can change its decisions through it.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from ambassador._linux cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, errno, mmap, munmap

cdef enum:  # words that every loop has; a loop's own follow from COUNTER_OWN, in the order of counters.py
    COUNTER_VERSION = 0
    COUNTER_GENERATION = 1  # of the update in force
    COUNTER_BACKENDS = 2  # how many there are in it
    COUNTER_HEARTBEAT = 3  # CLOCK_MONOTONIC in ms at the latest turn of the loop; 0 until the first
    COUNTER_SANDBOX = 7  # which steps of the sandbox hold (_sandbox.pyx); 0 until it is entered
    COUNTER_OWN = 8

cdef enum:
    COUNTERS_VERSION = 1
    COUNTERS_BYTES = 4096
    MAX_SIBLINGS = 63


cdef inline uint64_t *counters_map(int fd, bint writable) noexcept nogil:
    """Map the page behind `fd`; NULL with errno. counters_unmap unmaps it."""
    cdef int protection = PROT_READ | PROT_WRITE if writable else PROT_READ
    cdef void *page = mmap(NULL, COUNTERS_BYTES, protection, MAP_SHARED, fd, 0)
    return NULL if page == MAP_FAILED else <uint64_t *>page


cdef inline void counters_unmap(uint64_t *page) noexcept nogil:
    if page != NULL:
        munmap(page, COUNTERS_BYTES)


cdef inline int siblings_map(tuple fds, uint64_t ***pages, uint32_t *count) except -1:
    """Map the pages of the listener's other workers, to read. siblings_unmap undoes it, also after an error.

    Raises OSError, MemoryError, and ValueError if there are too many.
    """
    cdef int fd
    if len(fds) > MAX_SIBLINGS:
        raise ValueError(f"{len(fds)} siblings are over {MAX_SIBLINGS}")
    pages[0] = <uint64_t **>malloc((len(fds) + 1) * sizeof(uint64_t *))
    if pages[0] == NULL:
        raise MemoryError
    for fd in fds:
        pages[0][count[0]] = counters_map(fd, False)
        if pages[0][count[0]] == NULL:
            raise OSError(errno, "mmap of a sibling's counters")
        count[0] += 1
    return 0


cdef inline void siblings_unmap(uint64_t **pages, uint32_t count) noexcept nogil:
    cdef uint32_t i
    for i in range(count):
        counters_unmap(pages[i])
    free(pages)
