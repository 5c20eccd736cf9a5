from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from rich.console import Console
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from urbanclip_ray.evaluate.scores import Setting, score_predictions, score_table
from urbanclip_ray.schema import PREDICTIONS


def rows(
    method: str,
    seed: int,
    y: np.ndarray,
    y_pred: np.ndarray,
    split: str = "blocks",
    indicator: str = "carbon",
    tiles: list[str] | None = None,
    fold: int = 0,
) -> pa.Table:
    num = len(y)
    columns = {
        "tile_id": tiles or [f"t{index}" for index in range(num)],
        "indicator": [indicator] * num,
        "method": [method] * num,
        "split": [split] * num,
        "fold": [fold] * num,
        "seed": [seed] * num,
        "y": y,
        "y_pred": y_pred,
        "space": ["log1p"] * num,
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in PREDICTIONS], schema=PREDICTIONS)


def draws(num_tiles: int = 60, num_draws: int = 5, split: str = "blocks") -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
    """One fixed test set; `pretrained` with small errors, `colour` with larger ones."""
    rng = np.random.default_rng(3)
    y = rng.normal(size=num_tiles) * 2 + 9
    found = {
        method: [y + rng.normal(size=num_tiles) * error for _ in range(num_draws)]
        for method, error in (("pretrained", 0.7), ("colour", 1.2))
    }
    return y, found


def table_of(y: np.ndarray, predicted: dict[str, list[np.ndarray]], split: str = "blocks") -> pa.Table:
    return pa.concat_tables(
        rows(method, seed, y, values, split) for method, each in predicted.items() for seed, values in enumerate(each)
    )


def entry(scores: dict, **wanted: str) -> dict:
    [found] = [item for item in scores["probe"] if all(item[key] == value for key, value in wanted.items())]
    return found


def test_metrics_by_hand() -> None:
    y = np.array([1.0, 2.0, 3.0, 6.0])  # mean 3, squares around it 4 + 1 + 0 + 9 = 14
    scores = score_predictions(rows("pretrained", 0, y, y + np.array([1.0, -1.0, 0.0, 2.0])), "blocks")
    assert entry(scores, metric="r2")["mean"] == pytest.approx(1 - 6 / 14)
    assert entry(scores, metric="rmse")["mean"] == pytest.approx(np.sqrt(1.5))
    assert entry(scores, metric="mae") == {
        "indicator": "carbon",
        "method": "pretrained",
        "split": "blocks",
        "metric": "mae",
        "space": "log1p",
        "mean": 1.0,
        "std": 0.0,
        "low": None,
        "high": None,
        "low_tiles": 0.25,
        "high_tiles": 1.75,
        "unit": "tile",
        "num_units": 4,
        "seeds": 1,
        "num_folds": 1,
        "num_test": 4,
        "transductive": False,
    }


def test_mean_and_deviation_are_over_draws_and_agree_with_sklearn() -> None:
    y, predicted = draws()
    scores = score_predictions(table_of(y, predicted), "blocks")
    for metric, function in (("r2", r2_score), ("rmse", root_mean_squared_error), ("mae", mean_absolute_error)):
        values = [function(y, values) for values in predicted["colour"]]
        found = entry(scores, metric=metric, method="colour")
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["std"] == pytest.approx(np.std(values, ddof=1))
        assert found["seeds"] == 5


def test_the_order_of_rows_changes_nothing() -> None:
    y, predicted = draws()
    table = table_of(y, predicted)
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    one, other = score_predictions(table, "blocks"), score_predictions(shuffled, "blocks")
    assert entry(one, metric="r2", method="colour")["mean"] == pytest.approx(entry(other, metric="r2", method="colour")["mean"])
    assert one["paired"][0]["low"] == pytest.approx(other["paired"][0]["low"])


def test_paired_differences_have_a_t_interval_over_draws() -> None:
    y, predicted = draws()
    [pair] = score_predictions(table_of(y, predicted), "blocks")["paired"]
    differences = np.array(
        [r2_score(y, a) - r2_score(y, b) for a, b in zip(predicted["pretrained"], predicted["colour"], strict=True)]
    )
    half = 2.776445 * differences.std(ddof=1) / np.sqrt(5)  # t of 4 degrees of freedom, from a printed table
    assert (pair["method"], pair["against"], pair["metric"], pair["draws"]) == ("pretrained", "colour", "r2", 5)
    assert pair["mean"] == pytest.approx(differences.mean())
    assert pair["low"] == pytest.approx(differences.mean() - half, rel=1e-5)
    assert pair["high"] == pytest.approx(differences.mean() + half, rel=1e-5)
    assert pair["num_positive"] == (differences > 0).sum()


def test_the_tile_interval_is_a_bootstrap_of_the_mean_difference() -> None:
    """Against a plain bootstrap written out with sklearn, to within its own noise."""
    y, predicted = draws()
    [pair] = score_predictions(table_of(y, predicted), "blocks")["paired"]
    rng = np.random.default_rng(11)
    plain = []
    for _ in range(400):
        chosen = rng.integers(len(y), size=len(y))
        plain.append(
            np.mean(
                [
                    r2_score(y[chosen], a[chosen]) - r2_score(y[chosen], b[chosen])
                    for a, b in zip(predicted["pretrained"], predicted["colour"], strict=True)
                ]
            )
        )
    low, high = np.percentile(plain, [2.5, 97.5])
    width = high - low
    assert pair["low_tiles"] == pytest.approx(low, abs=0.2 * width)
    assert pair["high_tiles"] == pytest.approx(high, abs=0.2 * width)
    again = score_predictions(table_of(y, predicted), "blocks")["paired"][0]
    assert (again["low_tiles"], again["high_tiles"]) == (pair["low_tiles"], pair["high_tiles"])


def test_the_tile_interval_works_where_every_draw_tests_other_tiles() -> None:
    y, predicted = draws(num_tiles=90, num_draws=3)
    ids = [f"t{index}" for index in range(90)]
    pieces = [
        rows(method, seed, y[part], values[part], "random", tiles=ids[part])
        for method, each in predicted.items()
        for seed, values in enumerate(each)
        for part in [slice(20 * seed, 20 * seed + 50)]
    ]
    scores = score_predictions(pa.concat_tables(pieces), "blocks")
    [pair] = scores["paired"]
    assert pair["low_tiles"] < pair["mean"] < pair["high_tiles"]
    assert entry(scores, metric="r2", method="colour")["num_test"] == 50
    assert scores["transductive"] == ["random"]


def test_only_the_named_pairs_are_compared() -> None:
    y, predicted = draws()
    values = predicted["colour"]
    methods = ("pretrained", "untrained", "colour", "coordinates", "mean", "pretrained_mlp", "untrained_mlp")
    scores = score_predictions(table_of(y, dict.fromkeys(methods, values)), "blocks")
    assert [(pair["method"], pair["against"]) for pair in scores["paired"]] == [
        ("pretrained", "untrained"),
        ("pretrained", "colour"),
        ("pretrained", "coordinates"),
        ("pretrained", "mean"),
        ("pretrained_mlp", "untrained_mlp"),
    ]
    assert all(pair["mean"] == 0 and pair["num_positive"] == 0 for pair in scores["paired"])


def test_r2_of_a_constant_test_target_is_undefined_and_errors_are_not() -> None:
    y = np.full(5, 0.1)
    table = pa.concat_tables(rows(method, 0, y, y + 1) for method in ("pretrained", "mean"))
    scores = score_predictions(table, "blocks")
    assert entry(scores, metric="r2", method="mean")["mean"] is None
    assert entry(scores, metric="r2", method="mean")["std"] is None
    assert entry(scores, metric="mae", method="mean")["mean"] == pytest.approx(1)
    [pair] = scores["paired"]
    assert [pair[key] for key in ("mean", "low", "high", "low_tiles", "high_tiles")] == [None] * 5
    json.dumps(scores, allow_nan=False)


def test_one_draw_has_no_interval_over_draws() -> None:
    y, predicted = draws(num_draws=1)
    [pair] = score_predictions(table_of(y, predicted), "blocks")["paired"]
    assert pair["low"] is None
    assert pair["high"] is None
    assert pair["low_tiles"] < pair["mean"] < pair["high_tiles"]


def test_methods_judged_on_different_tiles_are_refused() -> None:
    y, predicted = draws(num_draws=1)
    table = pa.concat_tables(
        [rows("pretrained", 0, y, predicted["pretrained"][0]), rows("mean", 0, y[:-1], predicted["colour"][0][:-1])]
    )
    with pytest.raises(ValueError, match="mean does not predict the same carbon tiles"):
        score_predictions(table, "blocks")


def test_the_table_shows_the_outer_split_first_and_marks_the_others() -> None:
    y, predicted = draws()
    both = pa.concat_tables([table_of(y, predicted, "a_random"), table_of(y, predicted, "blocks")])
    constant = rows("mean", 0, np.full(4, 2.0), np.ones(4), "blocks", indicator="gdp")
    scores = score_predictions(pa.concat_tables([both, constant]), "blocks")
    table = score_table(scores)
    assert [column.header for column in table.columns] == ["indicator", "method", "blocks", "a_random (transductive)"]
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    found = entry(scores, metric="r2", method="colour", split="blocks")
    assert f"{found['mean']:.3f} ± {found['std']:.3f}" in stream.getvalue()
    assert "undefined" in stream.getvalue()


def test_every_score_has_an_interval_over_draws_and_one_over_units() -> None:
    y, predicted = draws()
    units = pd.Series(np.repeat(np.arange(12), 5), index=[f"t{index}" for index in range(60)])
    setting = Setting(units={"blocks": ("block", units)}, validation={("carbon", "blocks", "colour"): 0.7})
    found = entry(score_predictions(table_of(y, predicted), "blocks", setting), metric="r2", method="colour")
    assert found["low"] < found["mean"] < found["high"]
    assert found["low_tiles"] < found["mean"] < found["high_tiles"]
    assert (found["unit"], found["num_units"], found["validation"], found["transductive"]) == ("block", 12, 0.7, False)


def test_the_selected_pair_is_the_best_on_validation_whatever_test_says() -> None:
    y, predicted = draws()
    better = predicted["pretrained"]
    table = table_of(y, {"pretrained": better, "pretrained_mlp": better, "colour": predicted["colour"], "mean": better})
    validation = {"pretrained": 0.1, "pretrained_mlp": 0.3, "colour": 0.2, "mean": 0.0}
    setting = Setting(validation={("carbon", "blocks", method): score for method, score in validation.items()})
    paired = score_predictions(table, "blocks", setting)["paired"]
    assert [(pair["method"], pair["against"]) for pair in paired if pair["selected"]] == [("pretrained_mlp", "colour")]
    [chosen] = [pair for pair in paired if pair["selected"]]
    assert chosen["significant"] is True  # errors of 0.7 against 1.2 in every draw
    [same] = [pair for pair in paired if (pair["method"], pair["against"]) == ("pretrained", "mean")]
    assert same["significant"] is False


def test_folds_are_averaged_before_draws_are_counted_and_each_is_scored_by_itself() -> None:
    y, predicted = draws(num_draws=3)
    half = {0: slice(0, 30), 1: slice(30, 60)}
    tiles = [f"t{index}" for index in range(60)]
    table = pa.concat_tables(
        rows("pretrained", seed, y[part], values[part], "city", tiles=tiles[part], fold=fold)
        for seed, values in enumerate(predicted["pretrained"])
        for fold, part in half.items()
    )
    scores = score_predictions(table, "city", Setting(folds={"city": ["Beijing", "Lhasa"]}))
    by_fold = {fold: [r2_score(y[part], values[part]) for values in predicted["pretrained"]] for fold, part in half.items()}
    found = entry(scores, metric="r2")
    assert (found["seeds"], found["num_folds"], found["num_test"]) == (3, 2, 30)
    assert found["mean"] == pytest.approx(np.mean([by_fold[0], by_fold[1]]))
    assert found["std"] == pytest.approx(np.std(np.mean([by_fold[0], by_fold[1]], axis=0), ddof=1))
    named = {item["name"]: item["mean"] for item in scores["folds"] if item["metric"] == "r2"}
    assert named == {"Beijing": pytest.approx(np.mean(by_fold[0])), "Lhasa": pytest.approx(np.mean(by_fold[1]))}


def test_transfer_has_scores_by_pair_and_none_over_all_pairs() -> None:
    y, predicted = draws(num_draws=1)
    table = pa.concat_tables(rows("pretrained", 0, y, predicted["pretrained"][0], "transfer", fold=fold) for fold in range(4))
    scores = score_predictions(table, "blocks")
    assert scores["probe"] == []
    assert scores["paired"] == []
    assert {item["fold"] for item in scores["folds"]} == {0, 1, 2, 3}


def test_every_city_is_scored_where_regions_are_given() -> None:
    y, predicted = draws(num_draws=2)
    regions = pd.Series(["Beijing"] * 50 + ["Lhasa"] * 10, index=[f"t{index}" for index in range(60)])
    scores = score_predictions(table_of(y, predicted), "blocks", Setting(regions=regions))
    [lhasa] = [item for item in scores["cities"] if (item["city"], item["method"], item["metric"]) == ("Lhasa", "colour", "r2")]
    assert lhasa["mean"] == pytest.approx(np.mean([r2_score(y[50:], values[50:]) for values in predicted["colour"]]))
    assert (lhasa["fit"], lhasa["num_test"]) == ("pooled", 10)
