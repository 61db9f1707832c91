"""One intrusive, doubly linked list: for connections, sessions and slabs.

A member is a struct that starts with its link_t, so a pointer to either is a pointer to both. A list of
zeroes is empty. Invariant: a member is in one list at most.
"""

from libc.stdint cimport uint32_t

cdef struct link_t:
    link_t *previous
    link_t *next

cdef struct list_t:
    link_t *head
    link_t *tail
    uint32_t length


cdef inline void list_insert(list_t *members, link_t *link, link_t *after) noexcept nogil:
    """Insert `link` behind `after`; at the head if that is NULL."""
    link.previous = after
    link.next = after.next if after != NULL else members.head
    if link.next != NULL:
        link.next.previous = link
    else:
        members.tail = link
    if after != NULL:
        after.next = link
    else:
        members.head = link
    members.length += 1


cdef inline void list_append(list_t *members, link_t *link) noexcept nogil:
    """Insert `link` at the tail."""
    list_insert(members, link, members.tail)


cdef inline void list_remove(list_t *members, link_t *link) noexcept nogil:
    """Remove `link`, which must be a member."""
    if link.previous != NULL:
        link.previous.next = link.next
    else:
        members.head = link.next
    if link.next != NULL:
        link.next.previous = link.previous
    else:
        members.tail = link.previous
    members.length -= 1
