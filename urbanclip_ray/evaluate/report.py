"""The report of a run: one self-contained HTML page and one JSON, from finished datasets alone.

Everything that comes from data (captions, tile ids, regions, indicators, file names) is hostile input: the template
autoescapes, JSON inside the page is escaped for `<script>`, and a content security policy keeps the page from fetching
anything.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from urbanclip_ray import storage
from urbanclip_ray.config import RunConfig
from urbanclip_ray.evaluate import plots
from urbanclip_ray.evaluate.arms import ablation_tables, city_tables, read_experiment, transfer_records, transfer_tables
from urbanclip_ray.evaluate.findings import distinct, finding, main_finding, paired_row, score_table
from urbanclip_ray.evaluate.gallery import caption_gallery, search_examples
from urbanclip_ray.evaluate.leaderboard import board_tables, make_leaderboard
from urbanclip_ray.evaluate.maps import make_maps
from urbanclip_ray.evaluate.page import as_csv, read_template, render_page
from urbanclip_ray.evaluate.plots import method_name
from urbanclip_ray.evaluate.thumbnails import Sheets, make_sheets
from urbanclip_ray.storage import Dataset

Json = dict[str, Any]

REQUIRED = ("tiles", "splits", "probe")
STAGES = (
    *("tiles", "labels", "captions", "pairs", "splits", "shards", "pretrain"),
    *("embeddings", "untrained", "prompts", "probe", "retrieval"),
)
SOURCE_NAMES = {
    "folder": "a folder of tiles",
    "scene": "satellite scenes (GeoTIFF)",
    "slippy": "web map tiles",
    "rsicd": "RSICD (Lu et al. 2017)",
    "world": "the world demo (NASA Blue Marble, region scale)",
    "urbanclip": "the user's own, with UrbanCLIP's released captions and labels",
    "webdataset": "WebDataset shards",
    "huggingface": "a Hugging Face dataset",
}
CAPTIONER_NAMES = {
    "land_cover": "the rule-based baseline",
    "given": "the source itself",
    "coca": "a CoCa, in the words it was pretrained on",
    "transformers": "a vision-language model",
    "vllm": "a vision-language model run by vLLM",
    "openai": "a model behind an endpoint",
}
PREDICTION_COLUMNS = ["tile_id", "indicator", "method", "split", "fold", "seed", "y", "y_pred"]
SCORE_COLUMNS = (
    *("indicator", "split", "method", "metric", "space", "mean", "std", "low", "high", "low_tiles", "high_tiles"),
    *("unit", "num_units", "seeds", "num_folds", "num_test", "validation", "transductive"),
)


def write_report(config: RunConfig, datasets: Mapping[str, Dataset], uri: str) -> tuple[str, str]:
    """Write `<uri>/report.json`, `report.html`, `scores.csv` and `leaderboard.csv`; returns the URIs of the first two.

    `datasets` maps the stages of `STAGES` to finished datasets. All but tiles, splits and probe may be missing, and the
    page leaves out the parts that need them. Raises ValueError naming required stages that are missing, and ExperimentError
    where `report.experiment` cannot be read.
    """
    if missing := [stage for stage in REQUIRED if stage not in datasets]:
        raise ValueError(f"the report needs {', '.join(missing)}: run these stages first and pass their datasets")
    scores = _read_json(datasets["probe"], "scores.json")
    experiment = read_experiment(config.report.experiment) if config.report.experiment else []
    record = {
        "run": config.run,
        **{key: scores[key] for key in ("probe", "paired", "transductive", "outer")},
        **{key: scores.get(key, []) for key in ("folds", "cities")},
        "experiment": experiment,
        "retrieval": _read_json(datasets["retrieval"], "retrieval.json") if "retrieval" in datasets else None,
        "provenance": _provenance(datasets),
        "config": config.model_dump(mode="json"),
    }
    record["leaderboard"] = make_leaderboard(record, datasets["probe"].read(PREDICTION_COLUMNS).to_pandas())
    json_uri, html_uri = storage.join(uri, "report.json"), storage.join(uri, "report.html")
    storage.write_bytes(html_uri, _page(config, datasets, record).encode())
    storage.write_bytes(storage.join(uri, "scores.csv"), as_csv(record["probe"], SCORE_COLUMNS))
    storage.write_bytes(storage.join(uri, "leaderboard.csv"), as_csv(record["leaderboard"]))
    storage.write_bytes(json_uri, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return json_uri, html_uri


def _read_json(dataset: Dataset, name: str) -> Any:
    return json.loads(storage.read_bytes(dataset.file_uri(name)))


def _page(config: RunConfig, datasets: Mapping[str, Dataset], record: Json) -> str:
    figures: dict[str, plots.Figure] = {}
    outer = record["outer"]
    findings = [finding(indicator, record) for indicator in distinct(record["probe"], "indicator")]
    sheets = make_sheets(datasets["tiles"], config.report.max_thumbnails, 1e6 * config.report.max_thumbnail_mb)
    maps = make_maps(datasets, record, _mapped_method(record), sheets, figures)
    return render_page(
        "report.html",
        run=config.run,
        outer=outer,
        lead=_lead(config, datasets, record),
        findings=findings,
        main_finding=main_finding(findings),
        boards=board_tables(record["leaderboard"], outer),
        transductive=record["transductive"],
        table=score_table(record),
        paired=[paired_row(row) for row in record["paired"]],
        dots=_score_dots(record, figures),
        ablations=ablation_tables(record["experiment"]),
        transfers=transfer_tables([*transfer_records(record), *record["experiment"]]),
        cities=city_tables(record),
        notes=_probe_notes(datasets["probe"]),
        maps=maps,
        nearness=datasets["splits"].manifest.facts.get("nearness", {}),
        thumbnails=_thumbnail_note(sheets),
        sheets=[base64.b64encode(sheet).decode() for sheet in sheets.sheets],
        mapped=method_name(_mapped_method(record)),
        training=_training(datasets, figures),
        retrieval=_retrieval_rows(record["retrieval"] or []),
        searches=search_examples(datasets),
        gallery=caption_gallery(datasets, outer),
        rule_based=config.caption.captioner == "land_cover" and "captions" in datasets,
        captioner=_captioner_name(config, datasets),
        provenance=record["provenance"],
        libraries=_libraries(record["provenance"]),
        config_json=json.dumps(record["config"], indent=2),
        source=config.source.kind,
        figures=figures,
        script=read_template("report.js"),
        plotly_js=get_plotlyjs(),
    )


def _thumbnail_note(sheets: Sheets) -> str:
    """How large the pictures under the pointer are, and how many tiles have none; what is capped is said."""
    shown = len(sheets.place)
    if not shown:
        return "No tile is shown under the pointer."
    note = f"Tiles are shown under the pointer in {sheets.side_px} px"
    if shown < sheets.num_tiles:
        note += f"; to bound this page, {shown:,} of {sheets.num_tiles:,} tiles have a picture"
    return f"{note} (report.max_thumbnails, report.max_thumbnail_mb)."


def _probe_notes(probe: Dataset) -> list[str]:
    """What the probe says of itself that a reader of its scores must know."""
    facts = probe.manifest.facts
    notes = [f"{method_name(method)} could not run: {reason}." for method, reason in facts.get("skipped", {}).items()]
    notes += [f"Leak ({leak['severity']}), {leak['name']}: {leak['detail']}." for leak in facts.get("leaks", [])]
    return notes


def _provenance(datasets: Mapping[str, Dataset]) -> dict[str, Json]:
    return {
        stage: {
            "uri": datasets[stage].uri,
            "manifest_sha256": datasets[stage].sha256,
            "rows_in": datasets[stage].manifest.rows_in,
            "rows_out": datasets[stage].manifest.rows_out,
            "unit": datasets[stage].manifest.unit,
            "rejects": datasets[stage].manifest.rejects,
            "libraries": datasets[stage].manifest.libraries,
        }
        for stage in (*(name for name in STAGES if name in datasets), *sorted(datasets.keys() - set(STAGES)))
    }


def _libraries(provenance: dict[str, Json]) -> list[Json]:
    """One row per library; several versions where stages ran with different ones."""
    versions: dict[str, dict[str, list[str]]] = {}
    for stage, entry in provenance.items():
        for name, version in entry["libraries"].items():
            versions.setdefault(name, {}).setdefault(version, []).append(stage)
    return [
        {
            "name": name,
            "versions": [
                version if len(found) == 1 else f"{version} ({', '.join(stages)})" for version, stages in found.items()
            ],
        }
        for name, found in versions.items()
    ]


def _captioner_name(config: RunConfig, datasets: Mapping[str, Dataset]) -> str:
    model = datasets["captions"].manifest.facts.get("model") if "captions" in datasets else None
    name = CAPTIONER_NAMES[config.caption.captioner]
    return f"{name}, {model['name']} at revision {model['revision'][:12]}" if model else name


def _lead(config: RunConfig, datasets: Mapping[str, Dataset], record: Json) -> list[str]:
    tiles = datasets["tiles"].manifest
    lead = [f"{tiles.rows_out:,} of {tiles.rows_in:,} {tiles.unit} of {SOURCE_NAMES[config.source.kind]} could be used."]
    if "captions" in datasets:
        sentence = f"They were described by {_captioner_name(config, datasets)}"
        if "pairs" in datasets:
            pairs = datasets["pairs"].manifest
            sentence += f"; {pairs.rows_out:,} of {pairs.rows_in:,} {pairs.unit} were kept"
        lead.append(sentence + ".")
    weights = _weights_digest(datasets)
    if "pretrain" in datasets:
        start = f", starting from {config.model.pretrained}" * bool(config.model.pretrained)
        lead.append(
            f"A {config.model.architecture} was pretrained on them{start}{f', giving weights {weights}' * bool(weights)}."
        )
    elif config.embed.weights:
        lead.append(f"Weights made before were used: {config.embed.weights}{f' (digest {weights})' * bool(weights)}.")
    outer = [row for row in record["probe"] if row["split"] == record["outer"]]
    if outer:
        num_test, num_draws = max(row["num_test"] for row in outer), max(row["seeds"] for row in outer)
        lead.append(
            f"Vectors of frozen image encoders, and baselines, were then judged on the {num_test:,} test tiles of the "
            f"{record['outer']} split, with {num_draws} draw{'s' * (num_draws != 1)} of train and validation tiles."
        )
    return lead


def _weights_digest(datasets: Mapping[str, Dataset]) -> str:
    if "embeddings" not in datasets:
        return ""
    digests = datasets["embeddings"].read(columns=["weights"])["weights"].unique().to_pylist()
    return ", ".join(digest[:12] for digest in digests)


# --- figures


def _score_dots(record: Json, figures: dict[str, plots.Figure]) -> list[Json]:
    dots = []
    for index, indicator in enumerate(distinct(record["probe"], "indicator")):
        scores = [row for row in record["probe"] if row["indicator"] == indicator and row["metric"] == "r2"]
        figures[f"dots-{index}"] = plots.score_dots(scores, record["outer"])
        dots.append({"indicator": indicator, "figure": f"dots-{index}"})
    return dots


def _mapped_method(record: Json) -> str:
    methods = distinct(record["probe"], "method")
    return "pretrained" if "pretrained" in methods or not methods else methods[0]


def _training(datasets: Mapping[str, Dataset], figures: dict[str, plots.Figure]) -> Json | None:
    if "pretrain" not in datasets:
        return None
    history = _read_json(datasets["pretrain"], "history.json")
    train, validation = history["train"], history["validation"]
    figures["losses"] = plots.loss_curves(train, validation)
    figures["learning-rate"] = plots.learning_rate(train)
    for direction in ("image_to_text", "text_to_image"):
        if validation:
            figures[f"recall-{direction}"] = plots.recall_curves(validation, direction)
    speeds = [row["samples_per_s"] for row in train if row["samples_per_s"] is not None]
    return {
        "num_steps": train[-1]["step"] if train else 0,
        "samples_per_s": round(float(np.median(speeds))) if speeds else None,
        "validation": validation[-1] if validation else None,
    }


def _retrieval_rows(parts: list[Json]) -> list[Json]:
    rows = []
    for part in sorted(parts, key=lambda part: part["part"] != "test"):
        texts = f"{part['num_texts']:,} texts, {part['num_different_texts']:,} of them different"
        for direction in ("image_to_text", "text_to_image"):
            found, equal = part[direction], part["equal_texts"][direction]
            rows.append(
                {
                    "part": part["part"],
                    "direction": direction.replace("_", " "),
                    "size": f"{part['num_images']:,} images, {texts}",
                    "recalls": [
                        {
                            "own": _percent(found[f"r{k}"]),
                            "equal": _percent(equal[f"r{k}"]),
                            "chance": _percent(part["chance"][direction][f"r{k}"]),
                        }
                        for k in (1, 5, 10)
                    ],
                    "ranks": f"{found['median_rank']:g} and {found['mean_rank']:.1f}",
                    "equal_ranks": f"{equal['median_rank']:g} and {equal['mean_rank']:.1f}",
                }
            )
    return rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
