"""Which Engine is asked: the addresses, Docker's own variables and the TLS files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ambassador.cli.arguments import (
    Arguments,
    ConfigError,
    UsageError,
    check_tls_files,
)
from ambassador.cli.follow import follow_usage
from ambassador.cli.main import parse_arguments
from ambassador.engine.address import EngineAddress, TlsFiles

HOME = {"HOME": "/home/me"}


def read(*arguments: str, **environment: str) -> Arguments:
    return parse_arguments(["-name", "redis", *arguments], environment)


def engine(*arguments: str, **environment: str) -> EngineAddress:
    return read(*arguments, **environment).engine


def refused(*arguments: str, **environment: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read(*arguments, **environment)
    assert str(caught.value).isprintable(), "not one clean line"
    return caught.value


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
    assert engine("-sock", written).url == host
    if "://" in written or written.startswith(("/", ".")):
        assert engine(DOCKER_HOST=written).url == host


def test_docker_host_without_a_scheme_is_tcp_as_in_dockers_own_command_line() -> None:
    assert engine(DOCKER_HOST="engine:99").url == "tcp://engine:99"
    assert engine(DOCKER_HOST="engine").url == "tcp://engine:2375"


def test_an_empty_docker_host_is_none() -> None:
    assert engine(DOCKER_HOST="").url == "unix:///var/run/docker.sock"


def test_the_flag_beats_the_environment_even_a_bad_one() -> None:
    assert engine("-sock", "/x", DOCKER_HOST="ssh://h").url == "unix:///x"


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
    error = refused("-sock", written)
    assert "for flag -sock: " in str(error)
    assert reason in str(error)
    assert error.usage == follow_usage()
    variables = ["AMBASSADOR_SOCK"] + ["DOCKER_HOST"] * ("://" in written)
    for variable in variables:
        error = refused(**{variable: written})
        assert f"for {variable}: " in str(error)
        assert reason in str(error)
        assert str(error).endswith("; see grand-ambassador -help")
        assert error.usage == ""


def test_the_flag_beats_the_variable_and_the_variable_beats_docker_host() -> None:
    environment = {"AMBASSADOR_SOCK": "unix:///a", "DOCKER_HOST": "unix:///d"}
    assert engine("-sock", "/f", **environment).url == "unix:///f"
    assert engine(**environment).url == "unix:///a"
    assert engine(**environment | {"AMBASSADOR_SOCK": ""}).url == "unix:///d"
    assert engine(AMBASSADOR_SOCK="docker.sock").url == f"unix://{Path.cwd()}/docker.sock"


# --- TLS ---------------------------------------------------------------------------------------

VERIFIED = TlsFiles(
    True, "/home/me/.docker/ca.pem", "/home/me/.docker/cert.pem", "/home/me/.docker/key.pem"
)
UNVERIFIED = TlsFiles(
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
def test_when_tls_is_used(
    flags: list[str], verify_variable: str, expected: TlsFiles | None
) -> None:
    environment = {**HOME, "DOCKER_TLS_VERIFY": verify_variable}
    options = read("-sock", "tcp://h", *flags, **environment)
    assert options.engine.tls == expected
    assert options.engine.url == ("tcp://h:2376" if expected else "tcp://h:2375")
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
def test_https_is_tls_and_verified_unless_told_otherwise(
    flags: list[str], expected: TlsFiles
) -> None:
    assert engine("-sock", "https://h", *flags, **HOME).tls == expected


def test_a_variable_stands_for_its_flag() -> None:
    environment = {**HOME, "AMBASSADOR_SOCK": "tcp://h", "DOCKER_TLS_VERIFY": "1"}
    assert engine(**environment).tls == VERIFIED
    assert engine(**environment, AMBASSADOR_TLS="true").tls == VERIFIED
    assert engine(**environment, AMBASSADOR_TLS="false").tls is None
    assert engine(**environment, AMBASSADOR_TLSVERIFY="false").tls is None
    assert engine("-tlsverify", **environment, AMBASSADOR_TLSVERIFY="false").tls == VERIFIED
    tls = engine(**environment, AMBASSADOR_TLSCERT="/c", AMBASSADOR_TLSCACERT="/a").tls
    assert tls == TlsFiles(True, "/a", "/c", "/home/me/.docker/key.pem", client_required=True)


def test_tls_is_not_for_a_unix_socket_nor_for_http() -> None:
    options = read("-tlsverify", **HOME)
    assert (options.engine.tls, options.warnings) == (None, ())
    options = read("-tlsverify", "-sock", "http://h", **HOME)
    assert options.engine.tls is None
    assert options.warnings == (
        "TLS is not used with http://: write -sock tcp:// or https:// to use it",
    )


def test_where_the_files_are() -> None:
    tls = engine("-tls", "-sock", "tcp://h", DOCKER_CERT_PATH="/certs", HOME="/home/me").tls
    assert tls == TlsFiles(False, "/certs/ca.pem", "/certs/cert.pem", "/certs/key.pem")
    tls = engine("-tls", "-sock", "tcp://h", "-tlscacert", "/mine", DOCKER_CERT_PATH="/certs").tls
    assert tls == TlsFiles(False, "/mine", "/certs/cert.pem", "/certs/key.pem")
    tls = engine("-tls", "-sock", "tcp://h").tls
    assert tls is not None
    assert tls.ca == "/.docker/ca.pem"


def _with_files(directory: Path, *names: str, flags: tuple[str, ...] = ()) -> Arguments:
    for name in names:
        (directory / name).write_text("")
    return read("-sock", "tcp://h", *flags, DOCKER_CERT_PATH=str(directory))


def test_all_tls_files_there(tmp_path: Path) -> None:
    options = _with_files(tmp_path, "ca.pem", "cert.pem", "key.pem", flags=("-tlsverify",))
    assert check_tls_files(options) == options


def test_a_client_without_a_certificate_goes_without(tmp_path: Path) -> None:
    tls = check_tls_files(_with_files(tmp_path, "ca.pem", flags=("-tlsverify",))).engine.tls
    assert tls == TlsFiles(True, str(tmp_path / "ca.pem"), "", "")


def test_the_authority_is_needed_only_to_verify(tmp_path: Path) -> None:
    assert check_tls_files(_with_files(tmp_path, flags=("-tls",))).engine.tls == TlsFiles(
        False, "", "", ""
    )


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
