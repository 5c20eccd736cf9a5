"""A round of bootstrapping on two small cities: the second is described by the first one's weights, and both are learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import NUM_COLUMNS, NUM_ROWS, write_city

from urbanclip_ray.ablations import change
from urbanclip_ray.config import RunConfig
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.pipeline import run_stages
from urbanclip_ray.recipes import bootstrap_from, load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

TRAINING = ["ingest", "caption", "refine", "split", "pack", "pretrain"]


def write_other_city(folder: Path) -> Path:
    """As large a city with other names: tiles are told apart by them."""
    write_city(folder, NUM_ROWS, NUM_COLUMNS)
    for old, new in (("west", "north"), ("east", "south")):
        (folder / old).rename(folder / new)
        (folder / "tiles.csv").write_text((folder / "tiles.csv").read_text().replace(f"{old}/", f"{new}/"))
    return folder


def tiny(city: Path, storage: Path, name: str) -> RunConfig:
    return apply_overrides(
        load_recipe("tiny_test"),
        [f"source.uri={city}", "source.metadata=tiles.csv", f"storage={storage}", f"run={name}"],
    )


def test_tiles_are_described_by_the_teacher_filtered_by_it_and_learnt_beside_its_own(tmp_path):
    first = run_stages(tiny(write_city(tmp_path / "first"), tmp_path / "runs", "first"), None)
    config = bootstrap_from(tiny(write_other_city(tmp_path / "second"), tmp_path / "runs", "second"), first.uri)
    config = change(config, {"refine": {"min_words": 1}})  # a model of one minute writes what it likes
    second = run_stages(config, TRAINING)

    captions, pairs, shards = (second.datasets[name] for name in ("captions", "pairs", "shards"))
    assert captions.manifest.facts["model"]["name"] == "coca"
    reasons = pairs.manifest.rejects
    scored = pairs.manifest.rows_out + reasons["low consistency"]
    assert reasons["low consistency"] == pytest.approx(scored / 2, abs=2)  # half of each of two regions
    rows = {row["tile_id"]: row for row in shards.read().to_pylist()}
    known = set(second.datasets["tiles"].read(["image"])["image"].to_pylist())  # some tiles of the cities are alike
    theirs = {
        row["tile_id"]: row
        for row in first.datasets["shards"].read().to_pylist()
        if row["part"] == "train" and row["image"] not in known
    }
    borrowed = {tile_id: row for tile_id, row in rows.items() if tile_id.split("/")[0] in ("west", "east")}
    assert borrowed.keys() == theirs.keys()
    assert all(row["texts"] == theirs[tile_id]["texts"] for tile_id, row in borrowed.items())
    own = rows.keys() - borrowed.keys()
    assert own
    splits = second.datasets["splits"].read().to_pylist()
    held_out = {row["tile_id"] for row in splits if (row["split"], row["seed"], row["part"]) == ("blocks", 0, "test")}
    assert held_out
    assert not held_out & rows.keys()
    assert second.datasets["pretrain"].manifest.rows_in == sum(row["part"] == "train" for row in rows.values())
