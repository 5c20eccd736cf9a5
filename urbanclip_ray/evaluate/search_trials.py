"""The trials of a search as its page shows them: from its table once it is finished, until then from what Tune has written.

While a search runs there is no table. Tune's JSON loggers then say what each trial was given and has reported; nothing of it
is unpickled, and a last line that is only half there is left for the next look.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from urbanclip_ray.errors import UserError
from urbanclip_ray.search_results import EVENTS_FOLDER, read_record
from urbanclip_ray.storage import MANIFEST, Dataset, exists, join, list_folders, open_dataset, read_bytes

Json = dict[str, Any]

VALUES_FILE, REPORTS_FILE = "params.json", "result.json"  # what Tune calls them


class SearchPageError(UserError, ValueError):
    """A place without a search that can be shown; the message names it and the fix."""


class Point(NamedTuple):
    """A trial judged once: the training rows that it had seen, and its score."""

    samples: int
    score: float


class TrialView(NamedTuple):
    """One trial. `state` is finished, stopped, failed, or open: while a search runs, one that was stopped looks like one that
    is still running.
    """

    number: int
    values: Json
    state: str
    reports: tuple[Point, ...]  # in the order of their samples
    total_samples: int | None  # of its whole run; None where it never reported
    seconds: float | None = None  # that its pretraining had taken at its last report, where that is known
    error: str | None = None

    @property
    def score(self) -> float | None:
        """At its last report."""
        return self.reports[-1].score if self.reports else None

    @property
    def samples(self) -> int:
        return self.reports[-1].samples if self.reports else 0

    @property
    def items(self) -> list[str]:
        """Its values as `--set` takes them; the first trial is the config as it stands and needs none."""
        return [] if self.number == 0 else [f"{key}={json.dumps(value)}" for key, value in self.values.items()]


class SearchView(NamedTuple):
    """A search: `dataset` is None while it runs. The trials are in the order of their numbers."""

    uri: str
    trials: tuple[TrialView, ...]
    dataset: Dataset | None

    @property
    def metric(self) -> str:
        """What the score is; a running search does not say."""
        return str(self.dataset.manifest.config["tune"].get("metric", "score")) if self.dataset else "score"


def find_search(uri: str) -> str:
    """The search that a URI means: of its folder, or of a run that has one search. Raises :class:`SearchPageError`."""
    if _is_search(uri):
        return uri
    folder = join(uri, "search")
    found = [join(folder, name) for name in list_folders(folder)] if exists(folder) else []
    searches = [place for place in found if _is_search(place)]
    if not searches:
        raise SearchPageError(f"{uri} holds no search: give a run of jobs/tune.py, or the folder of its search")
    if len(searches) > 1:
        raise SearchPageError(f"{uri} holds {len(searches)} searches: give one of {', '.join(searches)}")
    return searches[0]


def _is_search(uri: str) -> bool:
    if exists(join(uri, MANIFEST)):
        return open_dataset(uri).manifest.stage == "search"
    return exists(join(uri, EVENTS_FOLDER))


def read_search(uri: str) -> SearchView:
    """All trials of a search at its own folder. Raises :class:`SearchPageError` where none has been started."""
    if exists(join(uri, MANIFEST)):
        dataset = open_dataset(uri)
        trials = [_from_row(row) for row in dataset.read().to_pylist()]
        return SearchView(uri, tuple(sorted(trials)), dataset)
    folder = join(uri, EVENTS_FOLDER)
    names = [name for name in list_folders(folder) if exists(join(folder, name, VALUES_FILE))]
    trials = [_from_tune(join(folder, name)) for name in names]
    if not trials:
        raise SearchPageError(f"{uri}: no trial has been started yet; look again in a minute")
    return SearchView(uri, tuple(sorted(trials)), None)


def _from_row(row: Json) -> TrialView:
    reports = read_record(row["record"]).reports if row.get("record") else ()
    points = [Point(report.samples, report.score) for report in reports if report.samples <= row["samples"]]
    if not points and row["score"] is not None:  # its record lies no longer where it was: the end is known all the same
        points = [Point(row["samples"], row["score"])]
    return TrialView(
        number=row["trial"],
        values=json.loads(row["values"]),
        state=row["state"],
        reports=tuple(points),
        total_samples=row["total_samples"],
        seconds=row.get("seconds"),
        error=row["error"],
    )


def _from_tune(folder: str) -> TrialView:
    where = join(folder, VALUES_FILE)
    try:
        settings = json.loads(read_bytes(where))["trial"]
        values = {key: _parse(value) for key, value in settings.items() if key != "number"}
        reports = _read_reports(join(folder, REPORTS_FILE))
        scores = {int(report["samples"]): float(report["score"]) for report in reports}  # a driver tried again repeats some
        points = [Point(*item) for item in sorted(scores.items())]
        last = reports[-1] if reports else {"total_samples": None}
        state = "finished" if points and points[-1].samples == last["total_samples"] else "open"
        return TrialView(
            int(settings["number"]), values, state, tuple(points), last["total_samples"], seconds=last.get("seconds")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SearchPageError(f"{where} and what lies beside it are not of a trial of ours ({error!r})") from None


def _parse(value: Any) -> Any:
    """Undo what `tune` does for TensorBoard: lists and mappings are JSON there."""
    return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value


def _read_reports(uri: str) -> list[Json]:
    if not exists(uri):
        return []
    lines = read_bytes(uri).decode().splitlines()
    reports = []
    for number, line in enumerate(lines, start=1):
        try:
            reports.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise
    return reports
