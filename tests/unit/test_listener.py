"""A running listener: generations, backend ids, and in which order its paths are told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest

from ambassador.datapath import Condition, PathState
from ambassador.model import Backend, ListenAddress, ListenerSpec
from ambassador.options import ListenerOptions
from ambassador.supervise.listener import RunningListener
from ambassador.values import Protocol

A, B = Backend("10.0.0.1", 80, "a", "1"), Backend("10.0.0.2", 80, "b", "1")
SPEC = ListenerSpec(ListenAddress(Protocol.TCP, 80), "web", backends=(A,))


class Path:
    """Writes down what it is told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name = name
        self.told = told
        self.refusal = ""

    def refuses(self, spec: ListenerSpec) -> str:  # noqa: ARG002
        return self.refusal

    def open(self, spec: ListenerSpec) -> None:
        self._note("open", spec)

    def update(self, spec: ListenerSpec) -> None:
        self._note("update", spec)

    def close(self, deadline_ms: int) -> None:
        self.told.append(f"{self.name} close {deadline_ms}")

    def counters(self) -> Mapping[str, int]:
        return {}

    def state(self) -> PathState:
        return PathState(Condition.FORWARDING)

    def _note(self, what: str, spec: ListenerSpec) -> None:
        backends = "".join(each.container for each in spec.backends)
        self.told.append(f"{self.name} {what} {backends}")


def opened(spec: ListenerSpec = SPEC) -> RunningListener:
    listener = RunningListener(spec)
    listener.open([Path("workers", [])])
    return listener


def ids(listener: RunningListener) -> list[int]:
    return [number for number, _ in listener.backends()]


def test_generations_only_rise() -> None:
    listener = opened()
    seen = [listener.generation]
    for backends in ((B,), (), (A,), (A, B)):
        listener.update(replace(SPEC, backends=backends))
        seen.append(listener.generation)
    assert seen == [1, 2, 3, 4, 5]


def test_ids_are_never_given_twice() -> None:
    listener = opened()
    assert ids(listener) == [1]
    listener.update(replace(SPEC, backends=(A, B)))
    assert ids(listener) == [1, 2]
    listener.update(replace(SPEC, backends=(B,)))
    assert ids(listener) == [2]
    listener.update(replace(SPEC, backends=(A, B)))
    assert ids(listener) == [3, 2], "what left and came back is another"
    listener.update(replace(SPEC, backends=(replace(B, run="2"),)))
    assert ids(listener) == [4], "another run is another backend"


def test_a_weight_changes_no_id() -> None:
    """Or else a backend that is leaving would lose what is open."""
    listener = opened()
    listener.update(replace(SPEC, backends=(replace(A, weight=0),)))
    assert ids(listener) == [1]


def test_the_order_of_paths() -> None:
    """What goes is told to the outer path first, what comes to the inner one first."""
    told: list[str] = []
    listener = RunningListener(SPEC)
    listener.open([Path("kernel", told), Path("workers", told)])
    assert told == ["workers open a", "kernel open a"]
    told.clear()
    listener.update(replace(SPEC, backends=(A, B)))
    assert told == ["workers update ab", "kernel update ab"]
    told.clear()
    listener.update(replace(SPEC, backends=(B,)))
    assert told == ["kernel update b", "workers update b"]
    told.clear()
    listener.update(replace(SPEC, backends=(A,)))
    assert told == ["kernel update ", "workers update ", "workers update a", "kernel update a"]
    told.clear()
    listener.close(300)
    assert told == ["kernel close 300", "workers close 300"]


def test_one_path_is_told_once() -> None:
    told: list[str] = []
    listener = RunningListener(SPEC)
    listener.open([Path("workers", told)])
    listener.update(replace(SPEC, backends=(B,)))
    assert told == ["workers open a", "workers update b"]


def test_what_a_path_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """Once in the log if nobody else carries it; the listener comes back with what can be carried."""
    told: list[str] = []
    path = Path("workers", told)
    path.refusal = "a range is not relayed yet"
    listener = RunningListener(SPEC)
    with caplog.at_level(logging.ERROR, logger="ambassador"):
        listener.open([path])
        listener.update(replace(SPEC, backends=(B,)))
    assert told == []
    (record,) = caplog.records
    assert vars(record)["fields"]["reason"] == path.refusal
    path.refusal = ""
    listener.update(SPEC)
    path.refusal = "another"
    listener.update(replace(SPEC, backends=()))
    assert told == ["workers open a", "workers close 0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backends": (B,)}, "backend changed"),
        ({"backends": ()}, "no backend, holding new connections"),
        ({"backends": (replace(A, weight=0),)}, "no backend, holding new connections"),
        ({"options": ListenerOptions(hold=1)}, "options changed"),
    ],
)
def test_what_the_log_says_of_a_change(
    change: dict[str, object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    listener = opened()
    with caplog.at_level(logging.INFO, logger="ambassador"):
        listener.update(replace(SPEC, **change))  # type: ignore[arg-type]
    assert [record.message for record in caplog.records] == [message]


def test_the_fields_of_a_log_line() -> None:
    assert opened().fields() == {
        "port": "80",
        "protocol": "tcp",
        "container": "web",
        "backend": "10.0.0.1:80",
        "generation": 1,
    }


def test_a_fixed_address_is_not_said_twice() -> None:
    listen = ListenAddress(Protocol.TCP, 80, address="127.0.0.1")
    fields = opened(ListenerSpec(listen, "10.0.0.1:80", backends=(A,))).fields()
    assert "container" not in fields
    assert fields["address"] == "127.0.0.1"
