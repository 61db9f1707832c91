"""What people do to containers, in any order: afterwards reality equals `docker inspect`, never a stranger.

The ambassador follows one name. After each step a new client must get what inspect says of that name (the
server at that address, or nobody), old ones must go on or end, and whoever took over an address that the
target gave up must never have had a visitor. Fault rows C1, C2, C4, C6 to C9. `DOCKER_EXAMPLES` and
`DOCKER_STEPS` make a longer run.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os

import docker.errors
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support.endpoints import PORT, Caller, Conversation, accepts
from tests.support.engine import (
    Box,
    Stage,
    create_server,
    fixed_network,
    listening_since,
    run_ambassador,
    run_server,
    visitors,
)
from tests.support.wait import wait_until

EXAMPLES = int(os.environ.get("DOCKER_EXAMPLES", "2"))
STEPS = int(os.environ.get("DOCKER_STEPS", "8"))

WITHIN_S = 2.0
SILENCE_S = 0.1
PORTS = (f"{PORT}/tcp", f"{PORT}/udp")
OTHER = PORT + 1
ADDRESSES = 3

SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


class Machine(RuleBasedStateMachine):
    """One target, from its first run to its removal."""

    stage: Stage
    host: str  # of the ambassador
    network: str
    addresses: tuple[str, ...]
    ambassador: Box
    numbers = itertools.count(1)

    def __init__(self) -> None:
        super().__init__()
        self.stranger: Box | None = None
        self.old: Conversation | None = None
        self.place = 0
        self.running = self.connected = self.named = True
        self.paused = False

    @initialize(more=st.booleans())
    def create(self, more: bool) -> None:
        self.saying = f"run{next(self.numbers)}"
        self.ports = (*PORTS, f"{OTHER}/tcp") if more else PORTS
        flags = [f"--network={self.network}", f"--ip={self.addresses[self.place]}"]
        self.box = create_server(self.stage, "target", *self.ports, flags=flags, says=self.saying)
        self.box.start()
        self.runs = 1
        self.running = self.connected = self.named = True
        self.paused = False
        self.check()

    # -- what Docker does

    @rule(how=st.sampled_from(["stop", "SIGKILL"]))
    @precondition(lambda self: self.running and not self.paused)
    def end(self, how: str) -> None:
        self.running = False
        if how == "stop":
            self.box.stop()
        else:
            self.box.kill(how)
        self.check()

    @rule()
    @precondition(lambda self: not self.running)
    def start(self) -> None:
        self.running = True
        self.box.start()
        self.runs += 1
        self.check()

    @rule()
    @precondition(lambda self: self.running and not self.paused)
    def restart(self) -> None:
        """To the same address: the run is another, so old connections are over."""
        self.box.restart()
        self.runs += 1
        self.old_is_over()
        self.check()

    @rule()
    @precondition(lambda self: self.connected and not self.paused)
    def restart_elsewhere(self) -> None:
        """A stranger takes the old address before the target is back."""
        self.box.stop()
        before = self.addresses[self.place]
        self.remove_stranger()
        self.place = (self.place + 1) % ADDRESSES
        self.stage.docker("network", "disconnect", self.network, self.box.id)
        self.connect()
        flags = [f"--network={self.network}", f"--ip={before}"]
        self.stranger = run_server(self.stage, "stranger", *PORTS, flags=flags)
        self.box.start()
        self.runs += 1
        self.running = True
        self.old_is_over()
        self.check()

    @rule()
    @precondition(lambda self: self.running)
    def pause(self) -> None:
        self.paused = not self.paused
        self.stage.docker("pause" if self.paused else "unpause", self.box.id)
        self.check()

    @rule()
    def rename(self) -> None:
        self.named = not self.named
        self.stage.docker(
            "rename", self.box.id, self.stage.name("target" if self.named else "away")
        )
        self.check()

    @rule()
    @precondition(lambda self: not self.paused)
    def connect_or_disconnect(self) -> None:
        if self.connected:
            self.stage.docker("network", "disconnect", self.network, self.box.id)
        else:
            self.connect()
        self.connected = not self.connected
        self.check()

    @rule(more=st.booleans())
    def recreate(self, more: bool) -> None:
        self.box.remove()
        self.old_is_over()
        self.create(more)

    # -- helpers

    def connect(self) -> None:
        address = self.addresses[self.place]
        self.stage.docker("network", "connect", f"--ip={address}", self.network, self.box.id)

    def old_is_over(self) -> None:
        if self.old is not None:
            self.old.ending(
                WITHIN_S
            )  # a reset, or the end that the server's own end was; not silence
            self.leave_old()

    def leave_old(self) -> None:
        if self.old is not None:
            self.old.__exit__()
            self.old = None

    def remove_stranger(self) -> None:
        if self.stranger is not None:
            assert visitors(self.stranger) == [], "somebody was relayed to a stranger"
            self.stranger.remove()
            self.stranger = None

    # -- what must hold

    def check(self) -> None:
        if self.running and not self.paused:
            listening_since(self.box, self.runs)  # in every run, so that their lines can be counted
        document = self.named_target()
        state = document["State"] if document else {}
        networks = document["NetworkSettings"]["Networks"] if document else {}
        address = networks.get(self.network, {}).get("IPAddress", "")
        if state.get("Paused"):
            self.nobody_answers()  # its kernel takes connections, and that is all
        elif state.get("Running") and address:
            self.target_answers(address)
        else:
            self.old_is_over()
            self.nobody_answers()
        if document:
            wanted = f"{OTHER}/tcp" in self.ports
            wait_until(lambda: accepts(self.host, OTHER) == wanted, "the exposed ports", WITHIN_S)
        if self.stranger is not None:
            assert visitors(self.stranger) == [], "somebody was relayed to a stranger"

    def named_target(self) -> dict[str, dict[str, dict[str, dict[str, str]]]]:
        try:
            box = self.stage.box(self.stage.name("target"))
        except docker.errors.NotFound:
            return {}
        return box.inspect()

    def target_answers(self, address: str) -> None:
        def greeted() -> bool:
            try:
                with Conversation(self.host, timeout=WITHIN_S) as fresh:
                    return fresh.greeting() == (self.saying, address)
            except (OSError, AssertionError):  # reset, while another run is being left
                return False

        wait_until(greeted, f"{self.saying} at {address}", WITHIN_S)
        with Caller(self.host) as caller:
            reply = wait_until(lambda: caller.ask(b"who?", 0.5), "a UDP answer", WITHIN_S)
            assert reply.data == f"{self.saying} who?".encode()
        if self.old is None:
            self.old = Conversation(self.host)
            assert self.old.greeting() == (self.saying, address)
        assert self.old.ask(b"still there?") == b"still there?"

    def nobody_answers(self) -> None:
        def silent() -> bool:
            with contextlib.suppress(OSError), Conversation(self.host) as fresh:
                return fresh.is_held(SILENCE_S)
            return False

        wait_until(silent, "silence", WITHIN_S)
        with Caller(self.host) as caller:
            assert caller.ask(b"who?", SILENCE_S) is None

    def teardown(self) -> None:
        self.leave_old()
        self.box.remove()
        self.remove_stranger()
        assert self.ambassador.is_running()


def prepare(stage: Stage) -> None:
    """Give the machine a network, and an ambassador that follows a target."""
    network = fixed_network(stage, "net")
    (config,) = stage.engine.client.networks.get(network).attrs["IPAM"]["Config"]
    hosts = list(itertools.islice(ipaddress.ip_network(config["Subnet"]).hosts(), 60))
    # Far from those that Docker gives by itself, which are the first.
    addresses = tuple(str(host) for host in hosts[50 : 50 + ADDRESSES])
    first = run_server(stage, "target", *PORTS, flags=[f"--network={network}"])
    ambassador, host = run_ambassador(stage, "-name", first.name, network=network)
    first.remove()
    Machine.stage, Machine.host, Machine.network = stage, host, network
    Machine.addresses, Machine.ambassador = addresses, ambassador


@pytest.mark.timeout(120 + 60 * EXAMPLES)
def test_any_order(stage: Stage) -> None:
    """C1, C2, C4, C6, C7, C8, C9: whatever happens, within 2 s."""
    prepare(stage)
    run_state_machine_as_test(Machine, settings=SETTINGS)
