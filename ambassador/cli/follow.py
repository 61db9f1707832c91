"""`grand-ambassador -name NAME`: follow containers through the Docker Engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ambassador import options
from ambassador.cli import goflags
from ambassador.cli.arguments import (
    Action,
    Arguments,
    MissingName,
    Subcommand,
    VariableError,
    read_options,
)
from ambassador.cli.parent import run_parent
from ambassador.cli.usage import flag_lines
from ambassador.engine.address import engine_address
from ambassador.supervise.forkserver import ForkServer
from ambassador.system.titles import set_title
from ambassador.values import escape, quote


def follow_usage() -> str:
    """The help of the program, and what follows a wrong flag."""
    return (
        "Usage:\n"
        "  grand-ambassador [flags] -name NAME [-name NAME ...]\n"
        "  grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT ...\n"
        "\n"
        "Relays every port that the named containers expose and follows them through restarts.\n"
        "\n"
        "Flags:\n"
        f"{flag_lines(options.all_rows())}"
        "\n"
        "Environment, if no flag says otherwise:\n"
        "  AMBASSADOR_...     any flag: AMBASSADOR_IDLE_TIMEOUT=1h is -idle-timeout 1h\n"
        "  DOCKER_HOST        as -sock\n"
        "  DOCKER_TLS_VERIFY  as -tlsverify, if it is not empty\n"
        "  DOCKER_CERT_PATH   directory of ca.pem, cert.pem and key.pem; else $HOME/.docker\n"
    )


def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Arguments:
    """Raises ValueError, or MissingName if no target is named."""
    rows = options.all_rows()
    parsed = goflags.parse(rows, arguments)
    if parsed.rest and not parsed.values.get("version"):
        raise ValueError(_unexpected(arguments, parsed.rest))
    found = read_options(rows, parsed, environment)
    if found.action is Action.VERSION:
        return found
    if not found.program.name:
        raise MissingName
    sources = {row.name: row.variable for row in rows if environment.get(row.variable)}
    sources |= {row.name: f"flag -{row.key}" for row in rows if row.name in parsed.values}
    try:
        engine = engine_address(found.program, sources, environment)
    except ValueError as error:
        raise (error if "sock" in parsed.values else VariableError(error)) from None
    wait = "" if found.program.wait else "-wait flag is deprecated and will not be used"
    return replace(found, engine=engine, warnings=tuple(filter(None, (wait, engine.warning))))


def _unexpected(arguments: Sequence[str], rest: Sequence[str]) -> str:
    """Why an argument that is no flag stands among the flags, and what to write."""
    line = f"unexpected argument {quote(rest[0])}"
    before = arguments[-len(rest) - 1] if len(arguments) > len(rest) else ""
    if rest[0].lower() in ("true", "false") and before.startswith("-") and before.strip("-"):
        return f"{line}: write {escape(before)}={rest[0]}"
    if rest[0] == "relay":
        return f"{line}: write it first, grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT"
    return f"{line}: write -name {quote(rest[0])} to follow a container of that name"


def supervise(arguments: Arguments, fork_server: ForkServer) -> int:
    import logging  # noqa: PLC0415

    from ambassador.discovery.docker_source import DockerSource  # noqa: PLC0415
    from ambassador.engine.client import connect_engine  # noqa: PLC0415
    from ambassador.reconcile import merge  # noqa: PLC0415
    from ambassador.supervise.supervisor import Supervisor  # noqa: PLC0415

    names, engine = arguments.program.name, arguments.engine
    set_title(f"following {', '.join(names)}")
    log = logging.getLogger(__name__)
    for warning in arguments.warnings:
        log.warning("%s", warning)
    supervisor = Supervisor(
        fork_server,
        lambda: merge(source.targets(), arguments.listener),
        sandbox=arguments.program.sandbox,
    )
    source = DockerSource(
        lambda: connect_engine(engine.url, tls=engine.tls),
        names,
        network=arguments.target.network,
        on_change=supervisor.wake,
        log=log,
    )
    source.start()
    try:
        return supervisor.run()
    finally:
        source.stop()


FOLLOW = Subcommand(follow_usage, read, lambda arguments: run_parent(arguments, supervise))
