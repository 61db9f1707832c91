"""Datagrams through an ambassador: clients that keep their socket, several addresses, real DNS.

Fault rows U3, U4, U7, U11.
"""

from __future__ import annotations

import socket
import struct
import threading
import time

import pytest

from tests.support.endpoints import PORT, Caller, Conversation
from tests.support.engine import DNSMASQ, Stage, listening_since, run_ambassador, run_server
from tests.support.wait import wait_until

EVERY_S = 0.01


@pytest.mark.alone
def test_socket_kept_open_through_a_restart(stage: Stage) -> None:
    """U3, U7, U11: a client that just goes on sending is answered again, and only once each."""
    db = run_server(stage, "db", f"{PORT}/udp", f"{PORT}/tcp")
    _, host = run_ambassador(stage, "-name", db.name)
    sent_at: dict[bytes, float] = {}
    came: list[tuple[bytes, float]] = []
    sources: set[str] = set()
    done = threading.Event()

    def send() -> None:
        while not done.wait(EVERY_S):
            question = b"%d" % len(sent_at)
            sent_at[question] = time.time()
            caller.send(question)

    def receive() -> None:
        while not done.is_set():
            answer = caller.receive(0.1)
            if answer is not None:
                came.append((answer.data.removeprefix(b"db "), time.time()))
                sources.add(answer.source)

    with Caller(host) as caller:
        threads = [threading.Thread(target=work) for work in (send, receive)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(came) > 20, "answers")
            stage.restart_elsewhere(db)
            back_at = listening_since(db, run=2)
            resumed = wait_until(
                lambda: next((at for question, at in came if sent_at[question] > back_at), None),
                "an answer to what was sent after the restart",
            )
        finally:
            done.set()
            for thread in threads:
                thread.join()
    assert resumed - back_at < 1
    assert sources == {host}
    questions = [question for question, _ in came]
    assert len(set(questions)) == len(questions), "an answer came twice"
    assert set(questions) <= set(sent_at), "an answer to nothing that was asked"


def test_answers_come_from_where_was_asked(stage: Stage) -> None:
    """U4: an ambassador with two addresses answers from the one that the client wrote to."""
    first, second = stage.network("a"), stage.network("b")
    db = run_server(stage, "db", f"{PORT}/udp", f"{PORT}/tcp", flags=f"--network={first}")
    ambassador, host = run_ambassador(stage, "-name", db.name, network=first)
    stage.docker("network", "connect", second, ambassador.name)
    other = wait_until(lambda: ambassador.address(second), "a second address")
    with Caller(host) as caller:
        for address in (host, other, host, other):
            caller.host = address
            answer = wait_until(lambda: caller.ask(b"where from"), "an answer")
            assert answer == (b"db where from", address)


def dns_query(name: str, ident: int = 7) -> bytes:
    """A question for the A records of a name."""
    question = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack("!6H", ident, 0x0100, 1, 0, 0, 0) + question + b"\0\0\1\0\1"


def dns_answer(reply: bytes) -> str:
    """The address in the last record of an answer."""
    answers = struct.unpack("!H", reply[6:8])[0]
    assert answers == 1, reply
    return socket.inet_ntoa(reply[-4:])


def test_dns_over_udp_and_tcp(stage: Stage) -> None:
    """A target with both protocols on one number, through a restart with a new address."""
    dns = stage.run_target(
        "dns", DNSMASQ, "--address=/db.example/192.0.2.7", expose=["53/udp", "53/tcp"]
    )
    _, host = run_ambassador(stage, "-name", dns.name, port=53)
    query = dns_query("db.example")

    def over_udp(caller: Caller) -> str:
        caller.send(query)
        answer = caller.receive(0.5)
        return dns_answer(answer.data) if answer is not None else ""

    def over_tcp() -> str:
        with Conversation(host, 53) as conversation:
            conversation.send(len(query).to_bytes(2) + query)
            length = int.from_bytes(conversation.read(2))
            return dns_answer(conversation.read(length))

    with Caller(host, 53) as caller:
        assert wait_until(lambda: over_udp(caller), "DNS over UDP") == "192.0.2.7"
        assert over_tcp() == "192.0.2.7"
        stage.restart_elsewhere(dns)
        assert wait_until(lambda: over_udp(caller), "DNS over UDP") == "192.0.2.7"
        assert over_tcp() == "192.0.2.7"


def test_many_clients_through_a_restart(stage: Stage) -> None:
    """U7: each of many sessions moves, and each client gets its own answers only."""
    db = run_server(stage, "db", f"{PORT}/udp")
    ambassador = stage.run_ambassador("-name", db.name)
    host = ambassador.address()
    callers = [Caller(host) for _ in range(50)]
    try:
        first = callers[0]
        wait_until(lambda: first.ask(b"first"), "an answer")

        def all_answered(label: bytes) -> bool:
            for number, caller in enumerate(callers):
                caller.send(b"%s %d" % (label, number))
            deadline = time.monotonic() + 1
            answers = [caller.receive(deadline - time.monotonic()) for caller in callers]
            expected = [b"db %s %d" % (label, number) for number in range(len(callers))]
            got = [answer.data if answer is not None else b"" for answer in answers]
            strays = [g for g, e in zip(got, expected, strict=True) if g and not g.endswith(e[-3:])]
            assert not strays, strays
            print(label, "unanswered:", got.count(b""))
            return got == expected

        assert all_answered(b"before")
        stage.restart_elsewhere(db)
        listening_since(db, run=2)
        wait_until(lambda: all_answered(b"after"), "answers to all")
    finally:
        for caller in callers:
            caller.socket.close()
