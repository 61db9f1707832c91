"""reconcile.py as tables: what is desired for given targets, and the step from what runs to it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.model import (
    AccessRule,
    Backend,
    DesiredState,
    ListenAddress,
    ListenerSpec,
    Replica,
    TargetState,
)
from ambassador.options import Change, ListenerOptions, Row, rows
from ambassador.reconcile import (
    MAX_LISTENERS,
    RESERVED,
    Action,
    Close,
    Open,
    Replace,
    Update,
    fit,
    merge,
    plan,
)
from ambassador.values import Protocol

TCP, UDP = Protocol.TCP, Protocol.UDP
REDIS, DNS, DNS_TCP = ListenAddress(TCP, 6379), ListenAddress(UDP, 53), ListenAddress(TCP, 53)
DEFAULTS = ListenerOptions(hold=1234)


def target(
    name: str, *listens: ListenAddress, address: str | None = "10.0.0.2", run: str = "1"
) -> TargetState:
    """A target that wants these listeners, each on the port of the same number; no address: it is away."""
    replicas = (Replica(f"id-of-{name}", run, address),) if address else ()
    return TargetState(name, ports={each: each.first_port for each in listens}, replicas=replicas)


def listeners(*targets: TargetState) -> Mapping[ListenAddress, ListenerSpec]:
    return merge(targets, DEFAULTS).listeners


# ----------------------------------------------------------------------------------------------- merge


def test_one_target_one_port() -> None:
    desired = merge([target("redis", REDIS)], DEFAULTS)
    backend = Backend("10.0.0.2", 6379, "id-of-redis", "1")
    assert desired.listeners == {REDIS: ListenerSpec(REDIS, "redis", "-name", (backend,), DEFAULTS)}
    assert desired.problems == ()


def test_no_targets() -> None:
    assert merge([], DEFAULTS).listeners == {}


def test_the_same_number_over_tcp_and_udp_is_two_listeners() -> None:
    assert set(listeners(target("dns", DNS, DNS_TCP))) == {DNS, DNS_TCP}


def test_a_target_that_is_away_keeps_its_listeners_without_a_backend() -> None:
    spec = listeners(target("redis", REDIS, address=None))[REDIS]
    assert spec == ListenerSpec(REDIS, "redis", "-name", (), DEFAULTS)


def test_the_target_port_may_be_another() -> None:
    """The backend has the target's port, the listener its own."""
    state = replace(target("web"), ports={ListenAddress(TCP, 80): 8080})
    assert listeners(state)[ListenAddress(TCP, 80)].backends[0].port == 8080


def test_a_range_is_one_listener_whose_backend_has_the_first_port() -> None:
    ports = ListenAddress(UDP, 30_000, 30_010)
    state = replace(target("rtp"), ports={ports: 40_000})
    (spec,) = listeners(state).values()
    assert spec.listen == ports
    assert [backend.port for backend in spec.backends] == [40_000]


def test_every_replica_is_a_backend_with_its_weight() -> None:
    replicas = (Replica("a", "1", "10.0.0.2"), Replica("b", "2", "fd00::2", weight=0))
    spec = listeners(replace(target("web", REDIS), replicas=replicas))[REDIS]
    assert spec.backends == (
        Backend("10.0.0.2", 6379, "a", "1", 1),
        Backend("fd00::2", 6379, "b", "2", 0),
    )


def test_a_target_may_have_options_and_access_rules_of_its_own() -> None:
    own, access = ListenerOptions(hold=1), (AccessRule("10.0.0.0/8", True),)
    state = replace(target("web", REDIS), options=own, access=access, origin="label of web")
    found = listeners(state, target("dns", DNS))
    assert found[REDIS].options == own
    assert (found[REDIS].access, found[REDIS].origin) == (access, "label of web")
    assert found[DNS].options == DEFAULTS
    assert found[DNS].access == ()


# --------------------------------------------------------------------------------------------- clashes


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_clash_goes_to_the_one_named_first_and_names_both(order: tuple[str, str]) -> None:
    desired = merge([target(order[0], REDIS), target(order[1], REDIS, DNS)], DEFAULTS)
    assert desired.listeners[REDIS].target == order[0]
    assert desired.listeners[DNS].target == order[1], "the rest of the loser runs"
    (problem,) = desired.problems
    assert "6379/tcp" in problem
    assert f"both {order[0]} and {order[1]}" in problem


def test_a_container_that_is_named_twice_is_one_target() -> None:
    web, ident = (replace(target(name, REDIS), container="c" * 64) for name in ("web", "c" * 12))
    other = replace(target("db", REDIS), container="d" * 64)
    for away in (False, True):
        states = [replace(each, replicas=()) if away else each for each in (web, ident)]
        desired = merge(states, DEFAULTS)
        assert (desired.listeners[REDIS].target, desired.problems) == ("web", ())
    # Renamed away, "web" is nobody, and the ID is still followed.
    desired = merge([replace(web, replicas=()), ident], DEFAULTS)
    assert (desired.listeners[REDIS].target, desired.problems) == ("c" * 12, ())
    assert len(merge([web, other, ident], DEFAULTS).problems) == 1


def test_a_clash_is_settled_the_same_way_while_the_first_is_away() -> None:
    found = listeners(target("a", REDIS, address=None), target("b", REDIS))
    assert found == {REDIS: ListenerSpec(REDIS, "a", "-name", (), DEFAULTS)}


def at(address: str, first: int = 80, last: int = 0, protocol: Protocol = TCP) -> ListenAddress:
    return ListenAddress(protocol, first, last, address)


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        (at(""), at("127.0.0.1"), True),  # a wildcard and an address
        (at("127.0.0.1"), at(""), True),
        (at(""), at("::1"), True),
        (at("127.0.0.1"), at("127.0.0.2"), False),
        (at("127.0.0.1"), at("::1"), False),
        (at("127.0.0.1"), at("127.0.0.1", protocol=UDP), False),
        (at("", 80, 90), at("", 85), True),  # ranges
        (at("", 85), at("", 80, 90), True),
        (at("", 80, 85), at("", 85, 90), True),
        (at("", 80, 84), at("", 85, 90), False),
        (at("127.0.0.1", 80, 90), at("", 90), True),
        (at("127.0.0.1", 80, 90), at("127.0.0.2", 80, 90), False),
        (at("", 80, 90), at("", 80, 90, UDP), False),
    ],
    ids=str,
)
def test_overlaps(first: ListenAddress, second: ListenAddress, clash: bool) -> None:
    desired = merge([target("a", first), target("b", second)], DEFAULTS)
    assert set(desired.listeners) == ({first} if clash else {first, second})
    if clash:
        (problem,) = desired.problems
        for part in (
            f"{second} of b",
            f"{first} of a",
            "a has it",
            "give b another port or address",
        ):
            assert part in problem
    else:
        assert desired.problems == ()


def test_a_target_may_overlap_itself() -> None:
    """The wildcard sorts first, whatever the order of its ports."""
    wildcard, address = at("", 80), at("127.0.0.1", 80)
    for order in ((wildcard, address), (address, wildcard)):
        assert set(listeners(target("a", *order))) == {wildcard}


def many(name: str, first: int, last: int, protocol: Protocol = TCP) -> TargetState:
    return target(name, *(ListenAddress(protocol, port) for port in range(first, last + 1)))


def test_clashes_of_two_targets_are_one_line() -> None:
    """R7: linear work, however many ports both expose."""
    both = [many(name, 1000, 65535, UDP) for name in ("one", "two", "three")]
    begin = time.process_time()
    first, second = merge(both, DEFAULTS).problems
    assert time.process_time() - begin < 10, "the square would be minutes"
    assert first == (
        "64536 ports (1000-65535/udp) are exposed by both one and two: they go to one, "
        "which is named first; run a second ambassador for two"
    )
    assert "both one and three" in second


def test_many_single_ports_are_a_short_line() -> None:
    odd = [ListenAddress(TCP, port) for port in range(1, 2000, 2)]
    (problem,) = merge([target("a", *odd), target("b", *odd)], DEFAULTS).problems
    assert "1000 ports (1/tcp, 3/tcp, " in problem
    assert "19/tcp, 990 more)" in problem


# ------------------------------------------------------------------------------------------------- fit


def counted(desired: DesiredState) -> dict[str, int]:
    return Counter(spec.target for spec in desired.listeners.values())


def fitted(running: Collection[ListenAddress], *targets: TargetState) -> DesiredState:
    return fit(merge(targets, DEFAULTS), running)


def test_what_fits_is_left_alone() -> None:
    desired = merge([many("a", 1, MAX_LISTENERS)], DEFAULTS)
    assert fit(desired, ()) is desired


def test_a_target_that_wants_too_many_takes_nothing_from_another() -> None:
    """R7: whichever is named first, and also if the other comes later."""
    evil, good = many("evil", 30000, 31100), many("good", 6000, 6009)
    for order in ((evil, good), (good, evil)):
        desired = fitted((), *order)
        assert set(good.ports) <= set(desired.listeners)
        assert len(desired.listeners) == MAX_LISTENERS - (RESERVED - 10)
        (problem,) = desired.problems
        assert problem.startswith("93 ports (31008-31100/tcp) of evil left out, 1024 are relayed")
    alone = fitted((), evil, target("good"))
    assert counted(alone) == {"evil": MAX_LISTENERS - RESERVED}
    later = fitted(alone.listeners, evil, good)
    assert counted(later) == {"evil": MAX_LISTENERS - RESERVED, "good": 10}
    assert set(alone.listeners) <= set(later.listeners)


def test_what_runs_stays() -> None:
    """R7: a newcomer takes what is free, and of its own ports those that run come first."""
    running = many("old", 40000, 40900)
    desired = fitted(running.ports, many("new", 1, 900), running)
    assert set(running.ports) <= set(desired.listeners)
    assert counted(desired) == {"old": 901, "new": MAX_LISTENERS - 901}
    wider = fitted(running.ports, many("old", 30000, 40900))
    assert set(running.ports) <= set(wider.listeners)


def test_equal_shares_of_those_that_want_too_many() -> None:
    desired = fitted(
        (), *(many(name, n * 1000 + 1, n * 1000 + 900) for n, name in enumerate("abcd"))
    )
    assert counted(desired) == dict.fromkeys("abcd", MAX_LISTENERS // 4)
    assert [problem.split()[4] for problem in desired.problems] == ["a", "b", "c", "d"]


def test_more_targets_than_listeners() -> None:
    desired = fitted((), *(target(str(n), ListenAddress(TCP, n)) for n in range(1, 1101)))
    assert len(desired.listeners) == MAX_LISTENERS
    assert len(desired.problems) == 1100 - MAX_LISTENERS


def test_fixed_routes_that_do_not_fit_are_one_line() -> None:
    """R1: each is a target of its own, but nobody's neighbour."""
    listeners = {ListenAddress(TCP, n): spec(ListenAddress(TCP, n)) for n in range(1, 121)}
    desired = fit(DesiredState(listeners), (), 38, "raise ulimit -n")
    assert len(desired.listeners) == 38
    assert desired.problems == (
        "82 ports (39-120/tcp) left out, 38 are relayed in all: raise ulimit -n",
    )


# ------------------------------------------------------------------------------------------------ plan


def test_a_restart_at_the_same_address_is_another_backend() -> None:
    """C1: old connections are reset even if the address did not change."""
    before, after = listeners(target("redis", REDIS)), listeners(target("redis", REDIS, run="2"))
    assert plan(after, before) == [Update(after[REDIS])]


def spec(
    listen: ListenAddress, address: str | None = "::1", weight: int = 1, **options: Any
) -> ListenerSpec:
    backends = (Backend(address, listen.first_port, weight=weight),) if address else ()
    return ListenerSpec(listen, "t", "-name", backends, ListenerOptions(**options))


@pytest.mark.parametrize(
    ("desired", "running", "expected"),
    [
        pytest.param([], [], [], id="nothing"),
        pytest.param([spec(REDIS)], [], [Open(spec(REDIS))], id="new"),
        pytest.param([], [spec(REDIS)], [Close(REDIS)], id="gone"),
        pytest.param([spec(DNS, "::2")], [spec(DNS)], [Update(spec(DNS, "::2"))], id="moved"),
        pytest.param([spec(DNS, None)], [spec(DNS)], [Update(spec(DNS, None))], id="down"),
        pytest.param(
            [spec(DNS, weight=0)], [spec(DNS)], [Update(spec(DNS, weight=0))], id="weight"
        ),
        pytest.param([spec(DNS)], [spec(DNS)], [], id="same"),
        pytest.param([spec(DNS, hold=1)], [spec(DNS)], [Update(spec(DNS, hold=1))], id="option"),
        pytest.param(
            [spec(DNS, workers=2)], [spec(DNS)], [Replace(spec(DNS, workers=2))], id="workers"
        ),
        pytest.param(
            [spec(DNS, "::2", hold=1, workers=2)],
            [spec(DNS)],
            [Replace(spec(DNS, "::2", hold=1, workers=2))],
            id="workers-and-more",
        ),
        pytest.param(
            [spec(DNS), spec(DNS_TCP, "::2")],
            [spec(REDIS), spec(DNS_TCP)],
            [Close(REDIS), Update(spec(DNS_TCP, "::2")), Open(spec(DNS))],
            id="what-ends-comes-first",
        ),
        pytest.param(
            [spec(at("127.0.0.1"))],
            [spec(at(""))],
            [Close(at("")), Open(spec(at("127.0.0.1")))],
            id="another-address-is-another-listener",
        ),
    ],
)
def test_plan(
    desired: list[ListenerSpec], running: list[ListenerSpec], expected: list[Action]
) -> None:
    assert plan(_by_listen(desired), _by_listen(running)) == expected


def _by_listen(specs: list[ListenerSpec]) -> dict[ListenAddress, ListenerSpec]:
    return {each.listen: each for each in specs}


@pytest.mark.parametrize("row", rows(ListenerOptions), ids=lambda row: row.name)
def test_what_a_changed_option_takes(row: Row) -> None:
    """LIVE is an Update, REPLACE new workers: as the table says."""
    changed: dict[str, Any] = {row.name: not row.default if row.default is True else 17}
    new = replace(ListenerOptions(), **changed)
    before, after = spec(REDIS), replace(spec(REDIS), options=new)
    action = Replace if row.change is Change.REPLACE else Update
    assert plan({REDIS: after}, {REDIS: before}) == [action(after)]


listens = st.builds(ListenAddress, st.sampled_from([TCP, UDP]), st.integers(1, 4))
states = st.lists(listens, max_size=6).flatmap(
    lambda names: st.fixed_dictionaries(
        {
            name: st.builds(
                spec, st.just(name), st.sampled_from([None, "::1", "::2"]),
                hold=st.integers(0, 1), workers=st.integers(1, 2),
            )
            for name in names
        }
    )
)  # fmt: skip


@given(states, states)
def test_carrying_out_a_plan_makes_the_two_equal(
    desired: dict[ListenAddress, ListenerSpec], running: dict[ListenAddress, ListenerSpec]
) -> None:
    result = dict(running)
    for action in plan(desired, running):
        match action:
            case Open():
                assert action.spec.listen not in result, "a port is free before it is bound"
                result[action.spec.listen] = action.spec
            case Update() | Replace():
                old, new = result[action.spec.listen].options, action.spec.options
                assert (old.workers != new.workers) == isinstance(action, Replace)
                result[action.spec.listen] = action.spec
            case Close():
                del result[action.listen]
    assert result == desired
    assert plan(desired, result) == []
