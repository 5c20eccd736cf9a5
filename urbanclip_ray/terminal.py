"""Where tables are printed, words for numbers in them, and what a process says while it works."""

from __future__ import annotations

import logging
import sys

from rich.console import Console

LOG_WIDTH = 140  # columns where the output is no terminal


def open_console() -> Console:
    """As wide as the terminal, or as wide as a log may be."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


def counted(number: int, noun: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def say(text: str, **fields: object) -> None:
    """A line of progress; where the job's logs are JSON, a record of `text` with these fields.

    Logs are JSON where the job was started with Ray's variable RAY_LOGGING_CONFIG_ENCODING=JSON, in all its processes.
    """
    if any(type(handler.formatter).__name__ == "JSONFormatter" for handler in logging.getLogger().handlers):  # Ray's
        logging.getLogger("urbanclip_ray").info(text, extra=fields)
    else:
        print(text, flush=True)
