"""Which container is meant, and several of them: names, IDs, clashes, neighbours that misbehave.

Fault rows C5, D10, R4, I2.
"""

from __future__ import annotations

import os
import socket
import time

import psutil
import pytest

from tests.support.endpoints import PORT, Caller, Conversation, greet, is_greeted_by
from tests.support.engine import (
    DEMO,
    Box,
    Stage,
    lines_with,
    run_ambassador,
    run_server,
    server_command,
    wait_until_accepts,
)
from tests.support.net import free_port
from tests.support.wait import wait_until

TCP = f"{PORT}/tcp"
HERE = "127.0.0.1"


def held_by(ambassador: Box) -> int:
    """The descriptors of all its processes."""
    parent = psutil.Process(int(ambassador.inspect()["State"]["Pid"]))
    return sum(process.num_fds() for process in (parent, *parent.children(recursive=True)))


def test_crash_loop_beside_a_healthy_target(stage: Stage) -> None:
    """C5: several targets; one that dies all the time costs the others nothing, and little log."""
    healthy = run_server(stage, "healthy", TCP)
    other = run_server(stage, "other", "7002/udp", "7003/tcp")
    crashing = stage.run(
        "crashing", DEMO, "false", flags=["--restart=always", "--expose=7001", "--expose=7004/udp"]
    )
    names = [word for box in (crashing, healthy, other) for word in ("-name", box.name)]
    ambassador, host = run_ambassador(stage, *names)
    for port in (7001, 7003):  # each target's ports come when Docker has told of that target
        wait_until_accepts(host, port)

    with Conversation(host) as conversation, Caller(host, 7002) as caller:
        assert conversation.greeting()[0] == "healthy"
        assert greet(host, 7003) == "other"
        wait_until(lambda: caller.ask(b"x"), "an answer")
        wait_until(
            lambda: len(lines_with(ambassador, '"listening"')) == 5, "not all ports are open"
        )
        before = held_by(ambassador)
        while crashing.inspect()["RestartCount"] < 6:
            assert conversation.ask(b"well?") == b"well?"
            answer = caller.ask(b"and you?")
            assert answer is not None
            assert answer.data == b"other and you?"
    assert held_by(ambassador) <= before + 2, "more than another connection to Docker"
    crashes = crashing.inspect()["RestartCount"] + 1
    for name in (healthy.name, other.name):
        assert lines_with(ambassador, "backend changed", name) == []
    # Of each crash: it runs, it does not, and for either port that there is a backend and is none.
    assert len(lines_with(ambassador, crashing.name)) <= 6 * crashes + 4


def test_two_targets_want_one_port(stage: Stage) -> None:
    """The first on the command line has it; one error names both; everything else runs."""
    second = run_server(stage, "second", TCP, "7002/tcp")
    ambassador, host = run_ambassador(
        stage, "-name", stage.name("first"), "-name", second.name, port=7002
    )
    assert greet(host) == "second", "so far nobody else wants it"
    first = run_server(stage, "first", TCP, "7001/tcp")
    wait_until(lambda: is_greeted_by("first", host), "the first one")
    wait_until_accepts(host, 7001)
    assert greet(host, 7001) == "first"
    assert greet(host, 7002) == "second"
    second.restart()
    assert greet(host, 7002) == "second"
    assert greet(host) == "first"
    clashes = lines_with(ambassador, "level=error")
    assert len(clashes) == 1, clashes
    for word in (TCP, first.name, second.name):
        assert word in clashes[0]


@pytest.mark.parametrize("digits", [12, 64])
def test_target_given_by_id(stage: Stage, digits: int) -> None:
    """An ID goes on meaning its container when that is restarted, and when it is renamed."""
    db = run_server(stage, "db", TCP)
    _, host = run_ambassador(stage, "-name", db.id[:digits])
    assert greet(host) == "db"
    with Conversation(host) as old:
        old.greeting()
        stage.restart_elsewhere(db)
        old.ending()
    with Conversation(host) as conversation:
        assert conversation.greeting() == ("db", db.address())
        db.container.rename(stage.name("renamed"))
        assert conversation.ask(b"the same") == b"the same"
    assert greet(host) == "db"


def test_similar_names(stage: Stage) -> None:
    """D10: `web` is not `web2`, and not the container whose ID begins with what is given."""
    run_server(stage, "web2", TCP)
    run_server(stage, "2web", TCP)
    decoy = run_server(stage, "decoy", TCP)
    prefix = decoy.id[:11]
    assert stage.docker("inspect", "--format", "{{.Id}}", prefix) == decoy.id
    ambassador = stage.run_ambassador("-name", stage.name("web"), "-name", prefix)
    ambassador.wait_for_log(f"no such container.*{stage.name('web')}")
    ambassador.wait_for_log(f"no such container.*{prefix}")
    assert lines_with(ambassador, "target is running") == []

    run_server(stage, "web", TCP, "7001/tcp")
    host = ambassador.address()
    wait_until_accepts(host)
    assert greet(host) == "web"
    namesake = stage.docker(
        "run", "-d", f"--name={prefix}", "--expose=7002", DEMO, *server_command("hex", ["7002/tcp"])
    )
    try:
        wait_until_accepts(host, 7002)
        assert greet(host, 7002) == "hex"
    finally:
        stage.docker("rm", "--force", namesake)
    stage.box(stage.name("web")).remove()
    with Conversation(host) as held:
        assert held.is_held(0.3), "web2 is not web"


def test_port_in_use(stage: Stage) -> None:
    """R4: one line names the port and who has it; the rest runs; it is had as soon as it is free."""
    taken, free = free_port(), free_port()
    db = run_server(stage, "db", f"{taken}/tcp", f"{taken}/udp", f"{free}/tcp")
    with (
        socket.create_server(("", taken)),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("", taken))
        ambassador = stage.run_ambassador_on_host("-name", db.name)
        for protocol in ("tcp", "udp"):
            line = ambassador.wait_for_line(f"cannot listen.*{taken}/{protocol} is in use")
            assert f"(pid {os.getpid()})" in line
        wait_until_accepts(HERE, free)
        assert greet(HERE, free) == "db"
        # It tries every second, and says so once.
        begin = time.monotonic()
        wait_until(lambda: time.monotonic() - begin > 2.2, "another try or two")
        assert len(lines_with(ambassador, "cannot listen")) == 2
    wait_until_accepts(HERE, taken)
    assert greet(HERE, taken) == "db"
    with Caller(HERE, taken) as caller:
        assert wait_until(lambda: caller.ask(b"x"), "an answer") == (b"db x", HERE)
    assert ambassador.stop() == 0


def test_nothing_to_do_yet(stage: Stage) -> None:
    """I2: a target that is not there, and one that exposes nothing: a line each, healed by one."""
    silent = stage.run("silent", DEMO, "sleep", "infinity", flags="--init")
    absent = stage.name("absent")
    ambassador = stage.run_ambassador("-name", absent, "-name", silent.name)
    ambassador.wait_for_log(f"no such container, waiting.*{absent}")
    ambassador.wait_for_log(f"{silent.name} exposes no port: start it with --expose PORT")
    for name in (absent, silent.name):
        assert len(lines_with(ambassador, name)) == 1

    silent.remove()
    run_server(stage, "silent", TCP)
    run_server(stage, "absent", "7001/tcp")
    host = ambassador.address()
    for port, name in ((PORT, "silent"), (7001, "absent")):
        wait_until_accepts(host, port)
        assert greet(host, port) == name
