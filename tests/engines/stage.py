"""What a scenario works with: containers on one engine, and clients among them.

The engine is the scenario's alone, so names are short: `net`, `target`, `ambassador`, `client`.
Every server says its own name, so an answer from a stranger is seen.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.engines import client
from tests.engines.client import Call
from tests.engines.engine import SOCKET, Engine
from tests.support import endpoints
from tests.support.endpoints import PORT
from tests.support.engine import AMBASSADOR, DEMO

BOTH = ("7000/tcp", "7000/udp")
PATIENCE_S = 10.0
GRACE_S = 0.5
"""After a target's death: how late a connection to it may still be refused or cut."""

_CLIENT = Path(client.__file__).read_text()
_SERVER = Path(endpoints.__file__).read_text()
_OWN_NETWORKS = {"bridge", "host", "none", "podman"}


class NotAvailableError(Exception):
    """The engine itself has no such thing; the message says what it said."""


class Stage:
    """One scenario's corner of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.docker = engine.docker
        self._pool = ThreadPoolExecutor()

    def clear(self) -> None:
        """Remove every container and network."""
        self.until("a clear stage", self._is_clear)

    def _is_clear(self) -> bool:
        # Again if need be: Podman removes a container whose network another uses only after that
        # one, and a network a moment after its last container.
        containers = self.docker("ps", "--all", "--quiet").split()
        if containers:
            self.docker("rm", "--force", "--volumes", *containers, check=False)
        listed = self.docker("network", "ls", "--format", "{{.Name}}").split()
        networks = set(listed) - _OWN_NETWORKS
        for network in networks:
            self.docker("network", "rm", network, check=False)
        return not containers and not networks

    # Making. `flags` are those of `docker run`.

    def network(self, name: str = "net", flags: str = "") -> None:
        self.docker("network", "create", *shlex.split(flags), name)

    def optional(self, *arguments: str) -> None:
        """A docker command that not every engine knows; raises NotAvailableError."""
        try:
            self.docker(*arguments)
        except RuntimeError as error:
            raise NotAvailableError(str(error)) from None

    def run(self, name: str, image: str, *command: str, flags: str = "") -> str:
        """`docker run -d`; the ID."""
        words = shlex.split(flags)
        made = self.docker("run", "-d", "--name", name, *words, image, *command)
        return made.splitlines()[-1]

    def target(
        self,
        name: str = "target",
        ports: tuple[str, ...] = BOTH,
        *,
        flags: str = "--network net",
        says: str = "",
        expose: tuple[str, ...] | None = None,
        image: str = DEMO,
    ) -> str:
        """A server that listens on ports, exposes them and says its name; the ID."""
        exposed = " ".join(f"--expose {port}" for port in (ports if expose is None else expose))
        command = ("python3", "-c", _SERVER, says or name, *ports)
        return self.run(name, image, *command, flags=f"{exposed} {flags}")

    def ambassador(
        self, *arguments: str, flags: str = "--network net", name: str = "ambassador"
    ) -> None:
        """The ambassador of `target`, unless the arguments say otherwise."""
        mount = f"-v {SOCKET}:/var/run/docker.sock"
        self.run(name, AMBASSADOR, *(arguments or ("-name", "target")), flags=f"{mount} {flags}")

    def client(self, name: str = "client", flags: str = "--network net") -> None:
        """A container that clients are started in."""
        self.run(name, DEMO, "sleep", "infinity", flags=f"--init --stop-timeout 1 {flags}")

    def scene(
        self,
        *arguments: str,
        target: str = "",
        ambassador: str = "",
        ports: tuple[str, ...] = BOTH,
        expose: tuple[str, ...] | None = None,
    ) -> str:
        """A network with a target, its ambassador and a client; the ambassador's address.

        `target` and `ambassador` are more flags of theirs.
        """
        self.network()
        self.target(ports=ports, expose=expose, flags=f"--network net {target}")
        self.ambassador(*arguments, flags=f"--network net {ambassador}")
        self.client()
        return self.address("ambassador")

    # Looking

    def inspect(self, name: str, what: str) -> Any:
        """One part of an inspect document."""
        return json.loads(self.docker("inspect", "--format", f"{{{{json {what}}}}}", name))

    def address(self, name: str, network: str = "", key: str = "IPAddress") -> str:
        """Its address in a network, or in the first that it is on; "" if it has none."""
        networks = self.inspect(name, ".NetworkSettings.Networks") or {}
        entry = networks[network] if network else next(iter(networks.values()), {})
        return str(entry.get(key, ""))

    def log(self, name: str = "ambassador") -> str:
        """What a container wrote to standard error; the ambassador's log."""
        done = ("sh", "-c", 'docker logs "$0" 2>&1', name)
        return self.engine.run(*done, check=False)

    def warnings(self) -> list[str]:
        """The ambassador's lines of level warning and above."""
        lines = self.log().splitlines()
        return [line for line in lines if "level=warn" in line or "level=error" in line]

    def until(self, what: str, look: Callable[[], object], seconds: float = PATIENCE_S) -> None:
        """Wait until `look` returns something true and raises nothing."""
        deadline = time.monotonic() + seconds
        seen = ""
        while time.monotonic() < deadline:
            try:
                if look():
                    return
            except (AssertionError, RuntimeError) as error:
                seen = f": {error}"
            time.sleep(0.1)
        raise AssertionError(f"waited {seconds:g} s for {what}{seen}")

    # Clients

    def ask(
        self,
        mode: str,
        host: str,
        last: object,
        port: int = PORT,
        client: str = "client",
    ) -> Any:
        """Run tests/engines/client.py in the client's container; what it printed."""
        words = ["python3", "-c", _CLIENT, mode, host, str(port), str(last)]
        return json.loads(self.docker("exec", client, *words).splitlines()[-1])

    def later(self, mode: str, host: str, seconds: float) -> Future[Any]:
        """The same, in the background; it has a second to begin."""
        asked = self._pool.submit(self.ask, mode, host, seconds)
        time.sleep(1)
        return asked

    def serves(
        self,
        host: str,
        name: str = "target",
        port: int = PORT,
        *,
        client: str = "client",
        udp: bool = True,
        seconds: float = PATIENCE_S,
    ) -> None:
        """Wait until the target answers over TCP, and over UDP; never anybody else."""
        expected = {"error": "", "tcp": name} | ({"udp": name} if udp else {})

        def look() -> bool:
            got = self.ask("ask", host, "udp" if udp else "tcp", port, client)
            assert got == expected, f"{host} port {port}: {got}"
            return True

        self.until(f"{name} to answer", look, seconds)


def cut(calls: list[Call], death: tuple[float, float], grace_s: float = GRACE_S) -> int:
    """How many calls a death, from its begin to its end, has cut.

    AssertionError if a stranger answered, or a call failed that the death cannot have cut.
    """
    strangers = {call[2] for call in calls} - {"target", ""}
    assert not strangers, f"answers from {strangers}"
    failed = [call for call in calls if call[3]]
    begin, end = death
    late = [call for call in failed if call[0] > end + grace_s or call[1] < begin - 0.05]
    problem = [f"{call[3]} from {call[0] - end:.2f} to {call[1] - end:.2f} s" for call in late[:3]]
    assert not late, f"{len(late)} calls failed outside of the death: {problem}"
    return len(failed)


def first_answer(calls: list[Call], after: float) -> float:
    """When the first answer came after a moment."""
    came = [call[1] for call in calls if call[2] and call[1] > after]
    assert came, "it never answered again"
    return min(came)
