"""Leaks made on purpose, each caught by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from urbanclip_ray.config import SplitConfig
from urbanclip_ray.evaluate.fits import Inputs, parts_by_draw
from urbanclip_ray.evaluate.leaks import LeakError, find_leaks, refuse_leaks
from urbanclip_ray.evaluate.splits import assign_splits
from urbanclip_ray.evaluate.training_tiles import training_tiles, transductive_splits
from urbanclip_ray.schema import SHARDS, embeddings_schema
from urbanclip_ray.storage import Dataset, open_dataset, publish

NUM_TILES = 200
IDS = [f"city/{index:04d}" for index in range(NUM_TILES)]
SPLIT = SplitConfig(outer="blocks", also=("random",), num_draws=2, block_km=8)


class Case:
    """Tiles without a leak; tests put one in."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(NUM_TILES, 8)).astype(np.float32)
        self.y = rng.normal(size=NUM_TILES)
        self.places = pa.table(
            {
                "tile_id": IDS,
                "region": ["city"] * NUM_TILES,
                "group": pa.nulls(NUM_TILES, pa.string()),
                "lon": rng.uniform(116, 116.6, NUM_TILES),
                "lat": rng.uniform(39.7, 40.2, NUM_TILES),
                "sha256": [f"image {index}" for index in range(NUM_TILES)],
                "error": pa.nulls(NUM_TILES, pa.string()),
            }
        )
        self.rows, _ = assign_splits(self.places, SPLIT, None)
        self.embeddings: dict[str, Dataset] = {}

    def members(self, part: str, split: str = "blocks") -> list[int]:
        rows = self.rows.to_pylist()
        return [IDS.index(r["tile_id"]) for r in rows if (r["split"], r["seed"], r["part"]) == (split, 0, part)]

    def inputs(self) -> Inputs:
        parts = parts_by_draw(self.rows, pa.array(IDS))
        return Inputs({"pretrained": self.x}, {"price": self.y}, parts, np.array(["city"] * NUM_TILES), {})

    def find(self, split: SplitConfig = SPLIT) -> dict[tuple[str, str], int]:
        """Number found by name and severity; of several splits the outer one's."""
        leaks = find_leaks(self.inputs(), self.rows, self.places, self.embeddings, split)
        return {(leak.name, leak.severity): leak.num_found for leak in reversed(leaks)}


def test_honest_inputs_have_no_leak():
    assert Case().find() == {}


@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_a_label_copied_into_a_column_is_caught(scale):
    case = Case()
    case.x[:, 5] = scale * case.y + 7
    assert case.find() == {("label_in_features", "error"): 1}
    leaks = find_leaks(case.inputs(), case.rows, case.places, {}, SPLIT)
    with pytest.raises(LeakError, match=r"label_in_features: column 5 of 'pretrained' is the indicator 'price'.*refuse_leaks"):
        refuse_leaks(leaks)


def test_a_label_copied_is_caught_where_some_tiles_have_none():
    case = Case()
    case.x[:, 2] = case.y
    case.y[::3] = np.nan
    assert case.find() == {("label_in_features", "error"): 1}


def test_a_strong_feature_a_constant_column_and_a_constant_label_are_no_leak():
    case = Case()
    case.x[:, 5] = case.y + 0.1 * np.random.default_rng(1).normal(size=NUM_TILES)  # correlation 0.995
    case.x[:, 6] = 4
    assert case.find() == {}
    case.y[:] = 2
    assert case.find() == {}


def test_a_test_tile_whose_image_is_in_train_is_caught():
    case = Case()
    names = case.places["sha256"].to_pylist()
    for test, train in zip(case.members("test")[:3], case.members("train")[:3], strict=True):
        names[test] = names[train]
    case.places = case.places.set_column(case.places.column_names.index("sha256"), "sha256", pa.array(names))
    assert case.find() == {("same_image_in_train_and_test", "warning"): 3}
    refuse_leaks(find_leaks(case.inputs(), case.rows, case.places, {}, SPLIT))  # a warning stops nothing


def test_images_that_are_missing_are_not_the_same():
    case = Case()
    case.places = case.places.set_column(case.places.column_names.index("sha256"), "sha256", pa.nulls(NUM_TILES, pa.string()))
    assert case.find() == {}


def test_a_test_tile_whose_vector_is_in_train_is_caught_though_its_bytes_differ():
    case = Case()
    for test, train in zip(case.members("test")[:2], case.members("train")[:2], strict=True):
        case.x[test] = case.x[train] * 1.0001
    assert case.find() == {("same_embedding_in_train_and_test", "warning"): 2}


def test_twins_within_one_part_are_no_leak():
    case = Case()
    outer = SplitConfig(outer="blocks", num_draws=1, block_km=8)
    case.rows, _ = assign_splits(case.places, outer, None)
    first, second = case.members("test")[:2]
    case.x[first] = case.x[second]
    assert case.find(outer) == {}


def test_a_tile_that_the_splits_name_twice_is_caught():
    case = Case()
    [test] = [row for row in case.rows.to_pylist() if row["seed"] == 0 and row["split"] == "blocks" and row["part"] == "test"][
        :1
    ]
    again = pa.Table.from_pylist([test | {"part": "train"}], schema=case.rows.schema)
    case.rows = pa.concat_tables([case.rows, again])
    assert case.find()["tile_in_two_parts", "error"] == 1


def publish_weights(root: Path, trained_on: list[str], embedded: str = "embeddings", known: bool = True) -> Dataset:
    """A run with shards, a pretraining and what it embedded, named as the pipeline names them."""
    shards_uri, pretrain_uri = f"{root}/run/shards/aa", f"{root}/run/pretrain/bb"
    rows = [
        {"row_id": row, "tile_id": tile_id, "image": b"", "texts": ["a"], "part": "train"}
        for row, tile_id in enumerate(trained_on)
    ]
    with publish(shards_uri, "shards", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=SHARDS))
    with publish(pretrain_uri, "pretrain", {}, {"shards": open_dataset(shards_uri)}) as publication:
        publication.write_file("weights.json", b"{}")
        weights = publication.data_uri
    with publish(f"{root}/run/{embedded}/cc", "embeddings", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist([], schema=embeddings_schema(2)))
        publication.facts["weights"] = {"uri": weights if known else "somewhere/else", "digest": "d"}
    return open_dataset(f"{root}/run/{embedded}/cc")


def test_weights_that_were_trained_on_test_tiles_are_caught(tmp_path):
    case = Case()
    seen = [IDS[index] for index in (*case.members("train"), *case.members("test")[:4])]
    case.embeddings = {"pretrained": publish_weights(tmp_path, seen)}
    assert case.find() == {("pretrained_on_test", "error"): 4}
    assert case.find(SPLIT.model_copy(update={"transductive": True})) == {}  # as the recipe says


def test_a_split_is_transductive_where_the_weights_have_seen_its_test_tiles(tmp_path):
    case = Case()
    kept_out = publish_weights(tmp_path / "a", [IDS[index] for index in (*case.members("train"), *case.members("val"))])
    elsewhere = publish_weights(tmp_path / "b", [f"town/{index}" for index in range(9)])
    unknown = publish_weights(tmp_path / "c", IDS, known=False)
    parts, ids = case.inputs().parts, case.places["tile_id"]

    def found(split: SplitConfig = SPLIT, **embeddings: Dataset) -> tuple[str, ...]:
        return transductive_splits(parts, ids, embeddings, split)

    assert found(pretrained=kept_out) == ("random",)
    assert found(pretrained=elsewhere) == ()  # no test tile of any split was trained on
    assert found(pretrained=elsewhere, other=unknown) == ("random",)  # what is not known is not promised
    assert found(SPLIT.model_copy(update={"transductive": True}), pretrained=elsewhere) == ("blocks",)


def test_untrained_weights_have_seen_nothing(tmp_path):
    with publish(f"{tmp_path}/e", "untrained", {}, {}) as publication:
        publication.facts["weights"] = {"uri": "anywhere", "digest": "abc-untrained-0"}
    seen = training_tiles(open_dataset(f"{tmp_path}/e"))
    assert seen is not None
    assert len(seen) == 0
