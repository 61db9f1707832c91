"""A worker's life: the entry point of the child. Its handle in the parent is worker.py. Compiled for memory.

Whatever Python touches here is a page that the worker no longer shares with the fork server: reference counts,
the caches in a function's bytecode, the pools of small objects. The same steps as Python cost each idle
worker 0.15 MB more (CPython 3.11).

Invariants:

- The child is lent three descriptors (listener, control pipe, and the counters page, which it maps) besides
  standard error, and has no thread. Everything it knows came over the control pipe: Start first, then
  Repoint, then Drain.
- It enters its sandbox when it has heard its Start and before its loop exists, so before any traffic.
- It leaves the compiled loop only for control. End of file on the control pipe means that the parent is
  gone: it exits at once, and every connection it had ends in a reset.
- Of two Repoints the one with the higher generation wins, whichever comes last.
"""

from libc.stdint cimport int64_t

from ambassador import _datagram, _sandbox, _splice
from ambassador._common cimport (
    COUNTER_BACKENDS,
    COUNTER_GENERATION,
    COUNTER_HEARTBEAT,
    COUNTER_OWN,
    COUNTER_SANDBOX,
)
from ambassador._common cimport COUNTERS_BYTES as PAGE_BYTES
from ambassador._linux cimport EINTR, F_SETFL, O_NONBLOCK, close, errno, fcntl, read
from ambassador._control import DRAIN, GSO, SANDBOX, SANDBOX_REQUIRED, START, TCP, take
from ambassador.system.titles import show_title

cdef enum:
    READ_BYTES = 65536  # as much as a pipe holds

# What the parent must know of the counters page: its size, and the words that every loop has.
COUNTERS_BYTES = PAGE_BYTES
GENERATION_WORD = COUNTER_GENERATION
BACKENDS_WORD = COUNTER_BACKENDS
HEARTBEAT_WORD = COUNTER_HEARTBEAT
SANDBOX_WORD = COUNTER_SANDBOX
FIRST_COUNTER = COUNTER_OWN  # from here on the loop's own, in the order of its COUNTERS

EXIT_DRAINED = 0
EXIT_PARENT_GONE = 0
EXIT_BAD_CONTROL = 65  # what it was told makes no sense (EX_DATAERR of sysexits.h)
EXIT_BROKEN = 70  # the loop could not be set up or failed (EX_SOFTWARE)
EXIT_NO_SANDBOX = 77  # the sandbox is required and something of it cannot be had (EX_NOPERM)

cdef int kind_start = START, kind_drain = DRAIN
cdef int flag_gso = GSO, flag_sandbox = SANDBOX, flag_required = SANDBOX_REQUIRED
cdef int protocol_tcp = TCP
cdef int reason_drained = _splice.DRAINED
cdef char inbox[READ_BYTES]  # only the pages that are read into are memory


def main(int listener, int control, int counters):
    """Serve one listener until told to drain or the parent is gone; the exit code.

    Owns the three descriptors. Raises OSError and MemoryError where the loop cannot be had or fails.
    """
    try:
        return serve(listener, control, counters)
    except (ValueError, OverflowError):  # no control record, or an impossible one
        return EXIT_BAD_CONTROL


cdef object serve(int listener, int control, int counters):
    cdef bytearray stream = bytearray()
    cdef object loop = None  # until the first record, for which the pipe blocks
    cdef int64_t generation = -1
    cdef int kind, protocol = 0
    while True:
        taken = take(stream)
        if taken is None:
            if loop is not None and <int>loop.run() == reason_drained:
                return EXIT_DRAINED
            if not receive(control, stream):
                return EXIT_PARENT_GONE
            continue
        kind, number, content = taken
        if (kind == kind_start) == (loop is not None):
            raise ValueError("a Start comes first, and once")
        if loop is None:
            protocol, flags, slot, slots = content[1], content[2], content[12], content[13]
            fcntl(control, F_SETFL, O_NONBLOCK)
            if flags & flag_sandbox and _sandbox.enter(counters, slot, slots) and flags & flag_required:
                return EXIT_NO_SANDBOX
            loop = make_loop(content, listener, control, counters)
            close(counters)
        elif kind == kind_drain:
            loop.drain(content)
            if protocol == protocol_tcp:
                close(listener)  # the last copy: from now on the port refuses
        elif number > generation:
            generation = number
            backends, title = content
            loop.repoint(generation, backends)
            show_title(title)


cdef bint receive(int control, bytearray stream) except -1:
    """Add to `stream` what the control pipe has. False at its end. Raises OSError."""
    cdef ssize_t got = read(control, inbox, READ_BYTES)
    while got < 0 and errno == EINTR:
        got = read(control, inbox, READ_BYTES)
    if got < 0:
        raise OSError(errno, "read of the control pipe")
    stream += inbox[:got]
    return got > 0


cdef object make_loop(tuple start, int listener, int control, int counters):
    """The loop that a Start asks for: the numbers of start_t (_wire.pyx), in their order."""
    _, protocol, flags, hold_ms, connect_ms, session_idle_ms, max_sessions, max_held = start[:8]
    pipe_bytes, max_connections, idle_ms, half_close_ms, slot, slots = start[8:]
    if protocol == protocol_tcp:
        return _splice.TcpRelay(
            listener,
            control,
            counters=counters,
            slot=slot,
            slots=slots,
            hold_ms=hold_ms,
            connect_ms=connect_ms,
            max_held=max_held,
            pipe_bytes=pipe_bytes,
            max_connections=max_connections,
            idle_ms=idle_ms,
            half_close_ms=half_close_ms,
        )
    return _datagram.UdpRelay(
        listener,
        control,
        counters=counters,
        slot=slot,
        slots=slots,
        hold_ms=hold_ms,
        session_idle_ms=session_idle_ms,
        max_sessions=max_sessions,
        gso=bool(flags & flag_gso),
    )
