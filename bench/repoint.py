"""The ambassador with a backend that changes: `python -m bench.repoint PORT BACKEND BACKEND`.

Its own supervisor, as behind Docker, but with a desired state that each SIGUSR1 turns from one backend to
the other. What Docker's event and the inspection of a container cost is not in it.
"""

from __future__ import annotations

import signal
import sys
from itertools import cycle

from ambassador.supervise.forkserver import ForkServer


def main(arguments: list[str]) -> int:
    fork_server = ForkServer.fork()  # as the program itself: before anything else is imported
    # ruff: disable[PLC0415]
    from ambassador.model import Backend, DesiredState, ListenAddress, ListenerSpec
    from ambassador.options import Sandbox
    from ambassador.supervise.supervisor import Supervisor
    from ambassador.values import Protocol
    # ruff: enable[PLC0415]

    listen = ListenAddress(Protocol.TCP, int(arguments[0]))
    states = []
    for text in arguments[1:]:
        host, _, port = text.rpartition(":")
        spec = ListenerSpec(listen, "bench", backends=(Backend(host, int(port)),))
        states.append(DesiredState({listen: spec}))
    turns = cycle(states)
    state = next(turns)
    supervisor = Supervisor(fork_server, lambda: state, sandbox=Sandbox.AUTO)

    def turn(*_: object) -> None:
        nonlocal state
        state = next(turns)
        supervisor.wake()

    signal.signal(signal.SIGUSR1, turn)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
