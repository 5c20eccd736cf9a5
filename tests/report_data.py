"""Finished datasets of a made-up run for tests of the report, with hostile texts wherever data reaches a page."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
from PIL import Image

from urbanclip_ray import storage
from urbanclip_ray.config import RunConfig, WorldSource
from urbanclip_ray.schema import CAPTIONS, PAIRS, PREDICTIONS, SPLITS, TILES, embeddings_schema
from urbanclip_ray.storage import Dataset, open_dataset, publish

HOSTILE = ("<script>alert(1)</script>", '"></script><img src=http://evil.example/x onerror=alert(2)>')
HOSTILE_TILE = "<b>tile</b>&</script>"
HOSTILE_PROMPT = "a harbour</script><b>with</b> ships"
INDICATORS = ("log_population", "<i>places</i>")
METHODS = ("pretrained", "pretrained_mlp", "untrained", "untrained_mlp", "colour", "coordinates", "mean")
NUM_DRAWS = 4


def make(root, stage, tables=(), files=(), *, rejects=None, unit="tiles", rows_out=0) -> Dataset:
    uri = storage.join(str(root), stage)
    rejects = rejects or {}
    with publish(uri, stage, {}, {}) as publication:
        for table in tables:
            publication.write_table(table)
            rows_out = table.num_rows
        for name, content in files:
            publication.write_file(name, json.dumps(content).encode())
        publication.count(unit=unit, rows_in=rows_out + sum(rejects.values()), rows_out=rows_out, rejects=rejects)
    return open_dataset(uri)


def jpeg(generator) -> bytes:
    smooth = Image.fromarray(generator.integers(30, 200, (4, 4, 3), dtype=np.uint8)).resize((54, 54), Image.BICUBIC)
    buffer = io.BytesIO()
    smooth.save(buffer, "JPEG")
    return buffer.getvalue()


def make_tiles(root, num_tiles, *, located=True, regions=("west", "east")) -> tuple[Dataset, list[dict]]:
    generator = np.random.default_rng(1)
    rows = []
    side = int(np.ceil(num_tiles**0.5))
    for index in range(num_tiles):
        lon, lat = 10 + 0.1 * (index % side), 50 + 0.07 * (index // side)
        box = {
            "lon": lon,
            "lat": lat,
            "west": lon - 0.05,
            "east": lon + 0.05,
            "south": lat - 0.035,
            "north": lat + 0.035,
        }
        rows.append(
            {
                "tile_id": f"world/{index:04d}" if index else HOSTILE_TILE,
                "region": regions[index % len(regions)],
                "image": jpeg(generator),
                "sha256": "0" * 64,
                "width": 54,
                "height": 54,
                **(box if located else dict.fromkeys(box)),
                "scheme": "none",
                "group": None,
                "error": None,
            }
        )
    rows[1] |= {"image": b"broken", "error": "not an image"}
    table = pa.Table.from_pylist(rows, schema=TILES)
    return make(root, "tiles", [table], rejects={"not an image": 2}), rows


def make_splits(root, rows) -> Dataset:
    parts = {row["tile_id"]: ("test", "train", "val", "train", "train")[index % 5] for index, row in enumerate(rows)}
    table = pa.Table.from_pylist(
        [
            {"tile_id": tile_id, "split": split, "seed": seed, "fold": 0, "part": part}
            for split in ("blocks", "random")
            for seed in range(NUM_DRAWS)
            for tile_id, part in parts.items()
        ],
        schema=SPLITS,
    )
    return make(root, "splits", [table])


def make_scores(means, *, indicators=INDICATORS, null_methods=()) -> dict:
    """scores.json with R² of `means` per method on blocks; random is 0.15 higher."""
    probe = []
    for indicator in indicators:
        for split, gain in (("blocks", 0.0), ("random", 0.15)):
            for method, mean in means.items():
                for metric, value in (("r2", mean + gain), ("rmse", 1.2 - mean), ("mae", 0.9 - mean)):
                    is_null = metric == "r2" and method in null_methods
                    probe.append(
                        {
                            "indicator": indicator,
                            "method": method,
                            "split": split,
                            "metric": metric,
                            "space": "log1p",
                            "mean": None if is_null else value,
                            "std": None if is_null else 0.02,
                            "seeds": NUM_DRAWS,
                            "num_test": 60,
                        }
                    )
    return {"probe": probe, "paired": [], "transductive": ["random"], "outer": "blocks"}


def paired(indicator, mean, margin=0.05, **changes) -> dict:
    return {
        "indicator": indicator,
        "split": "blocks",
        "method": "pretrained",
        "against": "untrained",
        "metric": "r2",
        "mean": mean,
        "low": mean - margin,
        "high": mean + margin,
        "low_tiles": mean - margin,
        "high_tiles": mean + margin,
        "draws": NUM_DRAWS,
        "num_positive": NUM_DRAWS if mean > 0 else 0,
        **changes,
    }


MEANS = dict(zip(METHODS, (0.52, 0.49, 0.41, 0.38, 0.47, 0.58, -0.02), strict=True))


def make_probe(root, rows, scores) -> Dataset:
    generator = np.random.default_rng(2)
    predictions = []
    for indicator in dict.fromkeys(score["indicator"] for score in scores["probe"]):
        for index, row in enumerate(rows[::5]):
            truth = 6 + 2 * np.sin(index / 5) + generator.normal(0, 0.4)
            for seed in range(NUM_DRAWS):
                predictions += [
                    {
                        "tile_id": row["tile_id"],
                        "indicator": indicator,
                        "method": method,
                        "split": split,
                        "fold": 0,
                        "seed": seed,
                        "y": truth,
                        "y_pred": 6 + 0.6 * (truth - 6) + generator.normal(0, 0.5),
                        "space": "log1p",
                    }
                    for method in ("pretrained", "untrained")
                    for split in ("blocks", "random")
                ]
    table = pa.Table.from_pylist(predictions, schema=PREDICTIONS)
    return make(root, "probe", [table], [("scores.json", scores)], unit="predictions", rejects={"no value": 3})


def make_text(root, rows) -> dict[str, Dataset]:
    captions, pairs = [], []
    for index, row in enumerate(rows):
        texts = [f"Dark green forest covers {10 + index % 80} percent of the tile.", "A river runs through it."]
        rejected = [{"text": "Short.", "reason": "too short"}] * (index % 7 == 0)
        if index == 0:
            texts, rejected = list(HOSTILE), [{"text": text, "reason": text} for text in HOSTILE]
        pairs.append({"tile_id": row["tile_id"], "texts": texts, "rejected": rejected})
        caption = {"tile_id": row["tile_id"], "caption_key": f"{index:064x}", "text": " ".join(texts)}
        captions.append(caption | {"model": "land_cover", "prompt": "", "error": None})
    return {
        "captions": make(root, "captions", [pa.Table.from_pylist(captions, schema=CAPTIONS)]),
        "pairs": make(root, "pairs", [pa.Table.from_pylist(pairs, schema=PAIRS)], unit="sentences", rejects={HOSTILE[0]: 7}),
    }


def make_pretrain(root) -> Dataset:
    steps = np.arange(1, 201)
    train = [
        {
            "step": int(step),
            "epoch": int(step) // 20,
            "loss": float(8 * np.exp(-step / 90) + 1),
            "contrastive": float(4 * np.exp(-step / 60) + 0.5),
            "caption": float(4 * np.exp(-step / 120) + 0.5),
            "lr": float(1e-3 * min(step / 20, np.cos((step - 20) / 180 * np.pi / 2))),
            "logit_scale": 14.0,
            "samples_per_s": 210.0,
        }
        for step in steps
    ]
    validation = []
    for step in steps[39::40]:
        row = {"step": int(step), "epoch": int(step) // 20, "contrastive": 2.0, "caption": 1.5}
        for direction in ("image_to_text", "text_to_image"):
            row |= {f"{direction}_r{k}": float(min(1, 0.02 * k * step / 60)) for k in (1, 5, 10)}
        validation.append(row | {"num_images": 120, "num_texts": 500})
    return make(root, "pretrain", [], [("history.json", {"train": train, "validation": validation})], unit="steps")


def make_retrieval(root) -> Dataset:
    chance = {"r1": 0.008, "r5": 0.04, "r10": 0.08}
    found = {"r1": 0.125, "r5": 0.4, "r10": 0.6, "median_rank": 7.0, "mean_rank": 21.5}
    equal = {"r1": 0.175, "r5": 0.5, "r10": 0.7, "median_rank": 5.0, "mean_rank": 18.5}
    parts = [
        {
            "part": part,
            "num_images": 120,
            "num_texts": 500,
            "num_different_texts": 480,
            "image_to_text": found,
            "text_to_image": found,
            "equal_texts": {"image_to_text": equal, "text_to_image": equal},
            "chance": {"image_to_text": chance, "text_to_image": chance},
        }
        for part in ("val", "test")
    ]
    return make(root, "retrieval", [], [("retrieval.json", parts)])


def make_embeddings(root, rows) -> Dataset:
    vectors = [{"tile_id": row["tile_id"], "embedding": [0.0, 1.0], "weights": "1a2b3c4d5e6f7788" * 4} for row in rows]
    return make(root, "embeddings", [pa.Table.from_pylist(vectors, schema=embeddings_schema(2))])


def make_prompts(root, rows) -> Dataset:
    uri = storage.join(str(root), "prompts")
    vectors = [{"tile_id": row["tile_id"], "embedding": [at / 40, -at / 40], "weights": "x"} for at, row in enumerate(rows)]
    with publish(uri, "prompts", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(vectors, schema=embeddings_schema(2)))
        publication.facts["prompts"] = ["dark forest", HOSTILE_PROMPT]
        publication.count(unit="tiles", rows_in=len(rows), rows_out=len(rows), rejects={})
    return open_dataset(uri)


def world_config() -> RunConfig:
    return RunConfig(run="world-demo", source=WorldSource())


def make_run(root, *, num_tiles=40, scores=None, located=True, complete=True, regions=("west", "east")):
    tiles, rows = make_tiles(root, num_tiles, located=located, regions=regions)
    if scores is None:
        scores = make_scores(MEANS)
        scores["paired"] = [paired(INDICATORS[0], 0.11), paired(INDICATORS[1], 0.02)]
    datasets = {"tiles": tiles, "splits": make_splits(root, rows), "probe": make_probe(root, rows, scores)}
    if complete:
        datasets |= make_text(root, rows)
        datasets |= {"pretrain": make_pretrain(root), "retrieval": make_retrieval(root)}
        datasets |= {"embeddings": make_embeddings(root, rows), "prompts": make_prompts(root, rows)}
    return datasets, scores
