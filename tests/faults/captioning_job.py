"""Captioning jobs whose work is counted: every tile must be described once, whatever was killed or refused."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from counted_captions import make_work
from nodes import QUICK
from PIL import Image
from record import longest_pause_s

from urbanclip_ray.schema import TILES
from urbanclip_ray.storage import open_dataset, publish

HERE = Path(__file__).parent
NUM_TILES = 20
BATCH_S = 3.0  # of one batch; what is killed is killed in its first two thirds, before it has described anything
WAIT_S = 400.0


def write_tiles(uri: str) -> None:
    rows = []
    for number in range(NUM_TILES):
        stream = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        row = {"tile_id": f"r/{number}", "region": "r", "scheme": "none", "image": stream.getvalue()}
        rows.append(row | {"sha256": hashlib.sha256(stream.getvalue()).hexdigest()})
    table = pa.Table.from_pylist(rows, schema=TILES)
    with publish(uri, "tiles", {}, {}) as publication:
        for first in range(0, NUM_TILES, 7):  # files that do not end with a batch
            publication.write_table(table.slice(first, 7), f"part-{first:05d}.parquet")
        publication.count(unit="tiles", rows_in=NUM_TILES, rows_out=NUM_TILES, rejects={})


class Job:
    """One captioning job, from its start to the end of its process; `folder` is of its own, `root` is where it writes."""

    def __init__(self, tiles: str, root: str, folder: Path, address: str, limited_group: str = "") -> None:
        self.tiles = tiles
        self.notes = folder
        self.address = address
        self.store = f"{root}/caption_store"
        self.captions = f"{root}/captions"
        self._limited_group = limited_group
        self._log = folder / "log"

    def command(self) -> list[str]:
        arguments = [self.tiles, self.store, self.captions, str(self.notes), str(BATCH_S), self._limited_group]
        return [sys.executable, str(HERE / "counted_captions.py"), *arguments]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        environment = os.environ | QUICK | {"RAY_ADDRESS": self.address}
        with self._log.open("ab") as log:
            process = subprocess.Popen(self.command(), stdout=log, stderr=log, env=environment)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def finish(self) -> None:
        with self.running() as process:
            self.wait_for_end(process)

    def fail(self) -> str:
        """Run to an end that must be an error; all that was printed."""
        with self.running() as process:
            return self.wait_for_failure(process)

    def wait_for_end(self, process: subprocess.Popen[bytes]) -> None:
        assert process.wait(WAIT_S) == 0, self.printed()[-4000:]

    def wait_for_failure(self, process: subprocess.Popen[bytes]) -> str:
        assert process.wait(WAIT_S) == 1, self.printed()[-4000:]
        return self.printed()

    def printed(self) -> str:
        return self._log.read_text()

    def said(self) -> Counter[str]:
        return Counter(tile for _, tile in self._said())

    def seconds_lost(self, after_s: float = 0.0) -> float:
        """Of all that was said, or of what was said after a time."""
        times = [float(time_s) for time_s, _ in self._said()]
        return longest_pause_s([*times, after_s] if after_s else times, after_s)

    def _said(self) -> list[tuple[str, str]]:
        lines = [line.split() for file in self.notes.glob("said-*") for line in file.read_text().splitlines()]
        return [(time_s, tile) for time_s, tile in lines]

    def inside(self) -> dict[int, float]:
        """Processes that describe a batch, and since how many seconds."""
        found = {}
        for note in self.notes.glob("inside-*"):
            pid = int(note.name.partition("-")[2])
            try:
                age_s = time.time() - note.stat().st_mtime
            except FileNotFoundError:  # it has just ended
                continue
            if Path(f"/proc/{pid}").exists():
                found[pid] = age_s
        return found

    def wait_until_inside(
        self, num_said: int, chosen: Callable[[int], bool] = lambda pid: True, num_inside: int = 1
    ) -> list[int]:
        """Wait until so many tiles are described and so many of the chosen processes are in the first part of a batch.

        They need not have begun together: two processes may stay out of step to the end.
        """

        def begun() -> list[int]:
            pids = [pid for pid, age_s in self.inside().items() if chosen(pid) and age_s < BATCH_S * 2 / 3]
            return pids if len(pids) >= num_inside and self.said().total() >= num_said else []

        deadline_s = time.monotonic() + WAIT_S
        while not (pids := begun()):
            assert time.monotonic() < deadline_s, self.printed()[-4000:]
            time.sleep(0.01)
        return pids

    def wait_until_said(self, num_said: int) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while self.said().total() < num_said:
            assert time.monotonic() < deadline_s, self.printed()[-4000:]
            time.sleep(0.05)

    def rows_lost(self) -> int:
        """Tiles without a caption: none. Fails where a tile was described twice, or the store is not whole."""
        assert self.said() == {f"r/{number}": 1 for number in range(NUM_TILES)}
        return self.rows_lost_of_the_end()

    def rows_lost_of_the_end(self) -> int:
        """The same of what was published alone: a tile may have been described more often than it was kept."""
        captions = open_dataset(self.captions)
        rows = captions.read().to_pylist()
        assert [row["tile_id"] for row in rows] == [f"r/{number}" for number in range(NUM_TILES)]
        assert all(row["text"] and row["error"] is None for row in rows)
        assert captions.manifest.rows_in == captions.manifest.rows_out + sum(captions.manifest.rejects.values())
        work = make_work(self.tiles, self.store)
        store = work.store_of(work.config.prompt)
        parts = [store.folder.read_part(part.name) for part in store.folder.parts()]  # all of them are whole
        assert len({row["sha256"] for part in parts for row in part.to_pylist()}) == NUM_TILES
        assert work.look_up(work.read_index()).to_do() == []
        assert store.read_failed().num_rows == 0
        return NUM_TILES - len(rows)
