"""The options that travel to a worker: the wire numbers of options.py, under its names (a test compares)."""

from libc.stdint cimport int64_t

cdef enum:
    HOLD = 1
    MAX_CONNECTIONS = 2
    IDLE_TIMEOUT = 3
    HALF_CLOSE_TIMEOUT = 4
    UDP_TIMEOUT = 5
    MAX_SESSIONS = 6
    CONNECT_TIMEOUT = 7
    MAX_HELD = 8
    PIPE_BYTES = 9
    GSO = 10
    OPTIONS_END

ctypedef int64_t options_t[OPTIONS_END]  # a loop reads loop.option[IDLE_TIMEOUT]; place 0 stays unused
