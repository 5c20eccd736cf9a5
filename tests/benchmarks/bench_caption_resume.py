"""Captions of 100,000 tiles that another run has described: the whole job after ingest, dataset `captions` and all.

The job runs in a process of its own, so that its peak memory is its own. The store is as a job leaves it, a file for every
batch of 64, and then as compaction leaves it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.compute as pc
from figures import Figure
from real_tiles import numbered_world_tiles

from urbanclip_ray.captioners.caption import CaptionWork, caption_tiles
from urbanclip_ray.captioners.compaction import compact
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.captioners.store import StoredCaption
from urbanclip_ray.config import CaptionConfig, PixelsConfig
from urbanclip_ray.storage import open_dataset, publish

NUM_TILES, TILES_PER_FILE, TILES_PER_BATCH = 100_000, 1_024, 64
LIMIT_S, LIMIT_MB = 20, 1_000
MODEL = ModelReference("model", "1", "model", False)
SENTENCE = "Fields and a river lie between wooded hills, and a road with some houses leads to the coast in the distance."


def make_work(folder: Path) -> CaptionWork:
    config = CaptionConfig(captioner="transformers", model=MODEL.name, tiles_per_batch=TILES_PER_BATCH)
    return CaptionWork(open_dataset(str(folder / "tiles")), config, PixelsConfig(), None, MODEL, str(folder / "caption_store"))


def fill_store(work: CaptionWork) -> int:
    """Captions of 300 characters for every tile, a file for each batch; returns the number of files."""
    store = work.store_of(work.config.prompt)
    hashes = work.tiles.read(["sha256"])["sha256"].to_pylist()
    for first in range(0, len(hashes), TILES_PER_BATCH):
        batch = enumerate(hashes[first : first + TILES_PER_BATCH], first)
        store.add(f"j-{first}", [StoredCaption(name, 0, f"Tile {number}. {SENTENCE * 3}"[:300]) for number, name in batch])
    return len(store.folder.parts())


def run_again(folder: Path, name: str) -> tuple[float, float]:
    """Seconds and peak memory, MB, of the job in a process of its own."""
    command = [sys.executable, __file__, str(folder), name]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak_mb = json.loads(result.stdout.splitlines()[-1])
    captions = open_dataset(str(folder / name)).read(["caption_key", "error"])
    if captions["error"].null_count != NUM_TILES or pc.count_distinct(captions["caption_key"]).as_py() != NUM_TILES:
        raise SystemExit(f"caption_resume: {name} has not one caption for each of {NUM_TILES:,} tiles")
    return seconds, peak_mb


def measure() -> list[Figure]:
    """With many small files, and compacted."""
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbered_world_tiles(folder / "tiles", NUM_TILES, TILES_PER_FILE)
        work = make_work(folder)
        num_files = fill_store(work)
        for suffix, files in (("", num_files), ("_compacted", 0)):
            if suffix:
                files = len(list(compact(work.store_of(work.config.prompt).folder)))
            seconds, peak_mb = run_again(folder, f"captions{suffix}")
            note = f"{NUM_TILES:,} tiles, {files:,} files in the store; without ingest and imports"
            figures.append(Figure(f"caption_resume{suffix}", seconds, 1, seconds, "s", LIMIT_S, note))
            memory = Figure(
                f"caption_resume{suffix}_memory", peak_mb, LIMIT_MB, peak_mb / LIMIT_MB, "MB", 1, "peak of the process"
            )
            figures.append(memory)
    return figures


def main(folder: Path, name: str) -> None:
    work = make_work(folder)
    start = time.perf_counter()
    with publish(str(folder / name), "captions", {}, {"tiles": work.tiles}) as publication:
        caption_tiles(work, publication)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()  # getrusage's figure is also of the process that started this one
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps([seconds, peak_kib * 1024 / 1e6]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
