"""An experiment: arms × pretraining seeds, each probed with the same draws, in one table with intervals.

Finished datasets are kept, so the same command goes on; an arm that fails is a row with its error and the others go on.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from urbanclip_ray.ablations import FULL, WITHOUT_TEXT, ablations, change
from urbanclip_ray.config import NO_WEIGHTS, ConfigError, RunConfig
from urbanclip_ray.evaluate.intervals import t_interval
from urbanclip_ray.evaluate.methods import FREE
from urbanclip_ray.evaluate.metrics import r2
from urbanclip_ray.pipeline import run_stages
from urbanclip_ray.places import weights_folder
from urbanclip_ray.remote_errors import explain_error
from urbanclip_ray.stages import Run
from urbanclip_ray.storage import Dataset, exists, join, read_bytes, write_bytes
from urbanclip_ray.terminal import counted

TRAINING_JOBS = ("ingest", "caption", "refine", "split", "pack", "pretrain", "baselines")
PROBING_JOBS = ("ingest", "split", "baselines", "embed", "probe")
TEXT, NO_TEXT = "pretrained", "image_only"
NOTE = (
    "Mean over pretraining seeds of the mean R² over the probe's draws, on one fixed test part. Intervals are Student's t over "
    "pretraining seeds (95%), and of differences over pairs of equal seed: they say what another pretraining would give, not "
    "another city or other test tiles. A method without a seed of its own has no interval; one seed has none either."
)


class Experiment(NamedTuple):
    """`pretraining` is trained with every seed, its `arms` with the first `num_arm_seeds` of them.

    `probing` judges all weights of a seed at once, by URI, on tiles of its own or the same.
    """

    pretraining: RunConfig
    probing: RunConfig
    arms: tuple[str, ...]  # of ablations(pretraining), without full
    seeds: tuple[int, ...]
    num_arm_seeds: int


def list_arms(pretraining: RunConfig) -> list[str]:
    """The ablations to run beside it: all, but text against none where its baselines hold that comparison already."""
    has_none = NO_TEXT in pretraining.baselines.names
    return [arm for arm in ablations(pretraining) if arm != FULL and not (arm == WITHOUT_TEXT and has_none)]


class Score(NamedTuple):
    """R² of a method on the test part: one pretraining seed, one draw of the probe."""

    method: str
    indicator: str
    seed: int
    draw: int
    r2: float


def run_experiment(experiment: Experiment, uri: str) -> dict[str, Any]:
    """Train and probe all that is missing; writes `results.json`, `results.csv` and `results.md` below `uri` after every seed.

    Raises ConfigError for arms that the pretraining does not have.
    """
    known = ablations(experiment.pretraining)
    if unknown := [arm for arm in experiment.arms if arm not in known]:
        raise ConfigError(f"arms {unknown} are none of this recipe; it has {', '.join(known)}")
    record: dict[str, Any] = {"note": NOTE, "seeds": list(experiment.seeds), "failures": [], "datasets": {}}
    record |= {"baselines": {}, "wall_s": {}}
    scores: list[Score] = []
    timings = _Timings(join(uri, "wall_s.json"))
    for place, seed in enumerate(experiment.seeds):
        arms = (FULL, *(experiment.arms if place < experiment.num_arm_seeds else ()))
        weights: dict[str, str] = {}
        for arm in arms:
            weights |= _train_arm(experiment, arm, seed, record, timings)
        weights |= _train_baselines(seeded(experiment.pretraining, seed), seed, record, timings)
        if weights:
            scores += _probe_seed(experiment, weights, seed, record, timings)
        record["wall_s"] = timings.seconds
        record |= {"table": summarise(scores), "differences": compare(scores), "scores": [s._asdict() for s in scores]}
        record["conclusion"] = conclude(record["differences"])
        write_results(record, uri)
    return record


class _Timings:
    """Wall seconds of what was made, kept from one run of the command to the next, which finds it again in a moment.

    What was interrupted has the longest of its attempts.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self.seconds: dict[str, float] = json.loads(read_bytes(uri)) if exists(uri) else {}

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = max(self.seconds.get(name, 0.0), round(seconds, 1))
        write_bytes(self._uri, json.dumps(self.seconds, indent=1).encode())


def _attempt(name: str, config: RunConfig, jobs: Sequence[str], record: dict[str, Any], timings: _Timings) -> Run | None:
    """The run, or None where it failed, which the record then says."""
    print(f"experiment: {name}", flush=True)
    start = time.monotonic()
    try:
        run = run_stages(config, list(jobs))
    except Exception as error:  # whatever stops one arm, the others go on and the table says so
        text = explain_error(error) or f"{type(error).__name__}: {error}"
        record["failures"].append({"what": name, "error": text})
        print(f"experiment: {name} failed: {text}", flush=True)
        return None
    timings.add(name, time.monotonic() - start)
    record["datasets"] |= {f"{name} {stage}": dataset.sha256 for stage, dataset in run.datasets.items()}
    return run


def seeded(config: RunConfig, seed: int) -> RunConfig:
    return change(config, {"model": {"seed": seed}, "train": {"seed": seed}, "baselines": {"seed": seed}})


def _train_arm(experiment: Experiment, arm: str, seed: int, record: dict[str, Any], timings: _Timings) -> dict[str, str]:
    """Weights by the name of the representation that they become: `full` brings `pretrained`."""
    config = seeded(ablations(experiment.pretraining)[arm], seed)
    if arm == WITHOUT_TEXT:
        return _train_baselines(config, seed, record, timings)
    config = change(config, {"baselines": {"names": ()}})
    run = _attempt(f"{arm}, seed {seed}", config, TRAINING_JOBS, record, timings)
    return {} if run is None else {TEXT if arm == FULL else arm: weights_folder(run.datasets["pretrain"])}


def _train_baselines(config: RunConfig, seed: int, record: dict[str, Any], timings: _Timings) -> dict[str, str]:
    """All of them side by side; where that fails, one by one, so that only what fails is missing."""
    names = config.baselines.names
    alone = change(config, {"embed": {"weights": NO_WEIGHTS}})
    if not names:
        return {}
    run = _attempt(f"baselines {', '.join(names)}, seed {seed}", alone, TRAINING_JOBS, record, timings)
    found: dict[str, str] = {}
    if run is not None:
        for name in names:
            made = run.datasets[f"trained_{name}"]
            found[name] = made.uri
            record["baselines"][f"{name}, seed {seed}"] = made.manifest.facts  # samples seen, wall seconds, losses
    elif len(names) > 1:
        record["failures"].pop()  # the one that fails says it again
        for name in names:
            found |= _train_baselines(change(alone, {"baselines": {"names": (name,)}}), seed, record, timings)
    return found


def _probe_seed(
    experiment: Experiment, weights: dict[str, str], seed: int, record: dict[str, Any], timings: _Timings
) -> list[Score]:
    also = {name: place for name, place in weights.items() if name != TEXT}
    embed = {"weights": weights.get(TEXT, NO_WEIGHTS), "also": also}
    own = (TEXT, "untrained") if TEXT in weights else ()
    # ridge alone where no method is named: the paper's MLP on every arm would take longer than the pretrainings
    baselines = tuple(name for name in experiment.probing.baselines.names if name not in also)
    methods = experiment.probing.probe.methods or (*own, *also, *baselines, *FREE)
    changes: dict[str, dict[str, Any]] = {"embed": embed, "probe": {"methods": methods}, "baselines": {"names": baselines}}
    config = change(seeded(experiment.probing, seed), changes)
    run = _attempt(f"probe, seed {seed}", config, PROBING_JOBS, record, timings)
    return [] if run is None else score(run.datasets["probe"], config.split.outer, seed)


def score(predictions: Dataset, outer: str, seed: int) -> list[Score]:
    """R² of every method and indicator in every draw of the outer split; a constant truth has none and is left out."""
    table = predictions.read(["indicator", "method", "split", "seed", "y", "y_pred"]).to_pandas()
    found = []
    for (method, indicator, draw), rows in table[table["split"] == outer].groupby(["method", "indicator", "seed"]):
        y, y_pred = rows["y"].to_numpy(), rows["y_pred"].to_numpy()
        if np.ptp(y) > 0:
            found.append(Score(method, indicator, seed, int(draw), r2(y, y_pred)))
    return found


def summarise(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """A row per indicator and method: the mean, its interval over pretraining seeds, and how many of them and draws."""
    rows = []
    for (indicator, method), by_seed in _means(scores).items():
        own = [s for s in scores if (s.indicator, s.method) == (indicator, method)]
        low, high = over_seeds(list(by_seed.values()))
        rows.append(
            {
                "indicator": indicator,
                "method": method,
                "r2": float(np.mean(list(by_seed.values()))),
                "low": low,
                "high": high,
                "num_seeds": len(by_seed),
                "num_draws": len({s.draw for s in own}),
            }
        )
    return sorted(rows, key=lambda row: (row["indicator"], -row["r2"]))


def compare(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Pretrained with text minus every other method, over the pretraining seeds that both have."""
    means = _means(scores)
    rows = []
    for (indicator, method), theirs in means.items():
        ours = means.get((indicator, TEXT), {})
        if method == TEXT or not (shared := sorted(ours.keys() & theirs.keys())):
            continue
        differences = [ours[seed] - theirs[seed] for seed in shared]
        low, high = over_seeds(differences)
        rows.append(
            {
                "indicator": indicator,
                "against": method,
                "difference": float(np.mean(differences)),
                "low": low,
                "high": high,
                "num_seeds": len(shared),
            }
        )
    return rows


def conclude(differences: Sequence[dict[str, Any]]) -> list[str]:
    """Text against no text in plain sentences, whichever way it goes."""
    sentences = []
    for row in differences:
        if row["against"] != NO_TEXT:
            continue
        way = "helps" if row["difference"] > 0 else "hurts"
        sure = row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
        by = f"{row['difference']:+.3f} R²{_interval(row)} over {counted(row['num_seeds'], 'pretraining seed')}"
        verdict = f"text {way}" if sure else f"no clear difference (text {way} in the mean)"
        if row["num_seeds"] == 1:
            verdict = f"one pretraining seed cannot tell (text {way} in it)"
        sentences.append(f"{row['indicator']}: {verdict}, {by} against the same tower trained without text.")
    return sentences or ["Text against no text was not compared: image_only is not among the methods."]


def _means(scores: Sequence[Score]) -> dict[tuple[str, str], dict[int, float]]:
    """(indicator, method) -> pretraining seed -> mean over draws."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for item in scores:
        found.setdefault((item.indicator, item.method), {}).setdefault(item.seed, []).append(item.r2)
    return {key: {seed: float(np.mean(values)) for seed, values in by_seed.items()} for key, by_seed in found.items()}


def over_seeds(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Student's interval of the mean; none for fewer than two, or where all are equal: those have no seed of their own."""
    if len(values) < 2 or np.ptp(values) == 0:
        return None, None
    return t_interval(np.array(values))


def write_results(record: dict[str, Any], uri: str) -> None:
    """The record whole as JSON, its table as CSV, and all of it to be read as Markdown."""
    write_bytes(join(uri, "results.json"), json.dumps(record, indent=1, allow_nan=False).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, ["indicator", "method", "r2", "low", "high", "num_seeds", "num_draws"])
    writer.writeheader()
    writer.writerows(record["table"])
    write_bytes(join(uri, "results.csv"), text.getvalue().encode())
    write_bytes(join(uri, "results.md"), markdown(record).encode())


def markdown(record: dict[str, Any]) -> str:
    indicators = sorted({row["indicator"] for row in record["table"]})
    cells = {(row["method"], row["indicator"]): f"{row['r2']:.3f}{_interval(row)}" for row in record["table"]}
    means: dict[str, list[float]] = {}
    for row in record["table"]:
        means.setdefault(row["method"], []).append(row["r2"])
    lines = [record["note"], "", f"| method | {' | '.join(indicators)} |", "|---" * (len(indicators) + 1) + "|"]
    for method in sorted(means, key=lambda name: -float(np.mean(means[name]))):
        lines.append(f"| {method} | {' | '.join(cells.get((method, name), '-') for name in indicators)} |")
    lines += [f"| {failure['what']} | failed: {failure['error']} |" for failure in record["failures"]]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in record["conclusion"]), ""])


def _interval(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
