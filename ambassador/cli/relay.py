"""`grand-ambassador relay 6379/tcp=10.0.0.5:6379`: relay to fixed addresses, with no Docker at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ambassador import options
from ambassador.cli import goflags
from ambassador.cli.arguments import Action, Arguments, Subcommand, read_options
from ambassador.cli.parent import run_parent
from ambassador.cli.usage import flag_lines
from ambassador.rules import parse_routes
from ambassador.supervise.forkserver import ForkServer
from ambassador.system.titles import set_title


def relay_usage() -> str:
    """The help of `relay`."""
    return (
        "Usage:\n"
        "  grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT ...\n"
        "\n"
        "Relays each port to a fixed address, without Docker:\n"
        "  grand-ambassador relay 6379/tcp=10.0.0.5:6379 53/udp=[fd00::5]:53\n"
        "\n"
        "Flags:\n"
        f"{flag_lines(row for row in options.all_rows() if row.relay)}"
        "\n"
        "Environment, if no flag says otherwise:\n"
        "  AMBASSADOR_...     any flag: AMBASSADOR_IDLE_TIMEOUT=1h is -idle-timeout 1h\n"
    )


def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Arguments:
    """Raises ValueError."""
    rows = [row for row in options.all_rows() if row.relay]
    parsed = goflags.parse(rows, arguments)
    found = read_options(rows, parsed, environment)
    if found.action is Action.VERSION:
        return found
    if not parsed.rest:
        raise ValueError("relay needs at least one route: write 6379/tcp=10.0.0.5:6379")
    return replace(found, routes=parse_routes(parsed.rest, found.listener))


def supervise(arguments: Arguments, fork_server: ForkServer) -> int:
    from ambassador.model import DesiredState  # noqa: PLC0415
    from ambassador.supervise.supervisor import Supervisor  # noqa: PLC0415

    set_title("relay")
    desired = DesiredState({spec.listen: spec for spec in arguments.routes})
    sandbox = arguments.program.sandbox
    return Supervisor(fork_server, lambda: desired, sandbox=sandbox).run()


RELAY = Subcommand(relay_usage, read, lambda arguments: run_parent(arguments, supervise))
