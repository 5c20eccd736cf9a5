"""tiles + weights ─embed─▶ embeddings: Ray Data actors hold the frozen image encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray import dataflow
from urbanclip_ray.config import EmbedConfig, Features, PixelsConfig, Precision
from urbanclip_ray.schema import embeddings_schema
from urbanclip_ray.storage import Dataset, Publication


def embed_tiles(
    tiles: Dataset,
    weights_uri: str,
    config: EmbedConfig,
    pixels: PixelsConfig,
    publication: Publication,
    untrained_seed: int | None = None,
    features: Features = "embedding",
) -> None:
    """One vector per readable tile; of our own weights' `embedding`, of length 1, it is the image side of the contrastive pair.

    `weights_uri` is what :func:`encoders.load_encoder` opens. With `untrained_seed` the weights' architecture is used with
    fresh random weights: the floor that pretraining must beat.
    """
    dataflow.connect()
    rows = dataflow.read_for_actors(tiles, ["tile_id", "image", "error"], config.num_actors).map_batches(
        EmbedBatch,
        fn_constructor_kwargs={
            "weights_uri": weights_uri,
            "views": config.views,
            "pixels": pixels,
            "untrained_seed": untrained_seed,
            "features": features,
            "precision": config.precision,
        },
        batch_size=config.tiles_per_batch,
        batch_format="pyarrow",
        **dataflow.actors(
            config.num_actors,
            config,
            num_rows=tiles.manifest.rows_out,
            rows_per_batch=config.tiles_per_batch,
        ),
    )
    dataflow.write(rows, publication, num_actors=config.num_actors)
    written = publication.read(["tile_id", "weights"])
    rows_in = tiles.manifest.rows_in
    publication.facts["weights"] = {"uri": weights_uri, "digest": written["weights"][0].as_py()}
    publication.count(
        unit="tiles",
        rows_in=rows_in,
        rows_out=written.num_rows,
        rejects={"unreadable tile": rows_in - written.num_rows},
    )


class EmbedBatch:
    """A Ray Data actor around one encoder. Follows a batch of tiles to rows of embeddings."""

    def __init__(
        self,
        weights_uri: str,
        views: int,
        pixels: PixelsConfig,
        untrained_seed: int | None,
        features: Features = "embedding",
        precision: Precision = "fp32",
    ) -> None:
        import torch

        from urbanclip_ray.evaluate.encoders import load_encoder
        from urbanclip_ray.train.precision import has_bf16_units, takes_bf16

        self._encoder = load_encoder(weights_uri, features, untrained_seed)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._encoder.module.to(self._device)
        self._is_bf16 = takes_bf16(precision, has_bf16_units(self._device), "embed.precision")
        self._views = views
        self._pixels = pixels

    def __call__(self, batch: pa.Table) -> pa.Table:
        from urbanclip_ray.imagery import crop_margins, decode, to_square

        image_px = self._encoder.shown.image_px
        batch = batch.filter(pc.is_null(batch["error"]))
        images = [to_square(crop_margins(decode(image), self._pixels), image_px) for image in batch["image"].to_pylist()]
        vectors = self._encode(np.array(images, np.uint8).reshape(-1, image_px, image_px, 3))
        columns: dict[str, Any] = {
            "tile_id": batch["tile_id"].combine_chunks(),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
            "weights": [self._encoder.digest] * batch.num_rows,
        }
        return dataflow.conform(columns, embeddings_schema(vectors.shape[1]))

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [rows, width]; with 8 views the mean over flips and quarter turns, of length 1 where one view's is."""
        import torch
        from torch.nn import functional as F

        from urbanclip_ray.model.preprocess import turned_views

        # a batch without readable tiles is shown one black tile, because its rows have a width too
        shown = pixels if len(pixels) else np.zeros((1, *pixels.shape[1:]), np.uint8)
        images = self._encoder.prepare(torch.from_numpy(shown).to(self._device))
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_bf16):
            total = torch.zeros(())
            for view in turned_views(images, self._views):
                total = total + self._encoder.module(view).float().cpu()
            mean = F.normalize(total, dim=-1) if self._encoder.unit_length else total / self._views
            vectors: np.ndarray = mean.numpy()[: len(pixels)]
        return vectors
