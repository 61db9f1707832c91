"""Memory for many structs of one size, in slabs of pages of its own.

A worker is a fork: the heap it was born with is shared with its nursery and full of small holes, and
connections put into those holes would each make a page of it private, in both processes. Slabs also go back
to the kernel when a burst is over, which a heap does only from its end.

Invariants: a slab is aligned to its size, so an item's address leads to it; a slab is in the list exactly
while it has room; one slab at most is kept with nothing in it. Inline functions only, as in _loop.pxd.
"""

from libc.stdint cimport uint32_t, uintptr_t
from libc.string cimport memset

from ambassador._loop cimport pages_map
from ambassador._linux cimport munmap

cdef enum:
    SLAB_BYTES = 65536
    SLAB_HEADER = 64  # bytes: a cache line, so that items keep their alignment

cdef struct slab_t:  # at the start of its own memory
    slab_t *previous
    slab_t *next
    void *free  # items given back; each holds the address of the next one
    uint32_t fresh  # items that were never used: their pages are not touched yet
    uint32_t live

cdef struct slabs_t:
    slab_t *roomy
    uint32_t item_bytes
    uint32_t capacity  # items of a slab


cdef inline void slabs_init(slabs_t *slabs, uint32_t item_bytes) noexcept nogil:
    """For items of `item_bytes`, 8 at least."""
    slabs.roomy = NULL
    slabs.item_bytes = item_bytes
    slabs.capacity = (SLAB_BYTES - SLAB_HEADER) // item_bytes


cdef inline void slab_link(slabs_t *slabs, slab_t *slab) noexcept nogil:
    slab.previous, slab.next = NULL, slabs.roomy
    if slabs.roomy != NULL:
        slabs.roomy.previous = slab
    slabs.roomy = slab


cdef inline void slab_unlink(slabs_t *slabs, slab_t *slab) noexcept nogil:
    if slab.previous != NULL:
        slab.previous.next = slab.next
    else:
        slabs.roomy = slab.next
    if slab.next != NULL:
        slab.next.previous = slab.previous


cdef inline slab_t *slab_map() noexcept nogil:
    """A slab of zeroes, NULL where there is no memory. mmap(2) aligns to pages: cut one out of two."""
    cdef char *start = <char *>pages_map(2 * SLAB_BYTES)
    cdef size_t before
    if start == NULL:
        return NULL
    before = -<uintptr_t>start & (SLAB_BYTES - 1)
    if before:
        munmap(start, before)
    munmap(start + before + SLAB_BYTES, SLAB_BYTES - before)
    return <slab_t *>(start + before)


cdef inline void *slabs_take(slabs_t *slabs) noexcept nogil:
    """An item of zeroes, NULL where there is no memory."""
    cdef slab_t *slab = slabs.roomy
    cdef void *item
    if slab == NULL:
        slab = slab_map()
        if slab == NULL:
            return NULL
        slab_link(slabs, slab)
    if slab.free != NULL:
        item = slab.free
        slab.free = (<void **>item)[0]
        memset(item, 0, slabs.item_bytes)
    else:
        item = <char *>slab + SLAB_HEADER + slab.fresh * slabs.item_bytes
        slab.fresh += 1
    slab.live += 1
    if slab.live == slabs.capacity:
        slab_unlink(slabs, slab)
    return item


cdef inline void slabs_give(slabs_t *slabs, void *item) noexcept nogil:
    """Takes back what slabs_take gave."""
    cdef slab_t *slab = <slab_t *>(<uintptr_t>item & ~<uintptr_t>(SLAB_BYTES - 1))
    (<void **>item)[0] = slab.free
    slab.free = item
    if slab.live == slabs.capacity:
        slab_link(slabs, slab)
    slab.live -= 1
    if slab.live == 0 and (slab.previous != NULL or slab.next != NULL):
        slab_unlink(slabs, slab)
        munmap(slab, SLAB_BYTES)


cdef inline void slabs_free(slabs_t *slabs) noexcept nogil:
    """Everything was given back: unmap what is kept."""
    if slabs.roomy != NULL:
        munmap(slabs.roomy, SLAB_BYTES)
        slabs.roomy = NULL
