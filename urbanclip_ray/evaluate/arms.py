"""Scores of several runs side by side: ablations by arm, and transfer from one city to another.

An experiment is a JSON list of records like

    {"arm": "without text", "indicator": "population", "split": "blocks", "method": "pretrained",
     "mean": 0.31, "low": 0.27, "high": 0.35, "seeds": 3}

where `mean` is R² on test tiles and `low` and `high` bound it (null where unknown). Records of a transfer have `train` and
`test`, the names of two cities, and may leave `arm` out. The `results.json` of jobs/experiment.py is read, too: the methods of
its `table` are the arms. Other keys are kept out of the page.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.findings import distinct, interval_text
from urbanclip_ray.evaluate.plots import method_name
from urbanclip_ray.storage import read_bytes

Json = dict[str, Any]

COPIED = ("indicator", "split", "method", "mean", "low", "high", "seeds")


class ExperimentError(UserError, ValueError):
    """A file that is no experiment; the message names the file, the record and what it should be."""


class ArmScore(BaseModel):
    """R² of one method on one indicator in one arm, or from one city to another."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
    arm: str = ""
    train: str = ""
    test: str = ""
    indicator: str
    split: str = ""
    method: str = "pretrained"
    mean: float | None = Field(validation_alias=AliasChoices("mean", "r2"))
    low: float | None = None
    high: float | None = None
    seeds: int | None = Field(default=None, validation_alias=AliasChoices("seeds", "num_seeds"))

    @model_validator(mode="after")
    def _check(self) -> ArmScore:
        if not self.arm and not (self.train and self.test):
            raise ValueError("a record needs arm, or train and test")
        return self


def read_experiment(uri: str) -> list[Json]:
    """The records of a file; raises :class:`ExperimentError` naming what is wrong in it."""
    try:
        data = json.loads(read_bytes(uri))
        records = TypeAdapter(list[ArmScore]).validate_python(_by_arm(data) if isinstance(data, dict) else data)
    except FileNotFoundError:
        raise ExperimentError(f"report.experiment={uri} is not there: correct it, or run the experiment first") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ExperimentError(f"report.experiment={uri}: {where}: {first['msg']}; see evaluate/arms.py") from None
    except ValueError as error:
        raise ExperimentError(f"report.experiment={uri} is no JSON ({error})") from None
    return [record.model_dump() for record in records]


def _by_arm(results: Json) -> Any:
    """The table of jobs/experiment.py, whose methods are arms."""
    table = results.get("table")
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        return results  # no list: refused with the others
    return [{**row, "arm": row.get("method"), "method": ""} for row in table]


def transfer_records(record: Json) -> list[Json]:
    """The folds of the split `transfer` in `scores.json`, each named `train → test`, as records of a transfer."""
    return [
        {"arm": "", "train": train, "test": test} | {key: row.get(key) for key in COPIED}
        for row in record["folds"]
        if row["split"] == "transfer" and row["metric"] == "r2"
        for train, _, test in [row["name"].partition(" → ")]
    ]


def ablation_tables(records: list[Json]) -> list[Json]:
    """A table per split and method: arms x indicators."""
    records = [record for record in records if not record["train"]]
    tables = []
    for split, method in dict.fromkeys((record["split"], record["method"]) for record in records):
        own = [record for record in records if (record["split"], record["method"]) == (split, method)]
        indicators = distinct(own, "indicator")
        found = {(record["arm"], record["indicator"]): record for record in own}
        rows = [
            {"name": arm, "cells": [_cell(found.get((arm, indicator))) for indicator in indicators]}
            for arm in distinct(own, "arm")
        ]
        title = ", ".join(part for part in (method and method_name(method), split) if part) or "Arms of the experiment"
        tables.append({"title": title, "indicators": indicators, "rows": rows})
    return tables


def transfer_tables(records: list[Json]) -> list[Json]:
    """A matrix per indicator and method (and arm): train x test."""
    records = [record for record in records if record["train"]]
    tables = []
    for key in dict.fromkeys((record["indicator"], record["method"], record["arm"]) for record in records):
        own = [record for record in records if (record["indicator"], record["method"], record["arm"]) == key]
        cities = list(dict.fromkeys([*distinct(own, "train"), *distinct(own, "test")]))
        tests = [city for city in cities if city in distinct(own, "test")]
        found = {(record["train"], record["test"]): record for record in own}
        rows = [
            {"name": train, "cells": [_cell(found.get((train, test))) for test in tests]} for train in distinct(own, "train")
        ]
        indicator, method, arm = key
        tables.append({"title": f"{indicator}, {method_name(method)}{f', {arm}' * bool(arm)}", "tests": tests, "rows": rows})
    return tables


def city_tables(record: Json) -> list[Json]:
    """A matrix per indicator and fit of the outer split: city x method; `pooled` is one fit for all cities, `own` one each."""
    rows = [row for row in record["cities"] if row["split"] == record["outer"] and row["metric"] == "r2"]
    tables = []
    for indicator, fit in dict.fromkeys((row["indicator"], row["fit"]) for row in rows):
        own = [row for row in rows if (row["indicator"], row["fit"]) == (indicator, fit)]
        methods = distinct(own, "method")
        found = {(row["city"], row["method"]): row for row in own}
        tables.append(
            {
                "title": f"{indicator}, {'one fit for all cities' if fit == 'pooled' else 'a fit for each city'}",
                "tests": [method_name(method) for method in methods],
                "rows": [
                    {"name": city, "cells": [_cell(found.get((city, method))) for method in methods]}
                    for city in distinct(own, "city")
                ],
            }
        )
    return tables


def _cell(record: Json | None) -> Json:
    if record is None or record["mean"] is None:
        return {"value": "", "text": "–", "note": ""}
    note = interval_text(record["low"], record["high"], sign=False) if record["low"] is not None else ""
    if record["seeds"]:
        note += f" {record['seeds']} seed{'s' * (record['seeds'] != 1)}"
    return {"value": record["mean"], "text": f"{record['mean']:.3f}".replace("-", "−"), "note": note.strip()}
