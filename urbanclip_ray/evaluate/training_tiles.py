"""Which tiles the weights behind a representation were trained on: what no test tile of an honest split may be among."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray.config import SplitConfig
from urbanclip_ray.evaluate.fits import Draw
from urbanclip_ray.evaluate.splits import PARTS
from urbanclip_ray.storage import Dataset, StorageError, exists, find_dataset, join, list_files

UNTRAINED = "-untrained-"  # in the digest of weights that were drawn and never trained


def training_tiles(embeddings: Dataset) -> pa.Array | None:
    """Ids of the tiles that its weights were trained on, empty where none were; None where that cannot be found out.

    A trained baseline holds their ids. Other weights name the shards that they were made from by the sha256 of their manifest,
    and shards lie beside them in the run.
    """
    facts = embeddings.manifest.facts.get("weights")
    facts = facts if isinstance(facts, dict) else {}
    if UNTRAINED in str(facts.get("digest", "")):
        return pa.array([], pa.string())
    if "shards" in embeddings.manifest.parents:
        return _ids(_run_of(embeddings.uri), embeddings.manifest.parents["shards"])
    pretrained = _find(str(facts["uri"]).rsplit("/", 1)[0]) if "uri" in facts else None
    if pretrained is not None and pretrained.manifest.stage.startswith("trained_"):
        return pretrained.read(["tile_id"])["tile_id"].combine_chunks()
    if pretrained is None or "shards" not in pretrained.manifest.parents:
        return None
    return _ids(_run_of(pretrained.uri), pretrained.manifest.parents["shards"])


def transductive_splits(
    parts: dict[Draw, np.ndarray], tile_ids: pa.ChunkedArray, embeddings: dict[str, Dataset], split: SplitConfig
) -> tuple[str, ...]:
    """The splits with a test tile that some of the weights were trained on.

    Where it cannot be found out what some were trained on, all but the outer split are taken for such.
    """
    kinds = tuple(dict.fromkeys(draw.split for draw in parts))
    found = [training_tiles(dataset) for dataset in embeddings.values()]
    seen: set[str] = {split.outer} if split.transductive else set()
    if any(ids is None for ids in found):
        return tuple(kind for kind in kinds if kind != split.outer or kind in seen)
    for ids in found:
        known = pc.is_in(tile_ids, value_set=ids).to_numpy()
        seen |= {draw.split for draw, own in parts.items() if (known & (own == PARTS.index("test"))).any()}
    return tuple(kind for kind in kinds if kind in seen)


def _find(uri: str) -> Dataset | None:
    try:
        return find_dataset(uri)
    except StorageError:  # a manifest of something else
        return None


def _run_of(uri: str) -> str:
    """The run that a dataset `<run>/<stage>/<digest>` belongs to."""
    return uri.rstrip("/").rsplit("/", 2)[0]


def _ids(run: str, manifest_sha256: str) -> pa.Array | None:
    folder = join(run, "shards")
    if not exists(folder):
        return None
    for info in list_files(folder):
        if info.base_name == "manifest.json":
            shards = _find(join(folder, str(info.path).rsplit("/", 2)[1]))
            if shards is not None and shards.sha256 == manifest_sha256:
                return shards.read(["tile_id"])["tile_id"].combine_chunks()
    return None
