"""Both ends of many connections and sessions, moved by one loop of the test's own thread.

What an end sends is its *tape*, and a datagram names its sender and its number (tests/support/endpoints.py).

The loop checks what must hold at every moment; what can be said only of a finished connection is
`check_finished`'s.
"""

from __future__ import annotations

import errno
import itertools
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.support.endpoints import (
    NAME_BYTES,
    SMALLEST,
    check_piece,
    datagram,
    names,
    number_of,
    piece,
    reset,
)

QUIET_S = 0.003
READ_BYTES = 1 << 18
NARROW_SERVER = 2
REPLY = 1 << 31  # in a datagram's sender: the other direction


@dataclass(eq=False)
class End:
    """One end of a TCP connection: a client, or what a server has accepted."""

    sock: socket.socket
    server: int | None = None  # None: this is a client
    run: int = 0  # of the server, when it accepted
    name: int = field(default_factory=lambda: next(names))
    quota: int = 0  # bytes to send; `sent` of them have been taken by the kernel
    sent: int = 0
    ending: str = ""  # what to do when the quota is sent: "fin" or "close"
    left: str = ""  # what was done: "fin", "close" or "reset"
    finned: bool = False  # a FIN went out at some time
    paused: bool = False
    head: bytes = b""  # of what it got, until the sender's name is complete
    got: int = 0
    peer: End | None = None
    end: str = ""  # what it saw: "clean" or "reset"
    disturbed: bool = False  # something was done to it that excuses a reset
    doomed_at: int | None = (
        None  # bytes sent when its worker or generation ended; no later one arrives
    )

    @property
    def gone(self) -> bool:
        return self.sock.fileno() < 0

    def __str__(self) -> str:
        side = "client" if self.server is None else f"backend of server {self.server}"
        saw = self.end or "no end"
        return f"{side} {self.name} ({self.sent}/{self.quota} sent, {self.got} got, saw {saw})"


class Crowd:
    """Clients and backends. `servers` is how many servers there are, TCP and UDP at the same address."""

    def __init__(self, servers: int) -> None:
        self._selector = selectors.DefaultSelector()
        self.ends: list[End] = []
        self.allowed: set[int] = set()  # the servers that may get connections and datagrams now
        self.runs = [0] * servers
        self.accept_paused = False  # what is accepted is not read
        self.tcp_servers = [_listening(self._selector, number) for number in range(servers)]
        self.udp = Sessions(self._selector, self, servers)

    def address(self, server: int, kind: socket.SocketKind) -> tuple[str, int]:
        servers = self.tcp_servers if kind == socket.SOCK_STREAM else self.udp.servers
        host, port = servers[server].getsockname()
        return host, port

    def close(self) -> None:
        for end in self.ends:
            end.sock.close()
        for sock in [*self.tcp_servers, *self.udp.servers, *self.udp.clients]:
            sock.close()
        self._selector.close()

    # -- what a rule does

    def open(self, port: int, *, narrow: bool = False) -> End:
        sock = socket.socket()
        if narrow:
            _narrow(sock)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex(("127.0.0.1", port))
        assert error in {0, errno.EINPROGRESS}, f"connect: {errno.errorcode[error]}"
        # Its name at once: that is how the two ends of a connection are found to be such.
        end = End(sock, quota=NAME_BYTES)
        self.ends.append(end)
        self._watch(end)
        return end

    def write(self, end: End, count: int) -> None:
        end.quota = max(end.quota + count, NAME_BYTES)  # its name whole, or nothing
        self._watch(end)

    def finish(self, end: End, how: str) -> None:
        """ "fin" or "close", when all is sent; "reset", now."""
        if how != "fin":
            self.excuse(end)
        if how == "reset":
            end.left = "reset"
            self._forget(end)
            reset(end.sock)
            return
        end.ending = "close" if "close" in {how, end.ending} else "fin"
        self._send(end)

    def pause(self, end: End, paused: bool) -> None:
        end.paused = paused
        self._watch(end)

    @property
    def clients(self) -> list[End]:
        return [end for end in self.ends if end.server is None]

    @property
    def present(self) -> list[End]:
        return [end for end in self.ends if not end.gone]

    # -- the loop

    def pump(self, longest_s: float = 0.05) -> None:
        """Until nothing has moved for a while, or so long."""
        deadline = time.monotonic() + longest_s
        while events := self._selector.select(QUIET_S):
            for key, mask in events:
                match key.data:
                    case End():
                        self._move(key.data, mask)
                    case ("tcp", server):
                        self._accept(server)
                    case ("udp server", server):
                        self.udp.arrived_at_server(server)
                    case ("udp client", client):
                        self.udp.arrived_at_client(client)
            if time.monotonic() > deadline:
                return

    def drain(self) -> None:
        """Take what has arrived at a listener or as a datagram, for the moment before a change counts."""
        for server in range(len(self.tcp_servers)):
            self._accept(server)
            self.udp.arrived_at_server(server)
        for client in range(len(self.udp.clients)):
            self.udp.arrived_at_client(client)

    def _accept(self, server: int) -> None:
        while True:
            try:
                sock, _ = self.tcp_servers[server].accept()
            except BlockingIOError:
                return
            assert server in self.allowed, f"server {server} got a connection and is not current"
            sock.setblocking(False)
            end = End(sock, server=server, run=self.runs[server])
            end.paused = self.accept_paused
            self.ends.append(end)
            self._watch(end)

    def _move(self, end: End, mask: int) -> None:
        if mask & selectors.EVENT_READ and not end.gone:
            self._read(end)
        if mask & selectors.EVENT_WRITE and not end.gone:
            self._send(end)

    def _read(self, end: End) -> None:
        try:
            data = end.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            self._saw(end, "reset")
            return
        if data:
            self._check(end, data)
        else:
            self._saw(end, "clean")

    def _send(self, end: End) -> None:
        try:
            while end.sent < end.quota:
                end.sent += end.sock.send(piece(end.name, end.sent, end.quota - end.sent))
        except BlockingIOError:
            self._watch(end)
            return
        except (ConnectionResetError, BrokenPipeError):
            self._saw(end, "reset")
            return
        if end.ending == "fin" and not end.left:
            try:
                end.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                assert error.errno == errno.ENOTCONN
                self._saw(end, "reset")
                return
            end.left, end.finned = "fin", True
        elif end.ending == "close":
            end.left, end.finned = "close", True
            self._forget(end)
            end.sock.close()
            return
        self._close_if_done(end)
        self._watch(end)

    def _saw(self, end: End, how: str) -> None:
        if how == "reset" and end.end == "clean":
            end.left = "reset"  # it had everything; the other direction could not be finished
        end.end = end.end or how
        if how == "reset":
            self._forget(end)
            end.sock.close()
            return
        self._close_if_done(end)
        self._watch(end)

    def _close_if_done(self, end: End) -> None:
        if end.end and end.left:
            self._forget(end)
            end.sock.close()

    def _watch(self, end: End) -> None:
        if end.gone:
            return
        wanted = 0
        if not end.paused and not end.end:
            wanted |= selectors.EVENT_READ
        if end.sent < end.quota or (end.ending and not end.left):
            wanted |= selectors.EVENT_WRITE
        known = end.sock in self._selector.get_map()
        if not wanted:
            self._forget(end)
        elif known:
            self._selector.modify(end.sock, wanted, end)
        else:
            self._selector.register(end.sock, wanted, end)

    def _forget(self, end: End) -> None:
        if end.sock in self._selector.get_map():
            self._selector.unregister(end.sock)

    # -- what must hold

    def _check(self, end: End, data: bytes) -> None:
        """The bytes are the next ones of its peer's tape. A first name makes the two a pair."""
        if end.got + len(end.head) < NAME_BYTES or end.head:
            end.head += data
            if len(end.head) < NAME_BYTES:
                return
            data, end.head = end.head, b""
            self._pair(end, int.from_bytes(data[:NAME_BYTES]))
        peer = end.peer
        assert peer is not None
        try:
            check_piece(peer.name, end.got, data)
        except AssertionError as error:
            raise AssertionError(f"{end}, peer {peer}: {error}") from None
        end.got += len(data)
        assert end.got <= peer.sent, f"{end} has more than {peer} sent"

    def _pair(self, end: End, name: int) -> None:
        found = [other for other in self.ends if other.name == name]
        assert found, f"{end}: the first bytes are nobody's"
        (peer,) = found
        assert (peer.server is None) != (end.server is None), f"{end} hears {peer}"
        assert peer.peer in {None, end}, f"{end} hears {peer}, whose peer is {peer.peer}"
        assert end.peer in {None, peer}, f"{end} hears {peer}, and had {end.peer}"
        end.peer, peer.peer = peer, end
        end.disturbed = peer.disturbed = end.disturbed or peer.disturbed

    def check_finished(self) -> None:
        """Of connections that have come to their ends: invariant 1, and who may see a reset."""
        orphans = any(client.disturbed and client.peer is None for client in self.clients)
        for end in self.ends:
            peer = end.peer
            if end.end == "clean":
                if peer is None:
                    assert end.server is None, f"{end}: a clean end without the client's name"
                    assert any(
                        other.finned and other.peer is None and other.server is not None
                        for other in self.ends
                    ), f"{end}: clean, and no backend ended so"
                else:
                    assert peer.finned, f"{end}: clean, and {peer} did not end so"
                    assert end.got == peer.sent, f"{end}: a clean end, and not all from {peer}"
            if peer is not None and peer.doomed_at is not None:
                assert end.got <= peer.doomed_at, f"{end} heard {peer} after its generation"
            # A client that was reset while its worker dialled is the unknown peer of some backend.
            if not end.disturbed and not (end.server is not None and peer is None and orphans):
                assert end.end == "clean", f"{end}, peer {peer}: a reset that nobody asked for"
                assert end.left == "fin", f"{end}: a reset behind the clean end"

    def excuse(self, end: End) -> None:
        """From here on a reset is no fault of the relay; whose peer is not known yet excuses all such."""
        end.disturbed = True
        if end.peer is not None:
            end.peer.disturbed = True
        else:
            self.excuse_unpaired()

    def excuse_unpaired(self) -> None:
        for end in self.ends:
            end.disturbed |= end.peer is None

    def doom(self, ends: Iterable[End]) -> None:
        """Their worker or their generation is over: they must see a reset, and nothing that is sent now."""
        for end in ends:
            for one in filter(None, (end, end.peer)):
                one.doomed_at = one.sent if one.doomed_at is None else one.doomed_at
                one.disturbed = True

    @property
    def lingering(self) -> list[End]:
        """What must be reset and has not seen it yet."""
        return [end for end in self.present if end.doomed_at is not None and not end.end]


class Sessions:
    """The datagrams: clients, servers, and what has come of which."""

    def __init__(self, selector: selectors.BaseSelector, crowd: Crowd, servers: int) -> None:
        self._selector = selector
        self._crowd = crowd
        self.clients: list[socket.socket] = []
        self.servers = [self._socket(("udp server", number)) for number in range(servers)]
        self._numbers = itertools.count(1)
        self._sent: dict[int, tuple[int, int, int, int]] = {}  # sender, size, server, its run
        self._seen: set[tuple[int, int]] = set()
        self._small: Counter[tuple[int, int]] = Counter()  # too small for a name: size, sender
        self.owner: dict[tuple[int, tuple[str, int]], int] = {}  # server, session's address: client
        self.at_servers = self.at_clients = 0

    def _socket(self, data: tuple[str, int]) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind(("127.0.0.1", 0))
        self._selector.register(sock, selectors.EVENT_READ, data)
        return sock

    def open(self, port: int) -> int:
        client = len(self.clients)
        self.clients.append(self._socket(("udp client", client)))
        self.clients[client].connect(("127.0.0.1", port))
        return client

    def send(self, client: int, size: int) -> None:
        try:
            self.clients[client].send(self._make(client, size, -1))
        except ConnectionRefusedError as error:
            raise AssertionError("the UDP port refused") from error
        except BlockingIOError:
            pass

    def reply(self, server: int, session: tuple[str, int], size: int) -> None:
        client = self.owner[server, session]
        self.servers[server].sendto(self._make(REPLY | client, size, server), session)

    def new_era(self) -> None:
        """Sessions have other sockets from here on, maybe with an address that another had."""
        self.owner.clear()

    def _make(self, sender: int, size: int, server: int) -> bytes:
        number = next(self._numbers)
        if size < SMALLEST:
            self._small[sender & REPLY, size] += 1
            return bytes(size)
        run = self._crowd.runs[server] if server >= 0 else 0
        self._sent[number] = sender, size, server, run
        return datagram(sender, number, size)

    def arrived_at_server(self, server: int) -> None:
        while True:
            try:
                data, session = self.servers[server].recvfrom(1 << 16)
            except BlockingIOError:
                return
            self.at_servers += 1
            assert server in self._crowd.allowed, (
                f"server {server} got a datagram, and is not current"
            )
            sender, _ = self._check(data, 0)
            if sender is not None:
                owner = self.owner.setdefault((server, session), sender)
                assert owner == sender, f"session {session} of client {owner} carries {sender}'s"

    def arrived_at_client(self, client: int) -> None:
        while True:
            try:
                data = self.clients[client].recv(1 << 16)
            except BlockingIOError:
                return
            except ConnectionRefusedError as error:
                raise AssertionError("the UDP port refused") from error
            self.at_clients += 1
            sender, number = self._check(data, REPLY)
            if sender is not None:
                assert sender == REPLY | client, (
                    f"client {client} got the reply to {sender ^ REPLY}"
                )
                _, _, server, run = self._sent[number]
                assert server in self._crowd.allowed, f"a reply of server {server}, not current"
                assert run == self._crowd.runs[server], f"a reply of run {run} of server {server}"

    def _check(self, data: bytes, direction: int) -> tuple[int | None, int]:
        """Whose it is, None where it is too small to say, and its number. It was sent, so, and came once."""
        if len(data) < SMALLEST:
            self._small[direction, len(data)] -= 1
            assert self._small[direction, len(data)] >= 0, (
                f"too many datagrams of {len(data)} bytes"
            )
            assert data == bytes(len(data)), "the bytes are altered"
            return None, 0
        sender, number = number_of(data)
        assert self._sent[number][:2] == (sender, len(data))
        assert sender & REPLY == direction, "a datagram came back to its own side"
        assert (sender, number) not in self._seen, f"datagram {number} of {sender} came twice"
        self._seen.add((sender, number))
        return sender, number


def _narrow(sock: socket.socket) -> None:
    """Small segments and a small window keep the worker's buffer small too: its sends are cut short."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 200)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


def _listening(selector: selectors.BaseSelector, number: int) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    if number == NARROW_SERVER:
        _narrow(sock)
    sock.bind(("127.0.0.1", 0))
    sock.listen(512)
    selector.register(sock, selectors.EVENT_READ, ("tcp", number))
    return sock
