"""Ingest with Ray Data: the tiles of a source become the `tiles` dataset, its indicators the `labels` dataset.

One tile's way: its record names where the image lies; a worker reads the bytes, decodes them only to know that they can
be decoded, and writes them untouched with their sha256, their size in pixels, or the error.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from urbanclip_ray import dataflow, metrics
from urbanclip_ray.config import IngestConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.imagery import TileImageError, decode
from urbanclip_ray.schema import TILES, labels_schema
from urbanclip_ray.sources.base import Source, SourceError, TileRecord
from urbanclip_ray.storage import Dataset, Publication

RECORDS = pa.schema([TILES.field(name) if name in TILES.names else pa.field(name, pa.string()) for name in TileRecord._fields])
BATCHES_PER_FILE = 4  # about 10 MB of small JPEG tiles a file: enough files to spread, few enough to list
READ_THREADS = 32  # of a worker: a small file on object storage is waited for (50 ms and more), not worked for
NO_DATA = "no data"  # reason of windows of scenes with too little of it: they are counted, but nothing is broken about them
NUM_EXAMPLES = 20  # how many tile ids a fact lists


class IngestError(UserError, RuntimeError):
    """Too many tiles that cannot be used; the message names the first ones and the fix."""


class CheckedImage(NamedTuple):
    """What is known of one image after it was read: its bytes even if they are bad, so that a person can look."""

    image: bytes | None = None  # None where nothing could be read
    sha256: str | None = None
    width: int | None = None  # px
    height: int | None = None  # px
    error: str | None = None  # `reason: detail`; the reason is one of a few fixed phrases


def ingest_tiles(source: Source, config: IngestConfig, publication: Publication) -> None:
    """Read and check every tile of a source and write them as the `tiles` dataset.

    Raises :class:`IngestError` when the share of unusable tiles is above `config.max_error_share`.
    """
    records = as_table(source.tiles())
    rows_per_file = config.tiles_per_batch * BATCHES_PER_FILE
    blocks = [records.slice(start, rows_per_file) for start in range(0, records.num_rows, rows_per_file)]
    dataflow.connect()
    check = partial(check_tiles, source=source, config=config, run=publication.run)
    rows = dataflow.map_tables(ray.data.from_arrow(blocks), check, batch_size=config.tiles_per_batch, each=config)
    dataflow.write(rows, publication)

    written = publication.read(["tile_id", "region", "error"])
    if written.num_rows != records.num_rows:
        raise AssertionError(f"{records.num_rows} tiles listed, {written.num_rows} written")
    failed = written.filter(pc.is_valid(written["error"]))
    errors = dict(zip(failed["tile_id"].to_pylist(), failed["error"].to_pylist(), strict=True))
    _refuse_many_errors(errors, records, config.max_error_share)
    rejects = Counter(error.partition(":")[0] for error in errors.values())
    num_good = records.num_rows - len(errors)
    publication.count(unit="tiles", rows_in=records.num_rows, rows_out=num_good, rejects=dict(rejects))
    regions = pc.value_counts(written["region"])
    publication.facts["regions"] = dict(sorted((item["values"].as_py(), item["counts"].as_py()) for item in regions))
    if ignored := source.ignored():
        publication.facts["ignored"] = ignored


def as_table(records: Sequence[TileRecord]) -> pa.Table:
    """`RECORDS`, column by column: a dict for every tile would be most of the driver's memory."""
    columns = [pa.array([record[at] for record in records], field.type) for at, field in enumerate(RECORDS)]
    return pa.table(columns, schema=RECORDS)


def check_tiles(records: pa.Table, source: Source, config: IngestConfig, run: str = "") -> pa.Table:
    """A batch of records as rows of the `tiles` dataset: no more than a batch is read ahead of what is checked."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        contents = pool.map(partial(_read, source), records["location"].to_pylist())
        checked = [content if isinstance(content, CheckedImage) else _check(content, config) for content in contents]
    columns = {name: records[name].combine_chunks() for name in records.column_names if name != "location"}
    columns |= {name: [getattr(item, name) for item in checked] for name in CheckedImage._fields}
    metrics.TILES_READ.add(len(checked), run=run)
    return dataflow.conform(columns, TILES)


def _read(source: Source, location: str) -> bytes | CheckedImage:
    try:
        return source.read(location)
    except FileNotFoundError:
        return CheckedImage(error=f"missing file: {location}")
    except OSError as error:
        return CheckedImage(error=f"unreadable file: {location}: {error}")
    except TileImageError as error:
        return CheckedImage(error=str(error))


def _check(data: bytes, config: IngestConfig) -> CheckedImage:
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        image = decode(data, min_side_px=config.min_side_px, max_pixels=config.max_pixels)
    except TileImageError as error:
        return CheckedImage(data, sha256, error=str(error))
    return CheckedImage(data, sha256, image.width, image.height)


def _refuse_many_errors(errors: dict[str, str], records: pa.Table, max_error_share: float) -> None:
    if len(errors) == records.num_rows and all(map(_lacks_data, errors.values())):
        raise IngestError(
            f"none of {len(errors)} tiles has enough data ({next(iter(errors.values()))}): raise source.max_nodata_share, or "
            "correct the value that the scene declares as no data"
        )
    broken = {tile_id: error for tile_id, error in errors.items() if not _lacks_data(error)}
    share = len(broken) / records.num_rows
    if share <= max_error_share:
        return
    first = records.filter(pc.is_in(records["tile_id"], value_set=pa.array(list(broken), pa.string()))).slice(0, 5).to_pylist()
    bad = "; ".join(f"{record['location']} ({broken[record['tile_id']]})" for record in first)
    raise IngestError(
        f"{len(broken)} of {records.num_rows} tiles cannot be used, a share of {share:.3g} where ingest.max_error_share is "
        f"{max_error_share:g}. The first: {bad}. Repair or remove these files, or accept them as error "
        f"rows with --set ingest.max_error_share={min(1.0, share + 0.001):.3f}"
    )


def _lacks_data(error: str) -> bool:
    return error.partition(":")[0] == NO_DATA


def collect_labels(labels: pa.Table, tiles: Dataset, publication: Publication) -> None:
    """Write the indicators of known tiles as the `labels` dataset; rows of other tiles are counted and left out.

    Infinite values become null, counted per indicator in the facts. These also count zeros and name the most frequent value
    with its count: whether a 0, or a value that neighbours share, is a measurement is the probe's to decide. Raises
    :class:`SourceError` when a tile has two rows or when no row belongs to a tile.
    """
    indicators = [name for name in labels.column_names if name != "tile_id"]
    if not indicators:
        raise SourceError("the labels have no indicator: give at least one column of numbers beside tile_id")
    _refuse_repeated(labels["tile_id"].to_pylist())
    tile_ids = tiles.read(["tile_id"])["tile_id"].combine_chunks()
    is_known = pc.is_in(labels["tile_id"], value_set=tile_ids)
    known, unknown = labels.filter(is_known), labels.filter(pc.invert(is_known))
    if known.num_rows == 0:
        raise SourceError(
            f"none of the {labels.num_rows} label rows belongs to a tile: they are for {labels['tile_id'][0]} and the "
            f"like, the tiles are {tile_ids[0]} and the like; make the file names of both agree"
        )
    columns: dict[str, pa.ChunkedArray] = {"tile_id": known["tile_id"]}
    infinite: dict[str, int] = {}
    infinite_tile_ids: list[str] = []
    for name in indicators:
        values = known[name].cast(pa.float64())
        is_infinite = pc.fill_null(pc.is_inf(values), False)
        if count := pc.sum(is_infinite).as_py():
            infinite[name] = count
            infinite_tile_ids += known["tile_id"].filter(is_infinite).to_pylist()
        columns[name] = pc.if_else(pc.is_finite(values), values, pa.scalar(None, pa.float64()))  # NaN is null as well
    written = dataflow.conform(_combined(columns), labels_schema(indicators))
    publication.write_table(written)
    rejects = {"unknown tile": unknown.num_rows} if unknown.num_rows else {}
    publication.count(unit="tiles", rows_in=labels.num_rows, rows_out=known.num_rows, rejects=rejects)
    publication.facts |= {
        "infinite": infinite,
        "infinite_tile_ids": sorted(set(infinite_tile_ids))[:NUM_EXAMPLES],
        "zeros": {name: pc.sum(pc.equal(written[name], 0)).as_py() or 0 for name in indicators},
        "most_frequent": {name: _most_frequent(written[name]) for name in indicators},
        "unknown_tile_ids": unknown["tile_id"].to_pylist()[:NUM_EXAMPLES],
        "tiles_without_labels": len(tile_ids) - known.num_rows,
    }


def _most_frequent(values: pa.ChunkedArray) -> list[float | int] | None:
    """The most frequent value and its count; None where all are null."""
    counts = Counter(values.drop_null().to_pylist())
    return list(counts.most_common(1)[0]) if counts else None


def _combined(columns: dict[str, pa.ChunkedArray]) -> dict[str, pa.Array]:
    return {name: column.combine_chunks() for name, column in columns.items()}


def _refuse_repeated(tile_ids: list[str]) -> None:
    repeated = [tile_id for tile_id, count in Counter(tile_ids).items() if count > 1]
    if repeated:
        raise SourceError(
            f"{len(repeated)} tiles have more than one row of labels, {repeated[0]} among them: keep one row per tile"
        )
