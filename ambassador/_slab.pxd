"""Memory for many structs of one size, in slabs of pages of its own.

A worker is a fork: it shares its first heap, full of small holes, with the fork server. A connection in such
a hole would make a page private, in both processes. After a burst a slab goes back to the kernel; a heap
shrinks only from its end.

Invariants: a slab is aligned to its size, so an item's address leads to it; a slab is in the list exactly
while it has room; at most one slab is kept empty. Inline functions only, as in _loop.pxd.
"""

from libc.stdint cimport uint32_t, uintptr_t
from libc.string cimport memset

from ambassador._linux cimport munmap
from ambassador._list cimport link_t, list_insert, list_remove, list_t
from ambassador._loop cimport pages_map

cdef enum:
    SLAB_BYTES = 65536
    SLAB_HEADER = 64  # bytes: a cache line, so that items keep their alignment

cdef struct slab_t:  # at the start of its own memory
    link_t link
    void *free  # items given back; each holds the address of the next one
    uint32_t fresh  # items that were never used: their pages are not touched yet
    uint32_t live

cdef struct slabs_t:
    list_t roomy
    uint32_t item_bytes
    uint32_t capacity  # items of a slab


cdef inline void slabs_init(slabs_t *slabs, uint32_t item_bytes) noexcept nogil:
    """Prepare for items of `item_bytes`, 8 at least."""
    memset(slabs, 0, sizeof(slabs_t))
    slabs.item_bytes = item_bytes
    slabs.capacity = (SLAB_BYTES - SLAB_HEADER) // item_bytes


cdef inline slab_t *slab_map() noexcept nogil:
    """Return a slab of zeroes, NULL without memory. mmap(2) aligns to pages: cut one out of two."""
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
    """Return an item of zeroes, NULL without memory."""
    cdef slab_t *slab = <slab_t *>slabs.roomy.head
    cdef void *item
    if slab == NULL:
        slab = slab_map()
        if slab == NULL:
            return NULL
        list_insert(&slabs.roomy, &slab.link, NULL)
    if slab.free != NULL:
        item = slab.free
        slab.free = (<void **>item)[0]
        memset(item, 0, slabs.item_bytes)
    else:
        item = <char *>slab + SLAB_HEADER + slab.fresh * slabs.item_bytes
        slab.fresh += 1
    slab.live += 1
    if slab.live == slabs.capacity:
        list_remove(&slabs.roomy, &slab.link)
    return item


cdef inline void slabs_give(slabs_t *slabs, void *item) noexcept nogil:
    """Take back an item that slabs_take returned."""
    cdef slab_t *slab = <slab_t *>(<uintptr_t>item & ~<uintptr_t>(SLAB_BYTES - 1))
    (<void **>item)[0] = slab.free
    slab.free = item
    if slab.live == slabs.capacity:
        list_insert(&slabs.roomy, &slab.link, NULL)
    slab.live -= 1
    if slab.live == 0 and slabs.roomy.length > 1:
        list_remove(&slabs.roomy, &slab.link)
        munmap(slab, SLAB_BYTES)


cdef inline void slabs_free(slabs_t *slabs) noexcept nogil:
    """Unmap the slab that is kept. Every item must have been given back."""
    if slabs.roomy.head != NULL:
        munmap(slabs.roomy.head, SLAB_BYTES)
        memset(&slabs.roomy, 0, sizeof(list_t))
