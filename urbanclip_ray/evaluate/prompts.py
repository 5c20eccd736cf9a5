"""embeddings + weights ─▶ prompts: how near every tile is to each of a list of texts, as features for the probe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from urbanclip_ray.config import PromptsConfig
from urbanclip_ray.schema import embeddings_schema
from urbanclip_ray.storage import Dataset, Publication

TILES_PER_CHUNK = 65_536


def score_prompts(embeddings: Dataset, weights_uri: str, config: PromptsConfig, publication: Publication) -> None:
    """Publishes rows of the embeddings' schema: cosines of a tile and every text of `prompts.texts`, [prompts] a tile.

    Cosines of one text compare between tiles; those of different texts do not, as a text may be near to everything. The
    texts are in the facts, in the order of the columns. Raises ConfigError where the weights are not those of the
    embeddings.
    """
    from urbanclip_ray.evaluate.retrieval import embed_texts
    from urbanclip_ray.evaluate.search import load_matching

    texts = list(config.texts)
    directions = embed_texts(load_matching(embeddings, weights_uri), texts)
    schema = embeddings_schema(len(texts))
    table = embeddings.read(["tile_id", "embedding", "weights"])
    pieces = []
    for first in range(0, table.num_rows, TILES_PER_CHUNK):
        rows = table.slice(first, TILES_PER_CHUNK).combine_chunks()
        scores = vectors_of(rows) @ directions.T
        columns = [
            rows["tile_id"].combine_chunks(),
            pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), len(texts)),
            rows["weights"].combine_chunks(),
        ]
        pieces.append(pa.table(columns, schema=schema))
    publication.write_table(pa.concat_tables(pieces) if pieces else schema.empty_table())
    publication.facts["prompts"] = texts
    publication.count(unit="tiles", rows_in=table.num_rows, rows_out=table.num_rows, rejects={})


def vectors_of(rows: pa.Table) -> np.ndarray:
    """The column `embedding` as float32 [tiles, width]."""
    vectors = rows["embedding"].combine_chunks()
    matrix: np.ndarray = vectors.flatten().to_numpy().reshape(len(vectors), -1)
    return matrix


def nearest_tiles(prompts: Dataset, num_tiles: int) -> list[dict[str, Any]]:
    """For each prompt its `text`, and the `tiles` nearest to it with their `score`, nearest first."""
    rows = prompts.read(["tile_id", "embedding"])
    ids, scores = rows["tile_id"].to_pylist(), vectors_of(rows)
    found = []
    for column, text in enumerate(prompts.manifest.facts["prompts"]):
        order = np.argsort(-scores[:, column], kind="stable")[:num_tiles]
        tiles = [{"tile_id": ids[at], "score": float(scores[at, column])} for at in order]
        found.append({"text": text, "tiles": tiles})
    return found
