"""Two finished runs in one storage: what is paired, what is left out, and what the page says of it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from report_data import HOSTILE

from urbanclip_ray import storage
from urbanclip_ray.config import RunConfig, TrainConfig
from urbanclip_ray.evaluate.compare import CompareError, compare_runs, config_differences
from urbanclip_ray.schema import PREDICTIONS
from urbanclip_ray.storage import publish

NUM_TILES = 60


def make_run(root, name, noise, *, tiles=range(NUM_TILES), shift=0.0, indicator="gdp", config=None, method="pretrained") -> str:
    """A run whose predictions miss the truth of its tiles by so much noise, in two draws."""
    truth, random = np.random.default_rng(0).normal(size=NUM_TILES), np.random.default_rng(1)
    rows = [
        {"tile_id": f"t{at}", "indicator": indicator, "method": method, "split": "blocks", "fold": 0, "seed": seed}
        | {"y": truth[at] + shift, "y_pred": truth[at] + random.normal(0, noise), "space": "log"}
        for seed in range(2)
        for at in tiles
    ]
    uri = storage.join(str(root), name)
    with publish(storage.join(uri, "probe", "abc"), "probe", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS))
    config = config or RunConfig(run=name)
    run = {"run": name, "datasets": {"probe": "probe/abc"}, "config": config.model_dump(mode="json")}
    storage.write_bytes(storage.join(uri, "run.json"), json.dumps(run).encode())
    return uri


def compare(root, first, second) -> dict:
    json_uri, _ = compare_runs(first, second, str(root / "compare"))
    return json.loads(storage.read_bytes(json_uri))


def test_the_difference_is_second_minus_first_on_shared_tiles_alone(tmp_path):
    record = compare(tmp_path, make_run(tmp_path, "a", 0.8), make_run(tmp_path, "b", 0.2, tiles=range(10, NUM_TILES)))
    (row,) = record["differences"]
    assert row["mean"] == pytest.approx(row["r2_second"] - row["r2_first"])
    assert row["low_tiles"] > 0
    assert (row["num_tiles"], row["draws"]) == (50, 2)
    assert (record["num_only_first"], record["num_only_second"], record["num_other_truth"]) == (20, 0, 0)


def test_a_run_compared_with_itself_differs_in_nothing(tmp_path):
    uri = make_run(tmp_path, "a", 0.5)
    record = compare(tmp_path, uri, uri)
    assert record["config"] == []
    (row,) = record["differences"]
    assert (row["mean"], row["low"], row["high"], row["low_tiles"], row["high_tiles"]) == (0, 0, 0, 0, 0)


def test_tiles_with_another_truth_are_left_out_and_counted(tmp_path):
    first = make_run(tmp_path, "a", 0.5)
    with pytest.raises(CompareError, match="predicted no tile in common, from the same truth"):
        compare(tmp_path, first, make_run(tmp_path, "b", 0.5, shift=0.1))
    with pytest.raises(CompareError, match="by a method and in a split of the same name"):
        compare(tmp_path, first, make_run(tmp_path, "c", 0.5, method="pca"))


def test_what_is_no_finished_run_is_named(tmp_path):
    first = make_run(tmp_path, "a", 0.5)
    with pytest.raises(CompareError, match=r"/nowhere has no run\.json"):
        compare(tmp_path, first, str(tmp_path / "nowhere"))
    storage.write_bytes(str(tmp_path / "bare" / "run.json"), b'{"run": "bare", "datasets": {}, "config": {}}')
    with pytest.raises(CompareError, match="is no run with a probe"):
        compare(tmp_path, str(tmp_path / "bare"), first)


def test_configs_differ_key_by_key():
    first, second = RunConfig(run="a"), RunConfig(run="a", train=TrainConfig(lr=0.5))
    found = config_differences(first.model_dump(mode="json"), second.model_dump(mode="json"))
    assert found == [{"key": "train.lr", "first": 0.001, "second": 0.5}]
    assert config_differences({"a": {"b": 1}}, {"c": 2}) == [
        {"key": "a.b", "first": 1, "second": None},
        {"key": "c", "first": None, "second": 2},
    ]


def test_names_of_a_hostile_run_are_text_and_csv_has_no_formula(tmp_path):
    name = "=1+1" + HOSTILE[0]
    first = make_run(tmp_path, "a", 0.8, indicator=name)
    second = make_run(tmp_path, "b", 0.2, indicator=name)
    _, page = compare_runs(first, second, str(tmp_path / "compare"))
    text = storage.read_bytes(page).decode()
    assert HOSTILE[0] not in text
    assert "=1+1&lt;script&gt;" in text
    lines = storage.read_bytes(str(tmp_path / "compare" / "compare.csv")).decode().splitlines()
    assert lines[0].startswith("indicator,split,method,space,r2_first")
    assert lines[1].startswith("'=1+1")
