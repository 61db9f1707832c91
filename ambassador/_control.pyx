"""Takes control records apart (control.py has their form). Compiled for memory.

This is all the parsing that a worker does. In Python it touched half a megabyte of the interpreter's
objects, and each page that is touched is one that the worker no longer shares with the fork server.

Invariants: nothing is read past what the header says; what does not parse raises ValueError and leaves
the stream as it was. Little-endian machines only, like the records.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    CURRENT_VERSION = 2
    LARGEST_PAYLOAD = 60000  # a pipe holds 64 KiB, so a record always fits an empty one
    MOST_BACKENDS = 1024
    MOST_SLOTS = 64  # as many pages of counters are mapped

cdef enum:
    KIND_START = 1
    KIND_REPOINT = 2
    KIND_DRAIN = 3

cdef enum:  # numbers of /etc/protocols
    PROTOCOL_TCP = 6
    PROTOCOL_UDP = 17

cdef enum:
    FLAG_GSO = 1
    FLAG_SANDBOX = 2  # enter it
    FLAG_SANDBOX_REQUIRED = 4  # and end where something of it is lacking
    FLAGS = 7

VERSION = CURRENT_VERSION
START = KIND_START
REPOINT = KIND_REPOINT
DRAIN = KIND_DRAIN
MAX_PAYLOAD = LARGEST_PAYLOAD
MAX_BACKENDS = MOST_BACKENDS
MAX_SLOTS = MOST_SLOTS
TCP = PROTOCOL_TCP
UDP = PROTOCOL_UDP
GSO = FLAG_GSO
SANDBOX = FLAG_SANDBOX
SANDBOX_REQUIRED = FLAG_SANDBOX_REQUIRED

cdef packed struct header_t:
    uint8_t version
    uint8_t kind
    uint16_t reserved
    uint32_t length
    uint64_t generation

cdef packed struct start_t:
    uint16_t port
    uint8_t protocol
    uint8_t flags
    uint32_t limits[9]
    uint16_t slot
    uint16_t slots

cdef packed struct repoint_t:
    uint16_t count
    uint16_t title_bytes

cdef packed struct backend_t:
    uint8_t version  # of IP
    uint8_t flags
    uint16_t port
    uint32_t zone
    uint64_t identity
    char address[16]


cdef tuple take_start(const char *payload, size_t length):
    cdef start_t record
    if length != sizeof(start_t):
        raise ValueError(f"type {KIND_START} of {length} bytes")
    memcpy(&record, payload, sizeof(start_t))
    if not record.port:
        raise ValueError("port 0")
    if record.protocol != PROTOCOL_TCP and record.protocol != PROTOCOL_UDP:
        raise ValueError(f"unknown protocol number {record.protocol}")
    if record.flags & ~FLAGS or record.flags & (FLAGS - FLAG_GSO) == FLAG_SANDBOX_REQUIRED:
        raise ValueError(f"unknown flags {record.flags:#x}")
    if record.slot >= record.slots or record.slots > MOST_SLOTS:
        raise ValueError(f"seat {record.slot} of {record.slots}")
    return (
        record.port, record.protocol, record.flags, record.limits[0], record.limits[1],
        record.limits[2], record.limits[3], record.limits[4], record.limits[5], record.limits[6],
        record.limits[7], record.limits[8], record.slot, record.slots,
    )


cdef tuple take_backend(const char *payload):
    cdef backend_t record
    cdef int i
    memcpy(&record, payload, sizeof(backend_t))
    if record.version != 4 and record.version != 6 or record.flags:
        raise ValueError(f"backend of family {record.version} with flags {record.flags}")
    if not record.port or (record.zone and record.version == 4):
        raise ValueError(f"backend of family {record.version} with port {record.port}, zone {record.zone}")
    if record.version == 6:
        return PyBytes_FromStringAndSize(record.address, 16), record.port, record.zone, record.identity
    for i in range(4, 16):
        if record.address[i]:
            raise ValueError("backend of family 4 with more than 4 bytes of address")
    return PyBytes_FromStringAndSize(record.address, 4), record.port, record.zone, record.identity


cdef tuple take_repoint(const char *payload, size_t length):
    cdef repoint_t head
    cdef size_t i, at
    cdef list backends = []
    if length < sizeof(repoint_t):
        raise ValueError(f"type {KIND_REPOINT} of {length} bytes")
    memcpy(&head, payload, sizeof(repoint_t))
    at = sizeof(repoint_t) + head.title_bytes
    if length != at + head.count * sizeof(backend_t) or head.count > MOST_BACKENDS:
        raise ValueError(f"{head.count} backends in {length} bytes")
    for i in range(head.count):
        backends.append(take_backend(payload + at + i * sizeof(backend_t)))
    return backends, PyUnicode_DecodeUTF8(payload + sizeof(repoint_t), head.title_bytes, NULL)


cdef object take_drain(const char *payload, size_t length):
    cdef uint32_t deadline_ms
    if length != sizeof(deadline_ms):
        raise ValueError(f"type {KIND_DRAIN} of {length} bytes")
    memcpy(&deadline_ms, payload, sizeof(deadline_ms))
    return deadline_ms


def take(bytearray stream not None):
    """Remove the first record from `stream`: `(type, generation, content)`, or None if it is not complete.

    The content of a start is its fourteen numbers, of a repoint a list of `(packed address, port, zone index,
    identity)` and the title, of a drain its deadline. Raises ValueError for what is no control record.
    """
    cdef header_t header
    cdef const char *payload
    if PyByteArray_GET_SIZE(stream) < <Py_ssize_t>sizeof(header_t):
        return None
    memcpy(&header, PyByteArray_AS_STRING(stream), sizeof(header_t))
    if header.version != CURRENT_VERSION:
        raise ValueError(f"version {header.version}, this worker speaks {VERSION}")
    if header.reserved or header.length > LARGEST_PAYLOAD:
        raise ValueError(f"header with reserved {header.reserved}, length {header.length}")
    if PyByteArray_GET_SIZE(stream) < <Py_ssize_t>(sizeof(header_t) + header.length):
        return None
    if header.generation and header.kind != KIND_REPOINT:
        raise ValueError(f"type {header.kind} with generation {header.generation}")
    payload = PyByteArray_AS_STRING(stream) + sizeof(header_t)
    if header.kind == KIND_START:
        content = take_start(payload, header.length)
    elif header.kind == KIND_REPOINT:
        content = take_repoint(payload, header.length)
    elif header.kind == KIND_DRAIN:
        content = take_drain(payload, header.length)
    else:
        raise ValueError(f"unknown type {header.kind}")
    del stream[:sizeof(header_t) + header.length]
    return header.kind, header.generation, content
