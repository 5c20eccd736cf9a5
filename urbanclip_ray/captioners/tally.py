"""What went wrong with captions: reasons, their numbers, and when it is too much."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray.captioners.base import UnusableCaptionerError
from urbanclip_ray.errors import UserError
from urbanclip_ray.logs import say

UNREADABLE = "unreadable tile"
UNUSABLE = "unusable captioner"
NUM_TRIED_FIRST = 256  # so many tiles are tried before their share of failures is believed
REPORT_EVERY_S = 60.0


class CaptionError(UserError, RuntimeError):
    """Too many tiles could not be captioned, or the captioner itself cannot be used."""


class Tally:
    """Counts tiles as they are described, and stops the job when it has gone wrong.

    `num_tiles` and `num_stored` are of distinct readable tiles, those that have their texts already included. A tile that is
    asked several prompts counts once for each; `unit` is what is said of them.
    """

    def __init__(self, num_tiles: int, num_stored: int, max_error_share: float, kept_in: str, unit: str = "tiles") -> None:
        self.errors: dict[tuple[str, str], str] = {}  # tile id and prompt -> reason
        self._unit = unit
        self._num_tiles = num_tiles
        self._num_tried = self._num_stored = num_stored
        self._max_error_share = max_error_share
        self._kept_in = kept_in
        self._started_s = self._reported_s = time.monotonic()

    def add(self, captions: pa.Table) -> None:
        """Count a batch of rows (`tile_id`, `prompt`, `error`).

        Raises CaptionError when the captioner cannot be used, or too many failed.
        """
        failed = captions.filter(pc.is_valid(captions["error"])).to_pylist()
        refuse_unusable([row["error"] for row in failed])
        self.errors |= {(row["tile_id"], row["prompt"]): row["error"] for row in failed}
        self._num_tried += captions.group_by(["tile_id", "prompt"]).aggregate([]).num_rows
        believed = self._num_tiles if self._num_tried < NUM_TRIED_FIRST else self._num_tried
        if len(self.errors) > self._max_error_share * believed:
            raise CaptionError(
                f"stopped after {self._num_tried:,} of {self._num_tiles:,} {self._unit}: {len(self.errors):,} of them could "
                f"not be captioned, more than caption.max_error_share={self._max_error_share}: {summarise(self.errors)}. Mend "
                f"the cause, or raise that share, and run the same command again: what is described is kept in {self._kept_in}"
            )

    def report(self) -> None:
        """Say how far it is, not more often than once a minute."""
        now_s = time.monotonic()
        if now_s - self._reported_s < REPORT_EVERY_S:
            return
        self._reported_s = now_s
        rate = (self._num_tried - self._num_stored) / (now_s - self._started_s)  # tiles a second
        left = f", {(self._num_tiles - self._num_tried) / rate / 3600:.1f} h left" if rate else ""
        say(
            f"captions: {self._num_tried:,} of {self._num_tiles:,} {self._unit}, {len(self.errors):,} failed, "
            f"{rate * 60:,.0f} a minute{left}",
            num_tried=self._num_tried,
            num_tiles=self._num_tiles,
            num_failed=len(self.errors),
            tiles_per_s=rate,
        )


def summarise(errors: dict[tuple[str, str], str], num_shown: int = 5) -> str:
    """Failures, by tile id and prompt, by reason, the most frequent first, with an example of each."""
    counted = Counter(kind_of(error) for error in errors.values())
    examples = {kind_of(error): (tile_id, error) for (tile_id, _), error in reversed(errors.items())}
    lines = [f"{count:,} × {kind!r} (as {examples[kind][0]}: {examples[kind][1]})" for kind, count in counted.most_common()]
    return "; ".join(lines[:num_shown] + ([f"{len(lines) - num_shown} more"] if len(lines) > num_shown else []))


def kind_of(error: str) -> str:
    """A reason without what is the tile's own in it."""
    return error.split(":")[0]


def reason_of(error: Exception) -> str:
    return f"{UNUSABLE}: {error}" if isinstance(error, UnusableCaptionerError) else str(error)


def refuse_unusable(errors: Iterable[str]) -> None:
    """Raise CaptionError where a row's error is the captioner's and not the tile's: more tiles would change nothing."""
    unusable = next((error for error in errors if error.startswith(UNUSABLE)), None)
    if unusable is not None:
        raise CaptionError(unusable.removeprefix(f"{UNUSABLE}: "))
