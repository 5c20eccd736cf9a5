"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console

LOG_WIDTH = 140  # columns where the output is no terminal


def open_console() -> Console:
    """As wide as the terminal, or as wide as a log may be."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
