"""Tiles that the report shows by themselves: with their sentences, and as what was found for a few prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from urbanclip_ray.evaluate.prompts import nearest_tiles
from urbanclip_ray.evaluate.thumbnails import read_images, thumbnail_uri
from urbanclip_ray.storage import Dataset

Json = dict[str, Any]

NUM_TILES_SHOWN = 12
NUM_TILES_WITH_REJECTS = 5  # of those shown, where there are as many
NUM_SENTENCES_SHOWN = 8
NUM_CHARACTERS_SHOWN = 400  # of one sentence
NUM_PROMPTS_SHOWN = 6
NUM_TILES_FOUND = 8  # for each prompt
THUMBNAIL_PX = 192
FOUND_PX = 128


def caption_gallery(datasets: Mapping[str, Dataset], outer: str) -> list[Json]:
    """A seeded choice of tiles with their kept and rejected sentences; a few with rejects are preferred."""
    if "pairs" not in datasets:
        return []
    pairs = datasets["pairs"].read().to_pylist()
    order = [pairs[index] for index in np.random.default_rng(0).permutation(len(pairs))]
    chosen = [row for row in order if row["rejected"]][:NUM_TILES_WITH_REJECTS]
    taken = {row["tile_id"] for row in chosen}
    chosen += [row for row in order if row["tile_id"] not in taken][: NUM_TILES_SHOWN - len(chosen)]
    ids = [row["tile_id"] for row in chosen]
    images = read_images(datasets["tiles"], ids)
    parts = _parts(datasets["splits"], outer, ids)
    return [
        {
            "tile_id": row["tile_id"],
            "part": parts.get(row["tile_id"], ""),
            "image": thumbnail_uri(images.get(row["tile_id"]), THUMBNAIL_PX),
            "kept": [_shorten(text) for text in row["texts"][:NUM_SENTENCES_SHOWN]],
            "rejected": [
                {"text": _shorten(item["text"]), "reason": item["reason"]} for item in row["rejected"][:NUM_SENTENCES_SHOWN]
            ],
            "num_more": sum(max(0, len(texts) - NUM_SENTENCES_SHOWN) for texts in (row["texts"], row["rejected"])),
        }
        for row in sorted(chosen, key=lambda row: str(row["tile_id"]))
    ]


def search_examples(datasets: Mapping[str, Dataset]) -> list[Json]:
    """For some of the run's prompts, evenly over their list, the nearest tiles with pictures."""
    if "prompts" not in datasets:
        return []
    found = nearest_tiles(datasets["prompts"], NUM_TILES_FOUND)
    places = np.linspace(0, len(found) - 1, min(NUM_PROMPTS_SHOWN, len(found))).round().astype(int)
    chosen = [found[at] for at in places]
    images = read_images(datasets["tiles"], sorted({tile["tile_id"] for example in chosen for tile in example["tiles"]}))
    for example in chosen:
        for tile in example["tiles"]:
            tile["image"] = thumbnail_uri(images.get(tile["tile_id"]), FOUND_PX)
    return chosen


def _parts(splits: Dataset, outer: str, ids: list[str]) -> dict[str, str]:
    """Part of each tile in the outer split's first draw."""
    filters = [("split", "=", outer), ("tile_id", "in", ids)]
    rows = splits.read(columns=["tile_id", "seed", "fold", "part"], filters=filters).to_pylist()
    return {row["tile_id"]: row["part"] for row in sorted(rows, key=lambda row: (-row["seed"], -row["fold"]))}


def _shorten(text: str | None) -> str:
    text = text or "(empty)"
    return text if len(text) <= NUM_CHARACTERS_SHOWN else text[:NUM_CHARACTERS_SHOWN] + "…"
