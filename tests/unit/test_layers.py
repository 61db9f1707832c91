"""The layers import downwards only, and each dependency has one owner (docs/design.md)."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ambassador"

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        "__init__ values backoff _splice _datagram _forkserver _control _sandbox",
        "options counters",
        "model",
        "rules control reconcile datapath snapshot system engine",
        "_worker",  # of the compiled core only this one takes a package: system, for the title
        "discovery supervise kernel admin power",
        "cli",
        "__main__",
    )
)
"""Lowest first: the files in front and the packages. Each imports from the layers below its own only."""

ONLY = {
    "__init__": frozenset[str](),
    "values": frozenset[str](),
    "backoff": frozenset[str](),
    "options": frozenset({"values"}),
    "counters": frozenset({"values"}),
    "model": frozenset({"values", "options"}),
    "reconcile": frozenset({"model", "options", "values"}),
    "datapath": frozenset({"model"}),
}
"""Stricter than the layers, for modules that promise to be usable on their own."""

OWNERS = {
    "docker": {"engine"},
    "requests": {"engine"},
    "urllib3": {"engine"},
    "psutil": {"system"},
    "setproctitle": {"system"},
    "argparse": set[str](),  # its syntax is not Go's: goflags
}

SLIM = ("docker", "psutil", "requests", "logging", "argparse")
"""What the fork server must never load: every worker would carry it."""


def imports(source: str, package: str = "ambassador") -> set[str]:
    """The absolute names that `source` imports, wherever in it; `a.b` for `from a import b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(parents if node.level else []) + ("." if node.level else "")
            base = (base + (node.module or "")).strip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def siblings(source: str, package: str = "ambassador") -> set[str]:
    """The package's own modules that `source` imports; `__init__` for the package's own names."""
    found = set()
    for name in imports(source, package):
        head, _, rest = name.partition(".")
        if head == "ambassador":
            module = rest.partition(".")[0]
            found.add(module if module in MODULES else "__init__")
    return found


def _modules() -> dict[str, dict[str, str]]:
    """Source by file, by module; a subpackage such as admin/ counts as one module."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        module = relative.parts[0].removesuffix(".py")
        found.setdefault(module, {})[str(relative)] = path.read_text()
    for path in sorted(PACKAGE.glob("*.pyx")):
        found.setdefault(path.stem, {})[path.name] = _runtime_imports(path)
    return found


def _runtime_imports(path: Path) -> str:
    """Those of a compiled module, as Python: a cimport is settled by the compiler."""
    found = re.findall(r"^[ \t]*((?:import|from \S+ import) .*)$", path.read_text(), re.MULTILINE)
    return "\n".join(found)


MODULES = _modules()


def _rank(module: str) -> int:
    for rank, layer in enumerate(LAYERS):
        if module in layer:
            return rank
    pytest.fail(f"ambassador/{module} has no layer: give it one in {Path(__file__).name}")


def _package_of(file: str) -> str:
    return ".".join(("ambassador", *Path(file).parts[:-1]))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    for file, source in MODULES[module].items():
        for other in siblings(source, _package_of(file)) - {module}:
            assert _rank(other) < _rank(module), f"{file} imports {other}, which is not below it"


@pytest.mark.parametrize("module", sorted(ONLY))
def test_the_lowest_modules_stand_alone(module: str) -> None:
    for file, source in MODULES.get(module, {}).items():
        extra = siblings(source, _package_of(file)) - ONLY[module]
        assert not extra, f"{file} may import only {sorted(ONLY[module])}, not {sorted(extra)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_dependency_has_one_owner(module: str) -> None:
    for file, source in MODULES[module].items():
        for dependency in {name.partition(".")[0] for name in imports(source)} & OWNERS.keys():
            assert module in OWNERS[dependency], f"{file} imports {dependency}"


def test_this_test_sees_every_form_of_import() -> None:
    source = """
import ambassador.cli.main
from ambassador import __version__
from ambassador.supervise import worker
from ambassador.control import pack
from . import model
from .supervise.sockets import bind
if True:
    def inner():
        import docker.errors as errors
"""
    assert siblings(source) >= {"control", "model"}
    assert {name.partition(".")[0] for name in imports(source)} == {"ambassador", "docker"}
    assert imports(source) == {
        "ambassador.cli.main",
        "ambassador.supervise.worker",
        "ambassador.__version__",
        "ambassador.control.pack",
        "ambassador.model",
        "ambassador.supervise.sockets.bind",
        "docker.errors",
    }
    assert imports("from ..model import Route\nfrom .page import x", "ambassador.admin") == {
        "ambassador.model.Route",
        "ambassador.admin.page.x",
    }


def _loaded_by(module: str, before: str = "") -> set[str]:
    """Every module in memory once `module` has imported all that it needs."""
    for loop in ("_splice", "_datagram"):
        if importlib.util.find_spec(f"ambassador.{loop}") is None:
            pytest.fail(f"ambassador.{loop} is not compiled: make build first")
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\nimport {module}, sys\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


# What is in memory when the fork server is forked: the command line has been read by then.
AT_THE_FORK = ("ambassador.supervise.forkserver", "ambassador.cli.arguments", "ambassador.cli.main")


@pytest.mark.parametrize("module", AT_THE_FORK)
def test_the_fork_server_is_forked_slim(module: str) -> None:
    loaded = _loaded_by(module)
    assert module in loaded
    # setproctitle imports logging for one line of its own (0.3 MB, once, shared): see below.
    assert not (set(SLIM) - {"logging"}) & loaded


@pytest.mark.parametrize("module", AT_THE_FORK)
def test_nothing_of_ours_brings_logging_to_the_fork_server(module: str) -> None:
    """As above, with setproctitle, which imports logging itself, replaced by a stand-in."""
    stand_in = (
        "import sys, types\n"
        "sys.modules['setproctitle'] = types.ModuleType('setproctitle')\n"
        "sys.modules['setproctitle'].setproctitle = print"
    )
    assert not set(SLIM) & _loaded_by(module, stand_in)
