"""What a search has found: the record of every trial, their table, and the best of them as `--set` items and a recipe file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from urbanclip_ray.config import RunConfig, TuneConfig
from urbanclip_ray.config.search import Metric
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipe_files import recipe_text
from urbanclip_ray.schema import TRIALS
from urbanclip_ray.search_space import Trial
from urbanclip_ray.storage import Dataset, Publication, StorageError, join, read_bytes, write_bytes

RECORD_FILE, VECTORS_FILE = "reports.json", "judged_vectors.npy"  # of a trial
BEST_FILE, PROBES_FILE, WINNER_FILE = "best.json", "probes.json", "winner.yaml"  # of a search
EVENTS_FOLDER = "ray_tune"  # TensorBoard events with HParams, and what else Tune writes of a trial
CAUTION = (
    "These scores are of the validation tiles that chose the trial and its probe, so they are optimistic, the best one most of "
    "all: never quote them as a result. Quote the winner's score on test tiles, which no trial looks at."
)

State = Literal["finished", "stopped", "failed"]


class Report(BaseModel):
    """A trial judged once: training rows seen out of all of its run, its score by `tune.metric`, and what is behind it.

    `r2` is by indicator, `retrieval` the mean recall at 10 of validation images and texts where the metric asks for it.
    `seconds` are those of wall time that its pretraining had taken, starts and scoring included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    samples: int
    total_samples: int
    score: float
    r2: dict[str, float]
    seconds: float
    retrieval: float | None = None

    def told(self) -> dict[str, Any]:
        """The report as Tune takes it. TensorBoard and trackers draw over what it calls `timesteps_total`: training rows."""
        return {**self.model_dump(), "timesteps_total": self.samples}


class TrialRecord(BaseModel):
    """Everything that a trial has reported, in order, and why it failed where it did."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    reports: tuple[Report, ...] = ()
    failure: str | None = None

    def with_report(self, report: Report) -> TrialRecord:
        """The record with one more report; one of the same moment is replaced."""
        kept = tuple(old for old in self.reports if old.samples != report.samples)
        return self.model_copy(update={"reports": tuple(sorted((*kept, report), key=lambda one: one.samples))})


class TrialResult(NamedTuple):
    """How a trial ended; `uri` is where its pretraining and its record lie, finished or not."""

    trial: Trial
    record: TrialRecord
    state: State
    uri: str

    @property
    def weights(self) -> str | None:
        """Its finished pretraining, None where it was stopped or failed."""
        return self.uri if self.state == "finished" else None


class ProbeResult(NamedTuple):
    """A setting of the MLP probe on the embeddings of one trial: its values, the `--set` items to them, its validation R²."""

    trial: int
    values: dict[str, Any]
    set: tuple[str, ...]
    score: float
    r2: dict[str, float]
    seconds: float


def reduce_r2(r2: dict[str, float], metric: Metric) -> float:
    """One figure of the R² of all indicators."""
    return min(r2.values()) if metric == "min_r2" else sum(r2.values()) / len(r2)


def read_record(uri: str) -> TrialRecord:
    """The record beside a pretraining; an empty one where there is none yet."""
    where = join(uri, RECORD_FILE)
    try:
        return TrialRecord.model_validate_json(read_bytes(where))
    except FileNotFoundError:
        return TrialRecord()
    except ValidationError as error:
        raise StorageError(f"{where} is not a record of ours ({error.errors()[0]['msg']}): remove {uri}") from None


def write_record(uri: str, record: TrialRecord) -> None:
    write_bytes(join(uri, RECORD_FILE), record.model_dump_json(indent=1).encode())


def best_trial(results: Sequence[TrialResult]) -> TrialResult | None:
    """The finished trial with the highest score at its end, the first among equals; None where none finished.

    What a trial scored on its way, or before it was stopped, is not what a run with its values ends with.
    """
    finished = [result for result in results if result.state == "finished"]
    return max(finished, key=lambda result: result.record.reports[-1].score, default=None)


def best_probe(probes: Sequence[ProbeResult], trial: int) -> ProbeResult | None:
    """The setting with the highest score on a trial, the first among equals; None where none was tried."""
    return max((probe for probe in probes if probe.trial == trial), key=lambda probe: probe.score, default=None)


def publish_results(
    config: RunConfig, results: Sequence[TrialResult], probes: Sequence[ProbeResult], publication: Publication
) -> None:
    """Write the table of trials, the probe settings that were tried, and the best of all, as JSON and as a recipe file."""
    publication.write_table(pa.Table.from_pylist([_row(result) for result in results], schema=TRIALS))
    base, best = results[0], best_trial(results)
    summary: dict[str, Any] = {"caution": CAUTION, "best": None, "base_score": None, "probe": None}
    if base.state == "finished":
        summary["base_score"] = base.record.reports[-1].score
    if best is not None:
        last = best.record.reports[-1]
        summary["best"] = {
            "trial": best.trial.number,
            "set": list(best.trial.overrides),
            "score": last.score,
            "r2": last.r2,
            "weights": best.weights,
        }
        probe = best_probe(probes, best.trial.number)
        if probe is not None:
            as_it_is = next(other.score for other in probes if other.trial == probe.trial)
            summary["probe"] = {"set": list(probe.set), "score": probe.score, "base_score": as_it_is}
        publication.write_file(WINNER_FILE, winner_text(config, best, probe, publication.uri).encode())
    publication.write_file(BEST_FILE, json.dumps(summary, indent=1, allow_nan=False).encode())
    tried = [probe._asdict() for probe in probes]
    publication.write_file(PROBES_FILE, json.dumps(tried, indent=1, allow_nan=False).encode())
    failed = sum(result.state == "failed" for result in results)
    publication.count(
        unit="trials", rows_in=len(results), rows_out=len(results) - failed, rejects={"failed": failed} if failed else {}
    )


def winner_text(config: RunConfig, best: TrialResult, probe: ProbeResult | None, uri: str) -> str:
    """The recipe file of the best trial, with the best probe setting where some were tried."""
    overrides = [*best.trial.overrides, *(probe.set if probe else ())]
    winner = apply_overrides(config, overrides).model_copy(update={"tune": TuneConfig()})
    return recipe_text(
        winner,
        f"Trial {best.trial.number} of the search {uri}, which validation tiles chose.",
        f"With --set embed.weights={best.weights} it is not pretrained again.",
    )


def _row(result: TrialResult) -> dict[str, Any]:
    reports = result.record.reports
    return {
        "trial": result.trial.number,
        "values": json.dumps(result.trial.values),
        "state": result.state,
        "samples": reports[-1].samples if reports else 0,
        "total_samples": reports[-1].total_samples if reports else None,
        "score": reports[-1].score if reports else None,
        "best_score": max(report.score for report in reports) if reports else None,
        "weights": result.weights,
        "error": result.record.failure,
        "seconds": reports[-1].seconds if reports else None,
        "record": result.uri,
    }


def look_meanwhile(uri: str) -> str:
    """How to watch a search that runs, from any machine that reaches its storage."""
    events, page = shlex.join(["tensorboard", "--logdir", join(uri, EVENTS_FOLDER)]), shlex.join(["--tune", uri])
    return f"while it runs: {events}\n           or: python jobs/report.py {page}"


def show_search(search: Dataset, console: Console) -> None:
    """Print the trials, the best one as `--set` items, and what the scores must not be used for."""
    rows = search.read().sort_by("trial").to_pylist()
    summary = json.loads(read_bytes(search.file_uri(BEST_FILE)))
    keys = list(json.loads(rows[0]["values"]))
    title = f"trials, judged by {search.manifest.config['tune']['metric']} on validation tiles"
    table = Table(title=title, title_justify="left")
    for name in ("trial", *keys, f"{_shown_metric(search)} at its end", "the best", "samples", "minutes", ""):
        table.add_column(name, justify="left" if name == "" else "right", overflow="fold")
    for row in rows:
        values = json.loads(row["values"])
        seen = f"{row['samples']:,} of {row['total_samples']:,}" if row["total_samples"] else "0"
        minutes = "-" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}"
        cells: list[str | Text] = [
            *(Text(str(values[key])) for key in keys),
            *(_shown(row[name]) for name in ("score", "best_score")),
        ]
        table.add_row(_name(row["trial"]), *cells, seen, minutes, Text(_ending(row)))  # no markup
    console.print(table)
    best = summary["best"]
    if best is None:
        console.print("no trial came to its end: look at what they say above, and narrow tune.space or give it more time")
        return
    what = _shown_metric(search)
    console.print(
        f"best: {_name(best['trial'])}, {what} {_shown(best['score'])}; the recipe as it is: {_shown(summary['base_score'])}"
    )
    probe = summary["probe"]
    if probe is not None:
        console.print(f"best MLP probe on it: R² {_shown(probe['score'])}; as the recipe has it: {_shown(probe['base_score'])}")
    options = shlex.join(part for item in (*best["set"], *(probe or {"set": []})["set"]) for part in ("--set", item))
    found = f"for jobs/pipeline.py, add: {options}" if options else "no trial did better than the recipe as it is"
    for line in (found, f"the same as a recipe: --recipe {search.file_uri(WINNER_FILE)}", f"its weights: {best['weights']}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(summary["caution"])


def _shown_metric(search: Dataset) -> str:
    return "R@10" if search.manifest.config["tune"]["metric"] == "retrieval" else "R²"


def _name(number: int) -> str:
    return "0 (as it is)" if number == 0 else str(number)


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def _ending(row: dict[str, Any]) -> str:
    return {"finished": "finished", "stopped": "stopped early", "failed": f"failed: {row['error']}"}[row["state"]]
