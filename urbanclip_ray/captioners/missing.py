"""What the caption store lacks is described: the driver finds it by key, actors see nothing else, and the driver counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from urbanclip_ray.captioners.base import UnusableCaptionerError
from urbanclip_ray.captioners.store import CaptionStore
from urbanclip_ray.errors import UserError
from urbanclip_ray.storage import Dataset, resolve

UNREADABLE = "unreadable tile"
UNUSABLE = "unusable captioner"
TILE_COLUMNS = ["tile_id", "image", "sha256", "error"]
NUM_TRIED_FIRST = 256  # so many tiles are tried before their share of failures is believed
REPORT_EVERY_S = 60.0


class CaptionError(UserError, RuntimeError):
    """Too many tiles could not be captioned, or the captioner itself cannot be used."""


class Missing(NamedTuple):
    """What a store has of some tiles: their sha256, each once, one tile's id for each, and which texts are there."""

    hashes: pa.Array
    tile_ids: pa.Array
    num_rows: np.ndarray  # [tiles]: how many rows of the tiles have these bytes
    are_stored: np.ndarray  # booleans [tiles, samples]

    @property
    def is_missing(self) -> np.ndarray:
        """Booleans [tiles]: whether any text of the tile is."""
        return np.logical_not(np.all(self.are_stored, axis=1))

    @property
    def num_missing(self) -> int:
        return int(self.is_missing.sum())

    @property
    def num_stored_captions(self) -> int:
        """Of tiles with all their texts, a text for every row."""
        return int(self.num_rows[~self.is_missing].sum()) * self.are_stored.shape[1]

    def missing_tile_ids(self) -> pa.Array:
        return self.tile_ids.filter(pa.array(self.is_missing))


def read_index(tiles: Dataset) -> pa.Table:
    """`tile_id`, `sha256`, `error` of every tile, in the dataset's order."""
    return tiles.read(["tile_id", "sha256", "error"])


def find_missing(store: CaptionStore | None, index: pa.Table, num_samples: int, given: Iterable[str] = ()) -> Missing:
    """Which of the readable tiles have no text; tiles that are `given` one elsewhere, by id, are not asked for."""
    index = index.filter(pc.is_null(index["error"]))
    index = index.filter(pc.invert(pc.is_in(index["tile_id"], value_set=pa.array(list(given), pa.string()))))
    first = index.group_by("sha256", use_threads=False).aggregate([("tile_id", "first"), ("tile_id", "count")])
    hashes, tile_ids = (first[name].combine_chunks() for name in ("sha256", "tile_id_first"))
    nothing = np.zeros((len(hashes), num_samples), bool)
    are_stored = nothing if store is None else store.samples_of(hashes, num_samples)
    return Missing(hashes, tile_ids, first["tile_id_count"].to_numpy(), are_stored)


def missing_rows(tiles: Dataset, tile_ids: pa.Array, tiles_per_block: int) -> ray.data.Dataset:
    """`TILE_COLUMNS` of these tiles, in small blocks: all actors have some, and with one of them one block is lost."""
    filesystem, _ = resolve(tiles.uri)
    wanted = ray.put(tile_ids)

    def read_file(batch: pa.Table) -> Iterator[pa.Table]:
        value_set = ray.get(wanted)
        for path in batch["path"].to_pylist():
            with filesystem.open_input_file(path) as stream:
                file = pq.ParquetFile(stream)
                if not pc.any(pc.is_in(file.read(["tile_id"])["tile_id"], value_set=value_set)).as_py():
                    continue  # no pixels are read for it
                for rows in file.iter_batches(batch_size=tiles_per_block, columns=TILE_COLUMNS):
                    yield pa.table(rows).filter(pc.is_in(rows["tile_id"], value_set=value_set))

    files = ray.data.from_arrow([pa.table({"path": [path]}) for path in tiles.parquet_paths()])
    rows = files.map_batches(read_file, batch_size=1, batch_format="pyarrow")
    return rows.repartition(target_num_rows_per_block=tiles_per_block)


class Tally:
    """Counts tiles as they are described, and stops the job when it has gone wrong.

    `num_tiles` and `num_stored` are of distinct readable tiles, those that have their texts already included.
    """

    def __init__(self, num_tiles: int, num_stored: int, max_error_share: float, kept_in: str) -> None:
        self.errors: dict[str, str] = {}  # tile id -> reason
        self._num_tiles = num_tiles
        self._num_tried = self._num_stored = num_stored
        self._max_error_share = max_error_share
        self._kept_in = kept_in
        self._started_s = self._reported_s = time.monotonic()

    def add(self, captions: pa.Table) -> None:
        """Count a batch of rows (`CAPTIONS`); raises CaptionError when the captioner cannot be used, or too many failed."""
        failed = captions.filter(pc.is_valid(captions["error"])).to_pylist()
        refuse_unusable([row["error"] for row in failed])
        self.errors |= {row["tile_id"]: row["error"] for row in failed}
        self._num_tried += pc.count_distinct(captions["tile_id"]).as_py()
        believed = self._num_tiles if self._num_tried < NUM_TRIED_FIRST else self._num_tried
        if len(self.errors) > self._max_error_share * believed:
            raise CaptionError(
                f"stopped after {self._num_tried:,} of {self._num_tiles:,} tiles: {len(self.errors):,} of them could not be "
                f"captioned, more than caption.max_error_share={self._max_error_share}: {summarise(self.errors)}. Mend the "
                f"cause, or raise that share, and run the same command again: what is described is kept in {self._kept_in}"
            )

    def report(self) -> None:
        """Say how far it is, not more often than once a minute."""
        now_s = time.monotonic()
        if now_s - self._reported_s < REPORT_EVERY_S:
            return
        self._reported_s = now_s
        rate = (self._num_tried - self._num_stored) / (now_s - self._started_s)  # tiles a second
        left = f", {(self._num_tiles - self._num_tried) / rate / 3600:.1f} h left" if rate else ""
        print(
            f"captions: {self._num_tried:,} of {self._num_tiles:,} tiles, {len(self.errors):,} failed, {rate * 60:,.0f} a "
            f"minute{left}",
            flush=True,
        )


def summarise(errors: dict[str, str], num_shown: int = 5) -> str:
    """Failures by reason, the most frequent first, with an example of each."""
    counted = Counter(kind_of(error) for error in errors.values())
    examples = {kind_of(error): (tile_id, error) for tile_id, error in reversed(errors.items())}
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
