"""The command line and the environment: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambassador.control import MAX_SLOTS, Drain, Start, Unpacker, pack
from ambassador.model import Backend, Listener, Route
from ambassador.values import Protocol
from ambassador.options import Sandbox
from ambassador.cli.arguments import (
    MAX_WORKERS,
    Command,
    ConfigError,
    MissingName,
    Options,
    Tls,
    UsageError,
    check_tls_files,
    follow_usage,
    parse_options,
    parse_routes,
    relay_usage,
)

HOME = {"HOME": "/home/me"}


def follow(*arguments: str, **environment: str) -> Options:
    return parse_options(["-name", "redis", *arguments], environment)


def refused(*arguments: str, **environment: str) -> str:
    """The one line that refuses `arguments`."""
    with pytest.raises(UsageError) as caught:
        parse_options(arguments, environment)
    assert caught.value.exit_code == 2
    assert caught.value.usage == (relay_usage() if arguments[0] == "relay" else follow_usage())
    line = str(caught.value)
    assert line.isprintable(), "not one clean line"
    return line


# --- following ---------------------------------------------------------------------------------


def test_defaults() -> None:
    assert follow() == Options(
        command=Command.FOLLOW,
        targets=("redis",),
        docker_host="unix:///var/run/docker.sock",
        hold_ms=10_000,
        drain_ms=300,
        log_level="info",
        wait=True,
        usage=follow_usage(),
    )


def test_everything_at_once() -> None:
    options = follow(
        *("-hold=1m30s", "--drain", "2s", "-network", "back", "-log-level=DEBUG", "-wait=false"),
        *("-sock", "tcp://10.0.0.1:2376", "-tls", "-tlsverify=true"),
        *("-tlscert", "/c", "-tlskey", "/k", "-tlscacert", "/a"),
        *("-max-connections", "500", "-idle-timeout", "1h", "-half-close-timeout=30s"),
        *("-udp-timeout", "5m"),
    )
    assert options == Options(
        command=Command.FOLLOW,
        targets=("redis",),
        docker_host="tcp://10.0.0.1:2376",
        tls=Tls(True, ca="/a", cert="/c", key="/k", client_required=True),
        network="back",
        hold_ms=90_000,
        drain_ms=2_000,
        max_connections=500,
        idle_ms=3_600_000,
        half_close_ms=30_000,
        session_idle_ms=300_000,
        log_level="debug",
        wait=False,
        warnings=("-wait flag is deprecated and will not be used",),
        usage=follow_usage(),
    )


def test_names_keep_their_order_and_lose_duplicates() -> None:
    options = parse_options(["-name", "b", "-name=a", "--name", "b", "-name", "c"], {})
    assert options.targets == ("b", "a", "c")


def test_any_name_is_a_name() -> None:
    strange = "web\nlevel=error \x1b[31m\u202e\udc80"
    assert parse_options(["-name", strange], {}).targets == (strange,)


@pytest.mark.parametrize("arguments", [[], ["-wait"], ["-sock", "/x"], ["-hold", "0"], ["--"]])
def test_a_missing_name_has_the_originals_words_and_code(arguments: list[str]) -> None:
    with pytest.raises(MissingName) as caught:
        parse_options(arguments, {})
    assert str(caught.value) == "Missing required arguments *name*"
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("form", "usage"), [([], follow_usage()), (["relay"], relay_usage())], ids=["follow", "relay"]
)
def test_help_and_version_need_nothing_else(form: list[str], usage: str) -> None:
    for word in ("-h", "-help", "--h", "--help"):
        assert parse_options([*form, word], {}) == Options(Command.HELP, usage=usage)
    assert parse_options([*form, "-version"], {}).command is Command.VERSION
    assert parse_options([*form, "--version=true"], {}).command is Command.VERSION


def test_usage_fits_a_terminal_and_names_every_flag() -> None:
    for text in (follow_usage(), relay_usage()):
        assert max(map(len, text.splitlines())) <= 100
        assert text.endswith("\n")
    original = {"name", "sock", "wait", "tls", "tlsverify", "tlscert", "tlskey", "tlscacert"}
    common = {"log-level", "hold", "drain", "version", "help"}
    common |= {"max-connections", "idle-timeout", "half-close-timeout", "udp-timeout"}
    for name in original | common | {"network"}:
        assert f"\n  -{name} " in follow_usage()
        assert (f"\n  -{name} " in relay_usage()) == (name in common)


@pytest.mark.parametrize(
    ("word", "level"),
    [
        ("debug", "debug"),
        ("info", "info"),
        ("warn", "warning"),
        ("warning", "warning"),
        ("error", "error"),
        ("fatal", "fatal"),
        ("panic", "panic"),
        ("WaRn", "warning"),
    ],
)
def test_log_levels(word: str, level: str) -> None:
    assert follow("-log-level", word).log_level == level
    assert parse_options(["relay", "-log-level", word, "1/tcp=10.0.0.5:1"], {}).log_level == level


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("0", 0), ("10s", 10_000), ("1.5h", 5_400_000), ("1us", 1), ("1000h", 3_600_000_000)],
)
def test_durations_are_milliseconds_that_fit_a_control_record(text: str, milliseconds: int) -> None:
    options = follow("-hold", text, "-drain", text)
    assert (options.hold_ms, options.drain_ms) == (milliseconds, milliseconds)
    start = Start(Listener(1, Protocol.TCP), hold_ms=options.hold_ms)
    drain = Drain(options.drain_ms)
    assert list(Unpacker().feed(pack(start) + pack(drain))) == [start, drain]


@pytest.mark.parametrize("sandbox", Sandbox)
def test_sandbox_modes(sandbox: Sandbox) -> None:
    assert follow("-sandbox", sandbox.value).sandbox is sandbox
    relay = parse_options(["relay", f"-sandbox={sandbox}", "1/tcp=10.0.0.5:1"], {})
    assert relay.sandbox is sandbox
    start = Start(Listener(1, Protocol.TCP), sandbox=sandbox)
    assert list(Unpacker().feed(pack(start))) == [start]


BAD_COMMAND_LINES = [
    (["-sandbox", "on"], 'invalid value "on" for flag -sandbox: write one of auto, required, off'),
    (["-x"], "flag provided but not defined: -x"),
    (["-na", "redis"], "flag provided but not defined: -na"),
    (["-name"], "flag needs an argument: -name"),
    (["---name"], "bad flag syntax: ---name"),
    (
        ["-name", ""],
        'invalid value "" for flag -name: it is empty; write a value or leave the flag out',
    ),
    (
        ["-sock", ""],
        'invalid value "" for flag -sock: it is empty; write a value or leave the flag out',
    ),
    (["-wait=maybe"], 'invalid boolean value "maybe" for -wait: write true or false'),
    (
        ["-hold", "10"],
        'invalid value "10" for flag -hold: '
        "missing unit in duration; write it as 10s, 500ms or 1m30s",
    ),
    (
        ["-hold=-1s"],
        'invalid value "-1s" for flag -hold: it is negative; write 0 or more',
    ),
    (
        ["-drain", "-1ns"],
        'invalid value "-1ns" for flag -drain: it is negative; write 0 or more',
    ),
    (
        ["-hold", "1001h"],
        'invalid value "1001h" for flag -hold: it is too long; write 1000h or less',
    ),
    (
        ["-udp-timeout", "0s"],
        'invalid value "0s" for flag -udp-timeout: write more than 0',
    ),
    *(
        (
            ["-max-connections", text],
            f'invalid value "{text}" for flag -max-connections: write a number from 1 to 10000000',
        )
        for text in ("0", "-1", "many", "1e3", "10000001", "99999999999999999999", "٣")
    ),
    (
        ["-log-level", "loud"],
        'invalid value "loud" for flag -log-level: '
        "write one of debug, info, warn, warning, error, fatal, panic",
    ),
    (
        ["redis"],
        'unexpected argument "redis": write -name "redis" to follow a container of that name',
    ),
    (["-wait", "false"], 'unexpected argument "false": write -wait=false'),
    (["--tls", "True"], 'unexpected argument "True": write --tls=True'),
    (
        ["-name", "a", "relay", "1/tcp=10.0.0.5:1"],
        'unexpected argument "relay": write it first, '
        "grand-ambassador relay [flags] PORT/PROTOCOL=ADDRESS:PORT",
    ),
    (["relay"], "relay needs at least one route: write 6379/tcp=10.0.0.5:6379"),
    (["relay", "-name", "x"], "flag provided but not defined: -name"),
    (["relay", "-sock=x", "1/tcp=10.0.0.5:1"], "flag provided but not defined: -sock"),
]


@pytest.mark.parametrize(("arguments", "line"), BAD_COMMAND_LINES)
def test_refused_command_lines(arguments: list[str], line: str) -> None:
    assert refused(*arguments) == line


# --- the Engine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "host"),
    [
        ("/docker.sock", "unix:///docker.sock"),
        ("docker.sock", f"unix://{Path.cwd()}/docker.sock"),
        ("./d:1/s", f"unix://{Path.cwd()}/d:1/s"),
        ("unix:///run/docker.sock", "unix:///run/docker.sock"),
        ("unix://", "unix:///var/run/docker.sock"),
        ("tcp://10.0.0.1:2375", "tcp://10.0.0.1:2375"),
        ("tcp://10.0.0.1", "tcp://10.0.0.1:2375"),
        ("tcp://:2375", "tcp://localhost:2375"),
        ("tcp://engine.local:1/", "tcp://engine.local:1"),
        ("tcp://engine:1/base/path", "tcp://engine:1/base/path"),
        ("tcp://[fd00:0::1]:2375", "tcp://[fd00::1]:2375"),
        ("tcp://[fd00::1]", "tcp://[fd00::1]:2375"),
        ("http://proxy:2375", "tcp://proxy:2375"),
        ("http://proxy", "tcp://proxy:2375"),
        ("https://engine", "tcp://engine:2376"),
    ],
)
def test_addresses_of_the_engine(written: str, host: str) -> None:
    assert follow("-sock", written).docker_host == host
    if "://" in written or written.startswith(("/", ".")):
        assert follow(DOCKER_HOST=written).docker_host == host


def test_docker_host_without_a_scheme_is_tcp_as_in_dockers_own_command_line() -> None:
    assert follow(DOCKER_HOST="engine:99").docker_host == "tcp://engine:99"
    assert follow(DOCKER_HOST="engine").docker_host == "tcp://engine:2375"


def test_an_empty_docker_host_is_none() -> None:
    assert follow(DOCKER_HOST="").docker_host == "unix:///var/run/docker.sock"


def test_the_flag_beats_the_environment_even_a_bad_one() -> None:
    assert follow("-sock", "/x", DOCKER_HOST="ssh://h").docker_host == "unix:///x"


BAD_ENGINES = [
    ("10.0.0.1:2375", "an address needs a scheme; write tcp://10.0.0.1:2375"),
    ("ssh://me@host", '"ssh" is not supported; write a path, unix://, tcp://, http:// or'),
    ("npipe:////./pipe/docker", '"npipe" is not supported'),
    ("://x", '"" is not supported'),
    ("tcp://h:0", "port 0 is out of range; write 1 to 65535"),
    ("tcp://h:65536", "port 65536 is out of range; write 1 to 65535"),
    ("tcp://h:", "a port is missing"),
    ("tcp://h:\uff12", "is not a number; write 1 to 65535 in digits 0-9"),
    ("tcp://me:secret@h:1", "only a host, a port and a path may follow"),
    ("tcp://h:1?x=1", "only a host, a port and a path may follow"),
    ("tcp://h:1/\x1b", "only a host, a port and a path may follow"),
    ("tcp://h!:1", '"h!" is no host name; write tcp://host:port'),
    ("tcp://fd00::1:2375", "an IPv6 address goes in brackets"),
    ("tcp://[fd00::1", "brackets are for an IPv6 address only"),
    ("tcp://[fd00::zz]:1", '"fd00::zz" is not a valid IPv6 address'),
]


@pytest.mark.parametrize(("written", "reason"), BAD_ENGINES)
def test_refused_addresses_of_the_engine(written: str, reason: str) -> None:
    line = refused("-name", "x", "-sock", written)
    assert "for flag -sock: " in line
    assert reason in line
    if "://" in written:
        line = refused("-name", "x", DOCKER_HOST=written)
        assert "for DOCKER_HOST: " in line
        assert reason in line


# --- TLS ---------------------------------------------------------------------------------------

VERIFIED = Tls(
    True, "/home/me/.docker/ca.pem", "/home/me/.docker/cert.pem", "/home/me/.docker/key.pem"
)
UNVERIFIED = Tls(
    False, "/home/me/.docker/ca.pem", "/home/me/.docker/cert.pem", "/home/me/.docker/key.pem"
)


@pytest.mark.parametrize(
    ("flags", "verify_variable", "expected"),
    [
        ([], "", None),
        (["-tls"], "", UNVERIFIED),
        (["-tlsverify"], "", VERIFIED),
        (["-tls", "-tlsverify"], "", VERIFIED),
        (["-tls=false", "-tlsverify"], "", VERIFIED),
        (["-tls", "-tlsverify=false"], "", UNVERIFIED),
        (["-tls=false"], "", None),
        ([], "1", VERIFIED),
        ([], "0", VERIFIED),  # as Docker has it: anything but empty
        (["-tls"], "1", VERIFIED),
        (["-tls=false"], "1", None),
        (["-tlsverify=false"], "1", None),
    ],
)
def test_when_tls_is_used(flags: list[str], verify_variable: str, expected: Tls | None) -> None:
    environment = {**HOME, "DOCKER_TLS_VERIFY": verify_variable}
    options = follow("-sock", "tcp://h", *flags, **environment)
    assert options.tls == expected
    assert options.docker_host == ("tcp://h:2376" if expected else "tcp://h:2375")
    assert options.warnings == ()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], VERIFIED),
        (["-tls"], UNVERIFIED),
        (["-tls=false"], VERIFIED),
        (["-tlsverify=false"], UNVERIFIED),
        (["-tls", "-tlsverify"], VERIFIED),
    ],
)
def test_https_is_tls_and_verified_unless_told_otherwise(flags: list[str], expected: Tls) -> None:
    assert follow("-sock", "https://h", *flags, **HOME).tls == expected


def test_tls_is_not_for_a_unix_socket_nor_for_http() -> None:
    options = follow("-tlsverify", **HOME)
    assert (options.tls, options.warnings) == (None, ())
    options = follow("-tlsverify", "-sock", "http://h", **HOME)
    assert options.tls is None
    assert options.warnings == (
        "TLS is not used with http://: write -sock tcp:// or https:// to use it",
    )


def test_where_the_files_are() -> None:
    tls = follow("-tls", "-sock", "tcp://h", DOCKER_CERT_PATH="/certs", HOME="/home/me").tls
    assert tls == Tls(False, "/certs/ca.pem", "/certs/cert.pem", "/certs/key.pem")
    tls = follow("-tls", "-sock", "tcp://h", "-tlscacert", "/mine", DOCKER_CERT_PATH="/certs").tls
    assert tls == Tls(False, "/mine", "/certs/cert.pem", "/certs/key.pem")
    tls = follow("-tls", "-sock", "tcp://h").tls
    assert tls is not None
    assert tls.ca == "/.docker/ca.pem"


def _with_files(directory: Path, *names: str, flags: tuple[str, ...] = ()) -> Options:
    for name in names:
        (directory / name).write_text("")
    return follow("-sock", "tcp://h", *flags, DOCKER_CERT_PATH=str(directory))


def test_all_tls_files_there(tmp_path: Path) -> None:
    options = _with_files(tmp_path, "ca.pem", "cert.pem", "key.pem", flags=("-tlsverify",))
    assert check_tls_files(options) == options


def test_a_client_without_a_certificate_goes_without(tmp_path: Path) -> None:
    tls = check_tls_files(_with_files(tmp_path, "ca.pem", flags=("-tlsverify",))).tls
    assert tls == Tls(True, str(tmp_path / "ca.pem"), "", "")


def test_the_authority_is_needed_only_to_verify(tmp_path: Path) -> None:
    assert check_tls_files(_with_files(tmp_path, flags=("-tls",))).tls == Tls(False, "", "", "")


def test_without_tls_no_file_is_looked_for(tmp_path: Path) -> None:
    options = _with_files(tmp_path)
    assert check_tls_files(options) is options


@pytest.mark.parametrize(
    ("files", "flags", "missing", "flag"),
    [
        ((), ("-tlsverify",), "ca.pem", "-tlscacert"),
        (("ca.pem", "cert.pem"), ("-tlsverify",), "key.pem", "-tlskey"),
        (("ca.pem", "key.pem"), ("-tlsverify",), "cert.pem", "-tlscert"),
        ((), ("-tls", "-tlscert=none.pem"), "none.pem", "-tlscert"),
        (("cert.pem",), ("-tls", "-tlskey=none.pem"), "none.pem", "-tlskey"),
    ],
)
def test_a_missing_tls_file_is_named_with_its_flag(
    tmp_path: Path, files: tuple[str, ...], flags: tuple[str, ...], missing: str, flag: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_tls_files(_with_files(tmp_path, *files, flags=flags))
    path = missing if missing == "none.pem" else str(tmp_path / missing)
    assert str(caught.value) == (
        f'Error setting up TLS: cannot read "{path}" (No such file or directory): '
        f"mount the file or name another with {flag}"
    )
    assert caught.value.exit_code == 1


def test_a_directory_is_no_tls_file(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").mkdir()
    with pytest.raises(ConfigError, match=r"Is a directory.*-tlscacert"):
        check_tls_files(_with_files(tmp_path, flags=("-tlsverify",)))


# --- routes ------------------------------------------------------------------------------------


def _route(port: int, protocol: Protocol, address: str, backend_port: int) -> Route:
    backend = Backend(address, backend_port)
    return Route(Listener(port, protocol), str(backend), (backend,))


def test_the_relay_form() -> None:
    assert parse_options(
        ["relay", "-hold=0", "-drain", "1s", "6379/tcp=10.0.0.5:6380", "53/udp=[fd00::5]:53"],
        {"DOCKER_HOST": "nonsense://", "DOCKER_TLS_VERIFY": "1"},
    ) == Options(
        command=Command.RELAY,
        routes=(
            _route(6379, Protocol.TCP, "10.0.0.5", 6380),
            _route(53, Protocol.UDP, "fd00::5", 53),
        ),
        hold_ms=0,
        drain_ms=1_000,
        usage=relay_usage(),
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("1/tcp=10.0.0.5:65535", _route(1, Protocol.TCP, "10.0.0.5", 65535)),
        ("65535/udp=10.0.0.5:1", _route(65535, Protocol.UDP, "10.0.0.5", 1)),
        ("0080/tcp=10.0.0.5:00080", _route(80, Protocol.TCP, "10.0.0.5", 80)),
        ("80/tcp=[fd00:0:0::5]:80", _route(80, Protocol.TCP, "fd00::5", 80)),
        ("80/tcp=[FD00::5]:80", _route(80, Protocol.TCP, "fd00::5", 80)),
        ("80/tcp=[::ffff:10.0.0.5]:80", _route(80, Protocol.TCP, "10.0.0.5", 80)),
        ("80/tcp=[fe80::1%7]:80", _route(80, Protocol.TCP, "fe80::1%7", 80)),
        ("80/tcp=127.0.0.1:81", _route(80, Protocol.TCP, "127.0.0.1", 81)),
    ],
)
def test_routes(spec: str, expected: Route) -> None:
    assert parse_routes([spec]) == (expected,)


def test_a_zone_by_name_becomes_the_interfaces_number() -> None:
    number = socket.if_nametoindex("lo")
    (route,) = parse_routes(["80/tcp=[fe80::1%lo]:80"])
    assert route.backends[0].address == f"fe80::1%{number}"


def test_one_port_may_have_both_protocols() -> None:
    assert len(parse_routes(["53/tcp=10.0.0.5:53", "53/udp=10.0.0.5:53"])) == 2


_SHAPE = "write PORT/PROTOCOL=ADDRESS:PORT, such as 6379/tcp=10.0.0.5:6379"

BAD_ROUTES = [
    ("", _SHAPE),
    ("6379", _SHAPE),
    ("=10.0.0.5:1", _SHAPE),
    ("6379/tcp=", _SHAPE),
    ("6379/tcp:10.0.0.5:6379", _SHAPE),
    ("-hold", "flags go before the routes; move it to the front"),
    ("0/tcp=10.0.0.5:1", "port 0 is out of range; write 1 to 65535"),
    ("000/tcp=10.0.0.5:1", "port 000 is out of range; write 1 to 65535"),
    ("65536/tcp=10.0.0.5:1", "port 65536 is out of range; write 1 to 65535"),
    ("9" * 5000 + "/tcp=10.0.0.5:1", "is out of range; write 1 to 65535"),
    ("/tcp=10.0.0.5:1", "a port is missing; write a number from 1 to 65535"),
    ("-1/tcp=10.0.0.5:1", "flags go before the routes"),
    ("+1/tcp=10.0.0.5:1", 'port "+1" is not a number; write 1 to 65535 in digits 0-9'),
    (" 1/tcp=10.0.0.5:1", 'port " 1" is not a number'),
    ("1_0/tcp=10.0.0.5:1", 'port "1_0" is not a number'),
    ("redis/tcp=10.0.0.5:1", 'port "redis" is not a number'),
    ("\uff16\uff13\uff17\uff19/tcp=10.0.0.5:1", "is not a number"),
    ("\u0661/tcp=10.0.0.5:1", "is not a number"),
    ("\u00b9/tcp=10.0.0.5:1", "is not a number"),
    ("6379=10.0.0.5:6379", "the protocol is missing; write 6379/tcp or 6379/udp"),
    ("6379/=10.0.0.5:6379", "the protocol is missing; write 6379/tcp or 6379/udp"),
    ("6379/sctp=10.0.0.5:1", 'protocol "sctp" is not supported; write tcp or udp'),
    ("6379/TCP=10.0.0.5:1", 'protocol "TCP" is not supported; write tcp or udp'),
    ("6379/tcp/udp=10.0.0.5:1", 'protocol "tcp/udp" is not supported'),
    ("1/tcp=10.0.0.5:0", "port 0 is out of range"),
    ("1/tcp=10.0.0.5:65536", "port 65536 is out of range"),
    ("1/tcp=10.0.0.5:", "a port is missing"),
    ("1/tcp=10.0.0.5:\uff16", "is not a number"),
    ("1/tcp=10.0.0.5", "the port after the address is missing; write 10.0.0.5:6379"),
    ("1/tcp=[fd00::5]", "the port after the address is missing; write [fd00::5]:6379"),
    ("1/tcp=:6379", "the address is missing"),
    ("1/tcp=redis:6379", '"redis" is not an IP address; write an IP literal such as 10.0.0.5'),
    ("1/tcp=redis", '"redis" is not an IP address'),
    ("1/tcp=10.0.0.256:1", "10.0.0.256 is not a valid IPv4 address"),
    ("1/tcp=010.0.0.5:1", "010.0.0.5 is not a valid IPv4 address"),
    ("1/tcp=10.0.5:1", "10.0.5 is not a valid IPv4 address"),
    ("1/tcp=1\u0661.0.0.5:1", "is not an IP address"),
    ("1/tcp=10.0.0.5%lo:1", "an IPv4 address has no interface; write 10.0.0.5"),
    ("1/tcp=fd00::5:53", "an IPv6 address goes in brackets; write [fd00::5]:53"),
    ("1/tcp=[fd00::5:53", "brackets are for an IPv6 address only"),
    ("1/tcp=[fd00::5]53", "brackets are for an IPv6 address only"),
    ("1/tcp=[10.0.0.5]:53", "brackets are for an IPv6 address only"),
    ("1/tcp=[]:53", "brackets are for an IPv6 address only"),
    ("1/tcp=10.0.0.5]:53", "brackets go around the whole IPv6 address"),
    ("1/tcp=[[fd00::5]]:53", "brackets are for an IPv6 address only"),
    ("1/tcp=[fd00::g]:53", '"fd00::g" is not a valid IPv6 address'),
    ("1/tcp=[fe80::1]:53", "fe80::1 needs its interface; write [fe80::1%eth0]"),
    ("1/tcp=[fe80::1%]:53", 'interface "" does not exist here'),
    ("1/tcp=[fe80::1%nope0]:53", 'interface "nope0" does not exist here; `ip link` lists'),
    ("1/tcp=[fe80::1%\u0661]:53", "does not exist here"),
    ("1/tcp=[fe80::1%a\0b]:53", "does not exist here"),
    ("1/tcp=[fe80::1%0]:53", "interface number 0 is out of range; write its name"),
    ("1/tcp=[fe80::1%4294967296]:53", "interface number 4294967296 is out of range"),
    ("1/tcp=[fe80::1%" + "9" * 5000 + "]:53", "is out of range"),
    ("1/tcp=0.0.0.0:2", "0.0.0.0 is not the address of one machine"),
    ("1/tcp=[::]:2", ":: is not the address of one machine"),
    ("1/udp=224.0.0.1:2", "224.0.0.1 is not the address of one machine"),
    ("1/udp=255.255.255.255:2", "255.255.255.255 is not the address of one machine"),
    ("1/tcp=127.0.0.1:1", "it leads back to this program's own listener"),
    ("1/udp=[::1]:1", "it leads back to this program's own listener"),
    ("1/tcp=[::ffff:127.0.0.1]:1", "it leads back to this program's own listener"),
    ("1/tcp=10.0.0.5:1\nlevel=error", "is not a number"),
]


@pytest.mark.parametrize(("spec", "reason"), BAD_ROUTES)
def test_refused_routes(spec: str, reason: str) -> None:
    line = refused("relay", "2/tcp=10.0.0.9:2", spec)
    assert line.startswith("invalid route ")
    assert reason in line


def test_a_listener_is_given_once() -> None:
    line = refused("relay", "80/tcp=10.0.0.5:80", "80/udp=10.0.0.5:80", "080/tcp=10.0.0.6:80")
    assert line == (
        'invalid route "080/tcp=10.0.0.6:80": 80/tcp is already given; write each listener once'
    )


def test_two_routes_in_a_circle_are_refused() -> None:
    line = refused("relay", "1/tcp=127.0.0.1:2", "2/tcp=127.0.0.1:1")
    assert "leads back to this program's own listener" in line
    assert len(parse_routes(["1/tcp=127.0.0.1:2", "2/udp=127.0.0.1:1"])) == 2


@given(
    st.integers(1, 65535),
    st.sampled_from(Protocol),
    st.ip_addresses(),
    st.integers(1, 65535),
)
def test_any_address_makes_its_route_or_is_refused_for_a_reason(
    port: int, protocol: Protocol, address: object, backend_port: int
) -> None:
    host = f"[{address}]" if ":" in str(address) else str(address)
    try:
        (route,) = parse_routes([f"{port}/{protocol}={host}:{backend_port}"])
    except UsageError as error:
        assert "one machine" in str(error) or "interface" in str(error) or "leads" in str(error)
    else:
        assert route.listener == Listener(port, protocol)
        assert route.backends[0].port == backend_port


@given(st.text(alphabet=st.sampled_from("0123456789/tcpud=.:[]%ae\u0661 -\n"), max_size=30))
def test_any_spec_is_a_route_or_one_line(spec: str) -> None:
    try:
        assert len(parse_routes([spec])) == 1
    except UsageError as error:
        assert str(error).isprintable()


@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_command_line_is_options_or_one_line(arguments: list[str]) -> None:
    try:
        assert parse_options(arguments, {}).command in Command
    except (UsageError, MissingName) as error:
        assert str(error).isprintable()


def test_every_worker_finds_a_seat() -> None:
    """The counters of so many workers are mapped, and no more."""
    assert MAX_WORKERS <= MAX_SLOTS
