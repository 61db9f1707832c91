"""The client of a Docker Engine: a few GET requests, and errors that say what to do.

Invariants:

- The only module that imports docker. Its results are JSON, bytes and EngineError.
- Every answer has a deadline for its first byte, one for the whole, and a bound on its size. Only an open
  event stream has neither. `close` ends every request.
- Every error is one line that names the endpoint and ends with what to do.
- Requests go directly to the Engine: proxies, .netrc and CA bundles of the environment are ignored, redirects
  are not followed, and nothing is unpacked.
"""

from __future__ import annotations

import errno
import http.client
import io
import json
import logging
import re
import socket
import stat
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import docker
import docker.tls
import requests
import urllib3
from docker.constants import MINIMUM_DOCKER_API_VERSION
from docker.errors import DockerException
from docker.transport import UnixHTTPAdapter
from docker.transport.unixconn import UnixHTTPConnectionPool
from requests.adapters import HTTPAdapter

from ambassador.engine.address import TlsFiles
from ambassador.engine.api import Document, EngineError, NoSuchContainer

TIMEOUT_S = 5.0
"""To connect, to begin an answer, and from its first byte to its last."""

INSPECT_TIMEOUT_S = 60.0
"""To begin the answer to an inspect: Docker holds a container's lock while it starts or stops it, and a
loaded Engine takes seconds. If the Engine does not even answer pings, `close` ends the wait."""

MAX_ANSWER = 4 << 20
"""Bytes. An inspect has some kilobytes; each byte of JSON can cost twenty of memory."""

READ_BYTES = 64 * 1024
MAX_KEPT_CONNECTIONS = 64
"""Idle connections that a client keeps. If more watchers ask at once, the rest of their connections close."""

KEEPALIVE = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""Over TCP. An idle event stream stays known to NATs, and one that they forgot ends within a minute."""

_VERSION = re.compile(r"1\.\d+", re.ASCII)
_NAME = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)
"""Names that Docker allows for a container, and IDs. Docker writes a name with a slash before it."""

_FAULTS = (
    DockerException,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    OSError,
    ValueError,
)

T = TypeVar("T")


def connect_engine(
    host: str,
    *,
    tls: TlsFiles | None = None,
    timeout: float = TIMEOUT_S,
    inspect_timeout: float = INSPECT_TIMEOUT_S,
) -> DockerEngine:
    """A client that speaks the API version of the Engine at `host`. The caller closes it.

    `host` is a path, `unix://path`, `tcp://host:port`, `http://host:port` or `https://host:port`. The
    timeouts are seconds, as TIMEOUT_S and INSPECT_TIMEOUT_S. Raises EngineError without an answer.
    """
    where = host.removeprefix("unix://")
    url = f"unix://{host}" if host.startswith("/") else host
    # urllib3 warns of every connection that it cannot keep.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    session = _call("GET /_ping", where, lambda: _Session(url, where, tls, timeout))
    try:
        return DockerEngine(session, _api_version(session), inspect_timeout)
    except EngineError:
        session.close()
        raise


def _api_version(session: _Session) -> str:
    try:
        response = session.get("GET /_ping", "/_ping")
        session.read("GET /_ping", response)
        version = response.headers.get("Api-Version", "")
    except EngineError as error:
        if error.status not in (403, 404, 405):
            raise
        version = ""  # a proxy that forbids the ping may allow /version
    if not _VERSION.fullmatch(version):
        answer = session.ask("GET /version", "/version")
        version = str(answer.get("ApiVersion", "")) if isinstance(answer, Mapping) else ""
    if not _VERSION.fullmatch(version):
        raise EngineError(
            f"{session.where} answers GET /version with no API version: {CHECK_SOCK}", status=200
        )
    return version


class DockerEngine:
    """An Engine that has answered. Several threads may use it."""

    def __init__(self, session: _Session, version: str, inspect_timeout: float) -> None:
        self._session = session
        self._root = f"/v{version}"
        self._inspect_timeout = inspect_timeout

    def inspect_container(self, name: str) -> Document:
        if not _NAME.fullmatch(name):
            # Do not ask: a slash or a question mark in it would make the path of another endpoint.
            raise NoSuchContainer(f"no container can be named {first_line(name, 64)}", status=404)
        endpoint = f"GET /containers/{first_line(name, 64)}/json"
        path = f"{self._root}/containers/{name.removeprefix('/')}/json"
        document = self._session.ask(endpoint, path, self._inspect_timeout)
        if not isinstance(document, Mapping):
            raise EngineError(
                f"{self._session.where} answers {endpoint} with no JSON object: {CHECK_SOCK}",
                status=200,
            )
        return document

    def events(self, filters: Mapping[str, list[str]]) -> DockerEvents:
        # client.events() has no timeout for the head of the answer, and collects text that is not
        # JSON in memory without end.
        parameters = {"filters": json.dumps(filters)}
        return DockerEvents(self._session.get("GET /events", f"{self._root}/events", parameters))

    def ping(self) -> None:
        self._session.read("GET /_ping", self._session.get("GET /_ping", "/_ping"))

    def networks(self) -> list[Any]:
        networks = self._session.ask("GET /networks", f"{self._root}/networks")
        return networks if isinstance(networks, list) else []

    def info(self) -> Mapping[str, Any]:
        info = self._session.ask("GET /info", f"{self._root}/info")
        return info if isinstance(info, Mapping) else {}

    def close(self) -> None:
        """Close the connections, and end the requests of other threads."""
        self._session.close()


class DockerEvents:
    """An open event stream. Every end of it, also a broken connection, ends the iteration."""

    def __init__(self, response: requests.Response) -> None:
        self._response = response
        # There is no public way: docker's CancellableStream does the same.
        raw: Any = response.raw
        self._reader: _Reader = raw._fp.fp.raw
        self._reader.wait_for_ever()  # after the head of the answer, silence is normal

    def __iter__(self) -> Iterator[bytes]:
        # Without chunks (an old proxy) urllib3 waits for as many bytes as it is asked for: ask for one.
        raw = self._response.raw
        try:
            yield from raw.stream(READ_BYTES if raw.chunked else 1, decode_content=False)
        except (*_FAULTS, AttributeError):
            return  # closed or broken: the stream has ended

    def close(self) -> None:
        """End the iteration, also of another thread."""
        self._reader.cut()


# --- requests ----------------------------------------------------------------------------------


class _Client(docker.APIClient):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: an Engine sends nobody elsewhere."""


class _Session:
    """GET requests to one Engine, over connections that are kept. Raises EngineError only."""

    def __init__(self, url: str, where: str, tls: TlsFiles | None, timeout: float) -> None:
        self.where = where
        self._timeout = timeout
        self._answers = _Answers(timeout)
        self._client = _Client(
            base_url=url,
            version=MINIMUM_DOCKER_API_VERSION,  # a path that needs one names its own
            timeout=timeout,  # type: ignore[arg-type]  # the stubs say int; it goes to a socket
            tls=_tls_config(tls),
        )
        self._client.trust_env = False
        # One connection pool for all requests together: docker's own adapter has one for each URL.
        if url.startswith("unix://"):
            self._client.mount("http+docker://", _UnixAdapter(url, timeout, self._answers))
        else:
            for scheme in ("http://", "https://"):
                self._client.mount(scheme, _TcpAdapter(self._answers))

    def get(
        self,
        endpoint: str,
        path: str,
        parameters: Mapping[str, str] | None = None,
        first_byte: float | None = None,
    ) -> requests.Response:
        """The answer, of which only the head has been read. `first_byte` is in seconds."""

        def send() -> requests.Response:
            return self._client.get(
                f"{self._client.base_url}{path}",
                params=parameters,
                stream=True,
                headers={"Accept-Encoding": "identity"},
                timeout=(self._timeout, first_byte or self._timeout),
            )

        response = _call(endpoint, self.where, send)
        if response.status_code != 200:
            raise _http_error(self.read(endpoint, response), response, endpoint, self.where)
        return response

    def read(self, endpoint: str, response: requests.Response) -> bytes:
        """The body of `response`, at most MAX_ANSWER."""
        try:
            return _call(endpoint, self.where, lambda: _body(response))
        except EngineError:
            response.close()
            raise

    def ask(self, endpoint: str, path: str, first_byte: float | None = None) -> object:
        """The JSON value that the Engine answers."""
        body = self.read(endpoint, self.get(endpoint, path, first_byte=first_byte))
        return _call(endpoint, self.where, lambda: _json(body))

    def close(self) -> None:
        self._answers.cut()
        self._client.close()


def _body(response: requests.Response) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ValueError(f"an answer in encoding {encoding}, which was not asked for")
    body = bytearray()
    for piece in response.raw.stream(READ_BYTES, decode_content=False):
        body += piece
        if len(body) > MAX_ANSWER:
            raise ValueError(f"an answer of more than {MAX_ANSWER >> 20} MB")
    return bytes(body)


def _json(body: bytes) -> object:
    try:
        value: object = json.loads(body)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    return value


class _Answers:
    """The answers that are awaited on the connections of one session."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._lock = Lock()
        self._readers: weakref.WeakSet[_Reader] = weakref.WeakSet()
        self._is_cut = False

    def add(self, reader: _Reader) -> None:
        with self._lock:
            self._readers.add(reader)
            if self._is_cut:
                reader.cut()

    def cut(self) -> None:
        """End all of them, and all to come."""
        with self._lock:
            self._is_cut = True
            for reader in self._readers:
                reader.cut()


class _Reader(io.RawIOBase):
    """Reads one answer, with a deadline for its first byte and then for all of it.

    A socket's timeout alone is one between two bytes: an answer that drips would never end.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, timeout: float) -> None:
        self._raw = raw
        self._sock = sock
        self._timeout: float | None = timeout  # from the first byte to the last
        first = sock.gettimeout()
        self._deadline = None if first is None else time.monotonic() + first
        self._has_begun = False

    def wait_for_ever(self) -> None:
        """From now on there is no deadline."""
        self._has_begun, self._deadline = True, None
        self._sock.settimeout(None)

    def cut(self) -> None:
        """End the answer, also for another thread that reads it."""
        if not self.closed:
            with suppress(OSError):  # it has ended before
                self._sock.shutdown(socket.SHUT_RDWR)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the answer takes too long")
            self._sock.settimeout(left)
        size: int | None = self._raw.readinto(buffer)
        if not self._has_begun and self._timeout is not None:
            self._has_begun, self._deadline = True, time.monotonic() + self._timeout
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, answers: _Answers, **names: Any) -> None:
        super().__init__(sock, *args, **names)
        reader = _Reader(self.fp.detach(), sock, answers.timeout)
        answers.add(reader)
        self.fp = io.BufferedReader(reader)


def _read_by(answers: _Answers, pool: type[Any]) -> type[Any]:
    """`pool`, whose connections read their answers with a deadline."""

    class Pool(pool):  # type: ignore[misc]  # a base that is a value
        def _new_conn(self) -> Any:
            connection = super()._new_conn()
            connection.response_class = partial(_Response, answers=answers)
            return connection

    return Pool


class _UnixAdapter(UnixHTTPAdapter):
    def __init__(self, url: str, timeout: float, answers: _Answers) -> None:
        super().__init__(url.replace("unix://", "http+unix://", 1), pool_connections=1)
        pool = _read_by(answers, UnixHTTPConnectionPool)
        self._pool = pool("localhost", self.socket_path, timeout, maxsize=MAX_KEPT_CONNECTIONS)

    def get_connection(self, url: str | bytes, proxies: Any = None) -> Any:  # noqa: ARG002
        return self._pool

    def close(self) -> None:
        self._pool.close()
        super().close()


class _TcpAdapter(HTTPAdapter):
    def __init__(self, answers: _Answers) -> None:
        super().__init__(pool_connections=1, pool_maxsize=MAX_KEPT_CONNECTIONS)
        self.poolmanager.pool_classes_by_scheme = {
            "http": _read_by(answers, urllib3.HTTPConnectionPool),
            "https": _read_by(answers, urllib3.HTTPSConnectionPool),
        }

    def init_poolmanager(self, *args: Any, **names: Any) -> None:
        super().init_poolmanager(*args, **names, socket_options=list(KEEPALIVE))


def _tls_config(tls: TlsFiles | None) -> docker.tls.TLSConfig | bool:
    if tls is None:
        return False
    if not tls.verify:
        # With -tls the user chose this; urllib3 would warn on standard error at every request.
        warnings.filterwarnings("ignore", category=urllib3.exceptions.InsecureRequestWarning)
    pair = (tls.cert, tls.key)
    usable = all(path and Path(path).is_file() for path in pair)
    return docker.tls.TLSConfig(
        client_cert=pair if usable else None,
        ca_cert=tls.ca if tls.verify and tls.ca else None,
        verify=tls.verify,
    )


# --- errors that say what to do ----------------------------------------------------------------

CHECK_SOCK = "check that -sock names a Docker Engine"

_AMBIGUOUS = ("multiple ids found with provided prefix", "more than one result for container")
"""How Docker and Podman begin it, in lower case."""

_OVERFLOW_ID = 65534
"""What the kernel shows for a user or group that has no ID in this user namespace."""


def _call(endpoint: str, where: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except _FAULTS as error:
        raise _engine_error(error, endpoint, where) from error


def _engine_error(error: BaseException, endpoint: str, where: str) -> EngineError:
    chain = list(_causes(error))
    if any(isinstance(e, requests.Timeout | TimeoutError) for e in chain):
        return EngineError(
            f"{where} does not answer {endpoint} in time: check whether the daemon is stuck"
        )
    number = next((e.errno for e in chain if isinstance(e, OSError) and e.errno), None)
    local = where.startswith("/")
    if local and number == errno.ENOENT:
        return EngineError(
            f"there is no socket {where}: start Docker, or in a container mount it with"
            f" docker run -v /var/run/docker.sock:{where} …",
            retry_is_cheap=True,
        )
    if local and number in (errno.EACCES, errno.EPERM):
        return EngineError(
            f"permission denied on {where}: {_how_to_be_permitted(where)}", retry_is_cheap=True
        )
    if local and number == errno.ECONNREFUSED:
        return EngineError(
            f"nobody listens on {where}: start Docker; if the socket is mounted into a container,"
            " mount its directory, since a new daemon makes a new socket",
            retry_is_cheap=True,
        )
    reason = next((e.strerror for e in chain if isinstance(e, OSError) and e.strerror), None)
    return EngineError(
        f"{where}: {endpoint} failed: {first_line(reason or str(error) or repr(error))}:"
        " check -sock and the daemon"
    )


def _how_to_be_permitted(where: str) -> str:
    """What to do if the socket `where` may not be used. IDs are those of this user namespace."""
    try:
        found = Path(where).stat()
    except OSError:
        return "let this user enter the socket's directory"
    if _OVERFLOW_ID in (found.st_uid, found.st_gid) and not _has_every_id():
        # The socket's owner or group is none of this user namespace: no group helps.
        return "this user namespace lacks the socket's owner, run with docker run --userns host …"
    if not found.st_mode & stat.S_IWGRP:
        mode = stat.S_IMODE(found.st_mode)
        return f"only its owner may use it (mode {mode:04o}), run with docker run --user {found.st_uid} …"
    return f"run with the socket's group, docker run --group-add {found.st_gid} …"


def _has_every_id() -> bool:
    """Whether this user namespace has the IDs of the host, each as itself."""
    try:
        fields = Path("/proc/self/uid_map").read_text().split()
    except OSError:
        return True
    return fields == ["0", "0", "4294967295"]


def _http_error(body: bytes, response: requests.Response, endpoint: str, where: str) -> EngineError:
    status, said = response.status_code, _message(body)
    if endpoint.startswith("GET /containers/") and _says_no_such_container(status, said):
        return NoSuchContainer(said, status=status)
    if status in (401, 403):
        return EngineError(
            f"{where} forbids {endpoint} ({status}): allow it there (in a docker-socket-proxy:"
            " PING, VERSION, EVENTS, CONTAINERS and NETWORKS = 1)",
            status=status,
        )
    if 300 <= status < 400:
        return EngineError(
            f"{where} answers {endpoint} with a redirect ({status}), which is not followed:"
            f" {CHECK_SOCK}",
            status=status,
        )
    reason = said or first_line(response.reason or "")
    remedy = CHECK_SOCK if status == 404 else "see the daemon's log"
    return EngineError(
        f"{where} answers {endpoint} with {status}: {reason}: {remedy}", status=status
    )


def _says_no_such_container(status: int, said: str) -> bool:
    """Whether an error of the Engine means that no container has the name.

    As another error it would keep a dead container's address.
    """
    if status == 404:
        # An answer in the Engine's own form: the endpoint exists, the container does not. The words differ
        # between Engines.
        return bool(said) and said != "page not found"
    text = said.lower()
    # Podman, while it removes a container; and an Engine that looks for a prefix of an ID, since nothing has
    # exactly that name or ID.
    return text.endswith("no such container") or text.startswith(_AMBIGUOUS)


def _message(body: bytes) -> str:
    """The message of an answer in the Engine's own form, `{"message": …}`, else empty."""
    try:
        answer = _json(body)
    except ValueError:
        return ""
    return first_line(str(answer.get("message", ""))) if isinstance(answer, Mapping) else ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and its causes: requests wraps urllib3's errors, which wrap the system's."""
    todo: list[object] = [error]
    seen: set[int] = set()
    while todo:
        here = todo.pop(0)
        if isinstance(here, BaseException) and id(here) not in seen:
            seen.add(id(here))
            yield here
            todo += [*here.args, getattr(here, "reason", None), here.__cause__, here.__context__]


def first_line(text: str, limit: int = 200) -> str:
    """The first line of `text`, at most `limit` characters, with no character that cannot be printed."""
    first = next(iter(text.strip().splitlines()), "")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in first[:limit])
