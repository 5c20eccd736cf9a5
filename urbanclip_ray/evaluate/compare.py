"""Two runs side by side: differences in R² on the tiles that both predicted, and what their configs have different.

A difference of two runs has many causes; the page lists every key that differs, and says where the truth or the parts of
tiles do, because then it is not the runs alone that differ.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pandas as pd
from plotly.offline import get_plotlyjs

from urbanclip_ray import storage
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate import plots
from urbanclip_ray.evaluate.findings import SPACE_NAMES, distinct, interval_text, signed
from urbanclip_ray.evaluate.page import as_csv, read_template, render_page
from urbanclip_ray.evaluate.paired import compare_r2
from urbanclip_ray.evaluate.plots import method_name
from urbanclip_ray.storage import Dataset

Json = dict[str, Any]

KEYS = ["tile_id", "indicator", "method", "split", "fold", "seed", "space"]
SAME_TRUTH = 1e-9  # relative: the same label in the same space


class CompareError(UserError, ValueError):
    """Runs that cannot be compared; the message names the run and the fix."""


class FinishedRun(NamedTuple):
    """A run with a probe, as its `run.json` has it."""

    name: str
    uri: str
    config: Json
    probe: Dataset


def compare_runs(first_uri: str, second_uri: str, uri: str) -> tuple[str, str]:
    """Write `<uri>/compare.json`, `compare.csv` and `compare.html`; returns the URIs of the JSON and the page.

    The URIs are of two runs. Differences are second − first. Raises :class:`CompareError` where a run is not finished or
    nothing was predicted by both.
    """
    first, second = open_run(first_uri), open_run(second_uri)
    record = {
        "first": {"run": first.name, "uri": first.uri, "probe_sha256": first.probe.sha256},
        "second": {"run": second.name, "uri": second.uri, "probe_sha256": second.probe.sha256},
        **compare_predictions(first, second),
        "config": config_differences(first.config, second.config),
    }
    json_uri, html_uri = storage.join(uri, "compare.json"), storage.join(uri, "compare.html")
    storage.write_bytes(html_uri, _page(record).encode())
    storage.write_bytes(storage.join(uri, "compare.csv"), as_csv(record["differences"]))
    storage.write_bytes(json_uri, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return json_uri, html_uri


def open_run(uri: str) -> FinishedRun:
    """A run by its folder; raises :class:`CompareError` where it has no probe."""
    try:
        run = json.loads(storage.read_bytes(storage.join(uri, "run.json")))
        place = storage.join(uri, run["datasets"]["probe"])
        return FinishedRun(str(run["run"]), uri, dict(run["config"]), storage.open_dataset(place))
    except FileNotFoundError:
        raise CompareError(
            f"{uri} has no run.json: give a run's name in --storage, or its URI, after jobs/pipeline.py"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise CompareError(f"{uri} is no run with a probe ({error!r}): give its source indicators and run it again") from None


def compare_predictions(first: FinishedRun, second: FinishedRun) -> Json:
    """`differences` per indicator, split and method, on the tiles and draws that both predicted from the same truth.

    `num_only_first`, `num_only_second`: predictions without a partner; `num_other_truth`: partners whose truth differs, which
    are left out. All over the methods and splits that both have.
    """
    frames = [run.probe.read().to_pandas() for run in (first, second)]
    joined = frames[0].merge(frames[1], on=KEYS, how="outer", suffixes=("_first", "_second"), indicator="found")
    both = joined[joined["found"] == "both"]
    gap, size = (both["y_first"] - both["y_second"]).abs(), both["y_first"].abs()
    same = both[gap <= SAME_TRUTH * size.clip(lower=1.0)]
    if same.empty:
        raise CompareError(
            f"{first.uri} and {second.uri} predicted no tile in common, from the same truth, by a method and in a split of the "
            "same name: compare runs with the same source, labels, probe.target and split"
        )
    rows = same.rename(columns={"y_first": "y", "y_pred_first": "first", "y_pred_second": "second"})
    differences = [
        dict(zip(("indicator", "split", "method", "space"), key, strict=True)) | compare_r2(own)
        for key, own in rows.groupby(["indicator", "split", "method", "space"], sort=False)
    ]
    shared = joined[joined[["indicator", "split", "method"]].apply(tuple, axis=1).isin(_groups(both))]
    return {
        "differences": differences,
        "num_only_first": int((shared["found"] == "left_only").sum()),
        "num_only_second": int((shared["found"] == "right_only").sum()),
        "num_other_truth": len(both) - len(same),
        "only_in_first": sorted(set(frames[0]["method"]) - set(frames[1]["method"])),
        "only_in_second": sorted(set(frames[1]["method"]) - set(frames[0]["method"])),
    }


def _groups(rows: pd.DataFrame) -> set[tuple[str, ...]]:
    return set(rows[["indicator", "split", "method"]].itertuples(index=False, name=None))


def config_differences(first: Json, second: Json) -> list[Json]:
    """Every dotted key whose value differs, with both values as JSON; null where a run does not know the key."""
    flat = [_flatten(config) for config in (first, second)]
    keys = [key for key in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(key) != flat[1].get(key)]
    return [{"key": key, "first": flat[0].get(key), "second": flat[1].get(key)} for key in keys]


def _flatten(config: Json, prefix: str = "") -> Json:
    flat: Json = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _page(record: Json) -> str:
    figures = {}
    for index, indicator in enumerate(distinct(record["differences"], "indicator")):
        rows = [row for row in record["differences"] if row["indicator"] == indicator and row["mean"] is not None]
        figures[f"differences-{index}"] = plots.difference_dots(rows)
    rows = [
        {
            **{key: row[key] for key in ("indicator", "split", "num_tiles", "draws", "num_positive")},
            "space": SPACE_NAMES.get(row["space"], row["space"]),
            "method": method_name(row["method"]),
            **{f"{key}_value": "" if row[key] is None else row[key] for key in ("r2_first", "r2_second", "mean")},
            **{key: "–" if row[key] is None else f"{row[key]:.3f}".replace("-", "−") for key in ("r2_first", "r2_second")},
            "mean": signed(row["mean"]),
            "over_draws": interval_text(row["low"], row["high"]),
            "over_tiles": interval_text(row["low_tiles"], row["high_tiles"]),
            "tone": _tone(row),
        }
        for row in record["differences"]
    ]
    return render_page(
        "compare.html",
        record=record,
        rows=rows,
        figures=figures,
        indicators=distinct(record["differences"], "indicator"),
        methods_apart=[(record[run]["run"], record[f"only_in_{run}"]) for run in ("first", "second")],
        config=[{"key": row["key"], **{run: json.dumps(row[run]) for run in ("first", "second")}} for row in record["config"]],
        maps={"tiles": {"ids": [], "thumb": []}, "areas": [], "panels": [], "scales": {}, "sheets": {}},
        script=read_template("report.js"),
        plotly_js=get_plotlyjs(),
    )


def _tone(row: Json) -> str:
    bounds = [row[key] for key in ("low", "high", "low_tiles", "high_tiles")]
    if None in bounds:
        return ""
    return "better" if min(bounds) > 0 else "worse" if max(bounds) < 0 else ""
