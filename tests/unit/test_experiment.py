"""Arms of an ablation, and the table of an experiment from predictions whose scores are known."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pytest

from urbanclip_ray import experiment as module
from urbanclip_ray.ablations import ablations
from urbanclip_ray.config import ConfigError
from urbanclip_ray.experiment import (
    Experiment,
    Score,
    compare,
    conclude,
    list_arms,
    over_seeds,
    run_experiment,
    score,
    summarise,
)
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.schema import PREDICTIONS
from urbanclip_ray.storage import open_dataset, publish


def differences(base: dict, other: dict, path: str = "") -> set[str]:
    if isinstance(base, dict) and isinstance(other, dict):
        return {key for name in base for key in differences(base[name], other[name], f"{path}.{name}".lstrip("."))}
    return set() if base == other else {path}


def test_an_arm_differs_from_its_base_in_one_thing():
    base = load_recipe("rsicd_against_none")
    found = {name: differences(base.model_dump(), arm.model_dump()) for name, arm in ablations(base).items()}
    assert found == {
        "full": set(),
        "without_text": {"embed.weights", "baselines.names"},
        "without_refinement": {"refine.min_words", "refine.max_words", "refine.repeats"},
        "without_contrastive": {"train.contrastive_weight"},
        "without_caption": {"train.caption_weight"},
        "paragraph": {"train.text_mode"},
        "captioner_land_cover": {"caption.captioner"},
    }


def test_a_captioner_that_is_asked_is_asked_about_one_aspect_at_a_time():
    arms = ablations(load_recipe("urbanclip_beijing"))
    asked = {name: arm.caption.asked() for name, arm in arms.items() if name.startswith("aspect_")}
    assert {len(prompts) for prompts in asked.values()} == {1}
    assert len(set(asked.values())) == len(asked) == 5


def test_a_coca_is_asked_nothing_and_its_run_has_no_arms_of_aspects():
    base = apply_overrides(load_recipe("world_demo"), ["caption.captioner=coca", "caption.model=weights"])
    assert not [name for name in ablations(base) if name.startswith("aspect_")]


def test_arms_that_would_not_differ_or_could_not_learn_are_left_out():
    assert "captioner_land_cover" not in ablations(load_recipe("world_demo"))
    base = apply_overrides(load_recipe("world_demo"), ["train.caption_weight=0"])
    assert {"without_caption", "without_contrastive"} & set(ablations(base)) == set()


def test_an_ablation_is_a_recipe_by_its_base_and_name():
    assert load_recipe("world_demo/without_caption") == ablations(load_recipe("world_demo"))["without_caption"]
    with pytest.raises(ConfigError, match="world_demo has no ablation 'moon'; choose one of full, without_text"):
        load_recipe("world_demo/moon")


def test_the_comparison_with_no_text_is_not_made_twice():
    assert "without_text" not in list_arms(load_recipe("rsicd_against_none"))
    assert "without_text" in list_arms(load_recipe("rsicd_small"))


@pytest.fixture
def predictions(tmp_path):
    """Method `good` is off by a tenth everywhere, `mean` predicts the mean; two draws, and a split that does not count."""
    y = np.array([1.0, 2.0, 3.0, 4.0])
    rows = [
        {
            "tile_id": f"t/{at}",
            "indicator": "gdp",
            "method": method,
            "split": split,
            "fold": 0,
            "seed": draw,
            "y": y[at],
            "y_pred": y[at] + 0.1 if method == "good" else y.mean(),
            "space": "log",
        }
        for method in ("good", "mean")
        for split in ("group", "random")
        for draw in (0, 1)
        for at in range(4)
    ]
    with publish(str(tmp_path / "probe"), "probe", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS))
        publication.count(unit="predictions", rows_in=len(rows), rows_out=len(rows), rejects={})
    return open_dataset(str(tmp_path / "probe"))


def test_scores_are_r2_of_every_draw_of_the_outer_split(predictions):
    found = score(predictions, "group", seed=7)
    assert len(found) == 4
    for item in found:
        assert item.seed == 7
        assert item.r2 == pytest.approx(1 - 4 * 0.01 / 5 if item.method == "good" else 0.0)


def scores(values: dict[str, list[float]]) -> list[Score]:
    """Two draws a pretraining seed, a little apart."""
    return [
        Score(method, "gdp", seed, draw, r2 + 0.01 * (draw - 0.5))
        for method, by_seed in values.items()
        for seed, r2 in enumerate(by_seed)
        for draw in (0, 1)
    ]


def test_the_table_has_the_mean_over_seeds_and_draws_and_an_interval_over_seeds():
    table = summarise(scores({"pretrained": [0.3, 0.4, 0.5], "colour": [0.2, 0.2, 0.2]}))
    assert [row["method"] for row in table] == ["pretrained", "colour"]
    first, second = table
    assert first["r2"] == pytest.approx(0.4)
    assert first["high"] - first["r2"] == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-3)  # t of 2 degrees of freedom
    assert (first["num_seeds"], first["num_draws"]) == (3, 2)
    assert second["r2"] == pytest.approx(0.2)


def test_one_seed_and_equal_values_have_no_interval():
    assert over_seeds([0.3]) == (None, None)
    assert over_seeds([0.3, 0.3, 0.3]) == (None, None)


def test_differences_are_of_equal_seeds_alone():
    (row,) = compare(scores({"pretrained": [0.3, 0.4, 0.5], "image_only": [0.2, 0.31]}))
    assert row["difference"] == pytest.approx(0.095)
    assert row["num_seeds"] == 2


@pytest.mark.parametrize(
    ("text", "none", "verdict"),
    [
        ([0.50, 0.51, 0.52], [0.30, 0.31, 0.33], "gdp: text helps, +0.19"),
        ([0.30, 0.31, 0.33], [0.50, 0.51, 0.52], "gdp: text hurts, -0.19"),
        ([0.3, 0.5, 0.2], [0.31, 0.2, 0.4], "gdp: no clear difference"),
        ([0.3], [0.2], "gdp: one pretraining seed cannot tell (text helps in it), +0.100 R² over 1 pretraining seed"),
    ],
)
def test_text_against_no_text_is_said_whichever_way_it_goes(text, none, verdict):
    (sentence,) = conclude(compare(scores({"pretrained": text, "image_only": none})))
    assert sentence.startswith(verdict)


def test_an_arm_that_fails_is_a_row_and_the_others_go_on(monkeypatch, tmp_path, predictions):
    """The stages are replaced: what trains and probes is tested where it is made."""
    asked = []

    def fake(config, jobs):
        if config.baselines.names:
            raise ConfigError(f"no {' and '.join(config.baselines.names)}")
        asked.append((config.run, config.train.caption_weight, config.train.seed, tuple(jobs)))
        if config.train.caption_weight == 0:
            raise ConfigError("no words")
        run = type("Made", (), {"datasets": {}})()
        if "probe" in jobs:
            run.datasets["probe"] = predictions
        else:
            with publish(str(tmp_path / f"pretrain{len(asked)}"), "pretrain", {}, {}) as publication:
                publication.write_file("open_clip_model.safetensors", str(len(asked)).encode())
            run.datasets["pretrain"] = open_dataset(str(tmp_path / f"pretrain{len(asked)}"))
        return run

    monkeypatch.setattr(module, "run_stages", fake)
    base = load_recipe("rsicd_against_none")
    experiment = Experiment(base, load_recipe("kingcounty_probe"), ("without_caption", "paragraph"), (0, 1), 1)
    record = run_experiment(experiment, str(tmp_path / "out"))
    assert record["failures"] == [
        {"what": "without_caption, seed 0", "error": "no words"},
        *(
            {"what": f"baselines {name}, seed {seed}", "error": f"no {name}"}
            for seed in (0, 1)
            for name in ("simclr", "image_only", "pca")
        ),
    ]
    assert [seed for *_, seed, _ in asked] == [0, 0, 0, 0, 1, 1]
    table = {row["method"]: row for row in csv.DictReader((tmp_path / "out" / "results.csv").open())}
    assert float(table["good"]["r2"]) == pytest.approx(0.992)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| without_caption, seed 0 | failed: no words |" in text
    assert "Text against no text was not compared" in text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["table"] == record["table"]


def test_unknown_arms_are_refused(tmp_path):
    base = load_recipe("rsicd_against_none")
    with pytest.raises(ConfigError, match=r"arms \['moon'\] are none of this recipe; it has full"):
        run_experiment(Experiment(base, base, ("moon",), (0,), 1), str(tmp_path))
