"""A proxy of the tests' own in front of the real Engine: it sees every request, and can misbehave.

    with EngineProxy(path, engine_socket, allowed=GET_ONLY) as proxy:
        ...
    assert proxy.refused == []

It understands what the ambassador says and no more: requests without a body, one at a time on a connection.
The Engine's answers pass through untouched.
"""

from __future__ import annotations

import re
import select
import socket
import socketserver
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

GET_ONLY = re.compile(
    r"GET (/v1\.\d+)?"
    r"(/_ping|/version|/events\?\S*|/containers/[^/ ]+/json|/networks(\?filters=%7B%7D)?|/info) HTTP/1\.1"
)
"""What docs/design.md says that the ambassador asks, and docs/security.md tells a proxy to allow."""

EVENTS = re.compile(r"GET \S*/events\?")
REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
PIECE = 1 << 16


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    proxy: EngineProxy


class _Connection(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        proxy, client = self.server.proxy, self.request
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as engine:
            engine.connect(proxy.engine)
            try:
                self._relay(proxy, client, engine)
            except OSError:
                pass  # one of the two left

    def _relay(self, proxy: EngineProxy, client: socket.socket, engine: socket.socket) -> None:
        head = b""
        is_events = False
        moved = time.monotonic()
        while True:
            ready, _, _ = select.select([client, engine], [], [], 0.05)
            if not ready:
                if proxy.cut_idle_s is not None and time.monotonic() - moved > proxy.cut_idle_s:
                    proxy.cuts += is_events
                    return
                continue
            moved = time.monotonic()
            for sock in ready:
                data = sock.recv(PIECE)
                if not data:
                    return
                if sock is engine:
                    # Its head must pass, or nobody would take it for an event stream.
                    if not (is_events and proxy.deaf and not data.startswith(b"HTTP/")):
                        client.sendall(data)
                    continue
                head += data
                if not head.endswith(b"\r\n\r\n"):
                    continue
                line = head.partition(b"\r\n")[0].decode(errors="replace")
                is_events = EVENTS.match(line) is not None
                if not proxy.admits(line):
                    client.sendall(REFUSAL)
                    return
                engine.sendall(head)
                head = b""


class EngineProxy:
    """Listens on `path` while in use. `allowed`: the request lines that pass, None for all."""

    def __init__(
        self,
        path: Path,
        engine: str,
        *,
        allowed: re.Pattern[str] | None = None,
        cut_idle_s: float | None = None,
    ) -> None:
        self.path = path
        self.engine = engine
        self.cut_idle_s = cut_idle_s
        """Connections on which nothing has moved for so long are closed."""
        self.deaf = False
        """Events are swallowed, and the stream stays open: the subscriber that the daemon skips."""
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.cuts = 0
        """Of event streams."""
        self._allowed = allowed
        self._server = _Server(str(path), _Connection)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def admits(self, line: str) -> bool:
        self.asked.append(line)
        if self._allowed is not None and not self._allowed.fullmatch(line):
            self.refused.append(line)
            return False
        return True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
