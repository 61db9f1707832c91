"""Process titles: `ps`, `top` and psutil show who is who. The only importer of setproctitle.

A title comes from untrusted text (container names), so what a terminal would obey is replaced.
"""

from __future__ import annotations

from setproctitle import setproctitle

PROGRAM = "grand-ambassador"

show_title = setproctitle
"""Show a title of title_of, unchecked. For workers, which run little Python."""


def title_of(role: str) -> str:
    """`grand-ambassador: role`, as printable text of one line."""
    return f"{PROGRAM}: {''.join(c if c.isprintable() else '?' for c in role)}"


def set_title(role: str) -> None:
    """Show `grand-ambassador: role` as this process's name and arguments."""
    show_title(title_of(role))
