"""Runs the tests of the compiled loops under AddressSanitizer and UBSan: `make test-sanitize`.

The loops are built once more in build/sanitize, beside copies of the package and the tests, so that
nothing else uses this build. A report of a sanitizer, in any process, is a file there; a file is a
failure, even if the test passed.

- Workers run without their sandbox: sanitizers map memory and open /proc at any time. The tests of
  the sandbox are skipped, and those of memory, which would measure the sanitizers' own.
- Leaks are not looked for at exit: Python leaves thousands of objects, and a worker leaves by _exit.
  leaks.py looks for them when the loop has just been freed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PLACE = REPO / "build" / "sanitize"
REPORTS = PLACE / "reports"
FLAGS = (
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
)
TESTS = ("tests/loops", "tests/unit/test_control.py")
SHOWN_LINES = 40


def main(arguments: list[str]) -> int:
    copy()
    build()
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir()
    python = [sys.executable, "-m"]
    code = run([*python, "tests.sanitize.leaks"], leaks=True)
    # Without the project's own options: one process, which sanitizers slow down enough.
    options = ("-o", "addopts=", "-p", "no:cacheprovider")
    code |= run([*python, "pytest", *(arguments or TESTS), *options])
    found = sorted(REPORTS.iterdir())
    for report in found:
        print(f"--- {report.relative_to(REPO)}")
        print(*report.read_text(errors="replace").splitlines()[:SHOWN_LINES], sep="\n")
    if found:
        print(f"{len(found)} reports of the sanitizers")
    return 1 if code or found else 0


def copy() -> None:
    """Copy what runs there. Object files stay, so that the next build is short."""
    for name in ("ambassador", "tests"):
        leave = shutil.ignore_patterns("*.so", "*.c", "__pycache__")
        shutil.rmtree(PLACE / name, ignore_errors=True)
        shutil.copytree(REPO / name, PLACE / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(REPO / name, PLACE / name)


def build() -> None:
    print("building the loops with sanitizers", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    env = {**os.environ, "CFLAGS": FLAGS}
    subprocess.run(command, cwd=PLACE, env=env, check=True)


def run(command: list[str], *, leaks: bool = False) -> int:
    log = f"log_path={REPORTS / 'report'}"
    env = {
        **os.environ,
        "LD_PRELOAD": library("libasan.so"),  # Python itself is not built with it
        "ASAN_OPTIONS": f"{log}:detect_leaks={leaks:d}:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": f"{log}:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that Python's objects are guarded as well
        "SANITIZED": "1",
    }
    return subprocess.run(command, cwd=PLACE, env=env, check=False).returncode


def library(name: str) -> str:
    command = [os.environ.get("CC", "gcc"), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"the compiler has no {name}: apt-get install gcc brings it")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
