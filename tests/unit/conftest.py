"""Fixtures of the tests of source: an Engine of plain objects, a log, and a running DockerSource."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest

from ambassador.discovery.docker_source import DockerSource
from ambassador.discovery.own_networks import OwnPlace
from tests.unit.fake_engine import ON_HOST, Log, Start, World, settle, until


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def start(world: World, log: Log) -> Iterator[Start]:
    started: list[DockerSource] = []

    def make(*targets: str, wait: bool = True, **changes: Any) -> DockerSource:
        settings: dict[str, Any] = {
            "on_change": lambda: None,
            "log": log.logger(),
            "debounce": 0.002,
        }
        if "own_id" in changes:
            changes["container_id"] = changes.pop("own_id")
        named = {each.name for each in fields(OwnPlace)} & changes.keys()
        settings["place"] = replace(ON_HOST, **{name: changes.pop(name) for name in named})
        made = DockerSource(world.connect, targets, **(settings | changes))
        started.append(made)
        made.start()
        if wait:
            until(lambda: made.connected and all(world.inspects(target) for target in targets))
            settle(world)
        return made

    yield make
    for each in started:
        each.stop()
