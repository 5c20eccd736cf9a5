"""A captioning job as a process of its own, whose captioner is slow and counts what it says.

    python counted_captions.py TILES STORE CAPTIONS NOTES SECONDS [LIMITED_GROUP]

The captioner is the rule-based one where a model would be, so all that is around it is as with a model: the store, the actors,
their attempts. In NOTES, `inside-PID` is there while a process describes a batch, and `said-PID` has a line for every tile
that it has described, with the time. A batch with the tile GREEDY takes much memory for every tile in it, out of the control
group LIMITED_GROUP.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from urbanclip_ray.captioners import caption
from urbanclip_ray.captioners.caption import CaptionBatch, CaptionWork, caption_tiles
from urbanclip_ray.captioners.land_cover import LandCoverCaptioner
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.config import CaptionConfig, PixelsConfig
from urbanclip_ray.pipeline import publish_or_say
from urbanclip_ray.storage import open_dataset

MODEL = ModelReference("counted", "1", "counted", False)
TILES_PER_BATCH = 2
GREEDY, GREEDY_BYTES = "r/5", 200 << 20  # memory for each tile of its batch


def make_work(tiles: str, store: str) -> CaptionWork:
    config = CaptionConfig(
        captioner="transformers", model=MODEL.name, tiles_per_batch=TILES_PER_BATCH, num_actors=2, max_error_share=0
    )
    return CaptionWork(open_dataset(tiles), config, PixelsConfig(), None, MODEL, store)


class Counted:
    """The rule-based captioner with notes; a batch takes `seconds` before it is described at once."""

    def __init__(self, notes: Path, seconds: float, limited_group: str = "") -> None:
        self._notes = notes
        self._seconds = seconds
        self._limited_group = limited_group
        self._captioner = LandCoverCaptioner()

    def describe(self, tiles: Any) -> Any:
        inside = self._notes / f"inside-{os.getpid()}"
        inside.touch()
        time.sleep(self._seconds)
        if self._limited_group and GREEDY in [tile.tile_id for tile in tiles]:
            (Path(self._limited_group) / "cgroup.procs").write_text(str(os.getpid()))
            np.ones(len(tiles) * GREEDY_BYTES, np.uint8)  # written, so that the kernel has to give it
        described = self._captioner.describe(tiles)
        with (self._notes / f"said-{os.getpid()}").open("a") as file:
            file.write("".join(f"{time.time():.3f} {tile.tile_id}\n" for tile in tiles))
        inside.unlink()
        return described


def main(tiles: str, store: str, captions: str, notes: str, seconds: str, limited_group: str = "") -> None:
    class CountedBatch(CaptionBatch):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._asked.captioner._load = lambda: Counted(Path(notes), float(seconds), limited_group)  # in the place of a model

    caption.CaptionBatch = CountedBatch
    work = make_work(tiles, store)
    with publish_or_say(captions, "captions", {}, {"tiles": work.tiles}) as publication:
        caption_tiles(work, publication)


if __name__ == "__main__":
    main(*sys.argv[1:])
