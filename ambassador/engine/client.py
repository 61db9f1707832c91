"""The client of a Docker Engine: a few GET requests, and errors that say what to do.

Invariants:

- The only module that imports docker. Its results are JSON, bytes and EngineError.
- Every request ends within its timeout, connect included. Only an open event stream has none.
- Every error is one line that names the endpoint and ends with what to do.
- Requests go directly to the Engine: proxies, .netrc and CA bundles of the environment are ignored.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import docker
import docker.tls
import requests
import urllib3
from docker.constants import MINIMUM_DOCKER_API_VERSION
from docker.errors import DockerException
from docker.transport import UnixHTTPAdapter
from requests.adapters import HTTPAdapter

from ambassador.engine.address import TlsFiles
from ambassador.engine.api import EngineError, NoSuchContainer

TIMEOUT_S = 5.0
READ_BYTES = 64 * 1024
MAX_KEPT_CONNECTIONS = 64
"""Idle connections that a client keeps. If more watchers ask at once, the rest of their connections close."""

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
    host: str, *, tls: TlsFiles | None = None, timeout: float = TIMEOUT_S
) -> DockerEngine:
    """A client that speaks the API version of the Engine at `host`. The caller closes it.

    `host` is a path, `unix://path`, `tcp://host:port`, `http://host:port` or `https://host:port`. `timeout`
    is in seconds and holds for each request. Raises EngineError if the Engine does not answer.
    """
    where = host.removeprefix("unix://")
    url = f"unix://{host}" if host.startswith("/") else host
    # urllib3 warns of every connection that it cannot keep.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

    def client(version: str) -> docker.APIClient:
        made = docker.APIClient(
            base_url=url,
            version=version,
            timeout=timeout,  # type: ignore[arg-type]  # the stubs say int; it goes to a socket
            tls=_tls_config(tls),
        )
        made.trust_env = False
        _mount_pool(made, url, timeout)
        return made

    probe = _call("GET /_ping", where, lambda: client(MINIMUM_DOCKER_API_VERSION))
    try:
        version = _call("GET /_ping", where, lambda: _version_of_ping(probe))
    except EngineError as error:
        if error.status not in (403, 404, 405):
            raise
        version = ""  # a proxy that forbids the ping may allow /version
    finally:
        probe.close()
    if not version:
        version = _call("GET /version", where, lambda: client("auto").api_version)
    return DockerEngine(_call("GET /_ping", where, lambda: client(version)), where)


class _UnixAdapter(UnixHTTPAdapter):
    """Sends every request through one pool: docker's own adapter has a pool for each URL."""

    def get_connection(self, url: str | bytes, proxies: Any = None) -> Any:  # noqa: ARG002
        return super().get_connection("http+docker://localhost")


def _mount_pool(client: docker.APIClient, url: str, timeout: float) -> None:
    """Keep up to MAX_KEPT_CONNECTIONS connections for all requests together."""
    kept = MAX_KEPT_CONNECTIONS
    if url.startswith("unix://"):
        socket_url = url.replace("unix://", "http+unix://", 1)
        client.mount(
            "http+docker://",
            _UnixAdapter(
                socket_url,
                timeout,  # type: ignore[arg-type]  # as above
                pool_connections=1,
                max_pool_size=kept,
            ),
        )
        return
    for scheme in ("http://", "https://"):
        client.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=kept))


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


def _version_of_ping(client: docker.APIClient) -> str:
    response = client.get(f"{client.base_url}/_ping", timeout=client.timeout)
    response.raise_for_status()
    version = response.headers.get("Api-Version", "")
    return version if _VERSION.fullmatch(version) else ""


class DockerEngine:
    """An Engine that has answered. Several threads may use it."""

    def __init__(self, client: docker.APIClient, where: str) -> None:
        self._client = client
        self._where = where

    def inspect_container(self, name: str) -> Mapping[str, Any]:
        if not _NAME.fullmatch(name):
            # Do not ask: a slash or a question mark in it would make the path of another endpoint.
            raise NoSuchContainer(f"no container can be named {first_line(name, 64)}", status=404)
        endpoint = f"GET /containers/{first_line(name, 64)}/json"
        document: object = _call(
            endpoint, self._where, lambda: self._client.inspect_container(name)
        )
        if not isinstance(document, Mapping):
            raise EngineError(
                f"{self._where} answers {endpoint} with no JSON object: {CHECK_SOCK}", status=200
            )
        return document

    def events(self, filters: Mapping[str, list[str]]) -> DockerEvents:
        client = self._client

        def subscribe() -> requests.Response:
            # client.events() has no timeout for the head of the answer, and collects text that is not
            # JSON in memory without end.
            response = client.get(
                f"{client.base_url}/v{client.api_version}/events",
                params={"filters": json.dumps(filters)},
                stream=True,
                timeout=client.timeout,
            )
            response.raise_for_status()
            return response

        return DockerEvents(_call("GET /events", self._where, subscribe))

    def ping(self) -> None:
        _call("GET /_ping", self._where, self._client.ping)

    def networks(self) -> list[Any]:
        networks: object = _call("GET /networks", self._where, self._client.networks)
        return networks if isinstance(networks, list) else []

    def info(self) -> Mapping[str, Any]:
        info: object = _call("GET /info", self._where, self._client.info)
        return info if isinstance(info, Mapping) else {}

    def close(self) -> None:
        self._client.close()


class DockerEvents:
    """An open event stream. Every end of it, also a broken connection, ends the iteration."""

    def __init__(self, response: requests.Response) -> None:
        self._response = response
        self._socket = _socket_of(response)
        if self._socket is not None:
            self._socket.settimeout(None)  # after the head of the answer, silence is normal

    def __iter__(self) -> Iterator[bytes]:
        # Without chunks (an old proxy) urllib3 waits for as many bytes as it is asked for: ask for one.
        raw = self._response.raw
        try:
            yield from raw.stream(READ_BYTES if raw.chunked else 1)
        except (*_FAULTS, AttributeError):
            return  # closed or broken: the stream has ended

    def close(self) -> None:
        """End the iteration, also of another thread."""
        try:
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the stream has ended before


def _socket_of(response: requests.Response) -> socket.socket | None:
    # There is no public way: docker's CancellableStream does the same. Without the socket, the stream ends
    # after each silence of `timeout`, and the source subscribes again.
    here: Any = response.raw
    for name in ("_fp", "fp", "raw", "_sock"):
        here = getattr(here, name, None)
    return here if isinstance(here, socket.socket) else None


# --- errors that say what to do ----------------------------------------------------------------

CHECK_SOCK = "check that -sock names a Docker Engine"


def _call(endpoint: str, where: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except _FAULTS as error:
        raise _engine_error(error, endpoint, where) from error


def _engine_error(error: BaseException, endpoint: str, where: str) -> EngineError:
    chain = list(_causes(error))
    answer = next((e for e in chain if isinstance(e, requests.HTTPError)), None)
    if answer is not None and answer.response is not None:
        return _http_error(answer, endpoint, where)
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
            f"permission denied on {where}: run with the socket's group, docker run"
            f" --group-add $(stat -c %g {where}) …",
            retry_is_cheap=True,
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


def _http_error(error: requests.HTTPError, endpoint: str, where: str) -> EngineError:
    status, said = error.response.status_code, _message(error.response)
    if status == 404 and said and said != "page not found":
        # An answer in the Engine's own form: the endpoint exists, the container does not. The words differ
        # between Engines, and as another error it would keep a dead container's address.
        return NoSuchContainer(said, status=status)
    if status in (401, 403):
        return EngineError(
            f"{where} forbids {endpoint} ({status}): allow it there (in a docker-socket-proxy:"
            " PING, VERSION, EVENTS, CONTAINERS and NETWORKS = 1)",
            status=status,
        )
    reason = said or first_line(error.response.reason or "")
    remedy = CHECK_SOCK if status == 404 else "see the daemon's log"
    return EngineError(
        f"{where} answers {endpoint} with {status}: {reason}: {remedy}", status=status
    )


def _message(response: requests.Response) -> str:
    """The message of an answer in the Engine's own form, `{"message": …}`, else empty."""
    try:
        answer = response.json()
    except (requests.RequestException, ValueError):
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
