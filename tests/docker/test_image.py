"""The image with as little as it can be given, and clients that never let go.

Fault row S4 for its main job.
"""

from __future__ import annotations

import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.endpoints import PORT, Caller, Conversation, greet
from tests.support.engine import Stage, finished_at, run_ambassador, run_server
from tests.support.wait import wait_until

LOCKED = "--read-only --cap-drop=ALL --security-opt=no-new-privileges"


@pytest.mark.parametrize("who", ["root", "nobody"])
def test_least_privilege(stage: Stage, who: str) -> None:
    """S4: read-only, without capabilities, and as a user who has only the socket's group."""
    flags = LOCKED
    if who == "nobody":
        socket = Path(stage.engine.socket).stat()
        if not socket.st_mode & stat.S_IWGRP:
            pytest.skip(f"{stage.engine.socket} is not open to its group")
        flags += f" --user=65534:65534 --group-add={socket.st_gid}"
    db = run_server(stage, "db", f"{PORT}/tcp", "53/tcp", "53/udp")
    ambassador, host = run_ambassador(stage, "-name", db.name, flags=flags)
    stage.restart_elsewhere(db)
    assert greet(host) == "db"
    assert greet(host, 53) == "db"
    with Caller(host, 53) as caller:
        assert wait_until(lambda: caller.ask(b"x"), "an answer") == (b"db x", host)
    assert ambassador.stop() == 0
    log = ambassador.logs()
    assert "level=error" not in log
    assert "Traceback" not in log


def test_clients_that_never_let_go(stage: Stage) -> None:
    """A client that connects every 10 ms through restarts: none refused, none timed out.

    Conversations that the target's own end cut in the middle are counted apart, and only those
    that were begun before it ended may be among them.
    """
    db = run_server(stage, "db", f"{PORT}/tcp")
    _, host = run_ambassador(stage, "-name", db.name)
    refused: list[str] = []
    cut_begun: list[float] = []
    longest = 0.0
    begun = 0
    lock = threading.Lock()
    done = threading.Event()

    def visit() -> None:
        nonlocal longest
        begin = time.time()
        try:
            conversation = Conversation(host)
        except OSError as error:
            refused.append(repr(error))
            return
        with conversation:
            try:
                conversation.greeting()
                assert conversation.ask(b"hello") == b"hello"
            except (ConnectionError, AssertionError):
                cut_begun.append(begin)
            except OSError as error:
                refused.append(repr(error))
        with lock:
            longest = max(longest, time.time() - begin)

    def visit_for_ever() -> None:
        nonlocal begun
        with ThreadPoolExecutor(500) as pool:
            while not done.wait(0.01):
                pool.submit(visit)
                begun += 1

    ends: list[float] = []
    visiting = threading.Thread(target=visit_for_ever)
    visiting.start()
    try:
        wait_until(lambda: begun > 50, "visits")
        for _ in range(2):
            stage.restart_elsewhere(db)
            assert greet(host) == "db"
            ends.append(finished_at(db))
            goal = begun + 30
            wait_until(lambda goal=goal: begun > goal, "visits")  # type: ignore[misc]
    finally:
        done.set()
        visiting.join()
    print(f"{begun} visits, {len(cut_begun)} cut, the longest took {longest:.3f} s")
    assert refused == []
    # A connection that its dying target still took is cut; one that began when Docker had told of
    # the end is not.
    for moment in cut_begun:
        assert any(-0.1 < end - moment < 5 for end in ends), (moment, ends)
