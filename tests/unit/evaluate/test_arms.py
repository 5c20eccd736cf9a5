"""Scores of several runs: what is accepted, and the tables made of them."""

from __future__ import annotations

import json

import pytest

from urbanclip_ray.evaluate.arms import (
    ExperimentError,
    ablation_tables,
    city_tables,
    read_experiment,
    transfer_records,
    transfer_tables,
)

WITH_TEXT = {"arm": "with text", "indicator": "price", "split": "group", "method": "pretrained", "mean": 0.31}
WITHOUT = WITH_TEXT | {"arm": "<b>without</b>", "mean": 0.24, "low": 0.2, "high": 0.28, "seeds": 3}


def read(tmp_path, content) -> list[dict]:
    path = tmp_path / "experiment.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_experiment(str(path))


def test_arms_become_a_table_of_arms_and_indicators(tmp_path):
    records = read(tmp_path, [WITH_TEXT, WITHOUT, WITHOUT | {"indicator": "lot", "mean": None}])
    (table,) = ablation_tables(records)
    assert table["title"] == "pretrained (ridge), group"
    assert table["indicators"] == ["price", "lot"]
    assert [row["name"] for row in table["rows"]] == ["with text", "<b>without</b>"]
    assert table["rows"][1]["cells"][0] == {"value": 0.24, "text": "0.240", "note": "[0.200, 0.280] 3 seeds"}
    assert [cell["text"] for cell in table["rows"][0]["cells"]] == ["0.310", "–"]
    assert table["rows"][1]["cells"][1]["text"] == "–"
    assert transfer_tables(records) == []


def test_records_of_two_cities_become_a_matrix(tmp_path):
    cities = ("Beijing", "Shanghai")
    records = [
        {"train": train, "test": test, "indicator": "gdp", "mean": 0.5 if train == test else -0.2}
        for train in cities
        for test in cities
    ]
    (table,) = transfer_tables(read(tmp_path, records))
    assert table["tests"] == list(cities)
    assert [[cell["value"] for cell in row["cells"]] for row in table["rows"]] == [[0.5, -0.2], [-0.2, 0.5]]


def test_the_results_of_the_job_are_read_with_methods_as_arms(tmp_path):
    row = {"indicator": "price", "r2": 0.2, "low": None, "high": None, "num_seeds": 3, "num_draws": 5}
    table = [row | {"method": name} for name in ("pretrained", "image_only")]
    (found,) = ablation_tables(read(tmp_path, {"note": "…", "table": table}))
    assert found["title"] == "Arms of the experiment"
    assert [row["name"] for row in found["rows"]] == ["pretrained", "image_only"]
    assert found["rows"][0]["cells"][0] == {"value": 0.2, "text": "0.200", "note": "3 seeds"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ({"arms": []}, "the whole: Input should be a valid list"),
        ([WITH_TEXT, {"arm": "x", "indicator": "price"}], r"1\.(mean|r2): Field required"),
        ([WITH_TEXT | {"mean": "high"}], r"0\.mean: Input should be a valid number"),
        ([{"indicator": "price", "mean": 0.1}], "a record needs arm, or train and test"),
    ],
)
def test_what_is_no_experiment_is_named_with_its_place(tmp_path, content, message):
    with pytest.raises(ExperimentError, match=message):
        read(tmp_path, content)


def test_a_missing_file_is_named():
    with pytest.raises(ExperimentError, match=r"report\.experiment=/nowhere\.json is not there"):
        read_experiment("/nowhere.json")


def test_folds_of_a_transfer_and_cities_come_from_the_scores():
    score = {"indicator": "gdp", "method": "pretrained", "metric": "r2", "mean": 0.1, "low": None, "high": None, "seeds": 1}
    record = {
        "outer": "blocks",
        "folds": [
            score | {"split": "transfer", "name": "Beijing → Shanghai"},
            score | {"split": "city", "name": "Beijing"},
            score | {"split": "transfer", "name": "Beijing → Shanghai", "metric": "mae"},
        ],
        "cities": [score | {"split": "blocks", "city": city, "fit": "own"} for city in ("Beijing", "Shanghai")],
    }
    (found,) = transfer_records(record)
    assert (found["train"], found["test"], found["mean"]) == ("Beijing", "Shanghai", 0.1)
    (table,) = city_tables(record)
    assert table["title"] == "gdp, a fit for each city"
    assert [row["name"] for row in table["rows"]] == ["Beijing", "Shanghai"]
