"""What happens to a target: it restarts, dies, pauses, is renamed, comes back with other ports.

Fault rows C1, C2, C4, C6, C7, C8, C11.
"""

from __future__ import annotations

import random
import threading
import time

import pytest

from tests.support.endpoints import EAT, PORT, Caller, Conversation, greet, is_greeted_by
from tests.support.engine import (
    DEMO,
    Box,
    Stage,
    create_server,
    fixed_network,
    lines_with,
    listening_since,
    run_ambassador,
    run_server,
    server_command,
    visitors,
    wait_until_accepts,
    wait_until_refuses,
)
from tests.support.wait import wait_until

BOTH = (f"{PORT}/tcp", f"{PORT}/udp")
TCP = f"{PORT}/tcp"

AT_ONCE_S = 2.0
"""The product is told within milliseconds; the rest is for docker itself and a busy machine."""


def go_silent(box: Box) -> None:
    """Cut a container (with NET_ADMIN) off, so that its end is not to be seen in any packet."""
    box.run("ip", "link", "set", "eth0", "down")


@pytest.mark.alone
def test_restart_while_a_stranger_has_the_old_address(stage: Stage) -> None:
    """C1, C2, U7: followed within a second, old connections reset, and the stranger gets nothing."""
    network = fixed_network(stage, "net")
    place = f"--network={network}"
    db = run_server(stage, "db", *BOTH, flags=[place, "--cap-add=NET_ADMIN"])
    before = db.address()
    stranger = create_server(stage, "stranger", *BOTH, flags=[place, f"--ip={before}"])
    _, host = run_ambassador(stage, "-name", db.name, network=network)

    with Conversation(host) as old, Caller(host) as caller:
        assert old.greeting() == ("db", before)
        first = caller.ask(b"first")
        assert first is not None
        assert first.data == b"db first"

        go_silent(db)
        begin = time.monotonic()
        db.kill()
        assert old.ending() == "reset"
        assert time.monotonic() - begin < AT_ONCE_S

        stranger.start()
        listening_since(stranger)
        assert stranger.address() == before
        with Conversation(host) as held:
            held.send(b"not for strangers")
            for _ in range(10):
                assert caller.ask(b"nor this", timeout=0.05) is None
            assert held.is_held(0.01)

            db.start()
            assert held.greeting() == ("db", db.address())
            relayed_after = time.time() - listening_since(db, run=2)
            assert held.read(17) == b"not for strangers"
        assert relayed_after < 1
        assert db.address() != before
        answer = wait_until(lambda: caller.ask(b"again"), "an answer")
        assert answer.data == b"db again"

    # It would have been able to see somebody: us, and so that nobody came before us.
    assert greet(before) == "stranger"
    assert len(wait_until(lambda: visitors(stranger), "a visitor")) == 1, visitors(stranger)


@pytest.mark.alone
@pytest.mark.parametrize("way", ["stop", "kill"])
def test_dead_target(stage: Stage, way: str) -> None:
    """C4: open connections are reset on Docker's word alone, new ones are held for the next run."""
    db = run_server(stage, "db", TCP, flags="--cap-add=NET_ADMIN")
    ambassador, host = run_ambassador(stage, "-name", db.name)
    with Conversation(host) as old:
        assert old.greeting()[0] == "db"
        go_silent(db)
        begin = time.monotonic()
        getattr(db, way)()
        assert old.ending() == "reset"
        assert time.monotonic() - begin < AT_ONCE_S
    with Conversation(host) as held:
        assert held.is_held(0.3), "it was to be held"
        db.start()
        assert held.greeting()[0] == "db"
    assert len(lines_with(ambassador, "no backend, holding new connections")) == 1


def test_target_out_of_memory(stage: Stage) -> None:
    """C4: the kernel's kill is a death like any other."""
    if not stage.engine.client.info()["MemoryLimit"]:
        pytest.skip("this Engine cannot limit memory: no memory controller in its cgroups")
    db = run_server(stage, "db", TCP, flags="--memory=48m --memory-swap=48m")
    _, host = run_ambassador(stage, "-name", db.name)
    with Conversation(host) as old, Conversation(host) as eater:
        old.greeting()
        eater.greeting()
        eater.send(EAT)
        old.ending()
        eater.ending()
    # The kernel may close a dead process's connections before its listener.
    wait_until(lambda: not db.is_running(), "the end of the target")
    with Conversation(host) as held:
        assert db.inspect()["State"]["OOMKilled"]
        db.start()
        assert held.greeting()[0] == "db"


def test_no_hold(stage: Stage) -> None:
    """C4: with -hold 0 a target that is down is a refusal, at once."""
    db = run_server(stage, "db", TCP)
    ambassador, host = run_ambassador(stage, "-hold", "0", "-name", db.name)
    assert greet(host) == "db"
    db.kill()
    ambassador.wait_for_log("no backend")

    def refused_in() -> float:
        begin = time.monotonic()
        try:
            with Conversation(host) as refused:
                assert refused.ending() == "reset"
        except (ConnectionRefusedError, ConnectionResetError):
            pass
        return time.monotonic() - begin

    assert min(refused_in() for _ in range(3)) < 0.2
    db.start()

    def answers() -> bool:
        try:
            return greet(host) == "db"
        except ConnectionError:
            return False

    wait_until(answers, "an answer")


def test_running_but_not_listening(stage: Stage) -> None:
    """C11: held as long as -hold says, then reset; released as soon as somebody listens."""
    flags = f"--init --expose={TCP}"
    db = stage.run("db", DEMO, "sleep", "infinity", flags=flags)
    _, host = run_ambassador(stage, "-hold", "3s", "-name", db.name)
    begin = time.monotonic()
    with Conversation(host) as vain:
        assert vain.ending() == "reset"
    assert 2.5 < time.monotonic() - begin < 5

    with Conversation(host) as patient:
        stage.docker("exec", "-d", db.name, *server_command("late", [TCP]))
        assert patient.greeting()[0] == "late"


def test_pause_under_traffic(stage: Stage) -> None:
    """C6: what is under way waits in the kernel, and not a byte is lost or altered."""
    db = run_server(stage, "db", TCP)
    ambassador, host = run_ambassador(stage, "-name", db.name)
    sent = random.Random(6).randbytes(64 << 20)
    got = bytearray()

    def send() -> None:
        stream.send(sent)

    def read() -> None:
        while len(got) < len(sent):
            got.extend(stream.read(min(1 << 16, len(sent) - len(got))))

    with Conversation(host, timeout=60) as stream:
        stream.greeting()
        threads = [threading.Thread(target=work, daemon=True) for work in (send, read)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(got) > 1 << 20, "traffic")
        db.container.pause()
        paused_at = len(got)
        assert paused_at < len(sent), "all was over before the pause"
        with Conversation(host) as during:
            assert during.is_held(0.5)
            db.container.unpause()
            assert during.greeting()[0] == "db"
        for thread in threads:
            thread.join(60)
    assert bytes(got) == sent
    assert lines_with(ambassador, "backend changed") == [], "a pause is no change"


def test_renamed(stage: Stage) -> None:
    """C7: a name means whoever has it now, exactly; who lost it is left at once."""
    first = run_server(stage, "db", TCP)
    name = first.name
    second = run_server(stage, "second", TCP)
    _, host = run_ambassador(stage, "-name", name)
    with Conversation(host) as old:
        assert old.greeting()[0] == "db"
        first.container.rename(stage.name("retired"))
        assert old.ending() == "reset"
    with Conversation(host) as held:
        assert held.is_held(0.3), "nobody has the name"
        second.container.rename(name)
        assert held.greeting()[0] == "second"

    second.container.rename(stage.name("second"))
    first.container.rename(name)
    wait_until(lambda: is_greeted_by("db", host), "the first one again")


def test_created_anew_with_other_ports(stage: Stage) -> None:
    """C8: what is exposed no more is closed, what is new is opened, what stays is held meanwhile."""
    db = run_server(stage, "db", "7000/tcp", "7001/tcp", "7002/udp")
    ambassador, host = run_ambassador(stage, "-name", db.name)
    wait_until_accepts(host, 7001)
    db.remove()
    with Conversation(host, 7001) as held:
        db = run_server(stage, "db", "7001/tcp", "7003/tcp", "7004/udp")
        assert held.greeting()[0] == "db"
        wait_until_refuses(host, 7000)
        wait_until_accepts(host, 7003)
        assert greet(host, 7003) == "db"
    with Caller(host, 7004) as caller:
        assert wait_until(lambda: caller.ask(b"x"), "an answer").data == b"db x"
    closed = lines_with(ambassador, "no longer exposed")
    assert len(closed) == 2, closed
    listening = len(ambassador.run("python3", "-c", _COUNT_LISTENERS).split())
    assert listening == 3
    workers = [
        line
        for line in ambassador.container.top(ps_args="-efww")["Processes"]
        if "->" in " ".join(line)
    ]
    assert len(workers) == 3, workers


_COUNT_LISTENERS = """
for protocol, state in (("tcp6", "0A"), ("udp6", "07")):
    for line in open(f"/proc/net/{protocol}").readlines()[1:]:
        words = line.split()
        if words[3] == state:
            print(words[1])
"""
