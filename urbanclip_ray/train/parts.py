"""Which rows of which file belong to a part: said by the manifest of packed shards, else read off the Parquet footers.

    facts["rows_of_files"] = {"data-1f/part-000003.parquet": {"train": [3072, [[0, 512]]], "val": [3584, [[512, 512]]]}}

is a file whose first 512 rows are training rows with row ids from 3072 on, the others validation rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter, ValidationError

from urbanclip_ray.storage import Dataset, StorageError, join, resolve

ROWS_OF_FILES = "rows_of_files"
NUM_THREADS = 16  # a footer is one or two small reads: waiting, where storage is far

Count = Annotated[int, Field(ge=0)]


class PartRows(NamedTuple):
    """A part's rows in one file: the lowest of their row ids, and where they lie, as (first row, number of rows)."""

    first_id: Count
    spans: Annotated[tuple[tuple[Count, Count], ...], Field(min_length=1)]

    @property
    def num_rows(self) -> int:
        return sum(count for _, count in self.spans)

    def indices(self) -> np.ndarray:
        return np.concatenate([np.arange(first, first + count) for first, count in self.spans])


PartsOfFile = dict[str, PartRows]  # by the part's name
_FACT = TypeAdapter(dict[str, PartsOfFile])


def rows_of_files(shards: Dataset) -> dict[str, PartsOfFile]:
    """The parts of every Parquet file of the shards, by its path below their folder."""
    paths = [entry.path for entry in shards.manifest.files if entry.path.endswith(".parquet")]
    if ROWS_OF_FILES not in shards.manifest.facts:
        return describe_files(shards.uri, paths)
    try:
        found = _FACT.validate_python(shards.manifest.facts[ROWS_OF_FILES])
    except ValidationError as error:
        raise StorageError(f"{shards.uri}: its manifest is damaged ({error.errors()[0]['msg']}): pack it again") from None
    if found.keys() != set(paths):
        raise StorageError(f"{shards.uri}: its manifest does not say which rows its files hold: pack it again")
    return found


def describe_files(uri: str, paths: Iterable[str]) -> dict[str, PartsOfFile]:
    """The same of files that no manifest speaks of yet, from their footers."""
    paths = list(paths)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return dict(zip(paths, threads.map(lambda path: _describe(join(uri, path)), paths), strict=True))


def _describe(uri: str) -> PartsOfFile:
    """A row group whose statistics name one part is of that part; of a mixed one the column is read."""
    filesystem, path = resolve(uri)
    first_ids: dict[str, int] = {}
    spans: dict[str, list[tuple[int, int]]] = {}
    start = 0
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            for part, first_id, inside in _parts_of(group) or _read_parts(file, number):
                first_ids[part] = min(first_id, first_ids.get(part, first_id))
                spans.setdefault(part, []).extend((start + first, count) for first, count in inside)
            start += group.num_rows
    return {part: PartRows(first_ids[part], _joined(spans[part])) for part in spans}


def _parts_of(group: Any) -> list[tuple[str, int, list[tuple[int, int]]]]:
    """(part, lowest row id, spans) of a row group; empty where its statistics do not say."""
    columns = (group.column(number) for number in range(group.num_columns))
    statistics = {column.path_in_schema: column.statistics for column in columns}
    row_id, part = statistics["row_id"], statistics["part"]
    if not all(found is not None and found.has_min_max for found in (row_id, part)) or part.min != part.max:
        return []
    return [(str(part.min), int(row_id.min), [(0, group.num_rows)])]


def _read_parts(file: Any, number: int) -> list[tuple[str, int, list[tuple[int, int]]]]:
    table = file.read_row_group(number, columns=["row_id", "part"])
    row_ids, parts = table["row_id"].to_numpy(), table["part"].to_numpy()
    found = []
    for part in np.unique(parts):
        inside = np.flatnonzero(parts == part)
        runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
        found.append((str(part), int(row_ids[inside].min()), [(int(run[0]), len(run)) for run in runs]))
    return found


def _joined(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans in order, those that touch made one."""
    found: list[tuple[int, int]] = []
    for first, count in spans:
        if found and sum(found[-1]) == first:
            found[-1] = found[-1][0], found[-1][1] + count
        else:
            found.append((first, count))
    return tuple(found)
