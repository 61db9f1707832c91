"""Process titles: `ps`, `top` and psutil show who is who. The only importer of setproctitle.

A title comes from untrusted text (container names), so what a terminal would obey is replaced.
"""

from __future__ import annotations

from setproctitle import setproctitle

PROGRAM = "grand-ambassador"


def set_title(role: str) -> None:
    """Show `grand-ambassador: role` as this process's name and arguments."""
    setproctitle(f"{PROGRAM}: {''.join(c if c.isprintable() else '?' for c in role)}")
