"""tiles + weights ─embed─▶ embeddings: Ray Data actors hold the frozen image encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from urbanclip_ray import dataflow
from urbanclip_ray.config import EmbedConfig, PixelsConfig
from urbanclip_ray.schema import embeddings_schema
from urbanclip_ray.storage import Dataset, Publication


def embed_tiles(
    tiles: Dataset,
    weights_uri: str,
    config: EmbedConfig,
    pixels: PixelsConfig,
    publication: Publication,
    untrained_seed: int | None = None,
) -> None:
    """One L2-normalised vector per readable tile, the image side of the contrastive pair.

    With `untrained_seed` the weights' architecture is used with fresh random weights: the floor that pretraining must beat.
    """
    dataflow.connect()
    rows = dataflow.read(tiles, ["tile_id", "image", "error"]).map_batches(
        EmbedBatch,
        fn_constructor_kwargs={
            "weights_uri": weights_uri,
            "views": config.views,
            "pixels": pixels,
            "untrained_seed": untrained_seed,
        },
        batch_size=config.tiles_per_batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.num_actors),
        num_gpus=config.gpus_per_actor or None,
    )
    dataflow.write(rows, publication)
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
    """A Ray Data actor around one model. Follows a batch of tiles to rows of embeddings."""

    def __init__(self, weights_uri: str, views: int, pixels: PixelsConfig, untrained_seed: int | None) -> None:
        import torch

        from urbanclip_ray.model.coca import build_model
        from urbanclip_ray.model.weights import load_model

        loaded = load_model(weights_uri)
        self._digest = loaded.digest
        self._model = loaded.model
        if untrained_seed is not None:
            self._model = build_model(loaded.model.config, untrained_seed).eval()
            self._digest = f"{loaded.digest}-untrained-{untrained_seed}"
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        self._views = views
        self._pixels = pixels

    def __call__(self, batch: pa.Table) -> pa.Table:
        from urbanclip_ray.imagery import crop_margins, decode, to_square

        batch = batch.filter(pc.is_null(batch["error"]))
        schema = embeddings_schema(self._model.embedding_width)
        if batch.num_rows == 0:
            return schema.empty_table()
        pixels = np.stack(
            [to_square(crop_margins(decode(image), self._pixels), self._model.image_px) for image in batch["image"].to_pylist()]
        )
        vectors = self._encode(pixels)
        columns: dict[str, Any] = {
            "tile_id": batch["tile_id"].combine_chunks(),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
            "weights": [self._digest] * batch.num_rows,
        }
        return dataflow.conform(columns, schema)

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [rows, width]; with 8 views the normalised mean over flips and quarter turns."""
        import torch
        from torch.nn import functional as F

        from urbanclip_ray.model.preprocess import normalise, turned_views

        images = normalise(torch.from_numpy(pixels).to(self._device))
        with torch.inference_mode():
            total = torch.zeros(())
            for view in turned_views(images, self._views):
                total = total + self._model.encode_image(view)[0].float().cpu()
            vectors: np.ndarray = F.normalize(total, dim=-1).numpy()
        return vectors
