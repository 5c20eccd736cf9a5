"""200,000 tiles through ingest, captions and refinement: peak memory over that of 20,000, and the rate.

The tiles are pieces of NASA's Blue Marble under new names: hard links in a folder, so that listing, reading and tables are
those of so many files. Each size runs in a process of its own with a Ray of its own; memory is that of the whole family of
processes, shared pages counted once (PSS), looked at every half second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import ray
from figures import Figure
from real_tiles import jpeg

from urbanclip_ray.captioners.caption import CaptionWork, caption_tiles
from urbanclip_ray.captioners.refine import refine_captions
from urbanclip_ray.config import CaptionConfig, FolderSource, IngestConfig, PixelsConfig, RefineConfig, WorldSource
from urbanclip_ray.sources import open_source
from urbanclip_ray.sources.ingest import ingest_tiles
from urbanclip_ray.storage import open_dataset, publish

SMALL, LARGE = (int(number) for number in os.environ.get("BENCH_SCALE", "20000,200000").split(","))
TILE_PX = 27
TILES_A_FOLDER = 1000
NUM_CORES = 2
OBJECT_STORE_BYTES = 400 << 20  # for both: it is for blocks on their way, which do not become more
MEMORY_LIMIT, LEAST_RATE = 1.2, 0.9
LOOK_EVERY_S = 0.5


def make_folder(folder: Path, num_tiles: int) -> None:
    """`num_tiles` names for about 2,900 images."""
    source = open_source(WorldSource(tile_px=TILE_PX, stride_px=TILE_PX))
    images = folder.parent / "images"
    images.mkdir()
    records = source.tiles()
    for number, tile in enumerate(records):
        (images / f"{number}.jpg").write_bytes(jpeg(source.read(tile.location)))
    for number in range(num_tiles):
        region = folder / f"region_{number // TILES_A_FOLDER:04d}"
        region.mkdir(parents=True, exist_ok=True)
        os.link(images / f"{number % len(records)}.jpg", region / f"{number:07d}.jpg")


class PeakMemory(threading.Thread):
    """The most memory that this process and its children held together, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._ended = threading.Event()

    def run(self) -> None:
        own = psutil.Process()
        while not self._ended.wait(LOOK_EVERY_S):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it ended between the list and the look
                    continue
            self.peak = max(self.peak, total)

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.peak


def walk(num_tiles: int) -> None:
    """In a process of its own: peak memory in bytes, and seconds of each stage."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        make_folder(Path(root) / "tiles_in", num_tiles)
        ray.init(address="local", num_cpus=NUM_CORES, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False)
        memory = PeakMemory()
        memory.start()
        source = open_source(FolderSource(uri=f"{root}/tiles_in"))
        for stage in ("tiles", "captions", "pairs"):
            start = time.perf_counter()
            with publish(f"{root}/{stage}", stage, {}, {}) as publication:
                if stage == "tiles":
                    ingest_tiles(source, IngestConfig(), publication)
                elif stage == "captions":
                    tiles = open_dataset(f"{root}/tiles")
                    caption_tiles(CaptionWork(tiles, CaptionConfig(num_actors=NUM_CORES), PixelsConfig()), publication)
                else:
                    refine_captions(open_dataset(f"{root}/captions"), RefineConfig(), publication)
            seconds[stage] = time.perf_counter() - start
        peak = memory.end()
        assert open_dataset(f"{root}/pairs").read(["tile_id"]).num_rows == num_tiles
        ray.shutdown()
    print("WALK", json.dumps([peak, seconds]), flush=True)


def run_walk(num_tiles: int) -> tuple[int, dict[str, float]]:
    command = [sys.executable, __file__, str(num_tiles)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    (line,) = (line for line in output.splitlines() if line.startswith("WALK"))
    peak, seconds = json.loads(line.removeprefix("WALK"))
    print(f"{num_tiles:,} tiles: {peak / 1e6:.0f} MB, " + ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()))
    return peak, seconds


def measure() -> list[Figure]:
    (small_peak, small_s), (large_peak, large_s) = run_walk(SMALL), run_walk(LARGE)
    small_rate, large_rate = SMALL / sum(small_s.values()), LARGE / sum(large_s.values())
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in large_s.items())
    memory = f"peak of all processes at {LARGE:,} tiles over that at {SMALL:,}; land_cover, {NUM_CORES} cores"
    rate = f"tiles a second through all three stages, {LARGE:,} tiles over {SMALL:,}: {stages}"
    return [
        Figure("scale_memory", large_peak / 1e6, small_peak / 1e6, large_peak / small_peak, "MB", MEMORY_LIMIT, memory),
        Figure("scale_rate", large_rate, small_rate, large_rate / small_rate, "tiles/s", LEAST_RATE, rate, at_most=False),
    ]


if __name__ == "__main__":
    walk(int(sys.argv[1]))
