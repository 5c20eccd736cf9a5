"""Rows of packed shards by their place in a part, with few files in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from urbanclip_ray.parquet_files import read_parquet
from urbanclip_ray.storage import Dataset, join, resolve
from urbanclip_ray.train.parts import rows_of_files


def count_steps(num_rows: int, epochs: int, rows_per_step: int) -> int:
    """Optimizer steps of a run: every row of every epoch is used once but for the last incomplete step."""
    return num_rows * epochs // rows_per_step


class ShardReader:
    """Rows of one part of packed shards, by place. Keeps the files that the shuffle window needs in memory.

    No file is opened before one of its rows is asked for.
    """

    def __init__(self, shards: Dataset, part: str, window: int) -> None:
        found = [(path, parts[part]) for path, parts in rows_of_files(shards).items() if part in parts]
        found.sort(key=lambda file: file[1].first_id)  # Ray numbers files as it likes
        self._uris = [join(shards.uri, path) for path, _ in found]
        self._inside = [rows for _, rows in found]
        self.rows_per_file = [rows.num_rows for rows in self._inside]
        self.num_rows = sum(self.rows_per_file)
        self._starts = np.concatenate([[0], np.cumsum(self.rows_per_file)]).astype(int)
        mean_rows = max(1, self.num_rows // max(1, len(found)))
        self._max_open = window // mean_rows + 2  # a window touches at most this many files
        self._open: OrderedDict[int, tuple[pa.Table, np.ndarray]] = OrderedDict()  # and the indices of the part's rows

    def rows(self, places: np.ndarray) -> Iterator[dict[str, Any]]:
        """row_id, tile_id, image, texts and part of every place, in order."""
        for place in places:
            file = int(np.searchsorted(self._starts, place, side="right")) - 1
            table, inside = self._table(file)
            index = int(inside[place - self._starts[file]])
            yield {name: table[name][index].as_py() for name in table.column_names}

    def _table(self, file: int) -> tuple[pa.Table, np.ndarray]:
        if file in self._open:
            self._open.move_to_end(file)
        else:
            filesystem, path = resolve(self._uris[file])  # now: keys that end within the hour are renewed there
            self._open[file] = read_parquet(filesystem, [path], None), self._inside[file].indices()
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return self._open[file]
