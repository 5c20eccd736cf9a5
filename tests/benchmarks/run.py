"""`make bench`: every benchmark in a process of its own, one after another; writes `runs/bench.json` and prints a table.

A benchmark is a module `bench_<name>.py` here with a function `measure() -> list[Figure]`. Name some to run these alone.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from figures import Figure
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OUTPUT = HERE.parents[1] / "runs" / "bench.json"
MARK = "FIGURES "


def run_one(name: str) -> list[Figure]:
    """What a benchmark says, nothing where it failed; its output goes on to the terminal as it comes."""
    figures: list[Figure] = []
    command = [sys.executable, str(HERE / "run.py"), "--inside", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                figures = [Figure(*fields) for fields in json.loads(line.removeprefix(MARK))]
            else:
                print(line, end="", flush=True)
    return [] if process.returncode else figures


def as_record(figure: Figure) -> dict[str, Any]:
    record = figure._asdict()
    bound = "at most" if record.pop("at_most") else "at least"
    return record | {"limit": f"{bound} {figure.limit:g}"}


def keep(figures: list[Figure]) -> None:
    """Put the figures in the place of older ones of the same names."""
    OUTPUT.parent.mkdir(exist_ok=True)
    before = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else []
    names = {figure.name for figure in figures}
    records = [record for record in before if record["name"] not in names] + [as_record(figure) for figure in figures]
    OUTPUT.write_text(json.dumps(records, indent=1) + "\n")


def show(figures: list[Figure]) -> None:
    table = Table(title=f"{os.cpu_count()} cores of {platform.machine()}", title_justify="left")
    for column in ("benchmark", "ours", "peer", "unit", "ratio", "limit", "", "note"):
        table.add_column(column, overflow="fold")
    for figure in figures:
        record, verdict = as_record(figure), "holds" if figure.holds else "MISSED"
        values = (f"{figure.ours:.4g}", f"{figure.peer:.4g}", figure.unit, f"{figure.ratio:.3f}", record["limit"])
        table.add_row(figure.name, *values, verdict, figure.note)
    Console(width=160).print(table)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--inside"]:
        measured = importlib.import_module(f"bench_{arguments[1]}").measure()
        print(MARK + json.dumps(measured), flush=True)
        return
    names = arguments or sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    figures: list[Figure] = []
    failed = []
    for name in names:
        print(f"benchmark {name}", flush=True)
        found = run_one(name)
        failed += [] if found else [f"{name} failed"]
        figures += found
        keep(figures)
    show(figures)
    if unmet := failed + [f"{figure.name} missed its bound" for figure in figures if not figure.holds]:
        raise SystemExit("; ".join(unmet))


if __name__ == "__main__":
    main(sys.argv[1:])
