"""The ambassador with a route that changes: `python -m bench.repoint PORT BACKEND BACKEND`.

Its own supervisor, as behind Docker, but with a desired state that each SIGUSR1 turns from one backend to
the other. What Docker's event and the inspection of a container cost is not in it.
"""

from __future__ import annotations

import signal
import sys
from itertools import cycle

from ambassador.supervise.forkserver import Nursery


def main(arguments: list[str]) -> int:
    nursery = Nursery.fork()  # as the program itself: before anything else is imported
    # ruff: disable[PLC0415]
    from ambassador.model import Backend, DesiredState, Listener, Route
    from ambassador.values import Protocol
    from ambassador.supervise.supervisor import Limits, Supervisor
    # ruff: enable[PLC0415]

    listener = Listener(int(arguments[0]), Protocol.TCP)
    states = []
    for text in arguments[1:]:
        host, _, port = text.rpartition(":")
        route = Route(listener, "bench", (Backend(host, int(port)),))
        states.append(DesiredState({listener: route}))
    turns = cycle(states)
    state = next(turns)
    supervisor = Supervisor(nursery, lambda: state, Limits())

    def turn(*_: object) -> None:
        nonlocal state
        state = next(turns)
        supervisor.wake()

    signal.signal(signal.SIGUSR1, turn)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
