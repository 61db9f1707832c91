"""The access rules of a listener, replaced whole by each update. No loop obeys them yet."""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from ambassador._record cimport rule_item_t, update_view_t

cdef struct access_t:
    rule_item_t *items
    uint32_t count


cdef inline int access_replace(access_t *access, update_view_t *view) except -1:
    """Replace the rules by those of a checked update. Raises MemoryError."""
    cdef uint32_t count = view.head.rules
    cdef rule_item_t *fresh = <rule_item_t *>calloc(count + 1, sizeof(rule_item_t)) if count else NULL
    if count and fresh == NULL:
        raise MemoryError
    if count:
        memcpy(fresh, view.rules, count * sizeof(rule_item_t))
    free(access.items)
    access.items, access.count = fresh, count
    return 0
