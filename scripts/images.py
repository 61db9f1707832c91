"""Makes the images of the demo and the tests, on the Engine that engine.py finds or starts.

    python3 scripts/images.py               all of them
    python3 scripts/images.py ambassador    the ambassador's only
    python3 scripts/images.py remove        removes them from an Engine that is not ours

- debian:trixie-slim is pulled. If no registry gives it, debootstrap makes it and `docker import`
  takes it under the same name, so the Dockerfiles need not know.
- grand-ambassador is the product.
- grand-ambassador-demo plays every other part. Its tags :redis, :redis-cli and :dnsmasq differ only
  in what they run (scripts/demo.Dockerfile).

All of it is safe to run twice. The pull is tried once a day: .cache/no-registry remembers that no
registry answered. Builds trust the certificates in certs/; the images do not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import debian
import engine
from debian import REPO, UnavailableError, last_lines, say

CACHE = REPO / ".cache"
BASE = "debian:trixie-slim"
SUITE = "trixie"
AMBASSADOR = "grand-ambassador"
DEMO = "grand-ambassador-demo"
DEMO_TARGETS = {
    DEMO: "parts",
    **{f"{DEMO}:{name}": name for name in ("redis", "redis-cli", "dnsmasq")},
}

NO_REGISTRY = CACHE / "no-registry"
NO_REGISTRY_S = 24 * 3600
PULL_S = 180
ERROR_LINES = 30

# Where this machine keeps the authorities that were added to it, and what names a bundle of them.
LOCAL_AUTHORITIES = Path("/usr/local/share/ca-certificates")
AUTHORITY_VARIABLES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

# How this machine reaches its package registries: given to builds.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
BUILD_VARIABLES = (*PROXIES, *map(str.lower, PROXIES), "PIP_INDEX_URL")

# What debootstrap makes and nothing here reads.
LEFT_OUT = ["dev", "proc", "sys", "tmp", "var/cache/apt", "var/lib/apt/lists", "var/log"]
LEFT_OUT += ["usr/share/info", "usr/share/locale", "usr/share/man"]


class Docker:
    """The docker command, pointed at one Engine."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.environment = {"DOCKER_HOST": host}
        if not debian.find("docker"):
            raise UnavailableError("the docker command is missing: install docker-cli or docker.io")
        if not self.works("buildx", "version"):
            # Without the plug-in the client builds only if it is told to do without.
            self.environment["DOCKER_BUILDKIT"] = "0"

    def run(self, *args: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a docker command to its end; the caller looks at its exit code."""
        return debian.run("docker", *args, env=self.environment, timeout_s=timeout_s)

    def works(self, *args: str) -> bool:
        return self.run(*args).returncode == 0

    def pull(self, image: str) -> bool:
        """Pull an image; return False if no registry gives it."""
        if NO_REGISTRY.exists() and time.time() - NO_REGISTRY.stat().st_mtime < NO_REGISTRY_S:
            return False
        # The Engine asks the registry itself, over the proxy and mirror that it is set up to use:
        # 5 s instead of a pull's minutes. An Engine over TCP is asked by the pull.
        asked = f"/distribution/{image}/json"
        if not self.host.startswith("unix://") or engine.get(self.host, asked) == 200:
            say(f"docker pull {image}")
            try:
                return self.run("pull", "-q", image, timeout_s=PULL_S).returncode == 0
            except subprocess.TimeoutExpired:
                return False
        NO_REGISTRY.touch()
        return False

    def build(self, tag: str, *args: str) -> None:
        """Build an image; raises UnavailableError with the end of the output if that fails."""
        log = CACHE / f"build-{tag.replace(':', '-')}.log"
        variables = [f"--build-arg={name}" for name in BUILD_VARIABLES if os.environ.get(name)]
        command = ("docker", "build", "--network", "host", "-t", tag, *variables, *args)
        if debian.run(*command, env=self.environment, log=log).returncode != 0:
            tail = last_lines(log.read_text(errors="replace"), ERROR_LINES)
            raise UnavailableError(f"{tail}\nbuilding {tag} failed; all of it in {log}")


def make_base(docker: Docker) -> None:
    """Pull or make the base image."""
    if docker.works("image", "inspect", BASE) or docker.pull(BASE):
        return
    if os.geteuid() != 0:
        raise UnavailableError(f"debootstrap needs root: run as root, or `docker pull {BASE}`")
    debian.need({"debootstrap": "debootstrap", "unshare": "util-linux", "tar": "tar"})
    log = CACHE / "debootstrap.log"
    say(f"no registry gives {BASE}; debootstrap makes it, in minutes (log: {log})")
    with tempfile.TemporaryDirectory(prefix="debootstrap-", dir=CACHE) as folder:
        root, archive = f"{folder}/root", f"{folder}/root.tar"
        # In a mount namespace of its own: if it is interrupted, its /proc goes with it, and only
        # the folder is removed.
        command = ("unshare", "--mount", "debootstrap", "--variant=minbase", SUITE, root)
        if debian.run(*command, *_mirror(), env={"LC_ALL": "C"}, log=log).returncode != 0:
            raise UnavailableError(f"debootstrap failed: {last_lines(log.read_text())} ({log})")
        excluded = [f"--exclude=./{name}/*" for name in LEFT_OUT]
        debian.run("tar", "--numeric-owner", "-C", root, *excluded, "-cf", archive, ".")
        imported = docker.run("import", "--change", 'CMD ["bash"]', archive, BASE, timeout_s=300)
        if imported.returncode != 0:
            raise UnavailableError(f"docker import failed: {last_lines(imported.stderr)}")


def _mirror() -> list[str]:
    """Return the mirror that this machine uses, if it is a Debian machine."""
    if not debian.find("apt-get"):
        return []
    fields = ("Created-By: Packages", "Label: Debian", "Component: main")
    return debian.run("apt-get", "indextargets", "--format", "$(REPO_URI)", *fields).stdout.split()[
        :1
    ]


def lay_out_authorities() -> None:
    """Copy the certificate authorities that were added to this machine into certs/."""
    variable = next((name for name in AUTHORITY_VARIABLES if os.environ.get(name)), None)
    if variable is None:
        return
    for source in sorted(LOCAL_AUTHORITIES.glob("*.crt")) or [Path(os.environ[variable])]:
        target = REPO / "certs" / f"host-{source.stem}.crt"
        content = source.read_bytes() if source.is_file() else b""
        if content and not (target.exists() and target.read_bytes() == content):
            say(f"{variable} is set: copying {source} into certs/ for the builds")
            target.write_bytes(content)


def make_ambassador(docker: Docker) -> None:
    lay_out_authorities()
    docker.build(AMBASSADOR, ".")


def make_demo(docker: Docker) -> None:
    for tag, target in DEMO_TARGETS.items():
        docker.build(tag, "--target", target, "-f", "scripts/demo.Dockerfile", "scripts")


def make(docker: Docker, *, demo: bool = True) -> None:
    """Make the images, the base first. Raises UnavailableError."""
    CACHE.mkdir(exist_ok=True)
    make_base(docker)
    builders = {AMBASSADOR: make_ambassador, **({DEMO: make_demo} if demo else {})}
    say(f"building the images: {', '.join(builders)}")
    with ThreadPoolExecutor() as pool:  # a build waits for the network more than it computes
        for future in [pool.submit(builder, docker) for builder in builders.values()]:
            future.result()
    say("the images are ready")


def remove() -> None:
    """Remove the images from an Engine that goes on without us; never start one."""
    host = engine.running_engine()
    if host is not None:
        say(f"removing our images from the Engine at {host}")
        Docker(host).run("image", "rm", AMBASSADOR, *DEMO_TARGETS)


def main(arguments: Sequence[str]) -> int:
    if arguments not in ([], ["ambassador"], ["remove"]):
        print("usage: images.py [ambassador | remove]", file=sys.stderr)
        return 2
    try:
        if arguments == ["remove"]:
            remove()
        else:
            make(Docker(engine.up()), demo=not arguments)
    except (UnavailableError, OSError) as error:
        print(f"images.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
