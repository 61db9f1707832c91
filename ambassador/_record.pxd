"""Control records as a worker reads them (control.py packs them and has their form).

Inline functions only: `_control` checks a whole record, and the loops read an update's payload in place. They
make no Python objects: each page that Python touches is one that the worker no longer shares.

Invariants: no byte past `length` is read; a payload that does not parse raises ValueError. Little-endian
only.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ambassador._options cimport OPTIONS_END, options_t

cdef enum:
    RECORD_VERSION = 3
    MAX_PAYLOAD_BYTES = 1 << 20
    MAX_RECORD_BACKENDS = 1024
    MAX_RECORD_RULES = 16384
    MAX_WORKER_SLOTS = 64
    MAX_OPTION_VALUE = 0xFFFFFFFF
    MAX_WEIGHT = 65535

cdef enum:
    KIND_START = 1
    KIND_UPDATE = 2
    KIND_DRAIN = 3

cdef enum:  # numbers of /etc/protocols
    PROTOCOL_TCP = 6
    PROTOCOL_UDP = 17

cdef enum:
    FLAG_SANDBOX = 1  # enter it
    FLAG_SANDBOX_REQUIRED = 2  # and exit if a step of it is missing

cdef packed struct header_t:
    uint8_t version
    uint8_t kind
    uint16_t reserved
    uint32_t length
    uint64_t generation

cdef packed struct start_t:
    uint8_t protocol
    uint8_t flags
    uint16_t slot
    uint16_t slots

cdef packed struct update_t:  # so many of each follow, in this order
    uint16_t options
    uint16_t backends
    uint16_t rules
    uint16_t title_bytes

cdef packed struct option_item_t:
    uint16_t number
    uint64_t value

cdef packed struct backend_item_t:
    uint8_t version  # of IP
    uint8_t reserved
    uint16_t port
    uint32_t weight
    uint32_t zone
    uint64_t id
    char address[16]

cdef packed struct rule_item_t:
    uint8_t version  # of IP
    uint8_t prefix
    uint8_t allow
    uint8_t reserved
    char address[16]

cdef struct update_view_t:  # an update's parts, inside its payload
    update_t head
    const char *backends
    const char *rules
    const char *title


cdef inline int start_read(const char *payload, size_t length, start_t *start) except -1:
    """Fill `start`. Raises ValueError if the payload is not a Start."""
    if length != sizeof(start_t):
        raise ValueError(f"type {KIND_START} of {length} bytes")
    memcpy(start, payload, sizeof(start_t))
    if start.protocol != PROTOCOL_TCP and start.protocol != PROTOCOL_UDP:
        raise ValueError(f"unknown protocol number {start.protocol}")
    if start.flags & ~(FLAG_SANDBOX | FLAG_SANDBOX_REQUIRED) or start.flags == FLAG_SANDBOX_REQUIRED:
        raise ValueError(f"unknown flags {start.flags:#x}")
    if start.slot >= start.slots or start.slots > MAX_WORKER_SLOTS:
        raise ValueError(f"slot {start.slot} of {start.slots}")
    return 0


cdef inline int options_read(const char *items, size_t count, options_t option) except -1:
    """Fill `option`. Raises ValueError if an option is missing, given twice, unknown or too large."""
    cdef option_item_t item
    cdef uint64_t seen = 0
    cdef size_t i
    memset(option, 0, sizeof(options_t))
    for i in range(count):
        memcpy(&item, items + i * sizeof(option_item_t), sizeof(option_item_t))
        if not 1 <= item.number < OPTIONS_END or seen >> item.number & 1 or item.value > MAX_OPTION_VALUE:
            raise ValueError(f"option {item.number} with value {item.value}")
        seen |= <uint64_t>1 << item.number
        option[item.number] = item.value
    if count != OPTIONS_END - 1:
        raise ValueError(f"{count} options of {OPTIONS_END - 1}")
    return 0


cdef inline int address_check(int version, const char *address) except -1:
    cdef int i
    for i in range(4 if version == 4 else 16, 16):
        if address[i]:
            raise ValueError("family 4 with more than 4 bytes of address")
    return 0


cdef inline int backend_check(const backend_item_t *item) except -1:
    if item.version != 4 and item.version != 6 or item.reserved:
        raise ValueError(f"backend of family {item.version} with reserved {item.reserved}")
    if not item.port or (item.zone and item.version == 4):
        raise ValueError(f"backend of family {item.version} with port {item.port}, zone {item.zone}")
    if item.weight > MAX_WEIGHT:
        raise ValueError(f"backend with weight {item.weight}")
    return address_check(item.version, item.address)


cdef inline int rule_check(const rule_item_t *item) except -1:
    if item.version != 4 and item.version != 6 or item.reserved or item.allow > 1:
        raise ValueError(f"rule of family {item.version} with reserved {item.reserved}, allow {item.allow}")
    if item.prefix > (32 if item.version == 4 else 128):
        raise ValueError(f"rule of family {item.version} with prefix {item.prefix}")
    return address_check(item.version, item.address)


cdef inline int update_read(
    const char *payload, size_t length, update_view_t *view, options_t option
) except -1:
    """Fill `view` and `option`, and check every item. Raises ValueError if the payload is not an Update."""
    cdef backend_item_t backend
    cdef rule_item_t rule
    cdef size_t at = sizeof(update_t), i
    if length < sizeof(update_t):
        raise ValueError(f"type {KIND_UPDATE} of {length} bytes")
    memcpy(&view.head, payload, sizeof(update_t))
    at += view.head.options * sizeof(option_item_t)
    view.backends = payload + at
    at += view.head.backends * sizeof(backend_item_t)
    view.rules = payload + at
    at += view.head.rules * sizeof(rule_item_t)
    view.title = payload + at
    if view.head.backends > MAX_RECORD_BACKENDS or view.head.rules > MAX_RECORD_RULES:
        raise ValueError(f"{view.head.backends} backends and {view.head.rules} rules")
    if length != at + view.head.title_bytes:
        raise ValueError(f"type {KIND_UPDATE} of {length} bytes instead of {at + view.head.title_bytes}")
    options_read(payload + sizeof(update_t), view.head.options, option)
    for i in range(view.head.backends):
        memcpy(&backend, view.backends + i * sizeof(backend_item_t), sizeof(backend_item_t))
        backend_check(&backend)
    for i in range(view.head.rules):
        memcpy(&rule, view.rules + i * sizeof(rule_item_t), sizeof(rule_item_t))
        rule_check(&rule)
    return 0
