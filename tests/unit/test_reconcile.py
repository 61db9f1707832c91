"""reconcile.py as tables: what is desired for given targets, and the step from what runs to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.model import Backend, Listener, Route, TargetState
from ambassador.values import Protocol
from ambassador.reconcile import MAX_LISTENERS, Repoint, Start, Stop, merge, plan

TCP, UDP = Protocol.TCP, Protocol.UDP
REDIS, DNS, DNS_TCP = Listener(6379, TCP), Listener(53, UDP), Listener(53, TCP)


def target(
    name: str, *exposed: Listener, address: str | None = "10.0.0.2", run: str = "1"
) -> TargetState:
    return TargetState(name, frozenset(exposed), address, f"id-of-{name}", run)


def test_one_target_one_port() -> None:
    desired = merge([target("redis", REDIS)])
    backend = Backend("10.0.0.2", 6379, "id-of-redis", "1")
    assert desired.routes == {REDIS: Route(REDIS, "redis", (backend,))}
    assert desired.problems == ()


def test_the_same_number_over_tcp_and_udp_is_two_listeners() -> None:
    assert set(merge([target("dns", DNS, DNS_TCP)]).routes) == {DNS, DNS_TCP}


def test_a_target_that_is_away_keeps_its_listeners_without_a_backend() -> None:
    assert merge([target("redis", REDIS, address=None)]).routes == {
        REDIS: Route(REDIS, "redis", ())
    }


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_clash_goes_to_the_one_named_first_and_names_both(order: tuple[str, str]) -> None:
    desired = merge([target(order[0], REDIS), target(order[1], REDIS, DNS)])
    assert desired.routes[REDIS].target == order[0]
    assert desired.routes[DNS].target == order[1], "the rest of the loser runs"
    (problem,) = desired.problems
    assert "6379/tcp" in problem
    assert f"both {order[0]} and {order[1]}" in problem


def test_a_clash_is_settled_the_same_way_while_the_first_is_away() -> None:
    desired = merge([target("a", REDIS, address=None), target("b", REDIS)])
    assert desired.routes[REDIS] == Route(REDIS, "a", ())


def test_a_range_exposed_by_mistake_does_not_take_every_process() -> None:
    first = target("a", *(Listener(port, TCP) for port in range(1, 1001)))
    desired = merge([first, target("b", *(Listener(port, TCP) for port in range(2000, 65536)))])
    assert len(desired.routes) == MAX_LISTENERS
    assert set(first.exposed) <= set(desired.routes), "the target named first has its ports first"
    (problem,) = desired.problems
    assert "64536 ports are exposed, 1024 are relayed" in problem


def test_a_restart_at_the_same_address_is_another_backend() -> None:
    """C1: old connections are reset even where the address did not change."""
    before = merge([target("redis", REDIS, run="1")]).routes
    after = merge([target("redis", REDIS, run="2")]).routes
    assert plan(after, before) == [Repoint(after[REDIS])]


def route(listener: Listener, address: str | None) -> Route:
    return Route(listener, "t", (Backend(address, listener.port),) if address else ())


PLANS = [
    ("nothing", {}, {}, []),
    ("a new listener", {REDIS: route(REDIS, "::1")}, {}, [Start(route(REDIS, "::1"))]),
    ("one is gone", {}, {REDIS: route(REDIS, "::1")}, [Stop(REDIS)]),
    ("moved", {DNS: route(DNS, "::2")}, {DNS: route(DNS, "::1")}, [Repoint(route(DNS, "::2"))]),
    ("down", {DNS: route(DNS, None)}, {DNS: route(DNS, "::1")}, [Repoint(route(DNS, None))]),
    ("same", {DNS: route(DNS, "::1")}, {DNS: route(DNS, "::1")}, []),
    (
        "re-created with other ports: what ends comes first",
        {DNS: route(DNS, "::1")},
        {REDIS: route(REDIS, "::1")},
        [Stop(REDIS), Start(route(DNS, "::1"))],
    ),
]


@pytest.mark.parametrize(
    ("desired", "actual", "expected"), [p[1:] for p in PLANS], ids=[p[0] for p in PLANS]
)
def test_plan(
    desired: dict[Listener, Route],
    actual: dict[Listener, Route],
    expected: list[Start | Repoint | Stop],
) -> None:
    assert plan(desired, actual) == expected


listeners = st.builds(Listener, st.integers(1, 4), st.sampled_from([TCP, UDP]))
states = st.lists(listeners, max_size=6).flatmap(
    lambda names: st.fixed_dictionaries(
        {n: st.sampled_from([route(n, None), route(n, "::1"), route(n, "::2")]) for n in names}
    )
)


@given(states, states)
def test_carrying_out_a_plan_makes_the_two_equal(
    desired: dict[Listener, Route], actual: dict[Listener, Route]
) -> None:
    result = dict(actual)
    for action in plan(desired, actual):
        match action:
            case Start():
                assert action.route.listener not in result, "a port is free before it is bound"
                result[action.route.listener] = action.route
            case Repoint():
                assert action.route.listener in result
                result[action.route.listener] = action.route
            case Stop():
                del result[action.listener]
    assert result == desired
