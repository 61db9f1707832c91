"""A worker's life: the entry point of the child. supervise/worker.py is the parent's side. Compiled for
memory.

Each page that Python touches is one that the worker no longer shares with the fork server: reference counts,
the caches in a function's bytecode, the pools of small objects. The same steps in Python cost each idle
worker 0.15 MB more (CPython 3.11).

Invariants:

- The child has one thread, and the descriptors that it was passed: listener, control pipe, its own counters
  page, and its siblings' pages to read. It has standard error, the parent's log, until its loop exists;
  without a sandbox for ever, since sanitizers report there. All it knows comes over the control pipe: Start
  first, then Updates, then Drain.
- It enters its sandbox after its Start and before its loop exists, so before any traffic. It serves no client
  before its first Update.
- It leaves the loop only for control. End of file on the control pipe means that the parent is gone: it exits
  at once, and every connection it has ends in a reset.
- Of two Updates the one with the higher generation wins, in whatever order they come.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy

from ambassador import _datagram, _sandbox, _splice
from ambassador._control import next_record
from ambassador._counters cimport (
    COUNTER_BACKENDS,
    COUNTER_GENERATION,
    COUNTER_HEARTBEAT,
    COUNTER_OWN,
    COUNTER_SANDBOX,
)
from ambassador._counters cimport COUNTERS_BYTES as PAGE_BYTES
from ambassador._linux cimport (
    EINTR,
    F_SETFL,
    O_NONBLOCK,
    close,
    dup3,
    epoll_create1,
    errno,
    fcntl,
    read,
)
from ambassador._loop cimport REASON_DRAINED
from ambassador._options cimport options_t
from ambassador._record cimport (
    FLAG_SANDBOX,
    FLAG_SANDBOX_REQUIRED,
    KIND_DRAIN,
    KIND_START,
    PROTOCOL_TCP,
    start_read,
    start_t,
    update_read,
    update_view_t,
)
from ambassador.system.titles import show_title

cdef enum:
    READ_BYTES = 65536  # as much as a pipe holds

# For the parent: the size of the counters page, and the words that every loop has.
COUNTERS_BYTES = PAGE_BYTES
GENERATION_WORD = COUNTER_GENERATION
BACKENDS_WORD = COUNTER_BACKENDS
HEARTBEAT_WORD = COUNTER_HEARTBEAT
SANDBOX_WORD = COUNTER_SANDBOX
FIRST_COUNTER = COUNTER_OWN  # from here on the loop's own, in the order of counters.py

EXIT_DRAINED = 0
EXIT_PARENT_GONE = 0
EXIT_BAD_CONTROL = 65  # a record that makes no sense (EX_DATAERR of sysexits.h)
EXIT_BROKEN = 70  # the loop could not be set up or failed (EX_SOFTWARE)
EXIT_NO_SANDBOX = 77  # the sandbox is required and a step of it is missing (EX_NOPERM)

cdef char read_buffer[READ_BYTES]  # only the pages that were read into take memory


def main(int listener, int control, int counters, *siblings):
    """Serve one listener until it has drained or the parent is gone. Return the exit code.

    Owns the descriptors. `siblings` are the counters pages of the listener's other workers, to read. Raises
    OSError and MemoryError if the loop cannot be made or fails.
    """
    try:
        return serve(listener, control, counters, siblings)
    except (ValueError, OverflowError):  # not a control record, or one that cannot be obeyed
        return EXIT_BAD_CONTROL


cdef object serve(int listener, int control, int counters, tuple siblings):
    cdef bytearray stream = bytearray()
    cdef object loop = None
    cdef int64_t generation = -1  # of the update in force
    cdef bint runs = False  # before the first update the pipe blocks, and no client is served
    cdef uint32_t deadline_ms
    cdef start_t start
    cdef int kind
    while True:
        record = next_record(stream)
        if record is None:
            if runs and <int>loop.run() == REASON_DRAINED:
                return EXIT_DRAINED
            if not receive(control, stream):
                return EXIT_PARENT_GONE
            continue
        kind, number, payload = record
        if (kind == KIND_START) == (loop is not None):
            raise ValueError("a Start comes first, and once")
        if kind == KIND_START:
            start_read(PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload), &start)
            if (
                start.flags & FLAG_SANDBOX
                and _sandbox.enter(counters)
                and start.flags & FLAG_SANDBOX_REQUIRED
            ):
                return EXIT_NO_SANDBOX
            loop = make_loop(&start, listener, control, counters, siblings)
            if start.flags & FLAG_SANDBOX:
                dup3(1, 2, 0)  # /dev/null: who is taken over can forge no line and read no terminal
        elif kind == KIND_DRAIN:
            memcpy(&deadline_ms, PyBytes_AS_STRING(payload), sizeof(deadline_ms))
            runs = True
            loop.drain(deadline_ms)
            if start.protocol == PROTOCOL_TCP:
                close(listener)  # the last copy: the port refuses from now on
                epoll_create1(0)  # keeps the number: the sandbox refuses some calls on it
        elif number > generation:
            if not runs:
                fcntl(control, F_SETFL, O_NONBLOCK)
            runs, generation = True, number
            loop.update(generation, payload)
            show_title(title_of_update(payload))


cdef object make_loop(start_t *start, int listener, int control, int counters, tuple siblings):
    """Make the loop that a Start asks for. Close the counters' descriptors: the loop has mapped them."""
    if start.protocol == PROTOCOL_TCP:
        loop = _splice.TcpLoop(listener, control, counters, siblings)
    else:
        loop = _datagram.UdpLoop(listener, control, counters)
    close(counters)
    for fd in siblings:
        close(fd)
    return loop


cdef object title_of_update(bytes payload):
    cdef update_view_t view
    cdef options_t option
    update_read(PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload), &view, option)
    return PyUnicode_DecodeUTF8(view.title, view.head.title_bytes, NULL)


cdef bint receive(int control, bytearray stream) except -1:
    """Append what the control pipe has to `stream`. False at end of file. Raises OSError."""
    cdef ssize_t got = read(control, read_buffer, READ_BYTES)
    while got < 0 and errno == EINTR:
        got = read(control, read_buffer, READ_BYTES)
    if got < 0:
        raise OSError(errno, "read of the control pipe")
    stream += read_buffer[:got]
    return got > 0
