"""Where the commands print."""

from __future__ import annotations

from rich.console import Console


def console() -> Console:
    """Standard output; as wide as a table needs where no terminal sets the width."""
    out = Console()
    return out if out.is_terminal else Console(width=140)
