"""Logging to standard error in logrus' text form, one line per event:

    time="2026-11-22T23:00:00.123Z" level=info msg="listening" port=6379 protocol=tcp

Modules log with the standard library: `log.info("listening", extra={"fields": {"port": 6379}})`.

Invariants:

- One event is one line, whatever a message, a field or an exception contains: all of it is
  untrusted, and everything that could end, disguise or forge a line is escaped.
- The caller never waits for standard error. It leaves the line in a bounded queue; one thread writes.
- What does not fit the queue, or could not be written, is counted and reported, never lost silently.
- No fault of standard error (closed, full, broken, stuck) raises in a caller or stops the thread.
- The thread writes to its own duplicate of the descriptor. If the number 2 is closed and given to a
  client's socket, the log does not go to the client.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import TextIO

from ambassador.values import quote

CAPACITY = 10_000
"""Lines that wait for standard error: about 2 MB."""

MAX_VALUE = 4096
"""Characters of one value. The rest is cut, so that the queue is bounded in bytes too."""

NOTICE_INTERVAL_S = 1.0
"""Between two reports of dropped lines while they go on being dropped."""

PACKAGE = "ambassador"

PANIC = logging.CRITICAL + 10
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "panic": PANIC,
}


class Logs:
    """The running log; made by `setup`. `close` is safe to call more than once."""

    def __init__(self, handler: _Handler, writer: _Writer) -> None:
        self._handler = handler
        self._writer = writer

    @property
    def dropped(self) -> int:
        """Lines that never reached standard error, so far."""
        return self._handler.dropped + self._writer.lost

    def close(self, timeout_s: float) -> bool:
        """Take no more lines and write what waits. False if the deadline came first.

        The handler stays. Without any, a late warning would go to the standard library's handler of
        last resort, which blocks and escapes nothing.
        """
        self._handler.stop()
        self._writer.join(timeout_s)
        return not self._writer.is_alive()


def setup(level: str, stream: TextIO | None = None, capacity: int = CAPACITY) -> Logs:
    """Send all logging to `stream` (standard error) from `level`, one of LEVELS, upwards.

    Other packages' loggers are heard from warnings upwards, in the same form.
    """
    handler = _Handler(capacity, show_exceptions=LEVELS[level] <= logging.DEBUG)
    writer = _Writer(handler, _open_sink(stream or sys.stderr))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(LEVELS[level], logging.WARNING))
    logging.getLogger(PACKAGE).setLevel(LEVELS[level])
    writer.start()
    return Logs(handler, writer)


# --- from a record to a line -------------------------------------------------------------------

_BARE = re.compile(r"[A-Za-z0-9._/@^+:%,\[\]-]+")
_NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9._-]")
_OWN_KEYS = frozenset(("time", "level", "msg", "logger", "exception"))


def format_line(record: logging.LogRecord, show_exceptions: bool = False) -> str:
    """The line for `record`, with its end of line. May raise what a value's `str` raises."""
    parts = [
        f"time={quote(_timestamp(record.created))}",
        f"level={_level_name(record.levelno)}",
        f"msg={quote(_cut(record.getMessage()))}",
    ]
    if record.name.partition(".")[0] != PACKAGE:
        parts.append(f"logger={_value(record.name)}")
    fields = getattr(record, "fields", None)
    if isinstance(fields, Mapping):
        parts += (f"{_key(key)}={_value(value)}" for key, value in fields.items())
    if show_exceptions and record.exc_info and record.exc_info[0]:
        text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        parts.append(f"exception={quote(text[-MAX_VALUE:])}")  # the end says what happened
    return " ".join(parts) + "\n"


def _timestamp(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    return f"{moment.isoformat(timespec='milliseconds')}Z"


def _level_name(number: int) -> str:
    for name in ("fatal", "error", "warning", "info"):
        if number >= LEVELS[name]:
            return name
    return "debug"


def _key(key: object) -> str:
    text = _NOT_IN_A_KEY.sub("_", str(key)) or "_"
    return f"fields.{text}" if text in _OWN_KEYS else text


def _value(value: object) -> str:
    text = _cut(str(value).lower() if isinstance(value, bool) else str(value))
    return text if _BARE.fullmatch(text) else quote(text)


def _cut(text: str) -> str:
    if len(text) <= MAX_VALUE:
        return text
    return f"{text[:MAX_VALUE]}... ({len(text) - MAX_VALUE} more characters)"


class _Handler(logging.Handler):
    """Turns records into lines and queues them. Called under the handler's lock.

    The queue is a SimpleQueue because its `put` may be interrupted by a signal handler that logs.
    """

    def __init__(self, capacity: int, show_exceptions: bool) -> None:
        super().__init__()
        self.lines: SimpleQueue[str | None] = SimpleQueue()
        self.dropped = 0
        self.closed = False
        self._capacity = capacity
        self._show_exceptions = show_exceptions

    def emit(self, record: logging.LogRecord) -> None:
        if self.closed or self.lines.qsize() >= self._capacity:
            self.dropped += 1
            return
        try:
            line = format_line(record, self._show_exceptions)
        except Exception as error:  # noqa: BLE001 - a value's own __str__ may raise anything
            line = _own_line(
                logging.ERROR,
                "log record cannot be shown",
                {"error": type(error).__name__, "file": record.filename, "line": record.lineno},
            )
        self.lines.put(line)

    def stop(self) -> None:
        """No line after this one. Under the lock, so that none slips in behind the end mark."""
        self.acquire()
        try:
            if not self.closed:
                self.closed = True
                self.lines.put(None)
        finally:
            self.release()


def _own_line(level: int, message: str, fields: Mapping[str, object]) -> str:
    """A line of this module's own, past the queue."""
    return format_line(
        logging.makeLogRecord({"name": PACKAGE, "levelno": level, "msg": message, "fields": fields})
    )


# --- from a line to standard error -------------------------------------------------------------


class _Writer(threading.Thread):
    """Writes the queued lines, and says how many are missing.

    `dropped` belongs to the handler, `lost` and `_reported` to this thread, so no lock is needed.
    """

    def __init__(self, handler: _Handler, sink: _Sink) -> None:
        super().__init__(name="logs", daemon=True)
        self.lost = 0
        self._reported = 0
        self._next_notice = 0.0
        self._handler = handler
        self._sink = sink

    def run(self) -> None:
        while (line := self._handler.lines.get()) is not None:
            if not self._write(line):
                self.lost += 1
            elif self._handler.lines.empty() or time.monotonic() >= self._next_notice:
                self._report()
        self._report()
        self._sink.close()

    def _report(self) -> None:
        missing = self._handler.dropped + self.lost - self._reported
        if missing:
            line = _own_line(logging.WARNING, "log lines dropped", {"count": missing})
            if self._write(line):
                self._reported += missing
            self._next_notice = time.monotonic() + NOTICE_INTERVAL_S

    def _write(self, line: str) -> bool:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a closed file object
            self._sink.write(line)
            return True
        return False


class _Sink:
    """Where lines go. This one writes nothing: standard error was closed before the program began."""

    def write(self, line: str) -> None:
        """Raises OSError or ValueError if the line could not be written whole."""

    def close(self) -> None:
        """No line after this."""


class _StreamSink(_Sink):
    """A file object in memory, as tests use."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: str) -> None:
        self._stream.write(line)
        self._stream.flush()


class _DescriptorSink(_Sink):
    """Owns `descriptor`, and writes past Python's buffers.

    A daemon thread that is stuck inside those would abort the interpreter when it shuts down. If an error
    cut a line short, that line is ended before the next one begins.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._torn = False

    def write(self, line: str) -> None:
        left = (f"\n{line}" if self._torn else line).encode()
        while left:
            try:
                written = os.write(self._descriptor, left)
            except BlockingIOError:  # someone made the open file, which is shared, non-blocking
                self._wait()
                continue
            left = left[written:]
            self._torn = bool(left)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll()

    def close(self) -> None:
        os.close(self._descriptor)


def _open_sink(stream: TextIO | None) -> _Sink:
    if stream is None:
        return _Sink()
    try:
        descriptor = fcntl.fcntl(stream.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        return _StreamSink(stream)
    return _DescriptorSink(descriptor)
