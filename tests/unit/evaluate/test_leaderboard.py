"""Who is compared with whom, and when a method counts as better."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from urbanclip_ray.evaluate.findings import is_baseline
from urbanclip_ray.evaluate.leaderboard import board_tables, make_leaderboard
from urbanclip_ray.evaluate.paired import compare_r2
from urbanclip_ray.evaluate.plots import method_name
from urbanclip_ray.evaluate.scores import score_predictions
from urbanclip_ray.schema import PREDICTIONS

NUM_TILES, NUM_DRAWS = 200, 3


def predictions(noise: dict[str, float]) -> pd.DataFrame:
    """Every method sees the truth with so much noise of its own, in every draw."""
    random = np.random.default_rng(0)
    y = random.normal(size=NUM_TILES)
    rows = []
    for seed in range(NUM_DRAWS):
        for method, deviation in noise.items():
            y_pred = y + random.normal(0, deviation, NUM_TILES)
            rows += [
                {"tile_id": f"t{at}", "indicator": "gdp", "method": method, "split": "blocks", "fold": 0, "seed": seed}
                | {"y": y[at], "y_pred": y_pred[at], "space": "log"}
                for at in range(NUM_TILES)
            ]
    return pd.DataFrame(rows)


def board_of(noise: dict[str, float], validation: dict[str, float] | None = None, paired: list | None = None) -> dict:
    import pyarrow as pa

    frame = predictions(noise)
    scores = score_predictions(pa.Table.from_pandas(frame, schema=PREDICTIONS, preserve_index=False), "blocks")
    for row in scores["probe"]:
        if validation and row["metric"] == "r2":
            row["validation"] = validation[row["method"]]
    scores["paired"] = paired if paired is not None else []
    return {row["method"]: row for row in make_leaderboard(scores, frame)}


NOISE = {"pretrained": 0.3, "pca": 0.5, "simclr": 0.6, "mean": 2.0}


def test_the_rival_is_the_baseline_with_the_best_validation_score():
    """simclr is the worse one on test tiles, and chosen all the same."""
    board = board_of(NOISE, {"pretrained": 0.9, "pca": 0.7, "simclr": 0.8, "mean": 0.0})
    assert board["pretrained"]["against"] == ["simclr"]
    assert board["pretrained"]["chosen_by"] == "validation"
    assert board["pretrained"]["verdict"] == "better"
    assert board["pca"]["verdict"] == "baseline"
    assert board["pca"]["against"] == []


def test_without_validation_scores_every_baseline_must_be_beaten():
    assert board_of(NOISE)["pretrained"]["verdict"] == "better"
    assert board_of(NOISE)["pretrained"]["against"] == ["pca", "simclr", "mean"]
    close = board_of(NOISE | {"pca": 0.3})["pretrained"]
    assert (close["verdict"], close["chosen_by"]) == ("open", "all")
    assert board_of(NOISE | {"pca": 0.1})["pretrained"]["verdict"] == "worse"


def test_a_baseline_without_a_validation_score_is_not_passed_over():
    board = board_of(NOISE, {"pretrained": 0.9, "pca": None, "simclr": 0.8, "mean": 0.0})
    assert board["pretrained"]["chosen_by"] == "all"


def test_a_comparison_that_the_scores_bring_is_taken_from_there():
    pair = {"indicator": "gdp", "split": "blocks", "method": "pretrained", "mean": -0.5}
    pair |= dict.fromkeys(("low", "high", "low_tiles", "high_tiles"), -0.5)
    pairs = [pair | {"against": name} for name in ("pca", "simclr", "mean")]
    board = board_of(NOISE, paired=pairs)
    assert board["pretrained"]["difference"] == -0.5
    assert board["pretrained"]["verdict"] == "worse"
    pairs[0] = pairs[0] | {"low": None, "high": None}
    assert board_of(NOISE, paired=pairs)["pretrained"]["verdict"] == "unknown"


def test_the_table_is_sorted_and_undefined_scores_come_last():
    board = list(board_of(NOISE).values())
    board[0] = board[0] | {"r2": None}
    (table,) = board_tables(board, "blocks")
    assert [row["name"] for row in table["rows"]] == ["PCA (ridge)", "SimCLR (ridge)", "mean predictor", "pretrained (ridge)"]
    assert table["rows"][-1]["cells"][0]["text"] == "–"
    assert [row["cells"][0]["best"] for row in table["rows"]] == [True, False, False, False]


@pytest.mark.parametrize(
    ("method", "name", "baseline"),
    [
        ("pretrained_mlp", "pretrained (MLP)", False),
        ("prompts", "text prompts (ridge)", False),
        ("image_only_mlp", "image only (MLP)", True),
        ("remoteclip", "remoteclip (ridge)", True),
        ("coordinates", "coordinates only", True),
    ],
)
def test_methods_that_nobody_listed_have_a_name_and_a_side(method, name, baseline):
    assert method_name(method) == name
    assert is_baseline(method) == baseline


def test_differences_are_those_of_r2_and_the_intervals_hold_them():
    frame = predictions({"a": 0.3, "b": 0.6})
    first, second = (frame[frame["method"] == name].reset_index(drop=True) for name in ("b", "a"))
    found = compare_r2(first.assign(first=first["y_pred"], second=second["y_pred"]))
    for name, rows in (("r2_first", first), ("r2_second", second)):
        per_draw = [
            1 - ((own["y"] - own["y_pred"]) ** 2).sum() / ((own["y"] - own["y"].mean()) ** 2).sum()
            for _, own in rows.groupby("seed")
        ]
        assert found[name] == pytest.approx(np.mean(per_draw))
    assert found["mean"] == pytest.approx(found["r2_second"] - found["r2_first"])
    assert 0 < found["low"] < found["mean"] < found["high"]
    assert 0 < found["low_tiles"] < found["mean"] < found["high_tiles"]
    assert (found["draws"], found["num_positive"], found["num_tiles"]) == (NUM_DRAWS, NUM_DRAWS, NUM_TILES)


def test_constant_truth_leaves_a_difference_undefined():
    frame = predictions({"a": 0.3})
    found = compare_r2(frame.assign(y=1.0, first=frame["y_pred"], second=frame["y_pred"]))
    assert found["mean"] is None
    assert found["low_tiles"] is None
