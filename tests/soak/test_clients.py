"""The soak's clients see what they are there to see: each against a server that does just that."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable

import pytest

from tests.soak.clients import Asker, Finding, Tally, converse
from tests.soak.samples import Use, drift, has_grown

DATA = bytes(range(256)) * 40
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def honest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"db\n" + await reader.read())


async def early_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"db\n" + (await reader.read())[:-1])


async def another_greets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"intruder7\n" + await reader.read())


async def a_byte_changes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"db\n" + (await reader.read())[:-1] + b"!")


async def more_than_was_sent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"db\n" + await reader.read() + b"!")


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"db\n" + await reader.read(100))
    await writer.drain()
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def talk(serve: Serve, data: bytes, pause: float) -> Tally:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(reader, writer)
        writer.close()

    tally = Tally()
    server = await asyncio.start_server(once, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with asyncio.timeout(20):
            await converse(port, data, tally, 1000, pause)
    return tally


def test_a_whole_conversation() -> None:
    assert asyncio.run(talk(honest, DATA, 0)).counts["bytes"] == 3 + 8 + len(DATA)


@pytest.mark.parametrize(
    ("serve", "kind"),
    [
        (early_end, "truncated"),
        (another_greets, "strangers"),
        (a_byte_changes, "altered"),
        (more_than_was_sent, "altered"),
    ],
)
def test_a_lie_is_found(serve: Serve, kind: str) -> None:
    with pytest.raises(Finding) as caught:
        asyncio.run(talk(serve, DATA, 0))
    assert caught.value.args[0] == kind


@pytest.mark.parametrize("pause", [0, 0.002])
def test_a_reset_is_a_reset_whoever_is_told(pause: float) -> None:
    """Also where the sender meets it first, and the reader sees an end."""
    for _ in range(20):
        with pytest.raises(ConnectionError):
            asyncio.run(talk(reset, DATA * 10, pause))


def test_a_reset_that_only_the_sender_is_told_of() -> None:
    """A burst meets the reset; the reader, which comes after it, sees an end."""

    def serve(server: socket.socket) -> None:
        for _ in range(20):
            client, _ = server.accept()
            client.recv(1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        for _ in range(20):
            with pytest.raises(ConnectionError):
                asyncio.run(converse(port, DATA * 400, Tally(), 1000, 0))
        thread.join()


def test_a_refusal_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Finding, match="refused"):
        asyncio.run(converse(port, DATA, Tally(), 1000, 0))


def test_what_a_datagram_client_takes_for_an_answer() -> None:
    tally = Tally()
    asker = Asker(tally)
    asker.open.add(b"one two")
    for data in (b"db one two", b"db one two", b"db three", b"intruder1 one two"):
        asker.datagram_received(data, None)
    assert tally.counts == {
        "datagrams answered": 1,
        "datagrams twice": 1,
        "datagrams altered": 1,
        "datagrams of strangers": 1,
    }


@pytest.mark.parametrize(("per_sample", "grown"), [(0, False), (20_000, False), (200_000, True)])
def test_drift(per_sample: int, grown: bool) -> None:
    samples = [{"parent": Use(10_000_000 + n * per_sample, 9)} for n in range(100)]
    assert has_grown(*drift(samples, "parent")) is grown
