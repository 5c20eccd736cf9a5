"""embeddings + pairs + splits + weights ─▶ retrieval: R@k of the held-out tiles against all their sentences."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from urbanclip_ray import dataflow
from urbanclip_ray.config import ActorsConfig
from urbanclip_ray.model.texts import TextMode, shown_texts
from urbanclip_ray.storage import Dataset, Publication

if TYPE_CHECKING:
    from urbanclip_ray.model.weights import LoadedModel

TEXTS_PER_BATCH = 256


def measure_retrieval(
    embeddings: Dataset,
    pairs: Dataset,
    splits: Dataset,
    weights_uri: str,
    outer: str,
    text_mode: TextMode,
    publication: Publication,
    each: ActorsConfig = dataflow.ANY_ACTOR,
) -> None:
    """Publishes `retrieval.json`: per part (val, test) of the outer split's first draw, recall and ranks both ways, and chance.

    Every accepted sentence of a part's tiles is in the gallery, repeated ones too; every whole description where the model
    was trained on those. `each` is what the actor that encodes them is given. By the benchmarks' convention the twin of a
    text on another tile is a miss; `equal_texts` has the figures in which it is true.
    """
    import torch

    from urbanclip_ray.model.recall import chance_recall, recall_at_k

    dataflow.connect()
    chosen = (pc.field("split") == outer) & (pc.field("seed") == 0)
    parts = splits.read(["tile_id", "part"], filters=chosen)
    images = embeddings.read(["tile_id", "embedding"])
    images = images.append_column("part", parts["part"].take(pc.index_in(images["tile_id"], parts["tile_id"])))
    texts = pairs.read(["tile_id", "texts"])
    rows = {part: images.filter(pc.field("part") == part).sort_by("tile_id") for part in ("val", "test")}
    galleries = {part: _gallery(texts, of_part["tile_id"], text_mode) for part, of_part in rows.items()}
    different = pa.concat_tables(galleries.values())["text"].combine_chunks().dictionary_encode().dictionary
    vectors = torch.from_numpy(encode_texts(different, weights_uri, each)) if len(different) else torch.empty(0)
    results, num_texts = [], 0
    for part, gallery in galleries.items():
        if gallery.num_rows == 0:
            continue
        same_text = torch.from_numpy(pc.index_in(gallery["text"], different).to_numpy().astype(np.int64))
        owner = torch.tensor(gallery["owner"].to_pylist())
        image, text = torch.from_numpy(np.stack(rows[part]["embedding"].to_numpy())), vectors[same_text]
        results.append(
            {
                "part": part,
                "num_images": rows[part].num_rows,
                "num_texts": len(owner),
                "num_different_texts": len(set(same_text.tolist())),
                **recall_at_k(image, text, owner),
                "equal_texts": recall_at_k(image, text, owner, same_text),
                "chance": chance_recall(owner, rows[part].num_rows),
            }
        )
        num_texts += len(owner)
    publication.write_file("retrieval.json", json.dumps(results, indent=1).encode())
    publication.count(unit="texts", rows_in=num_texts, rows_out=num_texts, rejects={})


def _gallery(pairs: pa.Table, tile_ids: pa.ChunkedArray, text_mode: TextMode) -> pa.Table:
    """owner (place of its tile in `tile_ids`) and text of everything to be found."""
    pairs = pairs.filter(pc.is_in(pairs["tile_id"], value_set=tile_ids))
    shown = [shown_texts(texts, text_mode) if texts else [] for texts in pairs["texts"].to_pylist()]
    owners = pc.index_in(pairs["tile_id"], value_set=tile_ids).to_pylist()
    return pa.table(
        {
            "owner": pa.array([owner for owner, texts in zip(owners, shown, strict=True) for _ in texts], pa.int64()),
            "text": pa.array([text for texts in shown for text in texts], pa.string()),
        }
    )


def encode_texts(texts: pa.Array, weights_uri: str, each: ActorsConfig = dataflow.ANY_ACTOR) -> np.ndarray:
    """The embedding [texts, width] of every text, by Ray Data. Equal texts given once are equally near to every image."""
    rows = ray.data.from_arrow(pa.table({"text": texts})).map_batches(
        TextBatch,
        fn_constructor_kwargs={"weights_uri": weights_uri},
        batch_size=TEXTS_PER_BATCH,
        batch_format="numpy",
        **dataflow.actors(1, each),
    )
    return np.concatenate([batch["embedding"] for batch in rows.iter_batches(batch_size=None, batch_format="numpy")])


class TextBatch:
    """A Ray Data actor around one text encoder."""

    def __init__(self, weights_uri: str) -> None:
        import torch

        from urbanclip_ray.model.weights import load_model

        self._loaded = load_model(weights_uri)
        self._loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"embedding": embed_texts(self._loaded, [str(text) for text in batch["text"]])}


def embed_texts(loaded: LoadedModel, texts: list[str]) -> np.ndarray:
    """float32 [texts, width], L2-normalised: the text side of the contrastive pair, computed where the model lies."""
    import torch

    tokens = loaded.tokenizer.encode(texts).to(loaded.model.inner.logit_scale.device)
    with torch.inference_mode():
        vectors: np.ndarray = loaded.model.encode_text(tokens)[0].cpu().numpy()
    return vectors
