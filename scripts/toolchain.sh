#!/bin/sh
# Makes sure of Python >= 3.11 and, with the word "compiler", of what builds the relay loops: venv,
# pip, the Python headers and gcc. As root on Debian what is missing is installed; elsewhere one line
# says what to install. In shell, because there may be no Python to run.
#
#   scripts/toolchain.sh python3 [compiler]
set -eu

python=$1
compiler=${2:-}

missing() {
    packages=
    if ! command -v "$python" > /dev/null; then
        packages=python3
        [ -z "$compiler" ] || packages="python3 python3-venv python3-dev"
    elif [ -n "$compiler" ]; then
        "$python" -c 'import ensurepip, venv' 2> /dev/null || packages=python3-venv
        header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
        [ -f "$header" ] || packages="$packages python3-dev"
    fi
    if [ -n "$compiler" ] && ! { command -v gcc > /dev/null && [ -f /usr/include/stdio.h ]; }; then
        packages="$packages gcc libc6-dev"
    fi
    echo "$packages"
}

packages=$(missing)
if [ -n "$packages" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "apt-get install $packages" >&2
        apt-get -q update > /dev/null || true
        # The list is split into words on purpose.
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $packages > /dev/null
        packages=$(missing)
    fi
    if [ -n "$packages" ]; then
        echo "$python needs what these Debian packages hold: $packages" >&2
        exit 2
    fi
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$("$python" --version) is too old: 3.11 or newer is needed (make PYTHON=/path/to/python3)" >&2
    exit 2
fi
