"""The Docker Engine behind a socket: the few GET requests that are needed, and errors one can act on.

Invariants:

- The only module that imports docker. What leaves it is JSON, bytes and EngineError.
- Every request but the open event stream ends within its timeout, connecting included.
- Every error names the endpoint and, where there is one, the remedy, in one line.
- The Engine is asked directly: no proxy, .netrc or CA bundle of the environment has a say.
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

from ambassador.engine.address import TlsFiles
from ambassador.engine.api import EngineError, NoSuchContainer

TIMEOUT_S = 5.0
READ_BYTES = 64 * 1024
POOL = 64
"""Kept connections. Each watcher may use one at a time."""

_VERSION = re.compile(r"1\.\d+", re.ASCII)
_NAME = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)
"""What Docker lets a container be named, and every ID. It writes names with a slash before them."""
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
    """Asks the Engine at `host` for its version, and speaks that.

    `host` is a path, `unix://path`, `tcp://host:port`, `http://host:port` or `https://host:port`.
    Raises EngineError where nobody answers.
    """
    where = host.removeprefix("unix://")
    url = f"unix://{host}" if host.startswith("/") else host
    # One connection too many is not worth a line each: urllib3 warns of every one.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

    def client(version: str) -> docker.APIClient:
        made = docker.APIClient(
            base_url=url,
            version=version,
            timeout=timeout,  # type: ignore[arg-type]  # the stubs say int; it goes to a socket
            tls=_tls_config(tls),
            max_pool_size=POOL,
        )
        made.trust_env = False
        return made

    probe = _call("GET /_ping", where, lambda: client(MINIMUM_DOCKER_API_VERSION))
    try:
        version = _call("GET /_ping", where, lambda: _version_of_ping(probe))
    except EngineError as error:
        if error.status not in (403, 404, 405):
            raise
        version = ""  # a proxy that forbids the ping may allow the other
    finally:
        probe.close()
    if not version:
        version = _call("GET /version", where, lambda: client("auto").api_version)
    return DockerEngine(_call("GET /_ping", where, lambda: client(version)), where)


def _tls_config(tls: TlsFiles | None) -> docker.tls.TLSConfig | bool:
    if tls is None:
        return False
    if not tls.verify:
        # The user chose so with -tls; urllib3 would warn on standard error at every request.
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
    """An Engine that has answered. Safe to use from several threads."""

    def __init__(self, client: docker.APIClient, where: str) -> None:
        self._client = client
        self._where = where

    def inspect_container(self, name: str) -> Mapping[str, Any]:
        if not _NAME.fullmatch(name):
            # Not asked: with a slash or a question mark in it, it would be another endpoint's path.
            raise NoSuchContainer(f"no container can be named {first_line(name, 64)}", status=404)
        endpoint = f"GET /containers/{first_line(name, 64)}/json"
        document: object = _call(
            endpoint, self._where, lambda: self._client.inspect_container(name)
        )
        if not isinstance(document, Mapping):
            raise EngineError(f"{self._where} answers {endpoint} with no JSON object", status=200)
        return document

    def events(self, filters: Mapping[str, list[str]]) -> DockerEvents:
        client = self._client

        def subscribe() -> requests.Response:
            # Not client.events(): that has no timeout for the answer's head either, and collects
            # what is no JSON in memory without end.
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

    def close(self) -> None:
        self._client.close()


class DockerEvents:
    """The bytes of an open event stream. Any end of it is a clean end of iteration."""

    def __init__(self, response: requests.Response) -> None:
        self._response = response
        self._socket = _socket_of(response)
        if self._socket is not None:
            self._socket.settimeout(None)  # the head has come; from here on silence is usual

    def __iter__(self) -> Iterator[bytes]:
        # Chunks come as they are. Without chunks (an old proxy) urllib3 fills what it was asked
        # for before it returns, so ask for a byte.
        raw = self._response.raw
        try:
            yield from raw.stream(READ_BYTES if raw.chunked else 1)
        except (*_FAULTS, AttributeError):
            return  # closed from here, or broken from there: what matters is that it ended

    def close(self) -> None:
        """Ends the iteration, also from another thread."""
        try:
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it had ended before


def _socket_of(response: requests.Response) -> socket.socket | None:
    # No public way leads there: docker's own CancellableStream goes the same one. Without it the
    # stream ends whenever it is silent for the timeout, and is opened again.
    here: Any = response.raw
    for name in ("_fp", "fp", "raw", "_sock"):
        here = getattr(here, name, None)
    return here if isinstance(here, socket.socket) else None


# --- errors one can act on ---------------------------------------------------------------------


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
        return EngineError(f"{where} does not answer {endpoint} in time: is the daemon stuck?")
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
            f"nobody listens on {where}: is the daemon running? (a socket mounted into a container"
            " is stale once the daemon made a new one: mount its directory)",
            retry_is_cheap=True,
        )
    reason = next((e.strerror for e in chain if isinstance(e, OSError) and e.strerror), None)
    return EngineError(
        f"{where}: {endpoint} failed: {first_line(reason or str(error) or repr(error))}"
    )


def _http_error(error: requests.HTTPError, endpoint: str, where: str) -> EngineError:
    status, said = error.response.status_code, _message(error.response)
    if status == 404 and said and said != "page not found":
        # In the Engine's own form: it knows the endpoint, and not the container. Engines word it
        # differently, and taken for anything else it would keep a dead container's address.
        return NoSuchContainer(said, status=status)
    if status in (401, 403):
        return EngineError(
            f"{where} forbids {endpoint} ({status}): allow it there (in a docker-socket-proxy:"
            " PING, VERSION, EVENTS, CONTAINERS and NETWORKS = 1)",
            status=status,
        )
    text = f"{where} answers {endpoint} with {status}: {said or first_line(error.response.reason or '')}"
    if status == 404:
        text += ": is this a Docker Engine?"
    return EngineError(text, status=status)


def _message(response: requests.Response) -> str:
    """What the Engine says in its own form, `{"message": …}`; empty for anything else."""
    try:
        answer = response.json()
    except (requests.RequestException, ValueError):
        return ""
    return first_line(str(answer.get("message", ""))) if isinstance(answer, Mapping) else ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what is inside it: requests wraps urllib3's, which wraps the system's."""
    todo: list[object] = [error]
    seen: set[int] = set()
    while todo:
        here = todo.pop(0)
        if isinstance(here, BaseException) and id(here) not in seen:
            seen.add(id(here))
            yield here
            todo += [*here.args, getattr(here, "reason", None), here.__cause__, here.__context__]


def first_line(text: str, limit: int = 200) -> str:
    first = next(iter(text.strip().splitlines()), "")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in first[:limit])
