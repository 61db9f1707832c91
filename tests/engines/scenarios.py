"""What the ambassador does for its users, each on a stage of its own.

A scenario returns a word about what it measured, or nothing. It raises NotAvailableError if the
engine has no such thing, anything else if the ambassador failed.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable

from tests.engines.engine import SOCKET
from tests.engines.stage import NotAvailableError, Stage, cut, first_answer
from tests.support.engine import AMBASSADOR, DEMO

Scenario = Callable[[Stage], str | None]

SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


# README, letter for letter


def _redis(stage: Stage, flags: str = "", alias: str = "") -> None:
    """README's first two lines."""
    stage.run("redis", f"{DEMO}:redis", flags=f"--expose 6379 {flags}")
    stage.ambassador("-name", "redis", name="redis_ambassador", flags=f"{flags} {alias}")


def _pings(stage: Stage, host: str, *flags: str) -> None:
    """redis answers a client that is started for the purpose."""

    def ping() -> bool:
        got = stage.docker("run", "--rm", *flags, f"{DEMO}:redis-cli", "-h", host, "ping")
        assert got.endswith("PONG"), got
        return True

    stage.until(f"redis at {host}", ping)


@scenario
def readme_link(stage: Stage) -> None:
    _redis(stage)
    link = ("--link", "redis_ambassador:db")
    stage.optional("create", *link, DEMO)
    _pings(stage, "db", *link)


@scenario
def readme_default_network(stage: Stage) -> None:
    _redis(stage)
    address = stage.address("redis_ambassador")
    if not address:
        raise NotAvailableError("containers have no address on the default network")
    _pings(stage, address)


@scenario
def readme_user_network(stage: Stage) -> None:
    stage.network()
    _redis(stage, "--network net", "--network-alias db")
    _pings(stage, "redis_ambassador", "--network", "net")
    _pings(stage, "db", "--network", "net")


@scenario
def readme_podman(stage: Stage) -> None:
    """README's line for Podman, with Podman's own client."""
    if stage.engine.kind.program != "podman":
        raise NotAvailableError("no Podman")

    def podman(*words: str) -> str:
        return stage.engine.run("podman", "--remote", "--url", f"unix://{SOCKET}", *words)

    def ping() -> bool:
        host = ("redis-cli", "-h", "redis_ambassador", "ping")
        return podman("run", "--rm", "--network", "net", DEMO, *host).endswith("PONG")

    podman("network", "create", "net")
    run = ("run", "-d", "--network", "net", "--name")
    podman(*run, "redis", "--expose", "6379", f"{DEMO}:redis")
    mount = ("-v", f"{SOCKET}:/var/run/docker.sock")
    podman(*run, "redis_ambassador", *mount, AMBASSADOR, "-name", "redis")
    stage.until("redis through the ambassador", ping)


@scenario
def compose(stage: Stage) -> None:
    stage.optional("compose", "version")
    services = {
        "redis": {"image": f"{DEMO}:redis", "expose": ["6379"], "container_name": "redis"},
        "ambassador": {
            "image": AMBASSADOR,
            "command": ["-name", "redis"],
            "volumes": [f"{SOCKET}:/var/run/docker.sock"],
        },
    }
    project = json.dumps({"name": "project", "services": services})

    def run(*words: str) -> None:
        stage.docker("compose", "-f", "-", *words, stdin=project)

    client = ("--network", "project_default")
    run("up", "-d")
    _pings(stage, "ambassador", *client)
    run("up", "-d", "--force-recreate", "--no-deps", "redis")
    _pings(stage, "ambassador", *client)
    run("restart", "redis")
    _pings(stage, "ambassador", *client)


# Restarts


@scenario
def restart_stolen_address(stage: Stage) -> str:
    at = stage.scene()
    stage.serves(at)
    old = stage.address("target")
    tcp, udp = stage.later("calls", at, 9), stage.later("datagrams", at, 8)
    begin = time.time()
    stage.docker("stop", "-t", "1", "target")
    dead = time.time()
    stage.target("thief")
    stage.docker("start", "target")
    back = time.time()
    calls, datagrams = tcp.result(), udp.result()
    lost = cut(calls, (begin, dead))
    cut(datagrams, (begin, dead))
    delays = [(first_answer(answers, dead + 0.05) - back) * 1000 for answers in (calls, datagrams)]
    stolen = "stolen" if stage.address("thief") == old else "not reused"
    return f"address {stolen}; back in {delays[0]:.0f} ms, UDP {delays[1]:.0f} ms; {lost} cut"


@scenario
def restart_command(stage: Stage) -> str:
    at = stage.scene()
    stage.serves(at)
    tcp = stage.later("calls", at, 6)
    begin = time.time()
    stage.docker("restart", "-t", "1", "target")
    back = time.time()
    calls = tcp.result()
    lost = cut(calls, (begin, back), grace_s=0)
    return f"back in {(first_answer(calls, back) - back) * 1000:.0f} ms, {lost} cut"


@scenario
def many_restarts(stage: Stage) -> str:
    at = stage.scene()
    stage.serves(at)
    tcp = stage.later("calls", at, 14)
    begin = time.time()
    count = 0
    while count < 6 and time.time() - begin < 12:
        stage.docker("restart", "-t", "0", "target")
        count += 1
        time.sleep(0.4)
    lost = cut(tcp.result(), (begin, time.time()))
    stage.serves(at)
    return f"{count} restarts, {lost} cut"


@scenario
def killed_under_a_conversation(stage: Stage) -> str:
    at = stage.scene()
    stage.serves(at)
    held, tcp = stage.later("hold", at, 8), stage.later("calls", at, 5)
    begin = time.time()
    stage.docker("kill", "target")
    dead = time.time()
    time.sleep(1)
    stage.docker("start", "target")
    conversation = held.result()
    assert conversation["end"] != "open", "the conversation with a killed container stays open"
    lost = cut(tcp.result(), (begin, dead))
    return f"{conversation['end']} {(conversation['at'] - dead) * 1000:.0f} ms later; {lost} cut"


@scenario
def restart_policy(stage: Stage) -> str:
    at = stage.scene(target="--restart always")
    stage.serves(at)
    tcp = stage.later("calls", at, 7)
    stage.docker("exec", "target", "python3", "-c", "import os; os.kill(1, 15)", check=False)
    dead = time.time()
    calls = tcp.result()
    lost = cut(calls, (dead - 1, dead), grace_s=1.2)
    first_answer(calls, dead + 2)
    return f"{lost} cut"


@scenario
def stop_grace(stage: Stage) -> str:
    """A target that goes on serving until its time to stop is over."""
    at = stage.scene(target="--stop-signal SIGWINCH")
    stage.serves(at)
    held, tcp = stage.later("hold", at, 9), stage.later("calls", at, 2.5)
    begin = time.time()
    stage.docker("stop", "-t", "4", "target")
    conversation = held.result()
    served = conversation["at"] - begin
    assert served > 3.5, f"the conversation ended {served:.1f} s into the grace"
    assert not cut(tcp.result(), (begin, begin + 4)), "new connections failed in the grace"
    return f"served for {served:.1f} s, then {conversation['end']}"


@scenario
def pause(stage: Stage) -> None:
    at = stage.scene()
    stage.serves(at)
    held = stage.later("hold", at, 5)
    stage.optional("pause", "target")
    time.sleep(1.5)
    stage.docker("unpause", "target")
    assert held.result()["end"] == "open", "the conversation did not survive a pause"
    stage.serves(at)


@scenario
def removed_at_its_end(stage: Stage) -> None:
    """A target that is started with --rm, as a unit of systemd does."""

    def gone() -> bool:
        return not stage.docker("ps", "--all", "--quiet", "--filter", "name=target")

    at = stage.scene(target="--rm")
    for _ in range(4):
        stage.serves(at)
        stage.docker("stop", "-t", "1", "target")
        stage.until("target to be gone", gone)
        stage.target(flags="--network net --rm")
    stage.serves(at)
    assert not stage.warnings(), stage.warnings()[0]


@scenario
def other_port(stage: Stage) -> None:
    at = stage.scene()
    stage.serves(at)
    stage.docker("rm", "-f", "target")
    stage.target(ports=("7100/tcp", "7100/udp"))
    stage.serves(at, port=7100)

    def refused() -> bool:
        return str(stage.ask("ask", at, "tcp")["error"]).startswith("ConnectionRefused")

    stage.until("the old port to be closed", refused)


@scenario
def rename(stage: Stage) -> None:
    at = stage.scene()
    stage.serves(at)
    stage.target("other")
    stage.docker("rename", "target", "gone")
    stage.docker("rename", "other", "target")
    stage.serves(at, "other")


@scenario
def appears_later(stage: Stage) -> None:
    stage.network()
    stage.ambassador()
    stage.client()
    stage.target()
    stage.serves(stage.address("ambassador"))


@scenario
def by_short_id(stage: Stage) -> None:
    stage.network()
    stage.ambassador("-name", stage.target()[:12])
    stage.client()
    stage.serves(stage.address("ambassador"))
    stage.docker("restart", "-t", "1", "target")
    stage.serves(stage.address("ambassador"))


# Ports


def _image_that_exposes(stage: Stage) -> str:
    stage.docker("create", "--name", "made", DEMO)
    stage.docker("commit", "--change", "EXPOSE 7000/tcp 7000/udp", "made", "exposes")
    return "exposes"


@scenario
def image_exposes(stage: Stage) -> None:
    stage.network()
    stage.target(expose=(), image=_image_that_exposes(stage))
    stage.ambassador()
    stage.client()
    stage.serves(stage.address("ambassador"))


@scenario
def publish_only(stage: Stage) -> None:
    stage.serves(stage.scene(expose=(), target="-p 7000 -p 7000/udp"))


@scenario
def expose_range(stage: Stage) -> None:
    at = stage.scene(expose=("7000-7004",), ports=("7003/tcp",))
    stage.serves(at, port=7003, udp=False)


@scenario
def low_port(stage: Stage) -> None:
    stage.serves(stage.scene(ports=("53/tcp", "53/udp")), port=53)


@scenario
def low_port_one_capability(stage: Stage) -> None:
    flags = "--cap-drop ALL --cap-add NET_BIND_SERVICE"
    stage.serves(stage.scene(ports=("53/tcp", "53/udp"), ambassador=flags), port=53)


@scenario
def two_targets(stage: Stage) -> None:
    stage.network()
    stage.target("one")
    stage.target("two", ("7000/tcp", "7001/tcp"))
    stage.ambassador("-name", "one", "-name", "two")
    stage.client()
    at = stage.address("ambassador")
    stage.serves(at, "one")
    stage.serves(at, "two", 7001, udp=False)


# Networks


@scenario
def two_networks(stage: Stage) -> None:
    for network in ("a", "b"):
        stage.network(network)
    stage.target(flags="--network a")
    stage.ambassador(flags="--network a")
    stage.docker("network", "connect", "b", "ambassador")
    stage.client(flags="--network b")
    at = stage.address("ambassador", "b")
    stage.serves(at)
    stage.serves("ambassador")
    stage.docker("network", "connect", "b", "target")
    stage.docker("network", "disconnect", "a", "target")
    stage.serves(at)
    stage.docker("restart", "-t", "1", "target")
    stage.serves(at)


@scenario
def network_flag(stage: Stage) -> None:
    for network in ("a", "b"):
        stage.network(network)
    stage.target(flags="--network a")
    stage.docker("network", "connect", "b", "target")
    stage.ambassador("-network", "b", "-name", "target", flags="--network b")
    stage.client(flags="--network b")
    stage.serves(stage.address("ambassador", "b"))


@scenario
def ambassador_joins_later(stage: Stage) -> str:
    for network in ("a", "b"):
        stage.network(network)
    stage.target(flags="--network a")
    stage.ambassador(flags="--network b")
    stage.client(flags="--network b")
    time.sleep(1.5)
    stage.docker("network", "connect", "a", "ambassador")
    begin = time.monotonic()
    stage.serves(stage.address("ambassador", "b"), seconds=35)
    return f"{time.monotonic() - begin:.1f} s after connect"


@scenario
def disconnect_connect(stage: Stage) -> str:
    at = stage.scene()
    stage.serves(at)
    held = stage.later("hold", at, 15)
    stage.docker("network", "disconnect", "net", "target")
    gone = time.time()
    time.sleep(0.7)
    stage.target("thief")
    tcp = stage.later("calls", at, 2)
    stage.docker("network", "connect", "net", "target")
    lost = cut(tcp.result(), (gone, gone))
    stage.serves(at)
    conversation = held.result()
    assert conversation["end"] not in ("open", "clean"), f"conversation: {conversation['end']}"
    assert not lost, f"{lost} calls failed"
    return f"{conversation['end']} {conversation['at'] - gone:.1f} s after disconnect"


@scenario
def ipv6_dual(stage: Stage) -> None:
    flags = ("--ipv6", "--subnet", "10.231.7.0/24", "--subnet", "fd00:e7::/64")
    stage.optional("network", "create", *flags, "net")
    stage.target()
    stage.ambassador()
    stage.client()
    stage.serves(stage.address("ambassador"))
    stage.serves(stage.address("ambassador", key="GlobalIPv6Address"))
    stage.serves("ambassador")


@scenario
def ipv6_only(stage: Stage) -> None:
    flags = ("--ipv6", "--ipv4=false", "--subnet", "fd00:e8::/64")
    stage.optional("network", "create", *flags, "net")
    stage.target()
    if stage.address("target"):
        raise NotAvailableError("the target has an IPv4 address")
    stage.ambassador()
    stage.client()
    at = stage.address("ambassador", key="GlobalIPv6Address")
    stage.serves(at)
    stage.docker("restart", "-t", "1", "target")
    stage.serves(at)


@scenario
def internal_network(stage: Stage) -> None:
    stage.network(flags="--internal")
    stage.target()
    stage.ambassador()
    stage.client()
    stage.serves(stage.address("ambassador"))


@scenario
def static_addresses_swap(stage: Stage) -> str:
    stage.network(flags="--subnet 10.231.8.0/24")
    stage.target(flags="--network net --ip 10.231.8.50")
    stage.ambassador()
    stage.client()
    at = stage.address("ambassador")
    stage.serves(at)
    tcp = stage.later("calls", at, 5)
    begin = time.time()
    stage.docker("rm", "-f", "target")
    dead = time.time()
    stage.target("thief", flags="--network net --ip 10.231.8.50")
    stage.target(flags="--network net --ip 10.231.8.51")
    back = time.time()
    calls = tcp.result()
    lost = cut(calls, (begin, dead))
    return f"back in {(first_answer(calls, dead) - back) * 1000:.0f} ms, {lost} cut"


HOST_PORTS = ("7391/tcp", "7391/udp")
HOST = "--network host"


def _serves_on_the_host(stage: Stage) -> None:
    """An ambassador on the host's network serves, or says why it cannot."""
    stage.ambassador(flags=HOST)
    stage.client(flags=HOST)
    try:
        stage.serves("127.0.0.1", port=7391)
    except AssertionError:
        if warnings := stage.warnings():
            raise NotAvailableError(warnings[0]) from None
        raise


@scenario
def host_network_ambassador(stage: Stage) -> None:
    stage.target(ports=HOST_PORTS, flags="")
    if not stage.address("target"):
        raise NotAvailableError("containers have no address on the default network")
    _serves_on_the_host(stage)
    stage.docker("restart", "-t", "1", "target")
    stage.serves("127.0.0.1", port=7391)


@scenario
def host_network_ambassador_user_network(stage: Stage) -> None:
    stage.network()
    stage.target(ports=HOST_PORTS)
    _serves_on_the_host(stage)


@scenario
def host_network_ambassador_isolated(stage: Stage) -> None:
    """A network in which the host has no address: nothing can be relayed, and the log says why."""
    mode = "com.docker.network.bridge.gateway_mode_ipv4=isolated"
    stage.optional("network", "create", "--internal", "-o", mode, "net")
    stage.target(ports=HOST_PORTS)
    stage.client(flags=HOST)
    if "tcp" in stage.ask("ask", stage.address("target"), "tcp", 7391):
        raise NotAvailableError("the host reaches the network all the same")
    stage.ambassador(flags=HOST)
    stage.until("a warning of the ambassador", stage.warnings, 4)


@scenario
def host_network_target(stage: Stage) -> None:
    stage.network()
    stage.target(ports=HOST_PORTS, flags=HOST)
    stage.ambassador()
    stage.client()
    gateway = stage.address("ambassador", key="Gateway")
    direct = stage.ask("ask", gateway, "tcp", 7391)
    if "tcp" not in direct:
        raise NotAvailableError(f"no container reaches the host network: {direct['error']}")
    stage.serves(stage.address("ambassador"), port=7391)


@scenario
def container_mode_target(stage: Stage) -> None:
    stage.network()
    stage.target("owner", ("7555/tcp",))
    image = _image_that_exposes(stage)
    stage.target(flags="--network container:owner", expose=(), image=image)
    stage.ambassador()
    stage.client()
    stage.serves(stage.address("ambassador"))


@scenario
def container_mode_ambassador(stage: Stage) -> None:
    stage.network()
    stage.client()
    stage.target()
    stage.ambassador(flags="--network container:client")
    stage.serves("127.0.0.1")


@scenario
def published_ambassador(stage: Stage) -> None:
    stage.scene(ambassador="-p 17391:7000 -p 17391:7000/udp")
    stage.client("host", flags=HOST)
    stage.serves("127.0.0.1", port=17391, client="host")
    stage.docker("restart", "-t", "1", "target")
    stage.serves("127.0.0.1", port=17391, client="host")


# Rights


@scenario
def no_warning(stage: Stage) -> None:
    stage.serves(stage.scene())
    assert not stage.warnings(), stage.warnings()[0]


@scenario
def sandbox_required(stage: Stage) -> None:
    stage.serves(stage.scene("-sandbox", "required", "-name", "target"))
    assert not stage.warnings(), stage.warnings()[0]


@scenario
def read_only_no_capabilities(stage: Stage) -> None:
    at = stage.scene(ambassador="--read-only --cap-drop ALL")
    stage.serves(at)
    stage.docker("restart", "-t", "1", "target")
    stage.serves(at)


@scenario
def no_new_privileges(stage: Stage) -> None:
    stage.serves(stage.scene(ambassador="--security-opt no-new-privileges"))


@scenario
def other_user(stage: Stage) -> None:
    """Another user, with the socket's group as a container sees it."""
    look = ("-v", f"{SOCKET}:/s", DEMO, "stat", "-c", "%g", "/s")
    group = stage.docker("run", "--rm", *look).splitlines()[-1]
    stage.serves(stage.scene(ambassador=f"--user 65534 --group-add {group}"))


@scenario
def other_user_group_of_the_host(stage: Stage) -> None:
    """README's line for another user, with the socket's group as the host sees it."""
    group = stage.engine.run("stat", "-c", "%g", SOCKET)
    stage.serves(stage.scene(ambassador=f"--user 65534 --group-add {group}"))


@scenario
def init_flag(stage: Stage) -> None:
    stage.serves(stage.scene(ambassador="--init"))


# Life of the ambassador


@scenario
def process_titles(stage: Stage) -> None:
    stage.serves(stage.scene())
    stage.optional("top", "ambassador")
    titles = stage.docker("top", "ambassador")
    assert "7000/tcp" in titles, titles


@scenario
def stops_at_once(stage: Stage) -> str:
    stage.serves(stage.scene())
    begin = time.monotonic()
    stage.docker("stop", "-t", "10", "ambassador")
    seconds = time.monotonic() - begin
    assert stage.inspect("ambassador", ".State.ExitCode") == 0
    assert seconds < 2.5, f"took {seconds:.1f} s"
    return f"{seconds:.1f} s"


@scenario
def ambassador_restarts(stage: Stage) -> None:
    stage.serves(stage.scene())
    stage.docker("restart", "-t", "3", "ambassador")
    stage.serves(stage.address("ambassador"))


_CPU_SECONDS = """
import glob
ticks = 0
for name in glob.glob("/proc/[0-9]*/stat"):
    try: ticks += sum(map(int, open(name).read().rpartition(")")[2].split()[11:13]))
    except OSError: pass
print(ticks / 100)
"""


@scenario
def quiet_on_exec(stage: Stage) -> str:
    """An exec in the target costs the ambassador nothing."""
    stage.serves(stage.scene())

    def used() -> float:
        return float(stage.docker("exec", "ambassador", "python3", "-c", _CPU_SECONDS))

    before = used()
    for _ in range(25):
        stage.docker("exec", "target", "true")
    spent = used() - before
    assert spent < 1, f"{spent:.2f} s of CPU for 25 execs"
    return f"{spent / 25 * 1000:.0f} ms of CPU an exec"


# The daemon


def _daemon_away(stage: Stage, number: signal.Signals) -> str:
    flags = "--network net --restart always"
    folder, _, name = SOCKET.rpartition("/")
    stage.network()
    stage.target(flags=flags)
    words = ("-sock", f"/host/{name}", "-name", "target")
    stage.run("ambassador", AMBASSADOR, *words, flags=f"-v {folder}:/host:ro {flags}")
    stage.client(flags=flags)
    stage.serves(stage.address("ambassador"))
    run = stage.inspect("ambassador", ".State.StartedAt")
    stage.engine.stop(number)
    time.sleep(1)
    stage.engine.start()
    back = time.monotonic()
    if not stage.inspect("client", ".State.Running"):  # Podman's service restarts nothing
        for container in ("target", "ambassador", "client"):
            stage.docker("start", container, check=False)

    def all_run() -> bool:
        states = [stage.inspect(name, ".State") for name in ("target", "ambassador", "client")]
        return all(state["Running"] and not state["Restarting"] for state in states)

    try:
        stage.until("the engine to start its containers", all_run, 20)
    except AssertionError as error:
        raise NotAvailableError(str(error)) from None
    lived = stage.inspect("ambassador", ".State.StartedAt") == run
    stage.serves(stage.address("ambassador"), seconds=20)
    seconds = time.monotonic() - back
    stage.docker("restart", "-t", "1", "target")
    stage.serves(stage.address("ambassador"), seconds=20)
    how = "lived on" if lived else "restarted with it"
    return f"serves {seconds:.1f} s after the daemon; the ambassador {how}"


@scenario
def daemon_stopped(stage: Stage) -> str:
    return _daemon_away(stage, signal.SIGTERM)


@scenario
def daemon_killed(stage: Stage) -> str:
    return _daemon_away(stage, signal.SIGKILL)
