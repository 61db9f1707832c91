"""Describes the compiled relay loops; everything else about the package is in pyproject.toml."""

import platform

from Cython.Build import cythonize
from setuptools import Extension, setup

# The loops are plain C in all but syntax and spend their time in the kernel: -O2 is enough. -Wall and
# -Wextra must stay silent; `make lint` builds with -Werror.
CFLAGS = [
    "-O2",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Werror=implicit-function-declaration",
    "-D_GNU_SOURCE",
]

# What Debian's own programs have (dpkg-buildflags, hardening=+all). The loops parse strangers' bytes.
CFLAGS += [
    "-fstack-protector-strong",
    "-fstack-clash-protection",
    "-U_FORTIFY_SOURCE",  # some Pythons ask for another level
    "-D_FORTIFY_SOURCE=3",
]
CFLAGS += {
    "x86_64": ["-fcf-protection"],
    "aarch64": ["-mbranch-protection=standard"],
}.get(platform.machine(), [])
LDFLAGS = ["-Wl,-z,relro,-z,now,-z,noexecstack"]


def loop(name: str) -> Extension:
    return Extension(
        f"ambassador.{name}",
        [f"ambassador/{name}.pyx"],
        extra_compile_args=CFLAGS,
        extra_link_args=LDFLAGS,
    )


setup(
    ext_modules=cythonize(
        [
            loop(name)
            for name in ("_splice", "_datagram", "_forkserver", "_control", "_sandbox", "_worker")
        ],
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    ),
)
