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
SCORES = pa.schema([pa.field("tile_id", pa.string()), pa.field("scores", pa.list_(pa.float32()))])


def reject_inconsistent(
    pairs: pa.Table, tiles: Dataset, weights_uri: str, config: ConsistencyConfig, pixels: PixelsConfig
) -> tuple[pa.Table, dict[str, Any]]:
    """`pairs` in SCORED_PAIRS, its sentences of low scores rejected, and what is to be said of it in the manifest."""
    scores = score_sentences(pairs, tiles, weights_uri, config, pixels)
    ids = tiles.read(["tile_id", "region"])
    regions = dict(zip(ids["tile_id"].to_pylist(), ids["region"].to_pylist(), strict=True))
    bounds = find_thresholds(scores, regions, config)
    rows = [_apply(row, scores.get(row["tile_id"], []), bounds[regions[row["tile_id"]]]) for row in pairs.to_pylist()]
    columns = {name: [row[name] for row in rows] for name in SCORED_PAIRS.names}
    return dataflow.conform(columns, SCORED_PAIRS), {"weights": weights_uri, "least_score_kept": bounds}


def find_thresholds(scores: dict[str, list[float]], regions: dict[str, str], config: ConsistencyConfig) -> dict[str, float]:
    """The least score that is kept, by region: `min_score`, or that of the last of its `top_share` best sentences."""
    by_region: dict[str, list[float]] = {region: [] for region in sorted(set(regions.values()))}
    for tile_id, values in scores.items():
        by_region[regions[tile_id]] += values
    bounds = {}
    for region, values in by_region.items():
        num_kept = int(np.ceil(config.top_share * len(values)))
        last = sorted(values, reverse=True)[num_kept - 1] if values else config.min_score
        bounds[region] = max(config.min_score, last) if config.top_share < 1 else config.min_score
    return bounds


def score_sentences(
    pairs: pa.Table, tiles: Dataset, weights_uri: str, config: ConsistencyConfig, pixels: PixelsConfig
) -> dict[str, list[float]]:
    """By tile id the scores of its sentences, in order; tiles without a sentence are not shown to the model."""
    texts = pairs.filter(pc.greater(pc.list_value_length(pairs["texts"]), 0)).select(["tile_id", "texts"])
    rows = dataflow.read_for_actors(tiles, ["tile_id", "image"]).map_batches(
        ScoreBatch,
        fn_constructor_kwargs={"weights_uri": weights_uri, "texts": ray.put(texts), "pixels": pixels},
        batch_size=config.tiles_per_batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.num_actors),
        **dataflow.actor_options(config.gpus_per_actor),
    )
    return {row["tile_id"]: row["scores"] for table in dataflow.collect(rows) for row in table.to_pylist()}


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
        table = ray.get(texts)
        self._texts = dict(zip(table["tile_id"].to_pylist(), table["texts"].to_pylist(), strict=True))
        self._pixels = pixels

    def __call__(self, batch: pa.Table) -> pa.Table:
        from urbanclip_ray.imagery import crop_margins, decode, to_square

        px = self._model.image_px
        batch = batch.filter(pc.is_in(batch["tile_id"], value_set=pa.array(self._texts, pa.string())))
        if batch.num_rows == 0:
            return SCORES.empty_table()
        images = [to_square(crop_margins(decode(image), self._pixels), px) for image in batch["image"].to_pylist()]
        tile_ids = batch["tile_id"].to_pylist()
        texts = [self._texts[tile_id] for tile_id in tile_ids]
        image = self._encode_images(np.array(images, np.uint8))
        text = self._encode_texts([sentence for sentences in texts for sentence in sentences])
        places = np.repeat(np.arange(len(texts)), [len(sentences) for sentences in texts])
        cosines = (image[places] * text).sum(axis=1)
        ends = np.cumsum([len(sentences) for sentences in texts])[:-1]
        columns = {"tile_id": tile_ids, "scores": [part.tolist() for part in np.split(cosines, ends)]}
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
