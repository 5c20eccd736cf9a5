"""Whether sentences fit their tiles, by the cosine of a CLIP-like model's embeddings.

A score is the model's opinion: weights that were pretrained on the same captions have learned their mistakes, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from urbanclip_ray import dataflow
from urbanclip_ray.config import ConsistencyConfig, PixelsConfig
from urbanclip_ray.schema import SCORED_PAIRS
from urbanclip_ray.storage import Dataset

LOW_CONSISTENCY = "low consistency"
TEXTS_PER_FORWARD = 256
TEXTS = pa.schema([pa.field("tile_id", pa.string()), pa.field("texts", pa.list_(pa.string()))])
SCORES = pa.schema(
    [pa.field("tile_id", pa.string()), pa.field("region", pa.string()), pa.field("scores", pa.list_(pa.float32()))]
)
ROWS_PER_TASK = 8192  # every task builds an index of all scored tiles


def reject_inconsistent(
    pairs: ray.data.Dataset, tiles: Dataset, weights_uri: str, config: ConsistencyConfig, pixels: PixelsConfig
) -> tuple[ray.data.Dataset, dict[str, Any]]:
    """`pairs` in SCORED_PAIRS, its sentences of low scores rejected, and what is to be said of it in the manifest."""
    pairs = pairs.materialize()  # read for the scores, and again to apply them
    scores = score_sentences(pairs, tiles, weights_uri, config, pixels)
    bounds = find_thresholds(scores, config)
    shared = ray.put(scores)

    def apply(rows: pa.Table) -> pa.Table:
        return apply_thresholds(rows, ray.get(shared), bounds)

    judged = dataflow.map_tables(pairs, apply, batch_size=ROWS_PER_TASK)
    return judged, {"weights": weights_uri, "least_score_kept": bounds}


def find_thresholds(scores: pa.Table, config: ConsistencyConfig) -> dict[str, float]:
    """The least score that is kept, by region: `min_score`, or that of the last of its `top_share` best sentences."""
    values = pc.list_flatten(scores["scores"]).to_numpy()
    regions = scores["region"].take(pc.list_parent_indices(scores["scores"])).to_numpy(zero_copy_only=False)
    bounds = {}
    for region in sorted(set(regions)):
        best_first = np.sort(values[regions == region])[::-1]
        last = float(best_first[int(np.ceil(config.top_share * len(best_first))) - 1])
        bounds[region] = max(config.min_score, last) if config.top_share < 1 else config.min_score
    return bounds


def score_sentences(
    pairs: ray.data.Dataset, tiles: Dataset, weights_uri: str, config: ConsistencyConfig, pixels: PixelsConfig
) -> pa.Table:
    """Scores of every tile's sentences, in order, in SCORES; tiles without a sentence are not shown to the model."""
    texts = pa.concat_tables([TEXTS.empty_table(), *dataflow.collect(pairs.select_columns(TEXTS.names))])
    texts = texts.filter(pc.greater(pc.list_value_length(texts["texts"]), 0))
    rows = dataflow.read_for_actors(tiles, ["tile_id", "region", "image"], config.num_actors).map_batches(
        ScoreBatch,
        fn_constructor_kwargs={"weights_uri": weights_uri, "texts": ray.put(texts), "pixels": pixels},
        batch_size=config.tiles_per_batch,
        batch_format="pyarrow",
        **dataflow.actors(
            config.num_actors,
            config,
            num_rows=tiles.manifest.rows_out,
            rows_per_batch=config.tiles_per_batch,
        ),
    )
    return pa.concat_tables([SCORES.empty_table(), *dataflow.collect(rows)]).combine_chunks()


def apply_thresholds(pairs: pa.Table, scores: pa.Table, bounds: dict[str, float]) -> pa.Table:
    """PAIRS with the scores of their sentences, in SCORED_PAIRS; those below their region's bound are rejected."""
    places = pc.index_in(pairs["tile_id"], value_set=scores["tile_id"])
    scored = scores.select(["region", "scores"]).take(places).to_pylist()
    rows = [
        _apply(row, item["scores"] or [], bounds.get(item["region"], 0.0))  # a row without sentences has neither
        for row, item in zip(pairs.to_pylist(), scored, strict=True)
    ]
    return dataflow.conform({name: [row[name] for row in rows] for name in SCORED_PAIRS.names}, SCORED_PAIRS)


def _apply(row: dict[str, Any], scores: list[float], least: float) -> dict[str, Any]:
    """A row of pairs with its scores; sentences below `least` are rejected, after those that were before."""
    kept = [(text, score) for text, score in zip(row["texts"], scores, strict=True) if score >= least]
    low = [(text, score) for text, score in zip(row["texts"], scores, strict=True) if score < least]
    return {
        "tile_id": row["tile_id"],
        "texts": [text for text, _ in kept],
        "rejected": row["rejected"] + [{"text": text, "reason": LOW_CONSISTENCY} for text, _ in low],
        "scores": [score for _, score in kept],
        "rejected_scores": [None] * len(row["rejected"]) + [score for _, score in low],
    }


class ScoreBatch:
    """A Ray Data actor around one model. Follows a batch of tiles to the scores of their sentences."""

    def __init__(self, weights_uri: str, texts: Any, pixels: PixelsConfig) -> None:
        import torch

        from urbanclip_ray.model.image_text import load_image_text

        self._model = load_image_text(weights_uri)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.module.to(self._device)
        self._texts = ray.get(texts)  # lies in Ray's shared memory, of which an actor keeps the places of the tiles alone
        self._places = {tile_id: place for place, tile_id in enumerate(self._texts["tile_id"].to_pylist())}
        self._pixels = pixels

    def __call__(self, batch: pa.Table) -> pa.Table:
        from urbanclip_ray.imagery import crop_margins, decode, to_square

        px = self._model.image_px
        has_text = [tile_id in self._places for tile_id in batch["tile_id"].to_pylist()]
        batch = batch.filter(pa.array(has_text, pa.bool_()))
        if batch.num_rows == 0:
            return SCORES.empty_table()
        images = [to_square(crop_margins(decode(image), self._pixels), px) for image in batch["image"].to_pylist()]
        tile_ids = batch["tile_id"].to_pylist()
        texts = self._texts["texts"].take([self._places[tile_id] for tile_id in tile_ids]).to_pylist()
        image = self._encode_images(np.array(images, np.uint8))
        text = self._encode_texts([sentence for sentences in texts for sentence in sentences])
        places = np.repeat(np.arange(len(texts)), [len(sentences) for sentences in texts])
        cosines = (image[places] * text).sum(axis=1)
        ends = np.cumsum([len(sentences) for sentences in texts])[:-1]
        columns = {
            "tile_id": tile_ids,
            "region": batch["region"],
            "scores": [part.tolist() for part in np.split(cosines, ends)],
        }
        return dataflow.conform(columns, SCORES)

    def _encode_images(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._model.encode_images(torch.from_numpy(pixels).to(self._device)).cpu().numpy()

    def _encode_texts(self, sentences: list[str]) -> np.ndarray:
        import torch

        parts = [sentences[at : at + TEXTS_PER_FORWARD] for at in range(0, len(sentences), TEXTS_PER_FORWARD)]
        with torch.inference_mode():
            return np.concatenate([self._model.encode_texts(part, self._device).cpu().numpy() for part in parts])
