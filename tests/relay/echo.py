"""Echo servers in a thread, for tests with more connections than a test can follow by itself."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from types import TracebackType
from typing import Self


class Echo:
    """Echoes what it gets, over TCP or UDP. Leaving it raises what went wrong in its thread.

    Over TCP every connection is made of records of `record` bytes, all alike in one connection: that is
    how a byte that crossed over would show.
    """

    def __init__(self, server: socket.socket, record: int = 0) -> None:
        self._server = server
        self._record = record
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None
        self._tags: dict[socket.socket, bytes] = {}
        self._rest: dict[socket.socket, bytes] = {}
        self.port: int = server.getsockname()[1]
        self.accepted = 0
        self.resets = 0

    def __enter__(self) -> Self:
        self._server.setblocking(False)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._wake.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._woken.close()
        for sock in self._tags:
            sock.close()
        if self._error is not None:
            raise self._error from error

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001 - raised again where the test is
            self._error = error

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock is self._woken:
                        return
                    if sock is not self._server:
                        self._answer(selector, sock)
                    elif sock.type == socket.SOCK_STREAM:
                        self._accept(selector)
                    else:
                        self._answer_datagrams()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._server.accept()
                sock.settimeout(10)
                self._tags[sock], self._rest[sock] = b"", b""
                self.accepted += 1
                selector.register(sock, selectors.EVENT_READ)

    def _answer(self, selector: selectors.BaseSelector, sock: socket.socket) -> None:
        try:
            data = sock.recv(1 << 16)
            if data:
                self._check(sock, data)
                sock.sendall(data)
                return
        except (ConnectionResetError, BrokenPipeError):
            self.resets += 1
        selector.unregister(sock)
        del self._tags[sock], self._rest[sock]
        sock.close()

    def _check(self, sock: socket.socket, data: bytes) -> None:
        if not self._record:
            return
        data = self._rest[sock] + data
        whole = len(data) // self._record
        self._rest[sock] = data[whole * self._record :]
        if whole:
            tag = self._tags[sock] or data[: self._record]
            self._tags[sock] = tag
            assert data[: whole * self._record] == tag * whole, "bytes of another connection"

    def _answer_datagrams(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, address = self._server.recvfrom(1 << 16)
                self._server.sendto(data, address)
