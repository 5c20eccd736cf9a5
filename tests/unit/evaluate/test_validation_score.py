"""Which rows judge a trial, and that test tiles are in no way among them.

Embedding by ranks is in tests/distributed/test_score_ranks.py.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import r2_score

from urbanclip_ray.config import ConfigError, RunConfig
from urbanclip_ray.evaluate.regression import ProbeData, RidgeProbe
from urbanclip_ray.evaluate.validation_score import ProbeRows, choose_rows, score_vectors
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.schema import SHARDS, labels_schema
from urbanclip_ray.storage import Dataset, open_dataset, publish

NUM_TRAIN, NUM_VAL, NUM_TEST = 30, 12, 9
CONFIG = apply_overrides(load_recipe("tiny_test"), ["probe.target=raw"])


def store(uri: str, table: pa.Table) -> Dataset:
    with publish(uri, "test", {}, {}) as publication:
        publication.write_table(table.slice(0, 20), "a.parquet")
        publication.write_table(table.slice(20), "b.parquet")
    return open_dataset(uri)


@pytest.fixture
def shards(tmp_path) -> Dataset:
    """Rows of tiles 0 to 41 in a shuffled file order; tiles 42 to 50 are test and were never packed."""
    parts = ["train"] * NUM_TRAIN + ["val"] * NUM_VAL
    rows = [{"row_id": at, "tile_id": str(at), "image": b"", "texts": [], "part": part} for at, part in enumerate(parts)]
    order = np.random.default_rng(0).permutation(len(rows))
    return store(str(tmp_path / "shards"), pa.Table.from_pylist([rows[at] for at in order], schema=SHARDS))


def labels(uri, gdp: dict[int, float | None] | None = None) -> Dataset:
    values = {at: float(at) for at in range(NUM_TRAIN + NUM_VAL + NUM_TEST)} | (gdp or {})
    rows = [{"tile_id": str(at), "gdp": value, "carbon": -at % 5 + 0.5} for at, value in reversed(values.items())]
    return store(str(uri), pa.Table.from_pylist(rows, schema=labels_schema(["gdp", "carbon"])))


def same(ours: ProbeRows, theirs: ProbeRows) -> bool:
    return (
        np.array_equal(ours.row_ids, theirs.row_ids)
        and ours.num_train == theirs.num_train
        and all(np.array_equal(ours.targets[name], theirs.targets[name], equal_nan=True) for name in ours.targets)
    )


def choose(shards: Dataset, labels: Dataset, config: RunConfig) -> ProbeRows:
    (rows,) = choose_rows([shards], labels, config)
    return rows


def test_all_rows_with_their_own_targets_are_taken_where_there_is_room(shards, tmp_path):
    rows = choose(shards, labels(tmp_path / "labels"), CONFIG)
    assert rows.row_ids.tolist() == list(range(NUM_TRAIN + NUM_VAL))
    assert rows.num_train == NUM_TRAIN
    assert rows.targets["gdp"].tolist() == [float(at) for at in range(NUM_TRAIN + NUM_VAL)]


def test_test_tiles_are_never_looked_at(shards, tmp_path):
    test = range(NUM_TRAIN + NUM_VAL, NUM_TRAIN + NUM_VAL + NUM_TEST)
    rows = choose(shards, labels(tmp_path / "labels"), CONFIG)
    assert not set(rows.row_ids.tolist()) & set(test)
    assert same(rows, choose(shards, labels(tmp_path / "other", dict.fromkeys(test, 1e9)), CONFIG))
    assert same(rows, choose(shards, labels(tmp_path / "none", dict.fromkeys(test)), CONFIG))


def test_a_subset_is_seeded_and_holds_both_parts(shards, tmp_path):
    few = apply_overrides(CONFIG, ["tune.max_train_tiles=10", "tune.max_val_tiles=5"])
    known = labels(tmp_path / "labels")
    rows = choose(shards, known, few)
    assert same(rows, choose(shards, known, few))
    assert not same(rows, choose(shards, known, apply_overrides(few, ["tune.seed=1"])))
    assert (rows.num_train, len(rows.row_ids), len(set(rows.row_ids.tolist()))) == (10, 15, 15)
    assert rows.row_ids[:10].max() < NUM_TRAIN <= rows.row_ids[10:].min()
    assert rows.targets["gdp"].tolist() == rows.row_ids.tolist()  # a target stays with its row


def test_shards_of_other_sentences_are_judged_by_the_tiles_that_all_of_them_have(shards, tmp_path):
    """Those of tiles 0 to 41 and of a refinement that left no sentence to every fourth of them."""
    kept = [at for at in range(NUM_TRAIN + NUM_VAL) if at % 4]
    random = np.random.default_rng(1).permutation(len(kept))
    rows = [
        {"row_id": int(number), "tile_id": str(at), "image": b"", "texts": [], "part": "train" if at < NUM_TRAIN else "val"}
        for number, at in zip(random, kept, strict=True)
    ]
    fewer = store(str(tmp_path / "fewer"), pa.Table.from_pylist(rows, schema=SHARDS))
    ours, theirs = choose_rows([shards, fewer], labels(tmp_path / "labels"), CONFIG)
    tiles = {row["row_id"]: int(row["tile_id"]) for row in rows}
    assert ours.row_ids.tolist() == kept == [tiles[row] for row in theirs.row_ids.tolist()]
    assert ours.num_train == theirs.num_train == sum(at < NUM_TRAIN for at in kept)
    assert ours.targets["gdp"].tolist() == theirs.targets["gdp"].tolist() == kept


def test_a_row_without_any_target_is_left_out_and_one_without_some_is_not_scored_there(shards, tmp_path):
    only_gdp = apply_overrides(CONFIG, ["probe.indicators=[gdp]"])
    known = labels(tmp_path / "labels", {0: None, 31: None})
    assert not set(choose(shards, known, only_gdp).row_ids.tolist()) & {0, 31}
    rows = choose(shards, known, CONFIG)
    assert {0, 31} < set(rows.row_ids.tolist())
    assert np.isnan(rows.targets["gdp"][[0, 31]]).all()
    vectors = np.random.default_rng(0).normal(size=(len(rows.row_ids), 3))
    changed = vectors.copy()
    changed[[0, 31]] = 1e6
    scores, others = score_vectors(vectors, rows, (1.0,)), score_vectors(changed, rows, (1.0,))
    assert scores["gdp"] == others["gdp"]
    assert scores["carbon"] != others["carbon"]


@pytest.mark.parametrize(
    ("gdp", "part"),
    [
        (dict.fromkeys(range(NUM_TRAIN, NUM_TRAIN + NUM_VAL), 1.0), "12 validation tiles with a usable 'gdp' cannot judge"),
        (dict.fromkeys(range(NUM_TRAIN + 1, NUM_TRAIN + NUM_VAL)), "1 validation tiles with a usable 'gdp'"),
        (dict.fromkeys(range(NUM_TRAIN)), "0 training tiles with a usable 'gdp'"),
    ],
)
def test_an_indicator_that_cannot_judge_a_trial_is_named_with_the_fix(shards, tmp_path, gdp, part):
    with pytest.raises(ConfigError, match=part) as caught:
        choose(shards, labels(tmp_path / "labels", gdp), CONFIG)
    assert "take it out of probe.indicators" in str(caught.value)


def test_the_score_is_the_r2_of_a_ridge_probe_on_the_validation_rows():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(40, 4))
    y = vectors @ [1.0, 2.0, 0.0, -1.0] + random.normal(size=40)
    rows = ProbeRows(np.arange(40), 28, {"gdp": y})
    _, predicted = RidgeProbe((0.1, 10.0)).select(ProbeData(vectors[:28], y[:28], vectors[28:], y[28:], vectors[28:]))
    assert score_vectors(vectors, rows, (0.1, 10.0)) == {"gdp": pytest.approx(r2_score(y[28:], predicted))}
    assert 0.5 < score_vectors(vectors, rows, (0.1, 10.0))["gdp"] < 1
