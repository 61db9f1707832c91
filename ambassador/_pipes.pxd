"""Pipes for splice: a pool that directions borrow from. A pipe that holds bytes is never in the pool."""

from libc.stdlib cimport free, malloc

from ambassador._linux cimport (
    F_GETPIPE_SZ,
    F_SETPIPE_SZ,
    O_CLOEXEC,
    O_NONBLOCK,
    close,
    fcntl,
    pipe2,
)
from ambassador._options cimport PIPE_BYTES
from ambassador._tcp cimport MAX_POOLED_PIPES, MIN_PIPE_BYTES, PIPES_AGAIN_MS, PIPES_OPEN, loop_t, pipe_t


cdef inline pipe_t *pipe_open(loop_t *loop) noexcept nogil:
    """Return a new pipe, NULL if the kernel gives none that is large enough."""
    cdef int ends[2]
    cdef int capacity
    cdef pipe_t *pipe = <pipe_t *>malloc(sizeof(pipe_t))
    if pipe == NULL:
        return NULL
    if pipe2(ends, O_NONBLOCK | O_CLOEXEC) < 0:
        free(pipe)
        return NULL
    # EPERM past pipe-user-pages-soft, and new pipes then have a page or two: read the real size back.
    fcntl(ends[1], F_SETPIPE_SZ, <int>loop.option[PIPE_BYTES])
    capacity = fcntl(ends[1], F_GETPIPE_SZ)
    if capacity < MIN_PIPE_BYTES and capacity < loop.option[PIPE_BYTES]:
        close(ends[0])
        close(ends[1])
        free(pipe)
        return NULL
    pipe.read_end, pipe.write_end = ends[0], ends[1]
    pipe.capacity, pipe.bytes = capacity, 0
    loop.tally[PIPES_OPEN] += 1
    return pipe


cdef inline pipe_t *pipe_borrow(loop_t *loop) noexcept nogil:
    """Return an empty pipe, NULL if there is none: then the direction copies."""
    cdef pipe_t *pipe = loop.pool
    if pipe == NULL:
        if loop.pipes_at > loop.now:
            return NULL
        pipe = pipe_open(loop)
        if pipe == NULL:
            loop.pipes_at = loop.now + PIPES_AGAIN_MS
        return pipe
    loop.pool = pipe.next  # the one that was used last: its pages are still in the cache
    loop.pooled -= 1
    return pipe


cdef inline void pipe_close(loop_t *loop, pipe_t *pipe) noexcept nogil:
    close(pipe.read_end)
    close(pipe.write_end)
    free(pipe)
    loop.tally[PIPES_OPEN] -= 1


cdef inline void pipe_return(loop_t *loop, pipe_t *pipe) noexcept nogil:
    """Put it into the pool if it is empty and there is room. Otherwise close it; bytes in it are lost."""
    if pipe.bytes == 0 and loop.pooled < MAX_POOLED_PIPES:
        pipe.next = loop.pool
        loop.pool = pipe
        loop.pooled += 1
    else:
        pipe_close(loop, pipe)


cdef inline void pool_close(loop_t *loop) noexcept nogil:
    """Close the pipes of the pool."""
    cdef pipe_t *pipe
    while loop.pool != NULL:
        pipe = loop.pool
        loop.pool = pipe.next
        pipe_close(loop, pipe)
    loop.pooled = 0
