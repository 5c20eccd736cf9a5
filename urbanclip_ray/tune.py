"""shards + labels ─tune─▶ trials: Ray Tune starts pretrainings with other values and stops early those that do badly.

Every trial is a nested Ray Train run and a run of its own, at `<run>/trials/<number>-<digest>`: its checkpoints, its weights,
and the record of what it reported. A search that was interrupted goes on from those records: what they hold is told to Tune
again, whose decisions fall as before where trials run one at a time. Nothing that Tune pickled is ever read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
import ray.train
import ray.tune
import torch.distributed as dist
from ray.train.v2._internal.execution import context as ray_train_context  # whose logger is named by its file
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from urbanclip_ray import dataflow
from urbanclip_ray.config import ConfigError, RunConfig, TuneConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.validation_score import ProbeRows, ValidationScore, choose_rows
from urbanclip_ray.search_results import Report, TrialRecord, TrialResult, publish_results, read_record, write_record
from urbanclip_ray.search_space import Trial, measure_content, plan_trials
from urbanclip_ray.storage import Dataset, Publication, dataset_uri, delete_folder, digest, find_dataset, join, publish, resolve
from urbanclip_ray.train.guards import TrainError
from urbanclip_ray.train.launch import pretrain
from urbanclip_ray.train.shards import count_steps

EVENTS_FOLDER = "ray_tune"  # TensorBoard events with HParams, and what else Tune writes of a trial
DRIVER_MEMORY_BYTES = 512 * 2**20  # what a trial's driver asks for: a CPU of its own would be missing to its ranks


class SearchError(UserError, RuntimeError):
    """A search that did not come to its end; the message says what to do."""


class TrialJob(NamedTuple):
    """What a trial's driver is told. `config` is the trial's own, its run and storage included."""

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


def run_search(config: RunConfig, shards: Dataset, labels: Dataset, publication: Publication) -> None:
    """Run all trials, and publish their table and the best of them.

    Trials see the training and validation rows of the shards and the labels of these; test tiles are in neither. Raises
    ConfigError where no trial could be judged or stopped, and SearchError when it was interrupted or a trial broke for
    a reason that is not its values': the same command goes on.
    """
    jobs = make_jobs(config, shards, labels)
    scheduler = make_scheduler(config.tune, jobs, shards)
    dataflow.connect()
    grid = _run_tune(config, jobs, scheduler, publication)
    results = [_collect(job, scheduler.stopped) for job in jobs]
    if missing := [job.trial.number for job, result in zip(jobs, results, strict=True) if result is None]:
        reasons = "; ".join(str(error).strip().splitlines()[-1] for error in grid.errors) or "it was interrupted"
        raise SearchError(
            f"trials {missing} of {len(jobs)} did not come to an end ({reasons}): run the same command again, finished "
            "trials are kept"
        )
    publish_results([result for result in results if result is not None], publication)


def make_jobs(config: RunConfig, shards: Dataset, labels: Dataset) -> list[TrialJob]:
    """The jobs of all trials; the name of a trial's run holds everything that its scores depend on."""
    rows = choose_rows(shards, labels, config)
    jobs = []
    for trial in plan_trials(config):
        made_of = {"train": trial.config.pretrain_content(), **measure_content(trial.config)}
        key = digest({**made_of, "labels": labels.sha256, "shards": shards.sha256})
        place = {"storage": join(config.storage, config.run, "trials"), "run": f"{trial.number:03d}-{key[:8]}"}
        own = trial.config.model_copy(update={**place, "tune": TuneConfig()})
        jobs.append(TrialJob(trial, own, shards, rows, config.tune))
    return jobs


class Halving(ASHAScheduler):
    """Asynchronous successive halving that spares two: the first trial, which the others are measured against and which
    must not be stopped for coming later than a better one, and whoever has seen all its samples and is writing weights.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.stopped: dict[int, int] = {}  # number of a trial -> the samples that it had reported

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tune's decision on a trial that has just reported."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        number = trial.config["trial"]["number"]
        if decision != TrialScheduler.STOP or number == 0 or result["samples"] >= result["total_samples"]:
            return str(TrialScheduler.CONTINUE)
        self.stopped[number] = int(result["samples"])
        return decision


def make_scheduler(config: TuneConfig, jobs: Sequence[TrialJob], shards: Dataset) -> Halving:
    """Time is counted in training rows seen. Raises ConfigError when every trial would be over before it can be stopped."""
    num_rows = shards.manifest.facts["parts"]["train"]
    trains = [job.config.train for job in jobs]
    total = max(count_steps(num_rows, train.epochs, train.global_batch_size) * train.global_batch_size for train in trains)
    if total == 0:
        raise ConfigError(f"{num_rows} training rows do not fill one step of train.global_batch_size in any trial: lower it")
    if max(config.grace_samples, config.samples_per_report) >= total:
        raise ConfigError(
            f"a trial sees {total} samples, so none could be stopped early by tune.grace_samples={config.grace_samples} and "
            f"tune.samples_per_report={config.samples_per_report}: lower both, to {total // 4} for example"
        )
    return Halving(
        time_attr="samples",
        max_t=total,
        grace_period=config.grace_samples,
        reduction_factor=config.reduction_factor,
        stop_last_trials=False,  # or Tune would end a trial at its last report, before it has written its weights
    )


def count_concurrent(config: RunConfig, cluster: dict[str, float]) -> int:
    """Trials that the cluster's resources hold at a time, at least one: Tune sees only drivers, not the ranks."""
    if config.tune.max_concurrent:
        return config.tune.max_concurrent
    resources = config.resources
    fit = cluster.get("CPU", 0) / (resources.max_workers * resources.cpus_per_worker)
    if resources.use_gpu:
        fit = min(fit, cluster.get("GPU", 0) / resources.max_workers)
    return max(1, int(fit))


def _run_tune(config: RunConfig, jobs: Sequence[TrialJob], scheduler: Halving, publication: Publication) -> Any:
    filesystem, path = resolve(publication.uri)
    delete_folder(join(publication.uri, EVENTS_FOLDER))  # of an interrupted search: every report is made again below

    def train_trial(settings: dict[str, Any]) -> None:
        run_trial(jobs[settings["trial"]["number"]])

    def name(trial: Any) -> str:
        return f"trial-{trial.config['trial']['number']:03d}"

    tuner = ray.tune.Tuner(
        ray.tune.with_resources(train_trial, {"memory": DRIVER_MEMORY_BYTES}),
        param_space={"trial": ray.tune.grid_search([_shown_values(job.trial) for job in jobs])},
        tune_config=ray.tune.TuneConfig(
            metric="score",
            mode="max",
            scheduler=scheduler,
            max_concurrent_trials=count_concurrent(config, ray.cluster_resources()),
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=ray.tune.RunConfig(name=EVENTS_FOLDER, storage_path=path, storage_filesystem=filesystem, verbose=0),
    )
    return tuner.fit()


def _shown_values(trial: Trial) -> dict[str, Any]:
    """The values of a trial for Tune and TensorBoard's HParams, which take no lists."""
    values = {key: str(value) if isinstance(value, list | dict) else value for key, value in trial.values.items()}
    return {"number": trial.number, **values}


def run_trial(job: TrialJob) -> None:
    """A trial's driver, inside Tune: tell it what is known, then train on, and stop where Tune says so."""
    record = read_record(job.uri)
    for report in record.reports:
        ray.tune.report(report.model_dump())
    if record.failure is not None or find_dataset(job.uri) is not None:
        return
    after_step = ReportScore(job, record.reports)
    try:
        with publish(job.uri, "pretrain", job.config.pretrain_content(), {"shards": job.shards}) as publication:
            pretrain(job.config, job.shards, publication, after_step, [TuneReportCallback()])
    except TrainError as error:  # the values' own fault, such as a learning rate that diverges: a result like others
        write_record(job.uri, read_record(job.uri).model_copy(update={"failure": str(error)}))


class ReportScore:
    """After every so many samples, and at the end, all ranks score the weights and report to Ray; rank 0 writes it down."""

    def __init__(self, job: TrialJob, known: Sequence[Report]) -> None:
        self._job = job
        self._known_samples = {report.samples for report in known}  # reported before the trial was interrupted
        self._seconds_before = known[-1].seconds if known else 0.0
        self._start = time.time()
        self._score = ValidationScore(job.rows, job.shards, job.config)

    def __call__(self, engine: Any, taken: int, num_steps: int) -> None:
        rows_per_step = self._job.config.train.global_batch_size
        samples, every = taken * rows_per_step, self._job.tune.samples_per_report
        is_due = samples // every > (samples - rows_per_step) // every or taken == num_steps
        if not is_due or samples in self._known_samples:
            return
        r2 = self._score(engine)
        score = min(r2.values()) if self._job.tune.metric == "min_r2" else sum(r2.values()) / len(r2)
        seconds = self._seconds_before + time.time() - self._start
        report = Report(samples=samples, total_samples=num_steps * rows_per_step, score=score, r2=r2, seconds=seconds)
        if dist.get_rank() == 0:
            write_record(self._job.uri, read_record(self._job.uri).with_report(report))
            number = self._job.trial.number
            print(f"trial {number}: {samples:,} of {report.total_samples:,} samples, validation R² {score:.3f}", flush=True)
        logging.getLogger(ray_train_context.__file__).setLevel(logging.WARNING)  # or every rank prints every report
        ray.train.report(report.model_dump())


def _collect(job: TrialJob, stopped: dict[int, int]) -> TrialResult | None:
    """How a trial ended, None where it did not."""
    record = read_record(job.uri)
    if record.failure is not None:
        return TrialResult(job.trial, record, "failed", job.uri)
    if job.trial.number in stopped:  # its ranks may have gone on for a moment: that is no part of this search
        reports = tuple(report for report in record.reports if report.samples <= stopped[job.trial.number])
        return TrialResult(job.trial, TrialRecord(reports=reports), "stopped", job.uri)
    if record.reports and find_dataset(job.uri) is not None:
        return TrialResult(job.trial, record, "finished", job.uri)
    return None
