"""Takes control records off a worker's stream (control.py packs them). Compiled for memory.

In Python this parsing touched half a megabyte of the interpreter's objects. Each touched page is one that the
worker no longer shares with the fork server.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t
from libc.string cimport memcpy

from ambassador._options cimport options_t
from ambassador._record cimport (
    FLAG_SANDBOX,
    FLAG_SANDBOX_REQUIRED,
    KIND_DRAIN,
    KIND_START,
    KIND_UPDATE,
    MAX_PAYLOAD_BYTES,
    MAX_RECORD_BACKENDS,
    MAX_RECORD_RULES,
    MAX_WORKER_SLOTS,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    RECORD_VERSION,
    header_t,
    start_read,
    start_t,
    update_read,
    update_view_t,
)

VERSION = RECORD_VERSION
START = KIND_START
UPDATE = KIND_UPDATE
DRAIN = KIND_DRAIN
MAX_PAYLOAD = MAX_PAYLOAD_BYTES
MAX_BACKENDS = MAX_RECORD_BACKENDS
MAX_RULES = MAX_RECORD_RULES
MAX_SLOTS = MAX_WORKER_SLOTS
TCP = PROTOCOL_TCP
UDP = PROTOCOL_UDP
SANDBOX = FLAG_SANDBOX
SANDBOX_REQUIRED = FLAG_SANDBOX_REQUIRED


cdef int record_check(header_t *header, const char *payload) except -1:
    """Raise ValueError if the payload is not what the header says."""
    cdef start_t start
    cdef update_view_t view
    cdef options_t option
    if header.generation and header.kind != KIND_UPDATE:
        raise ValueError(f"type {header.kind} with generation {header.generation}")
    if header.kind == KIND_START:
        start_read(payload, header.length, &start)
    elif header.kind == KIND_UPDATE:
        update_read(payload, header.length, &view, option)
    elif header.kind != KIND_DRAIN:
        raise ValueError(f"unknown type {header.kind}")
    elif header.length != sizeof(uint32_t):
        raise ValueError(f"type {KIND_DRAIN} of {header.length} bytes")
    return 0


def next_record(bytearray stream not None):
    """Remove the first record from `stream`. Return (type, generation, payload), or None if it is incomplete.

    The payload has been checked. Raises ValueError if it is not a control record; the stream then stays.
    """
    cdef header_t header
    cdef const char *payload
    if PyByteArray_GET_SIZE(stream) < <Py_ssize_t>sizeof(header_t):
        return None
    memcpy(&header, PyByteArray_AS_STRING(stream), sizeof(header_t))
    if header.version != RECORD_VERSION:
        raise ValueError(f"version {header.version}, this worker speaks {RECORD_VERSION}")
    if header.reserved or header.length > MAX_PAYLOAD_BYTES:
        raise ValueError(f"header with reserved {header.reserved}, length {header.length}")
    if PyByteArray_GET_SIZE(stream) < <Py_ssize_t>(sizeof(header_t) + header.length):
        return None
    payload = PyByteArray_AS_STRING(stream) + sizeof(header_t)
    record_check(&header, payload)
    content = PyBytes_FromStringAndSize(payload, header.length)
    del stream[:sizeof(header_t) + header.length]
    return header.kind, header.generation, content
