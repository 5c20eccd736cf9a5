"""A few tiles, drawn with a seed, and their captions: what a preview shows and a plan measures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from urbanclip_ray import dataflow
from urbanclip_ray.captioners.caption import (
    TILE_COLUMNS,
    CaptionBatch,
    CaptionWork,
    describe_missing,
    describe_rows,
    job_in,
    refuse_no_captions,
)
from urbanclip_ray.captioners.projection import project
from urbanclip_ray.storage import Dataset

SAMPLE_SEED = 0


def draw_tiles(tiles: Dataset, tile_ids: Sequence[str], num_tiles: int) -> pa.Table:
    """`TILE_COLUMNS` of at most `num_tiles` of these tiles, the same ones every time, in the order of their ids."""
    dataflow.connect()
    order = np.random.default_rng(SAMPLE_SEED).permutation(sorted(tile_ids))
    drawn = pa.array(order[:num_tiles].tolist(), pa.string())

    def keep(batch: pa.Table) -> pa.Table:
        return batch.filter(pc.is_in(batch["tile_id"], value_set=drawn))

    return pa.concat_tables(dataflow.collect(dataflow.map_files(tiles, TILE_COLUMNS, keep))).sort_by("tile_id")


def caption_sample(tiles: pa.Table, work: CaptionWork) -> pa.Table:
    """Rows of captions of a few tiles (`TILE_COLUMNS`), whatever share of them fails; only what is not stored is generated."""
    refuse_no_captions(work)
    if work.model is None:
        return describe_tiles(tiles, work)
    index = work.read_index()
    questions = work.look_up(index.filter(pc.is_in(index["tile_id"], value_set=tiles["tile_id"])).sort_by("tile_id"))
    patient = work._replace(config=work.config.model_copy(update={"max_error_share": 1.0}))
    described = describe_missing(questions, patient)
    return pa.concat_tables(project(questions.index, described, work.given_texts(), questions.places))


def describe_tiles(tiles: pa.Table, work: CaptionWork, actor: type[CaptionBatch] = CaptionBatch) -> pa.Table:
    """What actors of this class make of a few tiles (with `prompts`, for a model), spread over all actors of the config."""
    size = work.config.tiles_per_batch
    rows = ray.data.from_arrow([tiles.slice(at, size) for at in range(0, tiles.num_rows, size)])
    if work.model is None:
        return pa.concat_tables(dataflow.collect(describe_rows(rows, work, actor)))
    prompts = pc.unique(pc.list_flatten(tiles["prompts"])).to_pylist()
    with job_in([work.store_of(prompt) for prompt in prompts], work) as named:
        return pa.concat_tables(dataflow.collect(describe_rows(rows, named, actor)))
