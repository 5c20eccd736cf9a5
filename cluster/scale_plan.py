"""The table of README.md's plan for 1,000 GPUs and a billion tiles: `python cluster/scale_plan.py` prints it.

What was measured comes with its source, what was not is an assumption and called so; the rest is arithmetic. A test holds the
table in the README, and the figures that the code itself decides, against this module.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from urbanclip_ray.config import IngestConfig, PackConfig
from urbanclip_ray.sources.ingest import BATCHES_PER_FILE

NUM_TILES = 1_000_000_000
NUM_GPUS = 1024  # 128 machines of 8: a thousand, as a number that cuts a batch

# Measured.
TILE_BYTES = 28_000  # mean of 2,000 JPEGs of 256 px of web map tiles at zoom 16
TEXT_BYTES = 735  # of a tile: 36,181 released sentences of 7,974 tiles, 5.86 MB
SMALL_TILES, LARGE_TILES = 20_000, 200_000
SMALL_MB, LARGE_MB = 1723, 1897  # tests/benchmarks: scale_memory, the peak of all processes with so many tiles
WALK_TILES_PER_S = 495  # tests/benchmarks: scale_rate, two cores: ingest, land_cover captions and refinement
READ_TILES_PER_S = 1145  # tests/benchmarks: tile_reading, two cores
MEASURED_CORES = 2
MANIFEST_BYTES, MANIFEST_MEMORY_BYTES = 168, 720  # of a file's entry, as JSON and as the object that it becomes
PLAN_BYTES = 41  # of a row, in every rank: train/order.py, peak
PARAMETERS, EMBEDDING_WIDTH = 638_450_177, 768  # of coca_ViT-L-14
WAIT_S = 0.05  # for a small file of object storage (sources/ingest.py)

# Assumed.
CORES = 128  # of ingest: 8 machines of cluster/aws.yaml
SAMPLES_PER_GPU_S = 200
ROWS_PER_GPU = 64  # of a step
LINK_BYTES_PER_S = 50e9  # of a GPU: 3,200 Gbit/s of a machine of eight
STREAM_BYTES_PER_S = 100e6  # one connection to S3
PREFIX_GETS_PER_S = 5_500  # S3's documented least for one prefix
PUT_DOLLARS, GET_DOLLARS = 0.005 / 1000, 0.0004 / 1000  # S3 Standard; check the price list
STORAGE_TIERS = ((50_000, 0.023), (450_000, 0.022), (float("inf"), 0.021))  # GB, dollars a GB and month
HEAD_BYTES = 16 * 2**30  # cluster/aws.yaml: m7i.xlarge
PARTS_OF_FILE = 5  # requests of a shard's upload: three parts, begin and end
GETS_OF_FILE = 3  # requests to read a shard: its footer and its columns

FP32_BYTES, ADAM_VALUES, MODALITIES = 4, 3, 2
HOUR_S, DAY_S = 3600.0, 86_400.0

BILLIONS = f"{NUM_TILES / 1e9:g}"
TILE_FILES = NUM_TILES / (IngestConfig().tiles_per_batch * BATCHES_PER_FILE)
SHARD_FILES = NUM_TILES / PackConfig().rows_per_file


class Row(NamedTuple):
    """What is asked, how it follows, and what comes out."""

    what: str
    origin: str
    result: str


def dollars_a_month(gigabytes: float) -> float:
    """Of S3 Standard, in its tiers."""
    cost = 0.0
    for size, price in STORAGE_TIERS:
        cost += min(gigabytes, size) * price
        gigabytes = max(0.0, gigabytes - size)
    return cost


def tile_rows() -> list[Row]:
    """Tiles as they lie in storage, and what makes and packs them."""
    stored_gb = 2 * NUM_TILES * TILE_BYTES / 1e9
    walk_per_core = WALK_TILES_PER_S / MEASURED_CORES
    return [
        Row(
            "Bytes stored",
            f"{BILLIONS} billion tiles × {TILE_BYTES / 1000:g} kB, as tiles and as shards",
            f"{stored_gb / 1000:.0f} TB",
        ),
        Row("Dollars a month at S3", "its tiers", f"{dollars_a_month(stored_gb):,.0f}"),
        Row(
            "Requests of ingest",
            "one GET a tile of single files",
            f"{BILLIONS} billion, {NUM_TILES * GET_DOLLARS:,.0f} dollars",
        ),
        Row(
            "Time of ingest, rule-based captions and refinement",
            f"{walk_per_core:g} tiles/s of a core, {CORES} cores",
            f"{NUM_TILES / walk_per_core / CORES / HOUR_S:.1f} hours",
        ),
        Row(
            "Requests a second of it",
            f"{CORES} × {walk_per_core:g}; S3 gives a prefix {PREFIX_GETS_PER_S:,}",
            f"{CORES * walk_per_core:,.0f}, so at least {ceil(CORES * walk_per_core / PREFIX_GETS_PER_S)} prefixes",
        ),
        Row(
            "Files of tiles and of shards",
            f"{IngestConfig().tiles_per_batch * BATCHES_PER_FILE} and {PackConfig().rows_per_file:,} rows a file",
            f"{TILE_FILES / 1e6:.1f} and {SHARD_FILES / 1e6:.2f} million",
        ),
        Row(
            "Dollars to write them",
            f"one request a file of tiles, {PARTS_OF_FILE} a shard",
            f"{(TILE_FILES + PARTS_OF_FILE * SHARD_FILES) * PUT_DOLLARS:,.0f}",
        ),
        Row("Bytes moved by packing", "all tiles between all nodes, to mix them", f"{NUM_TILES * TILE_BYTES / 1e12:.0f} TB"),
    ]


def epoch_rows() -> list[Row]:
    """One pass of the training over all tiles."""
    read_per_core = READ_TILES_PER_S / MEASURED_CORES
    tiles_per_s = NUM_GPUS * SAMPLES_PER_GPU_S
    return [
        Row(
            "An epoch's reading",
            f"every tile once, {GETS_OF_FILE} requests a shard",
            f"{NUM_TILES * TILE_BYTES / 1e12:.0f} TB, {SHARD_FILES * GETS_OF_FILE * GET_DOLLARS:.1f} dollars",
        ),
        Row(
            "An epoch's time",
            f"{SAMPLES_PER_GPU_S} samples/s of a GPU (assumed), {NUM_GPUS:,} GPUs",
            f"{NUM_TILES / tiles_per_s / HOUR_S:.1f} hours, {tiles_per_s * TILE_BYTES / 1e9:.1f} GB/s from S3",
        ),
        Row(
            "Cores to decode for it",
            f"{read_per_core:g} tiles/s of a core",
            f"{tiles_per_s / read_per_core:,.0f}, {tiles_per_s / read_per_core / NUM_GPUS:.2f} a GPU",
        ),
    ]


def step_rows() -> list[Row]:
    """One step of the training, and a checkpoint."""
    batch, step_s = NUM_GPUS * ROWS_PER_GPU, ROWS_PER_GPU / SAMPLES_PER_GPU_S
    others = (NUM_GPUS - 1) / NUM_GPUS
    gathered = MODALITIES * batch * EMBEDDING_WIDTH * FP32_BYTES * others
    reduced = 2 * PARAMETERS * FP32_BYTES * others
    checkpoint = PARAMETERS * FP32_BYTES * ADAM_VALUES
    commit_s = NUM_GPUS * WAIT_S
    return [
        Row("Negatives of a row", f"{NUM_GPUS:,} × {ROWS_PER_GPU} rows, less itself", f"{batch - 1:,}"),
        Row(
            "Gather traffic a step",
            f"two vectors of {EMBEDDING_WIDTH} floats a row, received by each GPU",
            f"{gathered / 1e6:.0f} MB, {1000 * gathered / LINK_BYTES_PER_S:.0f} ms of its link",
        ),
        Row(
            "Gradients a step",
            f"{PARAMETERS / 1e6:.0f} million fp32 values, reduced and handed back",
            f"{reduced / 1e9:.1f} GB, {1000 * reduced / LINK_BYTES_PER_S:.0f} ms of {1000 * step_s:.0f} ms a step",
        ),
        Row(
            "A checkpoint",
            "weights and two moments in fp32, a share of a GPU each",
            f"{checkpoint / 1e9:.2f} GB, {checkpoint / NUM_GPUS / 1e6:.1f} MB and 2 files a GPU",
        ),
        Row(
            "Its time",
            f"upload of a share {checkpoint / NUM_GPUS / STREAM_BYTES_PER_S:.2f} s; rank 0 reads {NUM_GPUS:,} indexes in turn",
            f"{commit_s:.0f} s, so no oftener than every {commit_s / step_s:.0f} steps",
        ),
    ]


def process_rows() -> list[Row]:
    """What single processes hold and read: the first things that break."""
    listed = (LARGE_MB - SMALL_MB) * 1e6 / (LARGE_TILES - SMALL_TILES)
    published_s = NUM_TILES * TILE_BYTES / STREAM_BYTES_PER_S + TILE_FILES * WAIT_S
    return [
        Row(
            "Memory of the driver that lists the tiles",
            f"{listed:.0f} bytes a tile",
            f"{NUM_TILES * listed / 1e9:,.0f} GB; {_fit(listed)}",
        ),
        Row(
            "Memory of the driver that packs",
            f"{TEXT_BYTES} bytes of text a tile, three times over",
            f"{3 * NUM_TILES * TEXT_BYTES / 1e9:,.0f} GB; {_fit(3 * TEXT_BYTES)}",
        ),
        Row(
            "Time of the manifest of tiles",
            "the driver reads all files back, one after another, for their checksums",
            f"{published_s / DAY_S:.1f} days",
        ),
        Row(
            "Manifest of shards, read by every rank",
            f"{SHARD_FILES / 1e6:.2f} million entries of {MANIFEST_BYTES} bytes",
            f"{SHARD_FILES * MANIFEST_BYTES / 1e6:.0f} MB, {SHARD_FILES * MANIFEST_MEMORY_BYTES / 1e9:.1f} GB of memory, "
            f"{NUM_GPUS * SHARD_FILES * MANIFEST_BYTES / 1e9:.0f} GB moved at every start",
        ),
        Row(
            "Plan of an epoch in every rank",
            f"{PLAN_BYTES} bytes a row",
            f"{NUM_TILES * PLAN_BYTES / 1e9:.0f} GB, {8 * NUM_TILES * PLAN_BYTES / 1e9:.0f} GB on a machine of eight",
        ),
    ]


def _fit(bytes_per_tile: float) -> str:
    """How many tiles a head holds, beside what its processes take for a few."""
    return f"{HEAD_BYTES / 2**30:.0f} GiB hold {(HEAD_BYTES - SMALL_MB * 1e6) / bytes_per_tile / 1e6:.0f} million"


def rows() -> list[Row]:
    """Of the whole plan, in the order of the walk."""
    return [*tile_rows(), *epoch_rows(), *step_rows(), *process_rows()]


def table() -> str:
    """The rows in Markdown."""
    lines = ["| what | from | comes out at |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
