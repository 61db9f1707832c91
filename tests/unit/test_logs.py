"""The log: one line per event whatever it contains (I3, S6), and never in the caller's way (P5)."""

from __future__ import annotations

import ast
import errno
import io
import logging
import os
import re
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.system.logs import (
    MAX_VALUE,
    Logs,
    _DescriptorSink,
    _Handler,
    format_line,
    setup,
)
from ambassador.values import quote

ROOT = Path(__file__).resolve().parents[2]

log = logging.getLogger("ambassador.test")

any_text = st.text(st.characters())  # unlike the default, this has surrogates too

_PAIR = re.compile(r'([A-Za-z0-9._-]+)=("(?:[^"\\]|\\.)*"|[^" ]+)(?: |\Z)')


def parse_line(line: str) -> dict[str, str]:
    """What a log collector reads; fails where anything is left over."""
    assert line.endswith("\n")
    body, pairs, at = line[:-1], {}, 0
    assert body.isprintable(), "a line has a character that a terminal could obey"
    while at < len(body):
        pair = _PAIR.match(body, at)
        assert pair, f"not logrus text: {body[at:]!r}"
        key, value = pair.groups()
        assert key not in pairs
        pairs[key] = ast.literal_eval(value) if value.startswith('"') else value
        at = pair.end()
    return pairs


def record(message: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    attributes = {"name": "ambassador", "levelno": level, "msg": message, **extra}
    return logging.makeLogRecord(attributes)


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger("ambassador")
    levels = (root.level, package.level)
    yield
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    root.setLevel(levels[0])
    package.setLevel(levels[1])


def logged(stream: io.StringIO) -> list[dict[str, str]]:
    return [parse_line(line) for line in stream.getvalue().splitlines(keepends=True)]


def close(running: Logs) -> None:
    assert running.close(10)


# --- the form of a line ------------------------------------------------------------------------


def test_the_form_is_that_of_logrus() -> None:
    fields = {
        "port": 6379,
        "protocol": "tcp",
        "container": "redis",
        "backend": "172.17.0.3:6379",
        "backend6": "[fd00::5%2]:53",
        "generation": 1,
        "held": True,
        "empty": "",
        "words": "a b",
    }
    line = format_line(record("listening", created=1795388400.1239, fields=fields))
    assert line == (
        'time="2026-11-22T23:00:00.123Z" level=info msg="listening" port=6379 protocol=tcp '
        "container=redis backend=172.17.0.3:6379 backend6=[fd00::5%2]:53 generation=1 held=true "
        'empty="" words="a b"\n'
    )


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, "debug"),
        (logging.DEBUG, "debug"),
        (logging.INFO, "info"),
        (logging.INFO + 5, "info"),
        (logging.WARNING, "warning"),
        (logging.ERROR, "error"),
        (logging.CRITICAL, "fatal"),
        (99, "fatal"),
    ],
)
def test_names_of_levels(number: int, name: str) -> None:
    assert parse_line(format_line(record("x", number)))["level"] == name


@given(any_text, any_text, any_text)
def test_any_text_is_one_line_and_reads_back(message: str, key: str, value: str) -> None:
    line = format_line(record(message, fields={key: value}))
    assert len(line.splitlines()) == 1
    pairs = parse_line(line)
    assert list(pairs)[:3] == ["time", "level", "msg"]
    assert (pairs["level"], pairs["msg"]) == ("info", message)
    (written,) = list(pairs)[3:]
    assert pairs[written] == value
    assert line.encode().decode() == line


@given(st.lists(st.sampled_from(['"', "\\", "\n", " ", "level=error", "=", "\x1b[2J", "a"])))
def test_nothing_can_be_forged(pieces: list[str]) -> None:
    text = "".join(pieces)
    line = format_line(record(text, fields={"container": text, "after": "end"}))
    pairs = parse_line(line)
    assert set(pairs) == {"time", "level", "msg", "container", "after"}
    assert pairs["level"] == "info"
    assert pairs["container"] == text
    assert pairs["after"] == "end"


def test_every_character_that_could_break_or_disguise_a_line_is_escaped() -> None:
    harmful = [
        character
        for character in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs")
    ]
    assert len(harmful) > 2000
    quoted = quote("".join(harmful))
    assert not set(harmful) & set(quoted)
    assert ast.literal_eval(quoted) == "".join(harmful)


def test_readable_text_stays_readable() -> None:
    assert (
        quote("caf\u00e9 \u30c7\u30fc\u30bf \U0001f433")
        == '"caf\u00e9 \u30c7\u30fc\u30bf \U0001f433"'
    )
    assert quote('a"b\\c\n\t\x1b\u202e\U000e0041') == r'"a\"b\\c\n\t\x1b\u202e\U000e0041"'


def test_fields_cannot_stand_in_for_the_lines_own_keys() -> None:
    fields = {"level": "error", "time": "x", "msg": "y", "exception": "z", "a b\n": 1, "": 2}
    pairs = parse_line(format_line(record("real", fields=fields)))
    assert pairs["level"] == "info"
    assert pairs["msg"] == "real"
    assert pairs["fields.level"] == "error"
    assert pairs["fields.time"] == "x"
    assert pairs["fields.msg"] == "y"
    assert pairs["fields.exception"] == "z"
    assert pairs["a_b_"] == "1"
    assert pairs["_"] == "2"


def test_a_long_value_is_cut_and_says_so() -> None:
    pairs = parse_line(format_line(record("m" * (MAX_VALUE + 7), fields={"v": "v" * 10**6})))
    assert pairs["msg"] == "m" * MAX_VALUE + "... (7 more characters)"
    assert len(pairs["v"]) < MAX_VALUE + 50


def test_fields_that_are_no_mapping_are_left_out() -> None:
    assert set(parse_line(format_line(record("x", fields=["no", "mapping"])))) == {
        "time",
        "level",
        "msg",
    }


# --- from the standard library's loggers to the stream ------------------------------------------


def test_events_arrive_in_order_from_their_level_upwards() -> None:
    stream = io.StringIO()
    running = setup("warning", stream)
    log.debug("a")
    log.info("b")
    log.warning("c %s", "d", extra={"fields": {"port": 1}})
    log.error("e")
    log.critical("f")
    close(running)
    assert [(line["level"], line["msg"]) for line in logged(stream)] == [
        ("warning", "c d"),
        ("error", "e"),
        ("fatal", "f"),
    ]
    assert logged(stream)[0]["port"] == "1"
    assert running.dropped == 0


def test_panic_is_above_everything_that_is_logged() -> None:
    stream = io.StringIO()
    running = setup("panic", stream)
    log.critical("not even this")
    close(running)
    assert stream.getvalue() == ""


def test_other_packages_are_heard_from_warnings_upwards_and_named() -> None:
    stream = io.StringIO()
    running = setup("debug", stream)
    logging.getLogger("urllib3.pool").info("chatter")
    logging.getLogger("urllib3.pool").warning("pool is full")
    close(running)
    (line,) = logged(stream)
    assert (line["msg"], line["logger"]) == ("pool is full", "urllib3.pool")


def test_a_second_setup_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    close(setup("info", first))
    running = setup("info", second)
    log.info("once")
    close(running)
    assert first.getvalue() == ""
    assert [line["msg"] for line in logged(second)] == ["once"]


@pytest.mark.parametrize(("level", "shown"), [("debug", True), ("info", False)])
def test_exceptions_are_shown_at_debug_level_in_the_same_line(level: str, shown: bool) -> None:
    stream = io.StringIO()
    running = setup(level, stream)
    try:
        raise ValueError("bad\nlevel=fatal \x1b[31m")
    except ValueError:
        log.exception("failed")
    log.error("no exception here", exc_info=True)
    close(running)
    failed, bare = logged(stream)
    assert (failed["level"], failed["msg"]) == ("error", "failed")
    assert ("exception" in failed) == shown
    if shown:
        assert failed["exception"].startswith("Traceback (most recent call last):\n")
        assert failed["exception"].endswith("ValueError: bad\nlevel=fatal \x1b[31m")
    assert "exception" not in bare


class _Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


def test_what_cannot_be_shown_is_reported_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])  # pytest's own raises on such records
        running = setup("info", stream)
        log.info("%d items", "many")
        log.info("x", extra={"fields": {"value": _Hostile()}})
        log.info("after")
        close(running)
    wrong_arguments, hostile, after = logged(stream)
    assert wrong_arguments["msg"] == hostile["msg"] == "log record cannot be shown"
    assert wrong_arguments["error"] == "TypeError"
    assert hostile["error"] == "RuntimeError"
    assert hostile["file"] == "test_logs.py"
    assert after["msg"] == "after"


def test_many_threads_share_the_log() -> None:
    stream = io.StringIO()
    running = setup("info", stream)

    def chatter(number: int) -> None:
        for count in range(200):
            log.info("x", extra={"fields": {"thread": number, "count": count}})

    threads = [threading.Thread(target=chatter, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close(running)
    lines = logged(stream)
    for number in map(str, range(4)):
        counts = [int(line["count"]) for line in lines if line["thread"] == number]
        assert counts == list(range(200))


# --- faults of standard error (P5) ---------------------------------------------------------------


def test_a_stuck_reader_blocks_nobody_and_every_lost_line_is_counted() -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as stream:  # noqa: PTH123 - a descriptor has no path
        running = setup("info", stream, capacity=100)
    began = time.monotonic()
    for count in range(5_000):
        log.info("event", extra={"fields": {"count": count, "padding": "x" * 100}})
    assert time.monotonic() - began < 5, "the caller waited for standard error"
    assert running.dropped > 4_000

    read: list[dict[str, str]] = []

    def drain() -> None:
        with open(reading) as lines:  # noqa: PTH123
            read.extend(map(parse_line, lines))

    reader = threading.Thread(target=drain)
    reader.start()
    close(running)  # and with it the last write end of the pipe
    reader.join(10)
    events = [line for line in read if line["msg"] == "event"]
    notices = [line for line in read if line["msg"] == "log lines dropped"]
    assert {line["level"] for line in notices} == {"warning"}
    assert sum(int(line["count"]) for line in notices) == running.dropped == 5_000 - len(events)
    assert [int(line["count"]) for line in events] == sorted(int(e["count"]) for e in events)


def test_dropped_lines_are_reported_without_waiting_for_another_event() -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as stream:  # noqa: PTH123
        running = setup("info", stream, capacity=10)
    for _ in range(2_000):
        log.info("x" * 100)
    seen = b""
    deadline = time.monotonic() + 10
    while b"log lines dropped" not in seen and time.monotonic() < deadline:
        seen += os.read(reading, 65_536)
    assert b"log lines dropped" in seen
    os.close(reading)
    close(running)


def test_close_gives_up_on_a_stuck_reader_at_the_deadline() -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as stream:  # noqa: PTH123
        running = setup("info", stream)
    for _ in range(2_000):
        log.info("x" * 100)
    began = time.monotonic()
    assert not running.close(0.2)
    assert time.monotonic() - began < 2
    log.info("after the end: dropped, not raised")
    assert running.dropped == 1
    os.close(reading)  # the thread gets EPIPE and ends
    close(running)


def test_a_reader_that_went_away_stops_nothing() -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as stream:  # noqa: PTH123
        running = setup("info", stream)
    os.close(reading)
    for _ in range(100):
        log.info("into the void")
    close(running)
    assert running.dropped == 100


def test_a_full_disk_stops_nothing() -> None:
    with open("/dev/full", "w", buffering=1) as stream:  # noqa: PTH123
        running = setup("info", stream)
    log.info("x")
    close(running)
    assert running.dropped == 1


def test_a_closed_stream_stops_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    running = setup("info", stream)
    log.info("x")
    close(running)
    assert running.dropped == 1


def test_a_non_blocking_reader_gets_every_line() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open(writing, "w") as stream:  # noqa: PTH123
        running = setup("info", stream)
    for count in range(3_000):
        log.info("x" * 100, extra={"fields": {"count": count}})
    time.sleep(0.2)  # long enough for the pipe to be full
    read: list[int] = []

    def drain() -> None:
        with open(reading) as lines:  # noqa: PTH123
            read.extend(int(parse_line(line)["count"]) for line in lines)

    reader = threading.Thread(target=drain)
    reader.start()
    close(running)
    reader.join(10)
    assert read == list(range(3_000))


def test_a_line_cut_short_by_an_error_is_ended_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = b""
    full = -1
    answers = [4, full, full, 2, 100]

    def write(_descriptor: int, data: bytes) -> int:
        nonlocal written
        answer = answers.pop(0)
        if answer == full:
            raise OSError(errno.ENOSPC, "full")
        written += data[:answer]
        return len(data[:answer])

    monkeypatch.setattr(os, "write", write)
    sink = _DescriptorSink(-1)
    for line in ("first\n", "second\n"):
        with pytest.raises(OSError, match="full"):
            sink.write(line)
    sink.write("third\n")
    assert written == b"firs\nthird\n"
    assert not answers


def _python(code: str, before: Callable[[], None] | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        preexec_fn=before,
    )
    return done.returncode, done.stdout, done.stderr


_LOG_AND_PRINT = """
import logging, sys
from ambassador.system.logs import setup
running = setup("info")
for count in range(20_000):
    logging.getLogger("ambassador").info("event")
print(running.close({deadline}), sys.stderr is None)
"""


def test_standard_error_closed_before_the_start() -> None:
    def close_standard_error() -> None:
        os.close(2)

    code, output, _ = _python(_LOG_AND_PRINT.format(deadline=10), close_standard_error)
    assert (code, output) == (0, "True True\n")


def test_standard_error_stuck_until_the_end_does_not_abort_the_interpreter() -> None:
    reading, writing = os.pipe()
    done = subprocess.run(
        [sys.executable, "-c", _LOG_AND_PRINT.format(deadline=0.2)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=writing,
        text=True,
        timeout=30,
        check=False,
    )
    os.close(writing)
    os.close(reading)
    assert (done.returncode, done.stdout) == (0, "False False\n")


def test_the_log_never_goes_to_a_socket_that_took_over_descriptor_2() -> None:
    code, output, errors = _python(
        """
import logging, os, socket
from ambassador.system.logs import setup
running = setup("info")
os.close(2)
client, peer = socket.socketpair()
assert client.fileno() == 2, client.fileno()
logging.getLogger("ambassador").info("for the log alone")
assert running.close(10)
peer.setblocking(False)
try:
    print(peer.recv(100))
except BlockingIOError:
    print("nothing")
"""
    )
    assert (code, output) == (0, "nothing\n")
    assert parse_line(errors)["msg"] == "for the log alone"
