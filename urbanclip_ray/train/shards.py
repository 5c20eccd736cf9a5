"""Which row comes when: a seeded order over shards, the same whoever reads it.

An epoch permutes the files and cuts their rows into one contiguous span per rank, so that a rank opens only its own files;
inside a span rows are shuffled in a bounded window. Rows left over when an epoch does not fill its last step open the next one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from urbanclip_ray.storage import Dataset, resolve


class EpochRows(NamedTuple):
    """Rows in reading order. `place` counts rows over all files of a part; `epoch` is the one that a row belongs to."""

    place: np.ndarray
    epoch: np.ndarray


def plan_epoch(
    rows_per_file: list[int], seed: int, epoch: int, carried: EpochRows, rows_per_step: int
) -> tuple[EpochRows, EpochRows]:
    """The rows of one epoch, whole steps only, and the rows carried into the next."""
    starts = np.concatenate([[0], np.cumsum(rows_per_file)])
    files = np.random.default_rng([seed, epoch]).permutation(len(rows_per_file))
    fresh = np.concatenate([np.arange(starts[file], starts[file + 1]) for file in files])
    place = np.concatenate([carried.place, fresh])
    origin = np.concatenate([carried.epoch, np.full(len(fresh), epoch)])
    used = len(place) // rows_per_step * rows_per_step
    return EpochRows(place[:used], origin[:used]), EpochRows(place[used:], origin[used:])


def rank_rows(rows: EpochRows, rank: int, num_ranks: int, window: int, seed: int, epoch: int) -> EpochRows:
    """A rank's contiguous span, shuffled inside windows of `window` rows."""
    span = len(rows.place) // num_ranks
    place, origin = (column[rank * span : (rank + 1) * span] for column in rows)
    random = np.random.default_rng([seed, epoch, rank])
    order = np.concatenate(
        [first + random.permutation(min(window, span - first)) for first in range(0, span, window)] or [np.arange(0)]
    )
    return EpochRows(place[order], origin[order])


def no_rows() -> EpochRows:
    return EpochRows(np.arange(0), np.arange(0))


def count_steps(num_rows: int, epochs: int, rows_per_step: int) -> int:
    """Optimizer steps of a run: every row of every epoch is used once but for the last incomplete step."""
    return num_rows * epochs // rows_per_step


class ShardReader:
    """Rows of one part of packed shards, by place. Keeps the files that the shuffle window needs in memory."""

    def __init__(self, shards: Dataset, part: str, window: int) -> None:
        self._uri = shards.uri
        filesystem, _ = resolve(self._uri)
        self._files: list[tuple[str, np.ndarray]] = []  # path, indices of the part's rows in it
        first_ids = []
        for path in shards.parquet_paths():
            table = pq.read_table(path, columns=["row_id", "part"], filesystem=filesystem)
            inside = np.flatnonzero(table["part"].to_numpy() == part)
            if len(inside):
                self._files.append((path, inside))
                first_ids.append(table["row_id"][int(inside[0])].as_py())
        self._files = [self._files[index] for index in np.argsort(first_ids)]  # Ray numbers files as it likes
        self.rows_per_file = [len(inside) for _, inside in self._files]
        self.num_rows = sum(self.rows_per_file)
        self._starts = np.concatenate([[0], np.cumsum(self.rows_per_file)]).astype(int)
        mean_rows = max(1, self.num_rows // max(1, len(self._files)))
        self._max_open = window // mean_rows + 2  # a window touches at most this many files
        self._open: OrderedDict[int, pa.Table] = OrderedDict()

    def rows(self, places: np.ndarray) -> Iterator[dict[str, Any]]:
        """row_id, tile_id, image, texts and part of every place, in order."""
        for place in places:
            file = int(np.searchsorted(self._starts, place, side="right")) - 1
            table = self._table(file)
            index = int(self._files[file][1][place - self._starts[file]])
            yield {name: table[name][index].as_py() for name in table.column_names}

    def _table(self, file: int) -> pa.Table:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            filesystem, _ = resolve(self._uri)  # now: keys that end within the hour are renewed there
            self._open[file] = pq.read_table(self._files[file][0], filesystem=filesystem)
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return self._open[file]
