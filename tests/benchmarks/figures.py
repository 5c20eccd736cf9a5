"""What a benchmark says: our figure beside the peer's, and the bound on their ratio."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple


class Figure(NamedTuple):
    """`ratio` is what the bound `limit` speaks of: an upper bound where `at_most`, else a lower one."""

    name: str
    ours: float
    peer: float
    ratio: float
    unit: str
    limit: float
    note: str
    at_most: bool = True

    @property
    def holds(self) -> bool:
        return self.ratio <= self.limit if self.at_most else self.ratio >= self.limit


def interleaved(num_runs: int, **measured: Callable[[], float]) -> dict[str, float]:
    """The median of what each function returns, all of them called in turn, `num_runs` times over."""
    found: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(num_runs):
        for name, function in measured.items():
            found[name].append(function())
    return {name: statistics.median(values) for name, values in found.items()}
