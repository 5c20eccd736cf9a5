"""The page of a search, finished or running: its trials side by side, what mattered, what it cost, and the best to copy.

Scores here chose the trials, so the page says wherever it leads that they are no result.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from urbanclip_ray import storage
from urbanclip_ray.evaluate import search_plots
from urbanclip_ray.evaluate.importance import Importance, measure_importance
from urbanclip_ray.evaluate.page import as_csv, read_template, render_page
from urbanclip_ray.evaluate.search_plots import STATE_NAMES, short
from urbanclip_ray.evaluate.search_trials import SearchView, TrialView, find_search, read_search
from urbanclip_ray.search_results import CAUTION, PROBES_FILE, WINNER_FILE

Json = dict[str, Any]

METRIC_NAMES = {
    "mean_r2": "mean R² of the indicators",
    "min_r2": "lowest R² of the indicators",
    "retrieval": "mean R@10 of images and texts",
}
MOST_ROWS, MOST_PROBES = 100, 20  # of the tables; trials.csv and search.json have all


def write_search_page(uri: str, output: str = "") -> str:
    """Write `search.html`, `search.json` and `trials.csv` below `output` (default: `report` in the search's folder).

    `uri` is of a search or of the run that holds it. Returns the page's URI; raises SearchPageError where there is no search.
    """
    search = read_search(find_search(uri))
    output = output or storage.join(search.uri, "report")
    importance = measure_importance(search.trials)
    record = make_record(search, importance)
    page = storage.join(output, "search.html")
    storage.write_bytes(page, _page(search, record, importance).encode())
    storage.write_bytes(storage.join(output, "trials.csv"), as_csv([_flat(trial) for trial in ranked(search.trials)]))
    storage.write_bytes(storage.join(output, "search.json"), json.dumps(record, indent=1, ensure_ascii=False).encode())
    return page


def make_record(search: SearchView, importance: Importance) -> Json:
    """What the page says, as JSON."""
    return {
        "search": search.uri,
        "running": search.dataset is None,
        "manifest_sha256": search.dataset.sha256 if search.dataset else None,
        "metric": search.metric,
        "caution": CAUTION,
        "importance": importance._asdict() | {"keys": [key._asdict() for key in importance.keys]},
        "trials": [
            trial._asdict() | {"reports": [point._asdict() for point in trial.reports], "set": trial.items}
            for trial in ranked(search.trials)
        ],
        "probes": _read_probes(search),
    }


def ranked(trials: Sequence[TrialView]) -> list[TrialView]:
    """Finished trials first, then those that were stopped or still run, then failed ones; the best of each first.

    Only a score at a run's end is what a run with these values ends with.
    """
    order = {"finished": 0, "stopped": 1, "open": 1, "failed": 2}
    return sorted(trials, key=lambda trial: (order[trial.state], trial.score is None, -(trial.score or 0.0), trial.number))


def _read_probes(search: SearchView) -> list[Json]:
    """Probe settings that were tried on trials' embeddings, the best first."""
    if not _has_file(search, PROBES_FILE) or search.dataset is None:
        return []
    probes = json.loads(storage.read_bytes(search.dataset.file_uri(PROBES_FILE)))
    return sorted(probes, key=lambda probe: -probe["score"])


def _has_file(search: SearchView, name: str) -> bool:
    files = search.dataset.manifest.files if search.dataset else ()
    return any(entry.path.rsplit("/", 1)[-1] == name for entry in files)


def _flat(trial: TrialView) -> Json:
    return {
        "trial": trial.number,
        "state": trial.state,
        "score": trial.score,
        "samples": trial.samples,
        "total_samples": trial.total_samples,
        "seconds": trial.seconds,
        **{key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in trial.values.items()},
        "error": trial.error,
    }


def _page(search: SearchView, record: Json, importance: Importance) -> str:
    trials, base = ranked(search.trials), search.trials[0]
    scores = search_plots.score_range([trial.score for trial in trials if trial.score is not None])
    figures = {
        "coordinates": search_plots.parallel_coordinates(trials, scores),
        "curves": search_plots.score_curves(search.trials, scores),
        "cost-samples": _cost(search, [trial.samples for trial in search.trials], "training rows seen", scores),
    }
    if importance.keys:
        figures["importance"] = search_plots.importance_bars(importance)
    if any(trial.seconds is not None for trial in trials):
        figures["cost-seconds"] = _cost(search, [trial.seconds for trial in search.trials], "seconds of training", scores)
    return render_page(
        "search_page.html",
        run=_run_name(search.uri),
        record=record,
        lead=_lead(search),
        best=_best(trials, base),
        winner=search.dataset.file_uri(WINNER_FILE) if search.dataset and _has_file(search, WINNER_FILE) else "",
        keys=list(base.values),
        rows=[_row(trial, base) for trial in trials[:MOST_ROWS]],
        num_more=max(0, len(trials) - MOST_ROWS),
        importance=importance,
        importance_note=_importance_note(importance),
        probes=[_probe_row(probe) for probe in record["probes"][:MOST_PROBES]],
        figures=figures,
        config_json=json.dumps(search.dataset.manifest.config, indent=2) if search.dataset else "",
        maps={"tiles": {"ids": [], "thumb": []}, "areas": [], "panels": [], "scales": {}, "sheets": {}},
        script=read_template("report.js"),
        plotly_js=get_plotlyjs(),
    )


def _run_name(uri: str) -> str:
    """Of the run whose search it is, `<run>/search/<digest>`, else of the folder."""
    *_, run, stage, folder = ["", "", *uri.rstrip("/").split("/")]
    return run if stage == "search" else folder


def _cost(search: SearchView, costs: Sequence[float | None], name: str, scores: search_plots.ScoreRange) -> Json:
    return search_plots.score_against_cost(search.trials, costs, name, scores)


def _lead(search: SearchView) -> str:
    counts = Counter(trial.state for trial in search.trials)
    parts = [f"{counts[state]} {name}" for state, name in STATE_NAMES.items() if counts[state]]
    rows = sum(trial.samples for trial in search.trials)
    metric = METRIC_NAMES.get(search.metric, search.metric)
    begun = "Trials begun so far" if search.dataset is None else "Trials"
    lead = f"{begun}: {len(search.trials)} ({', '.join(parts)}), {rows:,} training rows in all."
    return f"{lead} The score is the {metric} on validation tiles."


def _best(trials: Sequence[TrialView], base: TrialView) -> Json | None:
    """The best finished trial beside the config as it stands; None before one has finished."""
    best = trials[0]
    if best.state != "finished":
        return None
    return {
        "number": best.number,
        "score": _score(best.score),
        "base": _score(base.score) if base.state == "finished" else "",
        "changes": _changes(best, base),
        "options": shlex.join(part for item in best.items for part in ("--set", item)),
    }


def _row(trial: TrialView, base: TrialView) -> Json:
    return {
        "number": trial.number,
        "name": "0 (as it is)" if trial.number == 0 else str(trial.number),
        "state": trial.state,
        "state_name": STATE_NAMES[trial.state],
        "error": trial.error or "",
        "score": _score(trial.score),
        "score_value": "" if trial.score is None else trial.score,
        "samples": trial.samples,
        "total_samples": trial.total_samples,
        "seconds": "" if trial.seconds is None else round(trial.seconds),
        "changes": _changes(trial, base),
        "options": shlex.join(part for item in trial.items for part in ("--set", item)),
    }


def _changes(trial: TrialView, base: TrialView) -> list[Json]:
    """The keys whose value is not the base's, with both."""
    return [
        {"key": key, "base": short(base.values.get(key)), "value": short(value)}
        for key, value in trial.values.items()
        if value != base.values.get(key)
    ]


def _score(score: float | None) -> str:
    return "–" if score is None else f"{score:.3f}".replace("-", "−")


def _probe_row(probe: Json) -> Json:
    options = shlex.join(part for item in probe["set"] for part in ("--set", item))
    return {"trial": probe["trial"], "score": _score(probe["score"]), "options": options or "as it is"}


def _importance_note(importance: Importance) -> str:
    if not importance.keys:
        return importance.reason or "No key has two values among the trials that have reported."
    compared = f"{importance.num_trials} trials, compared after about {importance.samples:,} training rows each"
    if importance.method == "rank correlation":
        method = (
            "Rank correlation of a key's values with the score (Spearman's ρ without its sign; the correlation ratio of ranks "
            "for values that are no numbers), one key at a time. A bar that does not reach its mark may well be chance alone."
        )
    else:
        method = (
            "How much the error of a random forest grows on trials that it was not fitted to, when a key's values are shuffled "
            f"among them, in shares of the scores' variance. The forest explains {importance.skill:.0%} of that variance there"
            + ("." if importance.skill is not None and importance.skill > 0.1 else ": too little for bars to mean much.")
        )
    return (
        f"{method} From {compared}, where the shortest ended. It holds for the ranges that were searched; what matters later "
        "in a run, or only together with another key, may not show."
    )
