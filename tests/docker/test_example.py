"""The example of the README, letter for letter but for the names."""

from __future__ import annotations

import time

import pytest

from tests.support.engine import AMBASSADOR, REDIS, REDIS_CLI, Stage


@pytest.mark.alone
def test_three_lines(stage: Stage) -> None:
    redis, ambassador = stage.name("redis"), stage.name("redis_ambassador")
    socket = stage.engine.socket

    def docker(line: str) -> str:
        return stage.docker(*line.split())

    docker(f"run -d --expose 6379 --name {redis} {REDIS}")
    docker(
        f"run -d -v {socket}:/var/run/docker.sock --name {ambassador} {AMBASSADOR} -name {redis}"
    )
    stage.box(ambassador).wait_for_log("listening")  # a person takes longer to type the third line
    assert docker(f"run --rm --link {ambassador}:db {REDIS_CLI} -h db ping") == "PONG"

    before, after = stage.restart_elsewhere(stage.box(redis))
    assert before != after
    assert docker(f"run --rm --link {ambassador}:db {REDIS_CLI} -h db ping") == "PONG"

    begin = time.monotonic()
    assert stage.box(ambassador).stop() == 0
    assert time.monotonic() - begin < 2
