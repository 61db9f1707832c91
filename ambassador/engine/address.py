"""Which Docker Engine to ask, and how to reach it: -sock, DOCKER_HOST and the TLS files.

Everything raises ValueError, one line that says what to do. Only `readable_files` reads files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ambassador.options import ProgramOptions
from ambassador.values import escape, parse_ip, parse_port, quote, split_address

_DEFAULT_PORTS = {"tcp": 2375, "http": 2375, "https": 2376}
"""The schemes of an Engine that is reached over TCP; tcp is 2376 under TLS."""

_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """How to reach an Engine over TLS: paths of PEM files, "" if not to be used.

    `client_required`: the user named the client's certificate or key, so they must exist.
    """

    verify: bool
    ca: str
    cert: str
    key: str
    client_required: bool = False


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """`url` is `unix:///path` or `tcp://host:port[/path]`; `warning` is a line for the log, or ""."""

    url: str = ""
    tls: TlsFiles | None = None
    warning: str = ""


def engine_address(
    options: ProgramOptions, sources: Mapping[str, str], environment: Mapping[str, str]
) -> EngineAddress:
    """The Engine's address from the options and Docker's own variables.

    `sources` says where each option that was given was given: `{"sock": "flag -sock"}`.
    """
    text, source = options.sock, sources.get("sock", "flag -sock")
    host = environment.get("DOCKER_HOST")
    if host and "sock" not in sources:
        # As in Docker's own command line, an address without a scheme is tcp; but a path is a path.
        bare = "://" not in host and not host.startswith(("/", "."))
        text, source = f"tcp://{host}" if bare else host, "DOCKER_HOST"
    scheme = text.partition("://")[0]
    tls = _tls(options, sources, environment, scheme)
    try:
        url = _parse(text, tls is not None)
    except (ValueError, OSError) as error:  # OSError: there is no working directory
        raise ValueError(f"invalid value {quote(text)} for {source}: {error}") from None
    if scheme == "http" and tls is not None:
        warning = "TLS is not used with http://: write -sock tcp:// or https:// to use it"
        return EngineAddress(url, None, warning)
    return EngineAddress(url, tls if url.startswith("tcp:") else None)


def _parse(text: str, tls: bool) -> str:
    scheme, separator, rest = text.partition("://")
    if not separator:
        if re.fullmatch(r"[^/]*:[0-9]+", text):
            raise ValueError(f"an address needs a scheme; write tcp://{escape(text)}")
        scheme, rest = "unix", text
    if scheme == "unix":
        return f"unix://{Path(rest or ProgramOptions().sock).absolute()}"
    if scheme not in _DEFAULT_PORTS:
        raise ValueError(
            f"{quote(scheme)} is not supported; write a path, unix://, tcp://, http:// or https://"
        )
    address, _, path = rest.partition("/")
    if re.search(r"[@?#\s]", rest) or not rest.isprintable():
        raise ValueError(f"only a host, a port and a path may follow; write {scheme}://host:port")
    host, port_text = split_address(address)
    if not host:
        host = "localhost"
    elif ":" in host:
        host = f"[{parse_ip(host)}]"
    elif not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{quote(host)} is no host name; write {scheme}://host:port")
    default = 2376 if tls and scheme == "tcp" else _DEFAULT_PORTS[scheme]
    port = default if port_text is None else parse_port(port_text)
    return f"tcp://{host}:{port}" + (f"/{path}" if path.strip("/") else "")


def _tls(
    options: ProgramOptions,
    sources: Mapping[str, str],
    environment: Mapping[str, str],
    scheme: str,
) -> TlsFiles | None:
    """-tlsverify implies -tls; https:// implies both, unless -tls alone says not to verify."""
    wanted = bool(environment.get("DOCKER_TLS_VERIFY"))
    if "tlsverify" in sources:
        verify = options.tlsverify
    elif scheme == "https":
        verify = wanted or not options.tls
    else:
        verify = wanted and (options.tls or "tls" not in sources)
    if not (verify or options.tls or scheme == "https"):
        return None
    directory = Path(
        environment.get("DOCKER_CERT_PATH") or Path(environment.get("HOME") or "/") / ".docker"
    )
    return TlsFiles(
        verify,
        ca=options.tlscacert or str(directory / "ca.pem"),
        cert=options.tlscert or str(directory / "cert.pem"),
        key=options.tlskey or str(directory / "key.pem"),
        client_required=bool(options.tlscert or options.tlskey),
    )


def readable_files(tls: TlsFiles) -> TlsFiles:
    """`tls` with only those files that are to be used, each of them readable.

    As in the original, the authority's is needed only to verify, and a client that has neither a
    certificate nor a key goes without. One of the two alone is a mistake.
    """
    if tls.verify:
        _check_file(tls.ca, "tlscacert")
    else:
        tls = replace(tls, ca="")
    if not (tls.client_required or Path(tls.cert).exists() or Path(tls.key).exists()):
        return replace(tls, cert="", key="")
    _check_file(tls.cert, "tlscert")
    _check_file(tls.key, "tlskey")
    return tls


def _check_file(path: str, flag: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ValueError(
            f"Error setting up TLS: cannot read {quote(path)} ({error.strerror}): "
            f"mount the file or name another with -{flag}"
        ) from None
