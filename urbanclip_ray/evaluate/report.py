"""The report of a run: one self-contained HTML page and one JSON, from finished datasets alone.

Everything that comes from data (captions, tile ids, regions, indicators, file names) is hostile input: the template
autoescapes, JSON inside the page is escaped for `<script>`, and a content security policy keeps the page from fetching
anything.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from plotly.offline import get_plotlyjs

from urbanclip_ray import imagery, storage
from urbanclip_ray.config import RunConfig
from urbanclip_ray.evaluate import plots
from urbanclip_ray.evaluate.findings import SPACE_NAMES, distinct, finding, main_finding, paired_row, score_table
from urbanclip_ray.evaluate.plots import method_name
from urbanclip_ray.storage import Dataset

Json = dict[str, Any]

REQUIRED = ("tiles", "splits", "probe")
STAGES = (
    *("tiles", "labels", "captions", "pairs", "splits", "shards", "pretrain"),
    *("embeddings", "untrained", "probe", "retrieval"),
)
SOURCE_NAMES = {
    "folder": "a folder of tiles",
    "rsicd": "RSICD (Lu et al. 2017)",
    "world": "the world demo (NASA Blue Marble, region scale)",
    "urbanclip": "the user's own, with UrbanCLIP's released captions and labels",
}
CAPTIONER_NAMES = {
    "land_cover": "the rule-based baseline",
    "given": "the source itself",
    "transformers": "a vision-language model",
}
NUM_TILES_SHOWN = 12
NUM_TILES_WITH_REJECTS = 5  # of those shown, where there are as many
NUM_SENTENCES_SHOWN = 8
NUM_CHARACTERS_SHOWN = 400  # of one sentence
MOST_MAP_AREAS = 12
THUMBNAIL_PX = 192


def write_report(config: RunConfig, datasets: Mapping[str, Dataset], uri: str) -> tuple[str, str]:
    """Write `<uri>/report.json` and `<uri>/report.html`; returns both URIs.

    `datasets` maps the stages of `STAGES` to finished datasets. All but tiles, splits and probe may be missing, and the
    page leaves out the parts that need them. Raises ValueError naming required stages that are missing.
    """
    if missing := [stage for stage in REQUIRED if stage not in datasets]:
        raise ValueError(f"the report needs {', '.join(missing)}: run these stages first and pass their datasets")
    scores = _read_json(datasets["probe"], "scores.json")
    retrieval = _read_json(datasets["retrieval"], "retrieval.json") if "retrieval" in datasets else None
    record = {
        "run": config.run,
        "probe": scores["probe"],
        "paired": scores["paired"],
        "transductive": scores["transductive"],
        "outer": scores["outer"],
        "retrieval": retrieval,
        "provenance": _provenance(datasets),
        "config": config.model_dump(mode="json"),
    }
    json_uri, html_uri = storage.join(uri, "report.json"), storage.join(uri, "report.html")
    storage.write_bytes(html_uri, _page(config, datasets, record).encode())
    storage.write_bytes(json_uri, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return json_uri, html_uri


def _read_json(dataset: Dataset, name: str) -> Any:
    return json.loads(storage.read_bytes(dataset.file_uri(name)))


def _page(config: RunConfig, datasets: Mapping[str, Dataset], record: Json) -> str:
    figures: dict[str, plots.Figure] = {}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = importlib.resources.files("urbanclip_ray.evaluate").joinpath("report.html").read_text("utf-8")
    outer = record["outer"]
    findings = [finding(indicator, record) for indicator in distinct(record["probe"], "indicator")]
    return environment.from_string(template).render(
        run=config.run,
        outer=outer,
        lead=_lead(config, datasets, record),
        findings=findings,
        main_finding=main_finding(findings),
        table=score_table(record),
        paired=[paired_row(row) for row in record["paired"]],
        dots=_score_dots(record, figures),
        panels=_panels(datasets, record, figures),
        mapped=method_name(_mapped_method(record)),
        training=_training(datasets, figures),
        retrieval=_retrieval_rows(record["retrieval"] or []),
        gallery=_gallery(datasets, outer),
        rule_based=config.caption.captioner == "land_cover" and "captions" in datasets,
        captioner=_captioner_name(config, datasets),
        provenance=record["provenance"],
        libraries=_libraries(record["provenance"]),
        config_json=json.dumps(record["config"], indent=2),
        source=config.source.kind,
        figures=figures,
        plotly_js=get_plotlyjs(),
    )


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
        for stage in STAGES
        if stage in datasets
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


def _panels(datasets: Mapping[str, Dataset], record: Json, figures: dict[str, plots.Figure]) -> list[Json]:
    """One panel per indicator (and area): maps where tiles have coordinates, and the scatter of test tiles."""
    method = _mapped_method(record)
    filters = [("method", "=", method), ("split", "=", record["outer"])]
    predictions = datasets["probe"].read(columns=["tile_id", "indicator", "y", "y_pred", "space"], filters=filters)
    held_out = predictions.to_pandas()
    areas = _map_areas(datasets["tiles"])
    panels: list[Json] = []
    for indicator in held_out["indicator"].unique():
        rows = held_out[held_out["indicator"] == indicator]
        space = str(rows["space"].iloc[0])
        test = rows[rows["space"] == space].groupby("tile_id", as_index=False)[["y", "y_pred"]].mean()
        for area, tiles in areas.items() or {"": None}.items():
            here = test if tiles is None else tiles.merge(test, on="tile_id")
            if here.empty:
                continue
            panel: Json = {"indicator": indicator, "area": area, "space": SPACE_NAMES.get(space, space), "maps": {}}
            if tiles is not None:
                for name, figure in plots.tile_maps(tiles, here).items():
                    panel["maps"][name] = f"panel-{len(panels)}-{name}"
                    figures[panel["maps"][name]] = figure
            panel["scatter"] = f"panel-{len(panels)}-scatter"
            figures[panel["scatter"]] = plots.truth_scatter(here, space)
            panels.append(panel)
    return panels


def _map_areas(tiles: Dataset) -> dict[str, pd.DataFrame]:
    """Tiles with coordinates, as one area, or one per region where regions lie far apart (cities of a country)."""
    columns = ["tile_id", "region", "lon", "lat", "west", "south", "east", "north"]
    frame = tiles.read(columns=columns).to_pandas().dropna(subset=["lon", "lat"])
    if frame.empty:
        return {}
    spans = frame.groupby("region")[["lon", "lat"]].agg(np.ptp)
    if 1 < len(spans) <= MOST_MAP_AREAS and spans.prod(axis=1).sum() < 0.25 * np.ptp(frame["lon"]) * np.ptp(frame["lat"]):
        return {str(region): rows for region, rows in frame.groupby("region")}
    return {"": frame}


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
    return [
        {
            "part": part["part"],
            "direction": direction.replace("_", " "),
            "size": f"{part['num_images']:,} images, {part['num_texts']:,} texts",
            "recalls": [(_percent(part[direction][f"r{k}"]), _percent(part["chance"][direction][f"r{k}"])) for k in (1, 5, 10)],
        }
        for part in sorted(parts, key=lambda part: part["part"] != "test")
        for direction in ("image_to_text", "text_to_image")
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


# --- tiles and their sentences


def _gallery(datasets: Mapping[str, Dataset], outer: str) -> list[Json]:
    """A seeded choice of tiles with their kept and rejected sentences; a few with rejects are preferred."""
    if "pairs" not in datasets:
        return []
    pairs = datasets["pairs"].read().to_pylist()
    order = [pairs[index] for index in np.random.default_rng(0).permutation(len(pairs))]
    chosen = [row for row in order if row["rejected"]][:NUM_TILES_WITH_REJECTS]
    taken = {row["tile_id"] for row in chosen}
    chosen += [row for row in order if row["tile_id"] not in taken][: NUM_TILES_SHOWN - len(chosen)]
    ids = [row["tile_id"] for row in chosen]
    tiles = datasets["tiles"].read(columns=["tile_id", "image", "error"], filters=[("tile_id", "in", ids)])
    images = {row["tile_id"]: row for row in tiles.to_pylist()}
    parts = _parts(datasets["splits"], outer, ids)
    return [
        {
            "tile_id": row["tile_id"],
            "part": parts.get(row["tile_id"], ""),
            "image": _thumbnail(images.get(row["tile_id"])),
            "kept": [_shorten(text) for text in row["texts"][:NUM_SENTENCES_SHOWN]],
            "rejected": [
                {"text": _shorten(item["text"]), "reason": item["reason"]} for item in row["rejected"][:NUM_SENTENCES_SHOWN]
            ],
            "num_more": sum(max(0, len(texts) - NUM_SENTENCES_SHOWN) for texts in (row["texts"], row["rejected"])),
        }
        for row in sorted(chosen, key=lambda row: str(row["tile_id"]))
    ]


def _parts(splits: Dataset, outer: str, ids: list[str]) -> dict[str, str]:
    """Part of each tile in the outer split's first draw."""
    filters = [("split", "=", outer), ("tile_id", "in", ids)]
    rows = splits.read(columns=["tile_id", "seed", "part"], filters=filters).to_pylist()
    return {row["tile_id"]: row["part"] for row in sorted(rows, key=lambda row: -row["seed"])}


def _thumbnail(tile: Json | None) -> str | None:
    """A data URI of the re-encoded image, so that no foreign bytes enter the page; None for an unusable tile."""
    if tile is None or tile["image"] is None or tile["error"] is not None:
        return None
    try:
        image = imagery.decode(tile["image"])
    except imagery.TileImageError:  # stricter limits than those of the ingest; the card says that it is not shown
        return None
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _shorten(text: str | None) -> str:
    text = text or "(empty)"
    return text if len(text) <= NUM_CHARACTERS_SHOWN else text[:NUM_CHARACTERS_SHOWN] + "…"
