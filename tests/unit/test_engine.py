"""The Docker client against a small HTTP server on a Unix socket that answers as a test wants."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ambassador.engine.api import EngineError, NoSuchContainer
from ambassador.engine.client import (
    MAX_ANSWER,
    MAX_KEPT_CONNECTIONS,
    DockerEngine,
    connect_engine,
)

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server | TcpServer

    def setup(self) -> None:
        self.server.connections += 1
        if isinstance(self.server, TcpServer):
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        for suffix, answer in self.server.answers.items():
            if path.endswith(suffix):
                answer(self)
                return
        self.send(404, b'{"message":"page not found"}')

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


def usual_answers() -> dict[str, Answer]:
    return {
        "/_ping": lambda h: h.send(200, b"OK", Api_Version="1.41"),
        "/version": lambda h: h.send(200, b'{"ApiVersion":"1.40"}'),
    }


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str) -> None:
        super().__init__(path, Handler)
        self.asked: list[str] = []
        self.connections = 0
        self.answers = usual_answers()


class TcpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.connections = 0
        self.answers = usual_answers()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(str(tmp_path / "s")) as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def connect(server: Server, timeout: float = 5.0) -> DockerEngine:
    return connect_engine(f"unix://{server.server_address!s}", timeout=timeout)


def connect_any(server: Server | TcpServer, timeout: float = 30.0) -> DockerEngine:
    where = server.server_address
    host = f"tcp://127.0.0.1:{where[1]}" if isinstance(where, tuple) else f"unix://{where!s}"
    return connect_engine(host, timeout=timeout, inspect_timeout=max(timeout, 2.0))


def says(status: int, body: bytes) -> Answer:
    return lambda handler: handler.send(status, body)


# --- connecting --------------------------------------------------------------------------------


def test_one_ping_negotiates_and_nothing_else_is_asked(server: Server) -> None:
    server.answers["/web/json"] = says(200, b'{"Id":"1"}')
    engine = connect(server)
    assert engine.inspect_container("web") == {"Id": "1"}
    assert server.asked == ["GET /_ping", "GET /v1.41/containers/web/json"]
    engine.close()


@pytest.mark.parametrize(
    "ping", [says(403, b"no"), says(200, b"OK"), lambda h: h.send(200, b"OK", Api_Version="new")]
)
def test_version_is_asked_where_the_ping_does_not_tell(server: Server, ping: Answer) -> None:
    server.answers["/_ping"] = ping
    server.answers["/web/json"] = says(200, b"{}")
    connect(server).inspect_container("web")
    assert server.asked == ["GET /_ping", "GET /version", "GET /v1.40/containers/web/json"]


def test_a_plain_path_and_the_urls_of_a_socket(server: Server) -> None:
    path = str(server.server_address)
    for host in (path, f"unix://{path}"):
        connect_engine(host).ping()


def test_no_socket_says_how_to_mount_it(tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"no socket .*docker run -v /var/run/docker.sock:"
    ) as info:
        connect_engine(str(tmp_path / "none"))
    assert info.value.retry_is_cheap


def test_a_dead_socket_says_that_nobody_listens(tmp_path: Path) -> None:
    Server(str(tmp_path / "s")).server_close()
    with pytest.raises(EngineError, match="nobody listens") as info:
        connect_engine(str(tmp_path / "s"))
    assert info.value.retry_is_cheap


@pytest.mark.parametrize(
    ("mode", "ids", "gid", "words"),
    [
        (0o660, "0 0 4294967295", 996, "run with the socket's group, docker run --group-add 996 "),
        (0o700, "0 0 4294967295", 996, r"only its owner may use it \(mode 0700\), .* --user 7 "),
        (0o660, "0 100000 65536", 65534, "user namespace .* docker run --userns host "),
        (0o660, "0 0 4294967295", 65534, "docker run --group-add 65534 "),
    ],
)
def test_permission_denied_says_what_helps(
    monkeypatch: pytest.MonkeyPatch, server: Server, *, mode: int, ids: str, gid: int, words: str
) -> None:
    """D9: the group helps only if the socket has one that may write and that this namespace knows."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = Path(str(server.server_address))
    os.chown(path, 7, gid)
    path.chmod(mode)
    monkeypatch.setattr("docker.transport.unixconn.UnixHTTPConnection.connect", refuse)
    monkeypatch.setattr(Path, "read_text", lambda _: f"{ids}\n")
    with pytest.raises(EngineError, match=words):
        connect(server)


def test_a_refused_tcp_port_is_one_line() -> None:
    with pytest.raises(EngineError, match="Connection refused") as info:
        connect_engine("tcp://127.0.0.1:1")
    assert "\n" not in str(info.value) and "127.0.0.1:1" in str(info.value)
    assert not info.value.retry_is_cheap


@pytest.mark.parametrize("host", ["tcp://", "fd://", "tcp://127.0.0.1", "gopher://x:1"])
def test_an_address_that_is_none_is_an_engine_error(host: str) -> None:
    with pytest.raises(EngineError):
        connect_engine(host)


def test_a_silent_daemon_ends_in_time(server: Server) -> None:
    server.answers["/_ping"] = lambda _: time.sleep(2)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"does not answer GET /_ping in time"):
        connect(server, timeout=0.1)
    assert time.monotonic() - began < 1.5


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "No such container: web"),
        (404, 'no container with name or ID "web" found: no such container'),
        (500, "no container with ID 3f found in database: no such container"),  # Podman removes it
        # D14: nothing has that name or that whole ID, or no prefix would have been looked for.
        (500, "Multiple IDs found with provided prefix: db"),
        (400, "multiple IDs found with provided prefix: db"),
        (500, 'more than one result for container name or ID "db": container already exists'),
    ],
)
def test_no_such_container(server: Server, status: int, message: str) -> None:
    server.answers["/json"] = says(status, json.dumps({"message": message}).encode())
    with pytest.raises(NoSuchContainer):
        connect(server).inspect_container("web")


@pytest.mark.parametrize("name", ["a/b", "../info", "web/json?x=", "a\nb", "☃", "", "-a", "/"])
def test_a_name_that_no_container_has_is_not_asked_for(server: Server, name: str) -> None:
    """S3, I3: only a valid name goes into the path of a request."""
    engine = connect(server)
    asked = list(server.asked)
    with pytest.raises(NoSuchContainer):
        engine.inspect_container(name)
    assert server.asked == asked


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(403, b"<html>no</html>"), r"forbids GET /containers/web/json \(403\).*CONTAINERS"),
        (says(404, b"<html>not here</html>"), "with 404.*: check that -sock names a Docker Engine"),
        (says(404, b'{"message":"page not found"}'), "check that -sock names a Docker Engine"),
        (
            says(500, b'{"message":"a\\nb"}'),
            "answers GET /containers/web/json with 500: a: see the daemon's log$",
        ),
        (says(200, b"junk"), "GET /containers/web/json failed"),
        (says(200, b"[]"), "no JSON object"),
        (says(200, b"\xff\xfe{"), "GET /containers/web/json failed"),
    ],
)
def test_other_answers_name_the_endpoint(server: Server, answer: Answer, words: str) -> None:
    server.answers["/json"] = answer
    with pytest.raises(EngineError, match=words) as info:
        connect(server).inspect_container("web")
    assert not isinstance(info.value, NoSuchContainer)
    assert str(info.value).isprintable()


def test_networks(server: Server) -> None:
    server.answers["/networks"] = says(200, b'[{"Name":"a"}]')
    assert connect(server).networks() == [{"Name": "a"}]
    server.answers["/networks"] = says(200, b"{}")
    assert connect(server).networks() == []


def test_tcp_is_asked_directly_whatever_proxy_the_environment_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with TcpServer() as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        connect_engine(f"tcp://127.0.0.1:{made.server_address[1]}").ping()
        made.shutdown()
    assert made.asked[0] == "GET /_ping" and len(made.asked) == 2


# --- answers without end, without bound, or from elsewhere -------------------------------------


def drips(head: bytes) -> Answer:
    def answer(handler: Handler) -> None:
        handler.wfile.write(head)
        with contextlib.suppress(OSError):
            for _ in range(100):
                time.sleep(0.05)
                handler.wfile.write(b" ")

    return answer


HEAD = b"HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Length: 10000\r\n\r\n{"


@pytest.mark.parametrize("head", [HEAD, HEAD[:20], b""], ids=["body", "head", "status"])
@pytest.mark.parametrize("path", ["/_ping", "/version", "/json", "/networks", "/events"])
def test_an_answer_that_drips_ends_in_time(
    any_server: Server | TcpServer, path: str, head: bytes
) -> None:
    """D12: the deadline is one for the whole answer, not one between two bytes."""
    if path == "/events" and head is HEAD:
        return  # a stream may drip
    if path == "/version":
        any_server.answers["/_ping"] = says(404, b"")
    engine = connect_any(any_server, 0.2) if path not in ("/_ping", "/version") else None
    any_server.answers[path] = drips(head)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"does not answer GET .* in time"):
        if engine is None:
            connect_any(any_server, 0.2)
        elif path == "/json":
            engine.inspect_container("web")
        elif path == "/networks":
            engine.networks()
        else:
            engine.events({})
    assert time.monotonic() - began < 1.5


def test_a_ping_that_drips_ends_in_time(server: Server) -> None:
    engine = connect(server, timeout=0.2)
    server.answers["/_ping"] = drips(HEAD)
    with pytest.raises(EngineError, match="does not answer GET /_ping in time"):
        engine.ping()


def test_an_inspect_may_begin_late(any_server: Server | TcpServer) -> None:
    """D13: a loaded Engine takes long until it answers; the answer itself comes at once."""

    def late(handler: Handler) -> None:
        time.sleep(0.5)
        handler.send(200, b'{"Id":"1"}')

    any_server.answers["/json"] = late
    assert connect_any(any_server, 0.1).inspect_container("web") == {"Id": "1"}


def test_close_ends_the_inspect_of_another_thread(any_server: Server | TcpServer) -> None:
    """D13: an inspect waits long, but not longer than the Engine is the one to ask."""
    asked, go_on = threading.Event(), threading.Event()

    def hang(_: Handler) -> None:
        asked.set()
        go_on.wait(5)

    any_server.answers["/json"] = hang
    engine = connect_any(any_server, 0.1)
    errors: list[EngineError] = []

    def inspect() -> None:
        try:
            engine.inspect_container("web")
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=inspect)
    thread.start()
    assert asked.wait(5)
    engine.close()
    thread.join(2)
    go_on.set()
    assert not thread.is_alive() and len(errors) == 1


def packed(handler: Handler) -> None:
    handler.send(200, gzip.compress(b'{"Id":"1"}'), Content_Encoding="gzip")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(200, b'{"Id":"' + b"x" * MAX_ANSWER + b'"}'), "an answer of more than 4 MB"),
        (says(500, b"x" * (MAX_ANSWER + 1)), "an answer of more than 4 MB"),
        (packed, "in encoding gzip, which was not asked for"),
        (says(200, b"[" * 100_000), "nested too deep"),
        (
            lambda h: h.send(302, b"x" * 100, Location="http://127.0.0.1:1/"),
            r"with a redirect \(302\), which is not followed: check that -sock",
        ),
    ],
)
def test_an_answer_that_is_not_taken(
    any_server: Server | TcpServer, answer: Answer, words: str
) -> None:
    """S3: memory is bounded, and nobody sends the parent elsewhere."""
    any_server.answers["/json"] = answer
    with pytest.raises(EngineError, match=words):
        connect_any(any_server).inspect_container("web")


def test_a_stream_is_not_redirected(server: Server) -> None:
    server.answers["/events"] = lambda h: h.send(307, b"", Location="http://127.0.0.1:1/")
    with pytest.raises(EngineError, match="redirect"):
        connect(server).events({})


def test_nothing_packed_is_asked_for(server: Server) -> None:
    encodings = []

    def answer(handler: Handler) -> None:
        encodings.append(handler.headers.get("Accept-Encoding"))
        handler.send(200, b"{}")

    server.answers["/json"] = answer
    connect(server).inspect_container("/web")
    assert encodings == ["identity"]
    assert server.asked[-1] == "GET /v1.41/containers/web/json"


def test_keepalive_over_tcp() -> None:
    """D3: an event stream stays known to what lies between, and its silent death is noticed."""
    with TcpServer() as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        hold = threading.Event()
        made.answers["/events"] = chunks(b"1", hold=hold)
        stream = connect_any(made).events({})
        options = stream._reader._sock
        assert options.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert options.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        stream.close()
        hold.set()
        made.shutdown()


# --- kept connections --------------------------------------------------------------------------


@pytest.fixture(params=[Server, TcpServer])
def any_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server | TcpServer]:
    with request.param(str(tmp_path / "s")) if request.param is Server else TcpServer() as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


def test_one_connection_serves_every_path(any_server: Server | TcpServer) -> None:
    any_server.answers["/json"] = says(200, b"{}")
    engine = connect_any(any_server)
    engine.ping()
    before = any_server.connections
    for number in range(100):
        engine.inspect_container(f"web{number}")
    assert any_server.connections == before


def test_as_many_connections_are_kept_as_promised(any_server: Server | TcpServer) -> None:
    """All at once, twice: the second time no request needs a new connection."""
    count = MAX_KEPT_CONNECTIONS
    together = threading.Barrier(count)

    def answer(handler: Handler) -> None:
        together.wait(20)
        handler.send(200, b"{}")

    any_server.answers["/json"] = answer
    engine = connect_any(any_server)
    made = []
    for _ in range(2):
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(engine.inspect_container, [f"web{n}" for n in range(count)]))
        made.append(any_server.connections)
    assert made[0] >= count
    assert made[1] == made[0]
    engine.close()


# --- the event stream --------------------------------------------------------------------------


def chunks(*pieces: bytes, end: bool = True, hold: threading.Event | None = None) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for piece in pieces:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if hold is not None:
            hold.wait(5)
        if end:
            with contextlib.suppress(BrokenPipeError):
                handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return answer


def plain(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(b'{"a":1}\n')
    time.sleep(0.2)
    handler.wfile.write(b'{"b":2}\n')
    handler.close_connection = True


def test_events_come_as_they_are_sent_filtered_by_the_server(server: Server) -> None:
    server.answers["/events"] = chunks(b'{"a":1}\n', b'{"b":', b"2}\n")
    stream = connect(server).events({"type": ["container"]})
    assert list(stream) == [b'{"a":1}\n', b'{"b":', b"2}\n"]
    assert server.asked[-1] == (
        "GET /v1.41/events?filters=%7B%22type%22%3A+%5B%22container%22%5D%7D"
    )


@pytest.mark.parametrize("answer", [chunks(b"x", end=False), chunks(b"x")])
def test_a_stream_cut_short_just_ends(server: Server, answer: Answer) -> None:
    server.answers["/events"] = answer
    assert b"".join(connect(server).events({})) == b"x"


def test_without_chunks_events_still_come_at_once(server: Server) -> None:
    server.answers["/events"] = plain
    began, first = time.monotonic(), 0.0
    data = b""
    for piece in connect(server).events({}):
        first = first or time.monotonic() - began
        data += piece
    assert data == b'{"a":1}\n{"b":2}\n'
    assert first < 0.15


def test_silence_longer_than_the_timeout_does_not_end_the_stream(server: Server) -> None:
    hold = threading.Event()
    server.answers["/events"] = chunks(b"1", hold=hold)
    pieces = iter(connect(server, timeout=0.1).events({}))
    assert next(pieces) == b"1"
    threading.Timer(0.4, hold.set).start()
    began = time.monotonic()
    assert list(pieces) == []
    assert time.monotonic() - began > 0.25


def test_close_ends_the_iteration_of_another_thread(server: Server) -> None:
    hold = threading.Event()
    server.answers["/events"] = chunks(b"1", hold=hold)
    stream = connect(server).events({})
    reader = threading.Thread(target=list, args=(stream,))
    reader.start()
    time.sleep(0.05)
    assert reader.is_alive()
    stream.close()
    reader.join(2)
    assert not reader.is_alive()
    stream.close()  # once more does no harm
    hold.set()


def test_a_forbidden_stream_names_the_endpoint(server: Server) -> None:
    server.answers["/events"] = says(403, b"")
    with pytest.raises(EngineError, match=r"forbids GET /events \(403\).*EVENTS"):
        connect(server).events({})


def test_a_stream_whose_head_never_comes_ends_in_time(server: Server) -> None:
    server.answers["/events"] = lambda _: time.sleep(2)
    began = time.monotonic()
    with pytest.raises(EngineError, match="does not answer GET /events"):
        connect(server, timeout=0.1).events({})
    assert time.monotonic() - began < 1.5
