"""Every fault test notes what it did to its run; the session ends with the table of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from record import FILE, ORDER, Row, table, write

ROWS: list[Row] = []


@pytest.fixture
def record() -> Callable[..., None]:
    """Called at the end of a test, when everything was found to be as it must be."""

    def note(fault: str, saw: str, seconds_lost: float | None, rows_lost: int) -> None:
        assert fault in ORDER
        assert rows_lost == 0
        ROWS.append(Row(fault, saw, None if seconds_lost is None else round(max(0.0, seconds_lost), 1), rows_lost))
        print(ROWS[-1])

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ROWS:
        write(ROWS)
        terminalreporter.section(f"faults, also in {FILE.relative_to(FILE.parents[1])}")
        terminalreporter.write_line(table(ROWS))
