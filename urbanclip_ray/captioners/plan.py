"""What captioning would cost: tiles, captions that are stored, captions to generate, and hours from a timed sample."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from urbanclip_ray.captioners.caption import CaptionBatch, CaptionError, CaptionWork, refuse_unusable
from urbanclip_ray.captioners.missing import read_index
from urbanclip_ray.captioners.sample import describe_tiles, draw_tiles

NUM_TIMED_TILES = 16


class CaptionPlan(NamedTuple):
    """The counts are of tiles that can be read and of distinct captions; equal tiles share theirs."""

    num_tiles: int
    num_unreadable: int
    num_captions: int
    num_stored: int  # with those of the timed sample, which are kept
    num_timed: int  # tiles
    seconds_per_tile: float | None  # of one actor; None where nothing was left to time
    samples_per_tile: int
    gpus_per_actor: float
    num_actors: int

    @property
    def num_missing(self) -> int:
        return self.num_captions - self.num_stored

    def __str__(self) -> str:
        lines = [
            f"tiles: {self.num_tiles:,} that can be read, {self.num_unreadable:,} that cannot",
            f"captions: {self.num_captions:,}, of which {self.num_stored:,} are in the store and {self.num_missing:,} are "
            "to be generated",
        ]
        if self.seconds_per_tile is None:
            return "\n".join([*lines, "cost: nothing was left to time"])
        hours = self.num_missing / self.samples_per_tile * self.seconds_per_tile / 3600
        unit, share = ("GPU", self.gpus_per_actor) if self.gpus_per_actor else ("CPU", 1.0)
        lines.append(
            f"cost: {hours * share:.3g} {unit}-hours, {hours / self.num_actors:.3g} hours on {self.num_actors} actors, at "
            f"{self.seconds_per_tile:.3g} s a tile (timed on {self.num_timed} tiles; loading the model is not in it)"
        )
        return "\n".join(lines)


def plan_captions(work: CaptionWork, num_timed_tiles: int = NUM_TIMED_TILES) -> CaptionPlan:
    """Count what is there, and time a sample of what is not. The sample's captions go to the store.

    Tiles that the source describes cost nothing: beside a model, they are left out.

    Raises CaptionError when the captioner cannot be used.
    """
    index = read_index(work.tiles)
    found = work.find_missing(index)
    missing = found[0].tile_ids.filter(pa.array(np.any([each.is_missing for each in found], axis=0)))
    num_timed, seconds = _time(work, missing.to_pylist(), num_timed_tiles) if len(missing) else (0, 0.0)
    found = work.find_missing(index) if num_timed else found  # with what was timed
    return CaptionPlan(
        num_tiles=int(found[0].num_rows.sum()),
        num_unreadable=index.num_rows - index["error"].null_count,
        num_captions=sum(each.are_stored.size for each in found),
        num_stored=sum(int(each.are_stored.sum()) for each in found),
        num_timed=num_timed,
        seconds_per_tile=seconds / num_timed if num_timed else None,
        samples_per_tile=work.config.decoding.num_samples,
        gpus_per_actor=work.config.gpus_per_actor,
        num_actors=work.config.num_actors,
    )


def _time(work: CaptionWork, tile_ids: list[str], num_tiles: int) -> tuple[int, float]:
    """Tiles timed and the seconds that one actor was busy with them."""
    timed = describe_tiles(draw_tiles(work.tiles, tile_ids, num_tiles), work, TimedCaptionBatch)
    errors = [error for error in timed["error"].to_pylist() if error]
    refuse_unusable(errors)
    if errors:
        raise CaptionError(f"{len(errors)} of {num_tiles} sampled tiles could not be captioned (the first: {errors[0]})")
    return sum(timed["num_tiles"].to_pylist()), sum(timed["seconds"].to_pylist())


class TimedCaptionBatch(CaptionBatch):
    """Describes a batch and reports the time instead of the texts: num_tiles, seconds, error (of the first that failed).

    An actor's first tile is described untimed: it waits for the model to be loaded.
    """

    _is_warm = False

    def __call__(self, batch: pa.Table) -> pa.Table:
        errors: list[str] = []
        if not self._is_warm:
            errors += _errors(super().__call__(batch.slice(0, 1)))
            batch = batch.slice(1)
            self._is_warm = True
        start = time.perf_counter()
        if batch.num_rows:
            errors += _errors(super().__call__(batch))
        seconds = time.perf_counter() - start
        first = errors[0] if errors else None
        columns = {"num_tiles": [batch.num_rows], "seconds": [seconds], "error": pa.array([first], pa.string())}
        return pa.table(columns)


def _errors(captions: pa.Table) -> list[str]:
    return [error for error in captions["error"].to_pylist() if error is not None]
