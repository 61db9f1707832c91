"""Where a target and an ambassador stand: several networks, none in common, the host's, another's.

Fault rows C3, C9, C10.
"""

from __future__ import annotations

import ipaddress
import random
import re

import pytest

from tests.support.endpoints import PORT, Caller, Conversation, greet
from tests.support.engine import (
    REDIS,
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
UDP = f"{PORT}/udp"


def reached_at(host: str, port: int = PORT) -> str:
    """The address at which a new connection's server was reached."""
    with Conversation(host, port) as conversation:
        return conversation.greeting()[1]


def wait_until_reached_at(host: str, address: str) -> None:
    wait_until(lambda: reached_at(host) == address, f"a way to {address}")


def test_target_leaves_its_network_and_returns(stage: Stage) -> None:
    """C9, C3: a running target without an address is never dialled; connections are held for it."""
    network = stage.network("net")
    db = run_server(stage, "db", TCP, flags=f"--network={network}")
    ambassador, host = run_ambassador(stage, "-name", db.name, network=network)
    with Conversation(host) as old:
        old.greeting()
        stage.docker("network", "disconnect", network, db.name)
        assert old.ending() == "reset"
    ambassador.wait_for_log(f"{db.name} is on no network")
    with Conversation(host) as held:
        assert held.is_held(0.3)
        stage.docker("network", "connect", network, db.name)
        assert held.greeting() == ("db", db.address(network))
    assert db.is_running()

    def backends() -> list[str]:
        return re.findall(r"backend=(\S+)", ambassador.logs())

    wait_until(lambda: len(backends()) == 3, "three lines")
    for backend in backends():
        assert backend == "none" or ipaddress.ip_address(backend.partition(":")[0])


def test_several_networks(stage: Stage) -> None:
    """C9: a run keeps the first address; a new run has the first by name; -network overrules it."""
    second, first = stage.network("b"), stage.network("a")  # made and joined in the other order
    db = run_server(stage, "db", TCP, flags=f"--network={second}")
    stage.docker("network", "connect", first, db.name)
    # On the default network too: a network of the user's own comes before it.
    stage.docker("network", "connect", "bridge", db.name)

    ambassador = stage.run_ambassador("-name", db.name)
    overruled = stage.run_ambassador("-name", db.name, "-network", second, short="overruled")
    host, other = ambassador.address("bridge"), overruled.address("bridge")
    for address in (host, other):
        wait_until_accepts(address)  # so far they share the default network only
    for each in (ambassador, overruled):
        for network in (second, first):
            stage.docker("network", "connect", network, each.name)

    assert reached_at(host) == db.address("bridge")  # what was shared first
    wait_until_reached_at(other, db.address(second))
    db.restart()
    wait_until_reached_at(host, db.address(first))
    wait_until_reached_at(other, db.address(second))

    with Conversation(host) as old, Conversation(other) as unconcerned:
        old.greeting()
        unconcerned.greeting()
        stage.docker("network", "disconnect", first, db.name)
        assert old.ending() == "reset"
        wait_until_reached_at(host, db.address(second))
        stage.docker("network", "connect", first, db.name)
        assert reached_at(host) == db.address(second)
        assert unconcerned.ask(b"still here") == b"still here"


def test_no_network_in_common(stage: Stage) -> None:
    """C9: one line names both sides' networks; `docker network connect` heals it as things run."""
    theirs, ours = stage.network("theirs"), stage.network("ours")
    db = run_server(stage, "db", TCP, flags=f"--network={theirs}")
    ambassador, host = run_ambassador(stage, "-name", db.name, network=ours)
    ambassador.wait_for_log("shares no network")
    (line,) = lines_with(ambassador, "shares no network")
    assert f"it is on {theirs}, the ambassador on {ours}" in line
    assert "docker network connect" in line
    with Conversation(host) as held:
        assert held.is_held(0.3)
        stage.docker("network", "connect", theirs, ambassador.name)
        assert held.greeting() == ("db", db.address(theirs))

    stage.docker("network", "disconnect", theirs, ambassador.name)
    wait_until(lambda: len(lines_with(ambassador, "shares no net")) == 2, "the same line again")
    with Conversation(host) as held:
        stage.docker("network", "connect", ours, db.name)  # the other side can come as well
        assert held.greeting() == ("db", db.address(ours))


def test_by_name_in_a_user_network(stage: Stage) -> None:
    """C9: in a network of the user's own, clients find the ambassador by its name."""
    network = stage.network("net")
    place = f"--network={network}"
    redis = stage.run_target("redis", REDIS, flags=place)
    ambassador, _ = run_ambassador(stage, "-name", redis.name, port=6379, network=network)
    client = stage.run_client(flags=place)
    assert client.run("redis-cli", "-h", ambassador.name, "ping") == "PONG"
    redis.restart()
    assert client.run("redis-cli", "-h", ambassador.name, "ping") == "PONG"


def test_target_on_the_host_network(stage: Stage) -> None:
    """C10: reached through the gateway of the ambassador's own network."""
    port = free_port()
    db = run_server(stage, "db", f"{port}/tcp", flags="--network=host")
    _, host = run_ambassador(stage, "-name", db.name, port=port)
    assert greet(host, port) == "db"
    with Conversation(host, port) as old:
        old.greeting()
        db.kill()
        old.ending()
    with Conversation(host, port) as held:
        db.start()
        assert held.greeting()[0] == "db"


def test_another_network_resets_nothing(stage: Stage) -> None:
    """C9: the target's way stays as it is, also if the new network comes first by name."""
    kept, first = stage.network("z"), stage.network("a")
    db = run_server(stage, "db", TCP, flags=f"--network={kept}")
    ambassador, host = run_ambassador(stage, "-name", db.name, network=kept)
    stage.docker("network", "connect", first, ambassador.name)
    with Conversation(host) as old:
        assert old.greeting() == ("db", db.address(kept))
        stage.docker("network", "connect", first, db.name)
        assert old.is_held(1.0)
    assert reached_at(host) == db.address(kept)
    db.restart()  # a new run chooses anew
    wait_until_reached_at(host, db.address(first))


def test_the_gateway_may_be_a_stranger(stage: Stage) -> None:
    """C10: another machine is the gateway of the first network; the host is that of the second."""
    port, number = free_port(), random.randrange(16, 200)
    lan = stage.network(
        "a",
        f"--subnet=10.{number}.1.0/24",
        f"--aux-address=DefaultGatewayIPv4=10.{number}.1.50",
    )
    bridge = stage.network("b", f"--subnet=10.{number}.2.0/24")
    db = run_server(stage, "db", f"{port}/tcp", flags="--network=host")
    ambassador = stage.run_ambassador("-name", db.name, flags=f"--network={lan}")
    ambassador.wait_for_log("host is not known to be the gateway")
    stage.docker("network", "connect", bridge, ambassador.name)
    host = ambassador.address(bridge)
    wait_until_accepts(host, port)
    assert greet(host, port) == "db"


def test_ambassador_on_the_host_network(stage: Stage) -> None:
    """C10: it listens on this machine, and says so where the target does the same."""
    port = free_port()
    db = run_server(stage, "db", f"{port}/tcp")
    ambassador = stage.run_ambassador("-name", db.name, flags="--network=host")
    wait_until_accepts("127.0.0.1", port)
    assert reached_at("127.0.0.1", port) == db.address()
    assert reached_at("::1", port) == db.address()
    assert ambassador.stop() == 0

    onhost = run_server(stage, "onhost", f"{free_port()}/tcp", flags="--network=host")
    ambassador = stage.run_ambassador("-name", onhost.name, short="vain", flags="--network=host")
    ambassador.wait_for_log(f"{onhost.name} is on the ambassador's own host network")


def test_target_on_no_network(stage: Stage) -> None:
    """C10: `none` is an error that says so; Docker never lets such a container have a network."""
    db = run_server(stage, "db", TCP, flags="--network=none")
    ambassador = stage.run_ambassador("-name", db.name)
    ambassador.wait_for_log(rf"{db.name} is on no network \(network mode none\)")


def test_target_in_the_network_of_another(stage: Stage) -> None:
    """C10: `container:X` is X's address; after X's restart it would lead elsewhere, and is left."""
    owner = run_server(stage, "owner", "7001/tcp")
    # In this mode --expose is not allowed: what it exposes must be in its image.
    image = stage.name("image")
    stage.docker("commit", "--change", f"EXPOSE {TCP}", owner.name, image)
    try:
        db = stage.run(
            "db", image, *server_command("db", [TCP]), flags=f"--network=container:{owner.name}"
        )
        ambassador, host = run_ambassador(stage, "-name", db.name)
        with Conversation(host) as old:
            assert old.greeting() == ("db", owner.address())
            owner.restart()
            old.ending()
        ambassador.wait_for_log(f"{owner.name} had before its restart: restart this one too")
        with Conversation(host) as held:
            assert held.is_held(0.3)
            db.restart()
            assert held.greeting() == ("db", owner.address())
        db.remove()
    finally:
        stage.docker("rmi", "--force", image)


def test_target_in_a_chain_of_others(stage: Stage) -> None:
    """C10: `container:X` where X is `container:Y`."""
    owner = run_server(stage, "owner", "7001/tcp")
    image = stage.name("image")
    stage.docker("commit", "--change", f"EXPOSE {TCP}", owner.name, image)
    try:
        middle = stage.run(
            "middle",
            image,
            *server_command("middle", ["7002/tcp"]),
            flags=f"--network=container:{owner.name}",
        )
        db = stage.run(
            "db", image, *server_command("db", [TCP]), flags=f"--network=container:{middle.name}"
        )
        _, host = run_ambassador(stage, "-name", db.name)
        assert greet(host) == "db"
        db.remove()
        middle.remove()
    finally:
        stage.docker("rmi", "--force", image)


def test_ipv6(stage: Stage) -> None:
    """C10: clients come over IPv6; the target has nothing else, where the Engine can do that."""
    network = stage.name("net")
    subnet = f"fd00:{random.randrange(1 << 16):x}:{random.randrange(1 << 16):x}::/64"
    try:
        # Engines before 28 pass over the second flag and give it IPv4 as well.
        stage.network("net", "--ipv6", "--ipv4=false", f"--subnet={subnet}")
        db = run_server(stage, "db", TCP, UDP, flags=f"--network={network}")
    except AssertionError as error:
        pytest.skip(f"this Engine has no IPv6: {error}")
    ambassador = stage.run_ambassador("-name", db.name, flags=f"--network={network}")

    def address6(box: Box) -> str:
        return str(box.inspect()["NetworkSettings"]["Networks"][network]["GlobalIPv6Address"])

    host = wait_until(lambda: address6(ambassador), "an IPv6 address")
    wait_until_accepts(host)
    assert reached_at(host) == (db.address() or address6(db))
    with Caller(host) as caller:
        answer = wait_until(lambda: caller.ask(b"x"), "an answer")
        assert answer == (b"db x", host)
    db.restart()
    assert reached_at(host) == (db.address() or address6(db))
