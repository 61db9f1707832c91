"""What is not ok on which engine, and why. Who mends a finding removes its row."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import NamedTuple

OK, NOT_AVAILABLE, FAILED = "ok", "n/a", "FAIL"


class Expected(NamedTuple):
    """`scenario` and `engines` may have wildcards; `finding` is the number of a fault of ours."""

    scenario: str
    engines: str
    reason: str
    finding: str = ""

    @property
    def word(self) -> str:
        return FAILED if self.finding else NOT_AVAILABLE


EXPECTED = (
    Expected("readme_link", "podman*", "Podman has no --link"),
    Expected("readme_podman", "docker*", "it is about Podman's client"),
    Expected("compose", "docker20*", "Debian 12 has no docker compose"),
    Expected("pause", "*-rootless", "pause needs a delegated cgroup"),
    Expected("process_titles", "docker*-rootless", "docker top needs a delegated cgroup"),
    Expected("ipv6_only", "docker20* docker26* podman*", "networks without IPv4 are Docker 28's"),
    Expected(
        "host_network_ambassador_isolated",
        "docker20* docker26* podman5 podman58 podman6",
        "networks without the host are Docker 28's",
    ),
    Expected(
        "host_network_target",
        "podman*-rootless",
        "no container reaches the host network of rootless Podman",
    ),
    # Faults
    Expected(
        "host_network_ambassador*",
        "podman*-rootless",
        "nothing says that the addresses of a rootless engine mean nothing on the host's network",
        "ENG1",
    ),
    Expected(
        "other_user_group_of_the_host",
        "*-rootless",
        "the group that the host sees is not the one that a container sees",
        "ENG3",
    ),
    Expected("removed_at_its_end", "podman*", "a false warning when a target is removed", "ENG6"),
    Expected(
        "host_network_ambassador_isolated",
        "docker28*",
        "nothing says that the host has no address in the target's network",
        "ENG7",
    ),
)


def chosen(name: str, patterns: str) -> bool:
    """Whether one of the patterns, between spaces, fits."""
    return any(fnmatch(name, pattern) for pattern in patterns.split())


def expected(scenario: str, engine: str) -> Expected | None:
    """The row for a scenario on an engine, or None if it should be ok."""
    for row in EXPECTED:
        if fnmatch(scenario, row.scenario) and chosen(engine, row.engines):
            return row
    return None
