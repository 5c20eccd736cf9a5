"""Column names and one pyarrow schema per dataset of the walk.

Every box of the walk is a Parquet dataset; these are its columns. A stage writes exactly these, in this order.
"""

from __future__ import annotations

import hashlib
import re

import pyarrow as pa

FORMAT_VERSION = 1  # part of every digest: raise it when the meaning of a column or of a stage changes

TILES = pa.schema(
    [
        pa.field("tile_id", pa.string(), nullable=False),  # region/stem by default
        pa.field("region", pa.string(), nullable=False),  # the city, or the sub-folder
        pa.field("image", pa.binary()),  # the source's encoded bytes, untouched; null where there is none
        pa.field("sha256", pa.string()),
        pa.field("width", pa.int32()),  # px
        pa.field("height", pa.int32()),  # px
        pa.field("lon", pa.float64()),  # WGS84 degrees, tile centre; null where unknown
        pa.field("lat", pa.float64()),
        pa.field("west", pa.float64()),
        pa.field("south", pa.float64()),
        pa.field("east", pa.float64()),
        pa.field("north", pa.float64()),
        pa.field("scheme", pa.string(), nullable=False),  # web_mercator, baidu, geotiff, plate_carree, none
        pa.field("group", pa.string()),  # e.g. a zipcode
        pa.field("error", pa.string()),  # why the image cannot be used; null where it can
    ]
)

CAPTIONS = pa.schema(
    [
        pa.field("tile_id", pa.string(), nullable=False),
        pa.field("caption_key", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)

STORED_CAPTIONS = pa.schema(  # the caption store, shared by all runs
    [
        pa.field("caption_key", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the tile
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("revision", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("decoding", pa.string(), nullable=False),  # JSON, with the margins cut off the tile
    ]
)

FAILED_CAPTIONS = pa.schema(  # in the caption store: tiles that a captioner could not describe
    [
        pa.field("sha256", pa.string(), nullable=False),  # of the tile
        pa.field("tile_id", pa.string(), nullable=False),  # in the run that tried it; others may call it otherwise
        pa.field("reason", pa.string(), nullable=False),
        pa.field("num_attempts", pa.int32(), nullable=False),
        pa.field("failed_at", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("revision", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("decoding", pa.string(), nullable=False),
    ]
)

REJECTED = pa.struct([pa.field("text", pa.string()), pa.field("reason", pa.string())])

PAIRS = pa.schema(
    [
        pa.field("tile_id", pa.string(), nullable=False),
        pa.field("texts", pa.list_(pa.string()), nullable=False),  # accepted sentences, in order
        pa.field("rejected", pa.list_(REJECTED), nullable=False),
    ]
)

SCORED_PAIRS = PAIRS.append(  # where sentences were scored against their tiles
    pa.field("scores", pa.list_(pa.float32()), nullable=False)  # of `texts`
).append(pa.field("rejected_scores", pa.list_(pa.float32()), nullable=False))  # of `rejected`; null where it was not scored

SPLITS = pa.schema(
    [
        pa.field("tile_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # source, random, blocks, group, city, transfer
        pa.field("seed", pa.int32(), nullable=False),  # the draw of train and validation
        pa.field("fold", pa.int32(), nullable=False),
        pa.field("part", pa.string(), nullable=False),  # train, val, test, or buffer: too near to test, and left out
    ]
)

SHARDS = pa.schema(
    [
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("tile_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("texts", pa.list_(pa.string()), nullable=False),
        pa.field("part", pa.string(), nullable=False),  # train or val: test rows are never packed
    ]
)

PREDICTIONS = pa.schema(
    [
        pa.field("tile_id", pa.string(), nullable=False),
        pa.field("indicator", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("fold", pa.int32(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("y", pa.float64(), nullable=False),
        pa.field("y_pred", pa.float64(), nullable=False),
        pa.field("space", pa.string(), nullable=False),  # raw, log, log1p, or z-score of one of them
    ]
)

TRIALS = pa.schema(
    [
        pa.field("trial", pa.int32(), nullable=False),  # 0 is the config as it stands
        pa.field("values", pa.string(), nullable=False),  # JSON: the searched keys and their values
        pa.field("state", pa.string(), nullable=False),  # finished, stopped, failed
        pa.field("samples", pa.int64(), nullable=False),  # training rows seen at its last report
        pa.field("total_samples", pa.int64()),  # of its whole run; null where it never reported
        pa.field("score", pa.float64()),  # R² on validation tiles at its last report
        pa.field("best_score", pa.float64()),  # the highest of all its reports
        pa.field("weights", pa.string()),  # URI of its pretraining; null unless finished
        pa.field("error", pa.string()),  # why it failed
        pa.field("seconds", pa.float64()),  # of wall time that its pretraining had taken at its last report
        pa.field("record", pa.string(), nullable=False),  # URI of the folder with its reports.json, however it ended
    ]
)


def labels_schema(indicators: list[str]) -> pa.Schema:
    """Labels: `tile_id` and one nullable float column per indicator, in the indicator's own unit."""
    return pa.schema([pa.field("tile_id", pa.string(), nullable=False)] + [pa.field(name, pa.float64()) for name in indicators])


def embeddings_schema(width: int) -> pa.Schema:
    """Embeddings: a float32 vector of `width` numbers per tile and the digest of the weights that made it."""
    return pa.schema(
        [
            pa.field("tile_id", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), width), nullable=False),
            pa.field("weights", pa.string(), nullable=False),
        ]
    )


def caption_key(
    sha256: str, model: str, revision: str, prompt: str, decoding: dict[str, float | int | str], sample: int
) -> str:
    """What a caption is known by: everything that made it. The same key never needs to be generated twice."""
    fields = [sha256, model, revision, prompt, *(f"{key}={decoding[key]}" for key in sorted(decoding)), str(sample)]
    return hashlib.sha256("\x1f".join(fields).encode()).hexdigest()


def is_safe_name(name: str) -> bool:
    """Whether a name may become one folder of a path: no separators, no leading dot, nothing exotic."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name) is not None
