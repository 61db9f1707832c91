"""What the operating system says of interfaces."""

from __future__ import annotations

import ipaddress

from ambassador.system.processes import own_addresses


def test_own_addresses_are_literals_in_their_shortest_form() -> None:
    found = own_addresses()
    assert "127.0.0.1" in found
    assert all(str(ipaddress.ip_address(each)) == each and "%" not in each for each in found)
