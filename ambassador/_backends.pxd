"""The backends that a loop may use, replaced whole by each update."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from ambassador._linux cimport AF_INET, AF_INET6, htons, sockaddr_in, sockaddr_in6, socklen_t
from ambassador._record cimport backend_item_t, update_view_t

cdef enum:  # how a new list differs from the old one
    BACKENDS_SAME = 0
    BACKENDS_CHANGED = 1  # weights, the order, or fewer
    BACKEND_CAME = 2  # one that the old list does not have

ctypedef union address_t:
    sockaddr_in v4
    sockaddr_in6 v6

cdef struct backend_t:
    uint64_t id  # of this run of this container at this address; the listener never reuses one
    uint32_t weight
    socklen_t length
    bint may_be_own  # TCP: the kernel may give this address and port to a socket of ours
    address_t address

cdef struct backends_t:
    backend_t *items
    uint32_t count
    uint32_t total_weight  # 0: no backend takes new clients
    uint32_t turn


cdef inline void backend_set(backend_t *backend, const backend_item_t *item) noexcept nogil:
    memset(backend, 0, sizeof(backend_t))
    backend.id, backend.weight = item.id, item.weight
    if item.version == 4:
        backend.address.v4.sin_family = AF_INET
        backend.address.v4.sin_port = htons(item.port)
        memcpy(&backend.address.v4.sin_addr, item.address, 4)
        backend.length = sizeof(sockaddr_in)
    else:
        backend.address.v6.sin6_family = AF_INET6
        backend.address.v6.sin6_port = htons(item.port)
        backend.address.v6.sin6_scope_id = item.zone
        memcpy(&backend.address.v6.sin6_addr, item.address, 16)
        backend.length = sizeof(sockaddr_in6)


cdef inline backend_t *backends_find(backends_t *backends, uint64_t number) noexcept nogil:
    """Return the backend with this id, NULL if it is not in the list."""
    cdef uint32_t i
    for i in range(backends.count):
        if backends.items[i].id == number:
            return &backends.items[i]
    return NULL


cdef inline bint backends_have(backends_t *backends, uint64_t number) noexcept nogil:
    """Whether the backend with this id is in the list."""
    return backends_find(backends, number) != NULL


cdef inline int backends_change(backends_t *old, backend_t *items, uint32_t count) noexcept nogil:
    """Return how `items` differ from `old`. An id stands for one address, so ids and weights say it."""
    cdef uint32_t i
    cdef int change = BACKENDS_SAME
    if old.items == NULL or old.count != count:
        change = BACKENDS_CHANGED
    for i in range(count):
        if not backends_have(old, items[i].id):
            return BACKEND_CAME
        if change == BACKENDS_SAME and (
            old.items[i].id != items[i].id or old.items[i].weight != items[i].weight
        ):
            change = BACKENDS_CHANGED
    return change


cdef inline void address_bytes(address_t *address, uint8_t *bytes) noexcept nogil:
    """Write the 16 bytes of an address; those of IPv4 in their IPv6 form."""
    if address.v4.sin_family == AF_INET6:
        memcpy(bytes, &address.v6.sin6_addr, 16)
    else:
        memset(bytes, 0, 10)
        memset(bytes + 10, 0xFF, 2)
        memcpy(bytes + 12, &address.v4.sin_addr, 4)


cdef inline bint address_is(address_t *one, address_t *other) noexcept nogil:
    """Whether both are the same address and port, in whichever form."""
    cdef uint8_t bytes[2][16]
    if one.v4.sin_port != other.v4.sin_port:  # at one place in both families
        return False
    address_bytes(one, bytes[0])
    address_bytes(other, bytes[1])
    if memcmp(bytes[0], bytes[1], 16) != 0:
        return False
    if one.v4.sin_family == AF_INET6 and other.v4.sin_family == AF_INET6:
        return one.v6.sin6_scope_id == other.v6.sin6_scope_id
    return True


cdef inline bint backends_have_address(backends_t *backends, address_t *address) noexcept nogil:
    """Whether a backend in the list has this address and port."""
    cdef uint32_t i
    for i in range(backends.count):
        if address_is(&backends.items[i].address, address):
            return True
    return False


cdef inline int backends_replace(backends_t *backends, update_view_t *view) except -1:
    """Replace the list by that of a checked update. Return how it differs. Raises MemoryError."""
    cdef uint32_t count = view.head.backends, i
    cdef backend_item_t item
    cdef backend_t *fresh = <backend_t *>calloc(count + 1, sizeof(backend_t))
    cdef int change
    if fresh == NULL:
        raise MemoryError
    for i in range(count):
        memcpy(&item, view.backends + i * sizeof(backend_item_t), sizeof(backend_item_t))
        backend_set(&fresh[i], &item)
    change = backends_change(backends, fresh, count)
    if change == BACKENDS_SAME:
        free(fresh)
        return change
    free(backends.items)
    backends.items, backends.count, backends.total_weight = fresh, count, 0
    for i in range(count):
        backends.total_weight += fresh[i].weight
    return change


cdef inline backend_t *backends_next(backends_t *backends) noexcept nogil:
    """Return each backend in turn, `weight` times in a row. One must have a weight."""
    cdef uint32_t left = backends.turn % backends.total_weight
    cdef uint32_t i = 0
    backends.turn += 1
    while left >= backends.items[i].weight:
        left -= backends.items[i].weight
        i += 1
    return &backends.items[i]


cdef inline backend_t *backends_after(backends_t *backends, uint64_t number) noexcept nogil:
    """Return the next backend with a weight behind the one with this id, round the list.

    There must be one.
    """
    cdef uint32_t i = 0, _step
    while i < backends.count and backends.items[i].id != number:
        i += 1
    for _step in range(backends.count):
        i = i + 1 if i + 1 < backends.count else 0
        if backends.items[i].weight:
            break
    return &backends.items[i]


cdef inline uint32_t backends_usable(backends_t *backends) noexcept nogil:
    """Return how many have a weight."""
    cdef uint32_t i, count = 0
    for i in range(backends.count):
        count += backends.items[i].weight > 0
    return count
