"""Asks a vulnerability database about the packages that the image is built from, and lists them.

    python scripts/audit.py          the check, and build/sbom.cdx.json (CycloneDX)
    python scripts/audit.py tools    what it needs installed (the `audit` extra of pyproject.toml)

The packages are those of requirements/*.txt, which `make lock` writes and the Dockerfile installs.

Exit code: 0 where every package was looked up and none is known to be vulnerable, 1 where one is, 3
where the database could not be asked about each of them. Silence of the database is never a pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
LOCKS = (REPO / "requirements" / "run.txt", REPO / "requirements" / "build.txt")
SBOM = REPO / "build" / "sbom.cdx.json"
TOOLS = Path(sys.executable).parent
LIMIT_S = 300

VULNERABLE = 1
NOT_CHECKED = 3


def verdict(answer: str, names: Sequence[str]) -> tuple[int, list[str]]:
    """The exit code and the lines for pip-audit's JSON answer about the packages `names`."""
    try:
        entries: list[dict[str, Any]] = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return NOT_CHECKED, ["NOT CHECKED: the vulnerability database gave no answer"]
    known = {entry["name"]: entry for entry in entries if "vulns" in entry}
    lines = [
        f"{name} {known[name]['version']}: {found['id']}, fixed in {found['fix_versions'] or 'none'}"
        for name in names
        if name in known
        for found in known[name]["vulns"]
    ]
    code = VULNERABLE if lines else 0
    missing = [name for name in names if name not in known]
    if missing:
        lines.append(f"NOT CHECKED: {', '.join(missing)}")
        code = code or NOT_CHECKED
    return code, lines or [f"no known vulnerability in {len(names)} packages"]


def locked(path: Path) -> list[str]:
    """The names of the packages in a lock file."""
    lines = path.read_text().splitlines()
    return [line.split("==")[0] for line in lines if "==" in line and line[0].isalnum()]


def check() -> int:
    """Print what is known of the locked packages; the exit code."""
    names = sorted({name for path in LOCKS for name in locked(path)})
    files = [word for path in LOCKS for word in ("-r", str(path))]
    command = [str(TOOLS / "pip-audit"), "--disable-pip", "--require-hashes", "-f", "json", *files]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
        answer, reason = done.stdout, done.stderr.strip().splitlines()[-1:]
    except subprocess.TimeoutExpired:
        answer, reason = "", [f"no answer within {LIMIT_S} s"]
    code, lines = verdict(answer, names)
    print(*lines, *(reason if not answer else ()), sep="\n")
    return code


def list_packages() -> None:
    """Write the image's Python packages, with their hashes, as a CycloneDX document."""
    SBOM.parent.mkdir(exist_ok=True)
    subprocess.run(
        [
            str(TOOLS / "cyclonedx-py"), "requirements", str(LOCKS[0]), "--pyproject",
            str(REPO / "pyproject.toml"), "--output-reproducible", "--of", "JSON", "-o", str(SBOM),
        ],
        check=True,
        stderr=subprocess.DEVNULL,  # a warning that the list has no graph; a lock file has none
    )  # fmt: skip
    print(f"wrote {SBOM.relative_to(REPO)}")


def main(arguments: Sequence[str]) -> int:
    if arguments == ["tools"]:
        project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
        print(*project["optional-dependencies"]["audit"])
        return 0
    list_packages()
    return check()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
