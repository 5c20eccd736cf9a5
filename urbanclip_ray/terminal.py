"""Where tables are printed, and words for numbers in them."""

from __future__ import annotations

import sys

from rich.console import Console

LOG_WIDTH = 140  # columns where the output is no terminal


def open_console() -> Console:
    """As wide as the terminal, or as wide as a log may be; brackets in names and texts are no markup."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH, markup=False)


def counted(number: int, noun: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
