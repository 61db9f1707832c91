"""The counter table: what a worker counts in its page, declared once.

`_tcp.pxd` and `_udp.pxd` have the same names in the same order, as words of the page (a test compares).
The log lines of losses, the totals over worker deaths and later the metrics are made from these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ambassador.values import Protocol


@dataclass(frozen=True, slots=True)
class Counter:
    """One word of a worker's page.

    A gauge says what is so now and ends with its worker; all others only rise. `unit` is "" or "bytes".
    `loss` is the log line for a rise, "" if nobody need hear of it. A part of another counter has a line of
    its own: the other's line leaves it out.
    """

    name: str
    help: str
    gauge: bool = False
    unit: str = ""
    loss: str = ""
    part_of: str = ""


TCP = (
    Counter("accepted", "connections accepted"),
    Counter("active", "connections that have not ended", gauge=True),
    Counter("closed", "connections that ended cleanly"),
    Counter("reset", "connections that ended in a reset"),
    Counter(
        "rejected",
        "connections that never got a backend, reset",
        loss="connections rejected, no backend within -hold",
    ),
    Counter("held", "connections that wait for a backend", gauge=True),
    Counter("held_total", "connections that had to wait for a backend"),
    Counter("dial_failed", "attempts to connect to a backend that failed"),
    Counter(
        "rejected_refused",
        "rejected connections that the backend refused",
        loss="connections rejected, backend refused: does it listen on 0.0.0.0?",
        part_of="rejected",
    ),
    Counter(
        "rejected_unanswered",
        "rejected connections that the backend did not answer",
        loss="connections rejected, backend does not answer: look for a firewall or icc=false",
        part_of="rejected",
    ),
    Counter(
        "no_local_port",
        "connections reset for want of a local port",
        loss="connections reset, no local port free",
    ),
    Counter(
        "no_descriptor",
        "times that a descriptor or memory was missing",
        loss="no descriptor or memory: raise ulimit -n",
    ),
    Counter("received_from_client", "bytes received from clients", unit="bytes"),
    Counter("received_from_backend", "bytes received from backends", unit="bytes"),
    Counter("sent_to_backend", "bytes sent to backends", unit="bytes"),
    Counter("sent_to_client", "bytes sent to clients", unit="bytes"),
    Counter("discarded_to_backend", "bytes received from clients and discarded", unit="bytes"),
    Counter("discarded_to_client", "bytes received from backends and discarded", unit="bytes"),
    Counter("pipes_open", "pipes for splice", gauge=True),
    Counter(
        "over_limit",
        "rejected connections that were over the limit",
        loss="connections rejected, over -max-connections",
        part_of="rejected",
    ),
    Counter(
        "idle_closed",
        "resets after the idle timeout",
        loss="connections reset, idle for -idle-timeout",
    ),
    Counter(
        "half_closed_too_long",
        "resets after the half-close timeout",
        loss="connections reset, half-closed for -half-close-timeout",
    ),
    Counter("spare", "backend sockets kept for the next client", gauge=True),
    Counter("reused", "connections that took a spare socket"),
)

UDP = (
    Counter("sessions_created", "sessions created"),
    Counter("sessions_active", "sessions that have not ended", gauge=True),
    Counter("sessions_expired", "sessions that ended after the timeout"),
    Counter(
        "sessions_evicted",
        "sessions ended to make room for others",
        loss="sessions evicted to make room",
    ),
    Counter("received_from_client", "datagrams received from clients"),
    Counter("received_from_backend", "datagrams received from backends"),
    Counter("sent_to_backend", "datagrams sent to backends"),
    Counter("sent_to_client", "datagrams sent to clients"),
    Counter("bytes_from_client", "bytes received from clients", unit="bytes"),
    Counter("bytes_from_backend", "bytes received from backends", unit="bytes"),
    Counter("bytes_to_backend", "bytes sent to backends", unit="bytes"),
    Counter("bytes_to_client", "bytes sent to clients", unit="bytes"),
    Counter(
        "dropped_truncated",
        "datagrams dropped because they were truncated",
        loss="datagrams dropped, truncated",
    ),
    Counter(
        "dropped_send_to_backend",
        "datagrams that the kernel refused to send to a backend",
        loss="datagrams to the backend refused by the kernel",
    ),
    Counter(
        "dropped_send_to_client",
        "datagrams that the kernel refused to send to a client",
        loss="datagrams to clients refused by the kernel",
    ),
    Counter(
        "dropped_no_backend",
        "datagrams that had no backend in time",
        loss="datagrams dropped, no backend within -hold",
    ),
    Counter(
        "dropped_no_session",
        "datagrams of new clients without room for a session",
        loss="datagrams dropped, no room for a session",
    ),
    Counter(
        "dropped_no_local_port",
        "datagrams of new clients without a local port",
        loss="datagrams dropped, no local port: widen net.ipv4.ip_local_port_range",
    ),
    Counter(
        "dropped_looped",
        "datagrams from a backend or from the listener itself, or passed on by 64 relays",
        loss="datagrams dropped, forwarding loop: check for a relay that points back",
    ),
    Counter("refused", "ICMP refusals from backends"),
    Counter("queued", "datagrams that wait for a backend", gauge=True),
    Counter("gso_refused", "runs that a route did not take whole"),
    Counter("messages_to_backend", "messages sent to backends; a run counts once"),
    Counter("messages_to_client", "messages sent to clients; a run counts once"),
)

COUNTERS: Mapping[Protocol, tuple[Counter, ...]] = {Protocol.TCP: TCP, Protocol.UDP: UDP}
