"""What captioning would cost: tiles, captions that are stored, captions to generate, and hours from a timed sample."""

from __future__ import annotations

import time
from typing import NamedTuple

import pyarrow as pa

from urbanclip_ray.captioners.caption import CaptionBatch, CaptionError, CaptionWork, refuse_unusable
from urbanclip_ray.captioners.missing import Missing, find_missing
from urbanclip_ray.captioners.sample import describe_tiles, draw_tiles

NUM_TIMED_TILES = 16


class CaptionPlan(NamedTuple):
    """The counts are of tiles that can be read and of distinct captions; equal tiles share theirs."""

    num_tiles: int
    num_unreadable: int
    num_captions: int
    num_stored: int  # with those of the timed sample, which are kept
    num_timed: int  # tiles
    seconds_per_caption: float | None  # of one actor; None where nothing was timed; engines of vLLM never are
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
        if self.seconds_per_caption is None:
            return "\n".join([*lines, "cost: nothing was timed"])
        hours = self.num_missing * self.seconds_per_caption / 3600
        unit, share = ("GPU", self.gpus_per_actor) if self.gpus_per_actor else ("CPU", 1.0)
        lines.append(
            f"cost: {hours * share:.3g} {unit}-hours, {hours / self.num_actors:.3g} hours on {self.num_actors} actors, at "
            f"{self.seconds_per_caption:.3g} s a caption (timed on {self.num_timed} tiles; loading the model is not in it)"
        )
        return "\n".join(lines)


def plan_captions(work: CaptionWork, num_timed_tiles: int = NUM_TIMED_TILES) -> CaptionPlan:
    """Count what is there, and time a sample of what is not. The sample's captions go to the store.

    Tiles that the source describes cost nothing: beside a model, they are left out, and so are prompts that cannot be filled.

    Raises CaptionError when the captioner cannot be used.
    """
    index = work.read_index()
    num_timed, seconds_per_caption = _time(work, index, num_timed_tiles)
    found = _look_up(work, index)  # with what was timed
    asked = find_missing(None, index, 1, work.given_texts() if work.model is not None else ())
    return CaptionPlan(
        num_tiles=int(asked.num_rows.sum()),
        num_unreadable=index.num_rows - index["error"].null_count,
        num_captions=sum(each.are_stored.size for each in found),
        num_stored=sum(int(each.are_stored.sum()) for each in found),
        num_timed=num_timed,
        seconds_per_caption=seconds_per_caption,
        gpus_per_actor=work.config.gpus_per_actor,
        num_actors=work.config.num_actors,
    )


def _look_up(work: CaptionWork, index: pa.Table) -> list[Missing]:
    """What there is of every prompt that can be filled; without a model nothing is kept."""
    if work.model is None:
        return [find_missing(None, index, work.config.decoding.num_samples)]
    return [each.known for each in work.look_up(index).asked if each.reason is None]


def _time(work: CaptionWork, index: pa.Table, num_tiles: int) -> tuple[int, float | None]:
    """Tiles timed, of those that lack texts, and the seconds that one actor was busy with each of their captions."""
    wanted = work.look_up(index).wanted() if work.model is not None else None
    tile_ids = wanted.tile_ids if wanted is not None else find_missing(None, index, 1).tile_ids
    if not len(tile_ids) or work.config.captioner == "vllm":
        return 0, None
    drawn = draw_tiles(work.tiles, tile_ids.to_pylist(), num_tiles)
    timed = describe_tiles(drawn if wanted is None else wanted.choose(drawn), work, TimedCaptionBatch)
    errors = [error for error in timed["error"].to_pylist() if error]
    refuse_unusable(errors)
    if errors:
        raise CaptionError(f"{len(errors)} of {num_tiles} sampled tiles could not be captioned (the first: {errors[0]})")
    num_timed, num_captions, seconds = (sum(timed[name].to_pylist()) for name in ("num_tiles", "num_captions", "seconds"))
    return num_timed, seconds / num_captions if num_captions else None


class TimedCaptionBatch(CaptionBatch):
    """Describes a batch and reports the time instead of the texts: num_tiles, num_captions, seconds, error (the first).

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
        captions = super().__call__(batch)
        seconds = time.perf_counter() - start
        errors += _errors(captions)
        first = errors[0] if errors else None
        columns = {"num_tiles": [batch.num_rows], "num_captions": [captions.num_rows], "seconds": [seconds]}
        return pa.table(columns | {"error": pa.array([first], pa.string())})


def _errors(captions: pa.Table) -> list[str]:
    return [error for error in captions["error"].to_pylist() if error is not None]
