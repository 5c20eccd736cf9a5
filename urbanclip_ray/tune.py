"""shards + labels ─tune─▶ trials: Ray Tune starts pretrainings with other values and stops early those that do badly.

Every trial is a nested Ray Train run and a run of its own, at `<run>/trials/<number>-<digest>`: its checkpoints, its weights,
and the record of what it reported. A search that was interrupted goes on from those records: what they hold is told to Tune
again, whose decisions fall as before where trials run one at a time. Nothing that Tune pickled is ever read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
import ray.train
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from urbanclip_ray import dataflow
from urbanclip_ray.cluster import read_cluster, wanted_worker
from urbanclip_ray.config import FolderSource, LabelsConfig, RunConfig, TuneConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.validation_score import ProbeRows, choose_rows
from urbanclip_ray.probe_search import search_probes
from urbanclip_ray.remote_errors import explain_error
from urbanclip_ray.report_score import ReportScore
from urbanclip_ray.search_results import (
    EVENTS_FOLDER,
    TrialRecord,
    TrialResult,
    look_meanwhile,
    publish_results,
    read_record,
    write_record,
)
from urbanclip_ray.search_scheduling import Budget, count_concurrent, make_scheduler, training_rows
from urbanclip_ray.search_space import Trial, measure_content, plan_trials, trial_with, upstream_variants, variant_of
from urbanclip_ray.searchers import TrialSearcher, read_values
from urbanclip_ray.storage import Dataset, Publication, dataset_uri, delete_folder, digest, find_dataset, join, publish, resolve
from urbanclip_ray.tracking import make_callbacks
from urbanclip_ray.train.launch import pretrain

DRIVER_MEMORY_BYTES = 512 * 2**20  # what a trial's driver asks for: a CPU of its own would be missing to its ranks


class SearchError(UserError, RuntimeError):
    """A search that did not come to its end; the message says what to do."""


class TrialJob(NamedTuple):
    """What a trial's driver is told, and all that it can find: no test tile is in its shards, and no other dataset is named.

    `config` is the trial's own, its run and storage included; where tiles and labels come from is left out of it.
    """

    trial: Trial
    config: RunConfig
    shards: Dataset
    rows: ProbeRows
    tune: TuneConfig

    @property
    def uri(self) -> str:
        """Where the trial's pretraining lies, and its record beside it."""
        content, parents = self.config.pretrain_content(), {"shards": self.shards}
        return dataset_uri(self.config.storage, self.config.run, "pretrain", content, parents)


class JobMaker:
    """Makes the jobs of trials from what they share, which is read once.

    `shards` are those of every variant of what comes before pretraining, in the order of `search_space.upstream_variants`.
    Raises ConfigError where no trial could be judged.
    """

    def __init__(self, config: RunConfig, shards: Sequence[Dataset], labels: Dataset) -> None:
        self.config = config.model_copy(update={"source": FolderSource(), "labels": LabelsConfig()})  # no way to test tiles
        self._shards = list(shards)
        self._variants = upstream_variants(config)
        self._rows = choose_rows(shards, labels, config)
        self._labels_sha256 = labels.sha256

    def job(self, trial: Trial) -> TrialJob:
        """The name of a trial's run holds everything that its scores depend on."""
        variant = variant_of(trial, self._variants)
        shards, config = self._shards[variant], self.config
        made_of = {"train": trial.config.pretrain_content(), **measure_content(trial.config)}
        if len(self._shards) > 1:  # they decide together which tiles judge
            made_of["judged_with"] = sorted(dataset.sha256 for dataset in self._shards)
        key = digest({**made_of, "labels": self._labels_sha256, "shards": shards.sha256})
        place = {"storage": join(config.storage, config.run, "trials"), "run": f"{trial.number:03d}-{key[:8]}"}
        blind = {"source": config.source, "labels": config.labels, "tune": TuneConfig()}
        own = trial.config.model_copy(update=place | blind)
        return TrialJob(trial._replace(config=own), own, shards, self._rows[variant], config.tune)

    def job_of(self, settings: dict[str, Any]) -> TrialJob:
        """The job of a trial as Tune was shown it."""
        number, shown = settings["number"], {key: value for key, value in settings.items() if key != "number"}
        return self.job(trial_with(self.config, number, read_values(self.config, shown)))


def run_search(config: RunConfig, shards: Sequence[Dataset], labels: Dataset, publication: Publication) -> None:
    """Run all trials, and publish their table, the best of them, and that one as a recipe file.

    Trials see the training and validation rows of the shards and the labels of these; test tiles are in neither. A trial that
    fails is tried again, and then is a row with its error. Raises ConfigError where no trial could be judged or stopped, and
    SearchError when the search was interrupted, every trial failed, or this Ray cannot free what a stopped one held: the same
    command goes on.
    """
    maker, planned = JobMaker(config, shards, labels), plan_trials(config)
    scheduler = make_scheduler(config.tune, [trial.config for trial in planned], training_rows(shards))
    dataflow.connect()
    if not dataflow.has_dashboard():
        raise SearchError(
            "this Ray has no dashboard, by whose state API the places of trials that are stopped are given back: start it with "
            "ray start --head --include-dashboard=true, where pip install 'ray[default]' has brought what that needs"
        )
    budget = Budget(config.tune.max_samples, config.tune.max_minutes)
    searcher = TrialSearcher(config, publication.uri, lambda: budget.samples_are_spent)
    print(look_meanwhile(publication.uri), flush=True)
    errors = _run_tune(maker, searcher, scheduler, budget, publication)
    stopped = getattr(scheduler, "stopped", {}) | budget.stopped
    is_over = budget.samples_are_spent or budget.minutes_are_spent
    results = [_collect(trial, maker.job(trial), stopped, errors.get(trial.number), is_over) for trial in searcher.trials]
    ended = [result for result in results if result is not None]
    if not is_over and len(ended) < searcher.num_trials:
        raise SearchError(
            f"{searcher.num_trials - len(ended)} of {searcher.num_trials} trials did not come to an end, as the search was "
            "interrupted: run the same command again, finished trials are kept"
        )
    refuse_all_failed(ended)
    for result in ended:
        if result.state == "failed":
            write_record(result.uri, result.record)
    probes = search_probes(config, [(result, maker.job(result.trial).rows) for result in ended if result.weights])
    publish_results(config, ended, probes, publication)


def refuse_all_failed(results: Sequence[TrialResult]) -> None:
    """What stops every trial is seldom a matter of values: nothing is written down, so that the same command tries again."""
    if all(result.state == "failed" for result in results):
        raise SearchError(
            f"every trial failed, the first one with: {results[0].record.failure}; mend that and run the same command again"
        )


def _run_tune(
    maker: JobMaker, searcher: TrialSearcher, scheduler: Any, budget: Budget, publication: Publication
) -> dict[int, str]:
    """Run Tune to its end; returns why trials failed, by number."""
    filesystem, path = resolve(publication.uri)
    delete_folder(join(publication.uri, EVENTS_FOLDER))  # of an interrupted search: every report is made again below
    config = maker.config

    def train_trial(settings: dict[str, Any]) -> None:
        run_trial(maker.job_of(settings["trial"]))

    def name(trial: Any) -> str:
        return f"trial-{trial.config['trial']['number']:03d}"

    tuner = ray.tune.Tuner(
        ray.tune.with_resources(train_trial, {"memory": DRIVER_MEMORY_BYTES}),
        tune_config=ray.tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=config.tune.num_trials,
            search_alg=searcher,
            scheduler=scheduler,
            max_concurrent_trials=count_concurrent(config, read_cluster().places_now(wanted_worker(config.resources))),
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=ray.tune.RunConfig(
            name=EVENTS_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=make_callbacks(config, publication),
            stop=budget,
            failure_config=ray.tune.FailureConfig(max_failures=config.tune.max_retries),
        ),
    )
    failed = {result.config["trial"]["number"]: result.error for result in tuner.fit() if result.error is not None}
    return {number: explain_error(error) or str(error).strip().splitlines()[-1] for number, error in failed.items()}


def run_trial(job: TrialJob) -> None:
    """A trial's driver, inside Tune: tell it what is known, then train on, and stop where Tune says so.

    Where it fails, Tune starts it again, `tune.max_retries` times, and it goes on from its last checkpoint.
    """
    record = read_record(job.uri)
    for report in record.reports:
        ray.tune.report(report.told())
    if record.failure is not None:
        return
    if find_dataset(job.uri) is not None:
        if not record.reports:
            raise SearchError(f"{job.uri} is finished, but its reports are gone: remove it, and it is made again")
        return
    train_job(job, [TuneReportCallback()])


def train_job(job: TrialJob, callbacks: Sequence[Any] = ()) -> None:
    """The pretraining of a trial, from its newest checkpoint; `callbacks` are Ray Train's."""
    after_step = ReportScore(job.config, job.tune, job.rows, job.shards, job.uri, job.trial.number)
    with publish(job.uri, "pretrain", job.config.pretrain_content(), {"shards": job.shards}) as publication:
        pretrain(job.config, job.shards, publication, after_step, callbacks)


def _collect(trial: Trial, job: TrialJob, stopped: dict[int, int], error: str | None, is_over: bool) -> TrialResult | None:
    """How a trial ended, None where it did not. `is_over`: the search has spent what it may."""
    record, number = read_record(job.uri), trial.number
    if number in stopped:  # its ranks may have gone on for a moment: that is no part of this search
        reports = tuple(report for report in record.reports if report.samples <= stopped[number])
        return TrialResult(trial, TrialRecord(reports=reports), "stopped", job.uri)
    if record.failure is None and error is not None:
        record = record.model_copy(update={"failure": error})
    if record.failure is not None:
        return TrialResult(trial, record, "failed", job.uri)
    if record.reports and find_dataset(job.uri) is not None:
        return TrialResult(trial, record, "finished", job.uri)
    return TrialResult(trial, record, "stopped", job.uri) if is_over else None
