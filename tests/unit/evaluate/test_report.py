from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from report_data import (
    HOSTILE,
    HOSTILE_PROMPT,
    HOSTILE_TILE,
    INDICATORS,
    MEANS,
    METHODS,
    make,
    make_run,
    make_scores,
    make_tiles,
    paired,
    world_config,
)

from urbanclip_ray import storage
from urbanclip_ray.config import SOURCE_KINDS, ReportConfig, RunConfig
from urbanclip_ray.evaluate import plots
from urbanclip_ray.evaluate.findings import finding, score_table
from urbanclip_ray.evaluate.report import SOURCE_NAMES, write_report
from urbanclip_ray.overrides import build_config
from urbanclip_ray.schema import TILES


class Page(HTMLParser):
    """What a browser would make of the page: elements, attributes that fetch, text outside scripts, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data


def render(root, config, datasets) -> tuple[dict, Page]:
    json_uri, html_uri = write_report(config, datasets, storage.join(str(root), "report"))
    return json.loads(storage.read_bytes(json_uri)), Page(storage.read_bytes(html_uri).decode())


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    root = tmp_path_factory.mktemp("complete")
    datasets, scores = make_run(root)
    record, page = render(root, world_config(), datasets)
    return datasets, scores, record, page


def figures_of(page: Page) -> dict:
    return json.loads(page.scripts[1])


def maps_of(page: Page) -> dict:
    return json.loads(page.scripts[2])


def test_json_repeats_the_scores_and_names_every_dataset(complete):
    datasets, scores, record, _ = complete
    for key in ("probe", "paired", "transductive", "outer"):
        assert record[key] == scores[key]
    assert set(record["provenance"]) == set(datasets)
    for stage, dataset in datasets.items():
        assert record["provenance"][stage]["manifest_sha256"] == dataset.sha256
        assert record["provenance"][stage]["uri"] == dataset.uri
    assert record["provenance"]["tiles"]["rejects"] == {"not an image": 2}
    assert build_config(record["config"]) == world_config()


def test_page_fetches_nothing(complete):
    page = complete[3]
    fetching = ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href")
    urls = [attrs[name] for _, attrs in page.elements for name in fetching if name in attrs]
    assert len(urls) >= 10
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base", "svg", "form"}
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_hostile_data_stays_text(complete):
    page = complete[3]
    assert len(page.scripts) == 5  # plotly, the figures, the maps, ours, one sheet of thumbnails
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert not [tag for tag, attrs in page.elements if tag == "b" or (tag == "i" and "style" not in attrs)]
    for text in (*HOSTILE, HOSTILE_TILE, INDICATORS[1], HOSTILE_PROMPT):
        assert text in page.text
    assert HOSTILE_TILE in maps_of(page)["tiles"]["ids"]  # the page sets it as text
    plotted = json.dumps(figures_of(page))
    assert not re.search(r"<(?!extra>)\w", plotted), "plotly would render it"
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", page.scripts[4])


def test_sections_come_in_order_and_say_what_was_done(complete):
    page = complete[3]
    wanted = [
        "world-demo",
        "pretraining helps",
        "no clear difference",
        "Leaderboard",
        "the test scores that are compared must not choose it",
        "Transductive: test tiles of this split were seen in pretraining; neighbours leak.",
        "Truth, prediction and residual",
        "Tiles are shown under the pointer in 48 px",
        "Where train and test lie",
        "Retrieval with the final weights",
        "Searching by text",
        "Tiles and their sentences",
        "too short",
        "What went in and out",
        "What these numbers must not be used for",
        "not city imagery",
    ]
    places = [page.text.find(text) for text in wanted]
    assert -1 not in places
    assert places == sorted(places)
    assert "described by the rule-based baseline" in page.text
    assert "1a2b3c4d5e6f" in page.text
    assert "12.5%" in page.text


def test_every_plot_of_the_page_has_its_figure_with_data(complete):
    page = complete[3]
    placed = [attrs["data-figure"] for _, attrs in page.elements if "data-figure" in attrs]
    figures = figures_of(page)
    assert sorted(placed) == sorted(figures)
    assert all(figure["data"] for figure in figures.values())
    assert {"scatter-0", "scatter-1", "losses", "recall-image_to_text"} <= set(figures)
    drawn = [
        (attrs["data-kind"], attrs.get("data-panel")) for tag, attrs in page.elements if tag == "canvas" and "class" in attrs
    ]
    kinds = ("truth", "prediction", "residual")
    assert drawn == [(kind, panel) for panel in ("0", "1") for kind in kinds] + [("split", None)]


def test_maps_have_every_tile_its_part_and_its_picture(complete):
    datasets, maps = complete[0], maps_of(complete[3])
    tiles = datasets["tiles"].read(["tile_id", "lon", "error"]).to_pylist()
    (area,) = maps["areas"]
    assert [maps["tiles"]["ids"][at] for at in area["tile"]] == [tile["tile_id"] for tile in tiles]
    assert area["lon"] == pytest.approx([tile["lon"] for tile in tiles])
    assert area["parts"]["blocks"] == "".join("etvtt"[index % 5] for index in range(40))
    pictures = dict(zip(maps["tiles"]["ids"], maps["tiles"]["thumb"], strict=True))
    assert pictures.pop(tiles[1]["tile_id"]) == -1  # it has no image
    assert sorted(pictures.values()) == list(range(39))


def test_panels_have_the_mean_prediction_of_every_test_tile(complete):
    datasets, maps = complete[0], maps_of(complete[3])
    rows = datasets["probe"].read().to_pandas()
    rows = rows[(rows["method"] == "pretrained") & (rows["split"] == "blocks") & (rows["indicator"] == INDICATORS[1])]
    wanted = rows.groupby("tile_id")[["y", "y_pred"]].mean()
    panel = maps["panels"][1]
    ids = [maps["tiles"]["ids"][at] for at in panel["tile"]]
    assert ids == [maps["tiles"]["ids"][maps["areas"][0]["tile"][at]] for at in panel["at"]]
    assert panel["y_pred"] == pytest.approx(wanted.loc[ids, "y_pred"].tolist(), rel=1e-4)
    assert panel["y"] == pytest.approx(wanted.loc[ids, "y"].tolist(), rel=1e-4)
    assert panel["low"] < panel["high"]


def test_table_headers_have_a_scope_and_the_best_is_bold(complete):
    page, scores = complete[3], complete[1]
    assert all("scope" in attrs for tag, attrs in page.elements if tag == "th" and "colspan" not in attrs)
    table = score_table(scores)
    assert [split["name"] for split in table["splits"]] == ["blocks", "random"]
    for group in table["groups"]:
        best = [m["name"] for m in group["methods"] for cells in m["cells"] for cell in cells if cell["best"]]
        assert best == ["coordinates only"] * 2


def test_a_run_that_only_probes_leaves_out_the_rest(tmp_path):
    datasets, _ = make_run(tmp_path, located=False, complete=False)
    record, page = render(tmp_path, RunConfig(), datasets)
    assert record["retrieval"] is None
    assert set(figures_of(page)) == {"dots-0", "dots-1", "scatter-0", "scatter-1"}
    assert maps_of(page)["areas"] == []
    assert len(maps_of(page)["panels"][0]["tile"]) == 8  # hovering over the scatter still shows the tile
    for text in ("Pretraining\n", "Tiles and their sentences", "rule-based", "not city imagery", "described by"):
        assert text not in page.text


def test_null_scores_are_dashes(tmp_path):
    scores = make_scores(MEANS, null_methods=METHODS)
    unknown = dict.fromkeys(("mean", "low", "high", "low_tiles", "high_tiles", "num_positive"))
    scores["paired"] = [paired(INDICATORS[0], 0.0) | unknown]
    datasets, _ = make_run(tmp_path, scores=scores, complete=False)
    record, page = render(tmp_path, RunConfig(), datasets)
    assert record["probe"] == scores["probe"]
    assert "not scored" in page.text
    assert "None" not in page.text
    assert not re.search(r"\bnan\b", page.text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("pair", "verdict"),
    [
        (paired("gdp", 0.1), "pretraining helps"),
        (paired("gdp", -0.1), "pretraining hurts"),
        (paired("gdp", 0.1, low_tiles=-0.02), "no clear difference between pretrained and untrained"),
        (paired("gdp", 0.1, low=None, high=None), "a difference without an interval"),
        (None, "pretrained and untrained not compared"),
    ],
)
def test_the_verdict_needs_both_intervals(pair, verdict):
    record = make_scores(MEANS, indicators=("gdp",)) | {"paired": [pair] if pair else []}
    assert finding("gdp", record)["verdict"] == verdict


def test_the_finding_says_when_a_baseline_wins():
    losing = finding("gdp", make_scores(MEANS, indicators=("gdp",)))["sentences"][-1]
    assert losing.startswith("A baseline scores highest: coordinates only, R² 0.580")
    winning = finding("gdp", make_scores(MEANS | {"pretrained_mlp": 0.7}, indicators=("gdp",)))["sentences"][-1]
    assert winning == "Highest R² of all methods: pretrained (MLP), 0.700."


def test_cities_far_apart_get_a_map_each(tmp_path):
    datasets, _ = make_run(tmp_path, complete=False)
    rows = datasets["tiles"].read().to_pylist()
    for index, row in enumerate(rows):
        row["region"] = "north" if index >= 20 else "south"
        row["lat"] += 30 * (index >= 20)
        row["lon"] += 30 * (index >= 20)
    datasets["tiles"] = make(tmp_path / "far", "tiles", [pa.Table.from_pylist(rows, schema=TILES)])
    _, page = render(tmp_path, RunConfig(), datasets)
    maps = maps_of(page)
    assert [panel["tile"] == [] for panel in maps["panels"]] == [False] * 4
    for area in maps["areas"]:
        _, south, _, north = area["box"]
        assert north - south < 2
        assert area["stretch"] == pytest.approx(1 / np.cos(np.radians((south + north) / 2)))


def test_a_failed_fit_is_an_arrow_at_the_edge():
    scores = [row for row in make_scores({"pretrained": 0.5, "untrained": -40.0})["probe"] if row["metric"] == "r2"]
    outer = plots.score_dots([row for row in scores if row["indicator"] == INDICATORS[0]], "blocks")["data"][0]
    assert outer["x"] == [0.5, -1.0]
    assert outer["marker"]["symbol"] == ["circle", "triangle-left"]


def test_missing_stages_are_named(tmp_path):
    tiles, _ = make_tiles(tmp_path, 4)
    with pytest.raises(ValueError, match="splits, probe"):
        write_report(RunConfig(), {"tiles": tiles}, str(tmp_path / "report"))


def test_every_kind_of_source_has_a_name():
    assert set(SOURCE_NAMES) == set(SOURCE_KINDS)


def test_scores_are_in_csv_files_without_formulas(tmp_path):
    indicators = ("=1+1", "@gdp")
    datasets, scores = make_run(tmp_path, scores=make_scores(MEANS, indicators=indicators), complete=False)
    render(tmp_path, RunConfig(), datasets)
    folder = storage.join(str(tmp_path), "report")
    rows = list(csv.DictReader(storage.read_bytes(storage.join(folder, "scores.csv")).decode().splitlines()))
    assert len(rows) == len(scores["probe"])
    assert [row["method"] for row in rows] == [row["method"] for row in scores["probe"]]
    assert [float(row["mean"]) for row in rows] == pytest.approx([row["mean"] for row in scores["probe"]])
    assert {row["indicator"] for row in rows} == {"'=1+1", "'@gdp"}
    board = list(csv.DictReader(storage.read_bytes(storage.join(folder, "leaderboard.csv")).decode().splitlines()))
    assert len(board) == 2 * 2 * len(MEANS)
    assert {row["against"] for row in board if row["method"] == "coordinates"} == {""}


def test_fields_that_newer_scores_bring_are_shown(tmp_path):
    """Intervals, validation scores, folds and cities; and the arms of an experiment, whose names are hostile."""
    scores = make_scores(MEANS)
    for row in scores["probe"]:
        row |= {"low": row["mean"] - 0.03, "high": row["mean"] + 0.03, "validation": row["mean"] / 2}
    scores["paired"] = [
        paired(indicator, -0.1) | {"split": split, "method": method, "against": "coordinates"}
        for indicator in INDICATORS
        for split in ("blocks", "random")
        for method in ("pretrained", "pretrained_mlp")
    ]
    some = scores["probe"][0]
    scores["folds"] = [some | {"split": "transfer", "name": f"{HOSTILE[0]} → Guangzhou"}]
    scores["cities"] = [some | {"city": "<b>Beijing</b>", "fit": "pooled"}]
    experiment = tmp_path / "experiment.json"
    experiment.write_text(
        json.dumps([{"arm": HOSTILE[1], "indicator": "gdp", "mean": 0.123, "low": 0.1, "high": 0.15, "seeds": 3}])
    )
    datasets, _ = make_run(tmp_path, scores=scores, complete=False)
    config = RunConfig(report=ReportConfig(experiment=str(experiment)))
    record, page = render(tmp_path, config, datasets)
    assert len(page.scripts) == 5
    for text in (
        "draws [0.490, 0.550]",
        "baseline that has the best validation score",
        "coordinates only for log_population",
        "▼",
    ):
        assert text in page.text
    for text in ("Ablations", HOSTILE[1], "[0.100, 0.150] 3 seeds", "Transfer between cities", HOSTILE[0], "City by city"):
        assert text in page.text
    assert "<b>Beijing</b>" in page.text
    assert {row["verdict"] for row in record["leaderboard"] if not row["baseline"]} == {"worse"}
    assert {row["chosen_by"] for row in record["leaderboard"] if not row["baseline"]} == {"validation"}


def test_tiles_beyond_the_cap_have_no_picture_and_the_page_says_so(tmp_path):
    datasets, _ = make_run(tmp_path, complete=False)
    _, page = render(tmp_path, RunConfig(report=ReportConfig(max_thumbnails=9)), datasets)
    assert "to bound this page, 9 of 39 tiles have a picture" in page.text
    assert sorted(place for place in maps_of(page)["tiles"]["thumb"] if place >= 0) == list(range(9))
    _, page = render(tmp_path, RunConfig(report=ReportConfig(max_thumbnails=0)), datasets)
    assert "No tile is shown under the pointer." in page.text
    assert len(page.scripts) == 4


def test_a_scatter_of_many_tiles_is_a_choice_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "MOST_POINTS", 5)
    datasets, _ = make_run(tmp_path, complete=False)
    _, page = render(tmp_path, RunConfig(), datasets)
    assert "A seeded choice of 5 of 8 tiles." in page.text
    points = figures_of(page)["scatter-0"]["data"][1]
    panel = maps_of(page)["panels"][0]
    assert len(points["x"]) == 5
    assert points["x"] == [panel["y"][row] for row in points["customdata"]]
    assert points["y"] == [panel["y_pred"][row] for row in points["customdata"]]
