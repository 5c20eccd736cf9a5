"""A small city for the whole walk: seeded tiles as files, and the jobs of the project as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
NUM_COLUMNS, NUM_ROWS = 8, 6
SPACING_DEG = 0.04  # 3 to 4.5 km: about one tile per block of 5 km
JOBS = ["ingest", "caption", "refine", "split", "pack", "pretrain", "embed", "probe", "report"]


def write_city(folder: Path, num_columns: int = NUM_COLUMNS, num_rows: int = NUM_ROWS) -> Path:
    """Tiles of 20 px, greener to the north and with more houses to the east; `tiles.csv` with two indicators."""
    random = np.random.default_rng(0)
    lines = ["file,lon,lat,population,gdp"]
    for row in range(num_rows):
        for column in range(num_columns):
            region = "west" if column < num_columns // 2 else "east"
            pixels = np.zeros((20, 20, 3))
            pixels[...] = (60, 60 + 20 * row, 70)
            pixels[: 2 + 2 * column] = (150 + 8 * column, 140, 140)
            pixels += random.normal(0, 6, pixels.shape)
            where = folder / region / f"{row}_{column}.png"
            where.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(where)
            place = f"{2 + column * SPACING_DEG:.4f},{48 + row * SPACING_DEG:.4f}"
            population = np.exp(3 + 0.4 * column + random.normal(0, 0.1))
            lines.append(f"{region}/{where.name},{place},{population:.2f},{10 * row + column + 1}")
    (folder / "tiles.csv").write_text("\n".join(lines) + "\n")
    return folder


def set_options(*items: str) -> list[str]:
    """`--set` before every KEY=VALUE."""
    return [part for item in items for part in ("--set", item)]


def city_options(folder: Path | str, storage: Path | str) -> list[str]:
    source = set_options(f"source.uri={folder}", "source.metadata=tiles.csv")
    return ["--recipe", "tiny_test", "--storage", str(storage), *source]


def run_job(name: str, *options: str, ray_address: str | None = None) -> subprocess.CompletedProcess[str]:
    """A job as a user starts it. Without an address it starts a Ray of its own, whatever Ray runs here."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": ray_address} if ray_address else {}
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
        cwd=ROOT,
    )


def stdout_of(name: str, *options: str, ray_address: str | None = None) -> str:
    """What a job that must end well prints."""
    result = run_job(name, *options, ray_address=ray_address)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
