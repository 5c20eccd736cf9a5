"""What each fault did to a run: a row in `runs/faults.json`, and the table that `make faults` ends with.

Seconds lost are the longest pause between two pieces of work that were done (training steps, described tiles), less the usual
one: from the fault to the first work after it, a new start of the job by the user included. The tests run one after another on
whatever else the machine does, so they are sizes, not measurements.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parents[2] / "runs" / "faults.json"
ORDER = (  # that of the table
    "worker SIGKILL",
    "raylet SIGKILL",
    "driver SIGKILL",
    "S3 down 10 s",
    "disk full",
    "SIGTERM with 30 s notice",
    "out-of-memory actor",
    "truncated Parquet part",
    "worker hang",
    "head restart, job resubmitted",
    "two node losses in a row",
    "0 to 3 nodes in mid-run and back",
    "object store full, spilling",
    "503 SlowDown for 10 s",
    "slow S3 (200 ms)",
    "connection reset in uploads",
    "expired credentials",
    "object deleted under a run",
    "object replaced under a run",
    "two captioning jobs to one output",
    "two pretrainings to one output",
    "flipped byte in a checkpoint",
    "NaN loss",
)


class Row(NamedTuple):
    """One fault. `saw` is what the job printed, or that it said nothing."""

    fault: str
    saw: str
    seconds_lost: float | None  # None: not measured
    rows_lost: int


def longest_pause_s(times: Sequence[float], after_s: float = 0.0) -> float:
    """Of work that was done at these times, less the usual pause; of pauses that began `after_s` or later."""
    ordered = sorted(times)
    pauses = [(before, after - before) for before, after in pairwise(ordered)]
    return max(pause for before, pause in pauses if before >= after_s) - statistics.median(pause for _, pause in pauses)


def write(rows: Sequence[Row], where: Path = FILE) -> None:
    """Rows by fault; those of faults that were not tried this time stay as they were."""
    known = {row["fault"]: row for row in json.loads(where.read_text())} if where.exists() else {}
    known |= {row.fault: row._asdict() for row in rows}
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps([known[name] for name in ORDER if name in known], indent=1))


def table(rows: Sequence[Row]) -> str:
    """Markdown, in the order of the suite."""
    lines = ["| fault | what the user saw | seconds lost | rows lost |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: ORDER.index(row.fault)):
        seconds = "not measured" if row.seconds_lost is None else f"{row.seconds_lost:.0f}"
        lines.append(f"| {row.fault} | {row.saw} | {seconds} | {row.rows_lost} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([Row(**row) for row in json.loads(FILE.read_text())]))
