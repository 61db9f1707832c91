"""Gets the images of the demo and the tests: the base, the ambassador, and what it is shown with.

    python3 scripts/images.py [base] [ambassador] [demo]     all of them when none is named
    python3 scripts/images.py remove                         what an Engine that is not ours has

The Engine is the one that engine.py finds or starts. Standard library only.

- `debian:trixie-slim` is pulled; where no registry answers it is made by debootstrap and
  `docker import`, under the same name, so that the Dockerfile needs not know.
- `grand-ambassador` is the product, built from the Dockerfile.
- `grand-ambassador-demo` plays every other part, for the demo and the tests alike. One image holds
  redis-server, redis-cli, dnsmasq, python3, ip, ss and socat; its tags `:redis`, `:redis-cli` and
  `:dnsmasq` differ only in what they run (scripts/demo.Dockerfile).

Invariants:

- Safe to run twice: what is there is not made again, and a build with unchanged input takes a
  second.
- A registry that does not answer costs a few seconds once, not at each run: the answer is
  remembered in .cache/ for a day. `docker pull debian:trixie-slim` by hand has the last word.
- The image does not trust an extra certificate authority: certs/ is used while building only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import debian
import engine
from debian import UnavailableError, say

REPO = engine.REPO
CACHE = REPO / ".cache"
CERTS = REPO / "certs"

BASE = "debian:trixie-slim"
SUITE = "trixie"
AMBASSADOR = "grand-ambassador"
DEMO = "grand-ambassador-demo"
DEMO_TAGS = ("latest", "redis", "redis-cli", "dnsmasq")

NO_REGISTRY = CACHE / "no-registry"
NO_REGISTRY_SECONDS = 24 * 3600
REGISTRY_SECONDS = 5
PULL_SECONDS = 180
ERROR_LINES = 30

# Where a machine keeps the authorities that its administrator added, and the variables by which
# programs are told of a bundle with such.
LOCAL_AUTHORITIES = Path("/usr/local/share/ca-certificates")
AUTHORITY_VARIABLES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

# Passed on to builds where they are set here: how this machine reaches its package registries.
BUILD_VARIABLES = (
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "PIP_INDEX_URL",
)

# What the official slim image leaves out too: a third of a fresh system, and nothing reads it.
SLIM = """\
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/groff/*
path-exclude /usr/share/info/*
path-exclude /usr/share/lintian/*
path-exclude /usr/share/locale/*
path-exclude /usr/share/man/*
"""
SLIM_FOLDERS = ("groff", "info", "lintian", "locale", "man")


class Docker:
    """The docker command, pointed at one Engine."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.program = debian.find("docker")
        if self.program is None:
            raise UnavailableError("the docker command is missing: install docker-cli or docker.io")
        self.environment = {**os.environ, "DOCKER_HOST": host}
        if self._run("buildx", "version").returncode != 0:
            # Without the plug-in the client refuses to build at all unless told to do without.
            self.environment["DOCKER_BUILDKIT"] = "0"

    def has(self, image: str) -> bool:
        return self._run("image", "inspect", image).returncode == 0

    def remove(self, image: str) -> None:
        self._run("image", "rm", image)

    def pull(self, image: str) -> bool:
        """Pull an image; False where no registry gives it."""
        if not self._registry_answers(image):
            return False
        say(f"docker pull {image}")
        try:
            return self._run("pull", "-q", image, limit=PULL_SECONDS).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def build(self, tag: str, *args: str) -> None:
        """docker build; raises UnavailableError with the end of its output where that fails."""
        log = CACHE / f"build-{tag.replace(':', '-')}.log"
        variables = [f"--build-arg={name}" for name in BUILD_VARIABLES if os.environ.get(name)]
        command = [str(self.program), "build", "--network", "host", "-t", tag, *variables, *args]
        with log.open("wb") as output:
            done = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=REPO,
            )
        if done.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-ERROR_LINES:])
            raise UnavailableError(f"{tail}\nbuilding {tag} failed; all of it in {log}")

    def import_folder(self, root: Path, tag: str) -> None:
        """Make an image of a folder."""
        excluded = [f"--exclude=./{name}/*" for name in ("dev", "proc", "sys", "tmp")]
        with subprocess.Popen(
            ["tar", "--numeric-owner", "-C", str(root), *excluded, "-c", "."],
            stdout=subprocess.PIPE,
        ) as tar:
            done = subprocess.run(
                [str(self.program), "import", "--change", 'CMD ["bash"]', "-", tag],
                check=False,
                stdin=tar.stdout,
                capture_output=True,
                text=True,
                env=self.environment,
            )
        if tar.returncode != 0 or done.returncode != 0:
            raise UnavailableError(f"docker import {tag} failed: {done.stderr.strip()}")

    def _registry_answers(self, image: str) -> bool:
        with contextlib.suppress(OSError):
            if time.time() - NO_REGISTRY.stat().st_mtime < NO_REGISTRY_SECONDS:
                return False
        if not self.host.startswith("unix://"):
            return True  # only the client can ask, and its pull has a limit
        # The Engine asks the registry itself, with whatever proxy and mirror it is set up to use.
        target = f"/distribution/{image}/json"
        try:
            status, _ = engine.request(
                self.host.removeprefix("unix://"), target, limit=REGISTRY_SECONDS
            )
        except OSError:
            status = 0
        if status == 200:
            return True
        NO_REGISTRY.touch()
        return False

    def _run(self, *args: str, limit: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.program), *args],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit,
            env=self.environment,
        )


def base(docker: Docker) -> None:
    """The base image, pulled or made."""
    if docker.has(BASE) or docker.pull(BASE):
        return
    say(f"no registry gives {BASE}: making it with debootstrap")
    if os.geteuid() != 0:
        raise UnavailableError(f"debootstrap needs root: run as root, or `docker pull {BASE}`")
    debian.need({"debootstrap": "debootstrap", "unshare": "util-linux", "tar": "tar"})
    with tempfile.TemporaryDirectory(prefix="debootstrap-", dir=CACHE) as folder:
        root = Path(folder) / "root"
        _debootstrap(root)
        _slim_down(root)
        say(f"docker import {BASE}")
        docker.import_folder(root, BASE)


def _debootstrap(root: Path) -> None:
    log = CACHE / "debootstrap.log"
    # In a mount namespace of its own: where it is interrupted, the /proc that it mounts goes with
    # it, and removing the folder removes only the folder.
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase", SUITE, str(root)]
    command += _mirror()
    steps = {"Retrieving": 0, "Unpacking": 0, "Configuring": 0}
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "LC_ALL": "C"},
        ) as process,
    ):
        assert process.stdout is not None  # noqa: S101  (PIPE was asked for; this tells mypy)
        for line in process.stdout:
            output.write(line)
            step = line.removeprefix("I: ").split(" ", 1)[0]
            if step in steps:
                steps[step] += 1
                if steps[step] in (1, 50):
                    say(f"debootstrap: {step.lower()} packages ({steps[step]})")
    if process.returncode != 0:
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        raise UnavailableError(f"debootstrap failed: {last} (more in {log})")


def _mirror() -> list[str]:
    """The Debian mirror that this machine uses; debootstrap knows one for where there is none."""
    done = subprocess.run(
        [
            debian.find("apt-get") or "apt-get",
            "indextargets",
            "--format",
            "$(ORIGIN) $(COMPONENT) $(CODENAME) $(REPO_URI)",
            "Created-By: Packages",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) == 4 and words[:2] == ["Debian", "main"] and "-" not in words[2]:
            return [words[3]]
    return []


def _slim_down(root: Path) -> None:
    (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(SLIM)
    for name in SLIM_FOLDERS:
        folder = root / "usr/share" / name
        if folder.is_dir():
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for document in (root / "usr/share/doc").rglob("*"):
        if document.name != "copyright" and not document.is_dir():
            document.unlink()
    for kept in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
        for entry in (root / kept).rglob("*"):
            if not entry.is_dir():
                entry.unlink()


def _lay_out_authorities() -> None:
    """Copy the certificate authorities that this machine added into certs/, for the builds."""
    variable = next((name for name in AUTHORITY_VARIABLES if os.environ.get(name)), None)
    if variable is None:
        return
    for source in sorted(LOCAL_AUTHORITIES.glob("*.crt")) or [Path(os.environ[variable])]:
        target = CERTS / f"host-{source.stem}.crt"
        if source.is_file() and not _same(source, target):
            say(f"{variable} is set: copying {source} into certs/ for the builds")
            shutil.copyfile(source, target)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def ambassador(docker: Docker) -> None:
    """The product's own image."""
    _lay_out_authorities()
    _timed(f"image {AMBASSADOR}", lambda: docker.build(AMBASSADOR, "."))


def demo(docker: Docker) -> None:
    """The image of everything that the ambassador is shown and tested with, under all its tags."""

    def build() -> None:
        for tag in DEMO_TAGS:
            target = "parts" if tag == "latest" else tag
            docker.build(
                f"{DEMO}:{tag}", "--target", target, "-f", "scripts/demo.Dockerfile", "scripts"
            )

    _timed(f"image {DEMO}", build)


def _timed(what: str, work: Callable[[], None]) -> None:
    say(f"{what}: building")
    begin = time.monotonic()
    work()
    say(f"{what}: ready after {time.monotonic() - begin:.1f} s")


def make(docker: Docker, names: Sequence[str]) -> None:
    """Make the named images, the base before what stands on it."""
    CACHE.mkdir(exist_ok=True)
    base(docker)
    builders = {"ambassador": ambassador, "demo": demo}
    wanted = [builder for name, builder in builders.items() if name in names]
    with ThreadPoolExecutor() as pool:  # each waits for the network more than for the processor
        for future in [pool.submit(builder, docker) for builder in wanted]:
            future.result()


def remove() -> None:
    """Remove our images from an Engine that goes on without us; never starts one."""
    host = engine.running_engine()
    if host is None:
        return
    say(f"removing our images from the Engine at {host}")
    docker = Docker(host)
    for image in (AMBASSADOR, *(f"{DEMO}:{tag}" for tag in DEMO_TAGS)):
        docker.remove(image)


def main(argv: Sequence[str]) -> int:
    known = ("base", "ambassador", "demo")
    names = tuple(argv) or known
    if names != ("remove",) and not set(names) <= set(known):
        print("usage: images.py [base] [ambassador] [demo] | remove", file=sys.stderr)
        return 2
    try:
        if names == ("remove",):
            remove()
        else:
            make(Docker(engine.up()), names)
    except (UnavailableError, OSError) as error:
        print(f"images.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
