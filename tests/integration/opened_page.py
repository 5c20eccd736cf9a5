"""A page of ours in a real browser, opened from its file and without a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Opened(NamedTuple):
    """A page that has drawn its first view, and what it asked for and complained of meanwhile."""

    page: Any
    requests: list[str]
    complaints: list[str]
    dialogs: list[str]


@contextmanager
def open_page(browser: Any, path: str, scheme: str, width_px: int, timeout_ms: int) -> Iterator[Opened]:
    """The page of a file, `light` or `dark`."""
    with browser.new_context(viewport={"width": width_px, "height": 900}, color_scheme=scheme, offline=True) as context:
        page = context.new_page()
        found = Opened(page, [], [], [])
        page.on("request", lambda request: found.requests.append(request.url.split(":", 1)[0]))
        page.on("console", lambda message: found.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: found.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (found.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(f"file://{path}")
        page.wait_for_selector("html[data-drawn]", timeout=timeout_ms)
        yield found
