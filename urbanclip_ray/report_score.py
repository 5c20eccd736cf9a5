"""What the ranks of a trial do after every so many samples: judge the weights, write it down, and report it to Ray."""

from __future__ import annotations

import io
import logging
import time
from typing import TYPE_CHECKING

import numpy as np
import ray.train
import torch.distributed as dist
from ray.train.v2._internal.execution import context as ray_train_context  # whose logger is named by its file

from urbanclip_ray.config import RunConfig, TuneConfig
from urbanclip_ray.config.search import Metric
from urbanclip_ray.evaluate.validation_score import ProbeRows, RowVectors, score_vectors
from urbanclip_ray.search_results import VECTORS_FILE, Report, read_record, reduce_r2, write_record
from urbanclip_ray.storage import Dataset, join, write_bytes

if TYPE_CHECKING:
    from urbanclip_ray.train.loop import Rank


class ReportScore:
    """Called by all ranks after every step. Scores after every `tune.samples_per_report` samples, and at the end.

    Rank 0 keeps the record at `uri`, and beside it the vectors of the judged rows at the end, by which probe settings can be
    tried later.
    """

    def __init__(self, config: RunConfig, tune: TuneConfig, rows: ProbeRows, shards: Dataset, uri: str, number: int) -> None:
        known = read_record(uri).reports
        self._config, self._tune, self._rows, self._uri, self._number = config, tune, rows, uri, number
        self._known_samples = {report.samples for report in known}  # reported before the trial was interrupted
        self._seconds_before = known[-1].seconds if known else 0.0
        self._start_s = time.time()
        self._embed = RowVectors(rows, shards, config)

    def __call__(self, rank: Rank, taken: int, num_steps: int) -> None:
        rows_per_step = self._config.train.global_batch_size
        samples, every = taken * rows_per_step, self._tune.samples_per_report
        is_due = samples // every > (samples - rows_per_step) // every or taken == num_steps
        if not is_due or samples in self._known_samples:
            return
        vectors = self._embed(rank.engine)
        r2 = score_vectors(vectors, self._rows, self._config.probe.ridge_alphas)
        retrieval = mean_recall(rank, self._config) if self._tune.metric == "retrieval" else None
        report = Report(
            samples=samples,
            total_samples=num_steps * rows_per_step,
            score=reduce_r2(r2, self._tune.metric) if retrieval is None else retrieval,
            r2=r2,
            retrieval=retrieval,
            seconds=self._seconds_before + time.time() - self._start_s,
        )
        if dist.get_rank() == 0:
            if taken == num_steps:
                write_vectors(self._uri, vectors)
            write_record(self._uri, read_record(self._uri).with_report(report))
            print(shown_report(self._number, report, self._tune.metric), flush=True)
        logging.getLogger(ray_train_context.__file__).setLevel(logging.WARNING)  # or every rank prints every report
        ray.train.report(report.told())


def mean_recall(rank: Rank, config: RunConfig) -> float:
    """R@10 on validation rows, the mean of image to text and text to image; says nothing across other rows or texts."""
    from urbanclip_ray.train.validate import validate

    figures = validate(rank.engine, rank.val_reader, rank.maker, rank.tokenizer, config.train)
    return (figures["image_to_text_r10"] + figures["text_to_image_r10"]) / 2


def shown_report(number: int, report: Report, metric: Metric) -> str:
    """One line of what a trial has reported."""
    what = "validation R@10" if metric == "retrieval" else "validation R²"
    return f"trial {number}: {report.samples:,} of {report.total_samples:,} samples, {what} {report.score:.3f}"


def write_vectors(uri: str, vectors: np.ndarray) -> None:
    """Vectors [judged rows, width] as a `.npy` file, without pickles."""
    stream = io.BytesIO()
    np.save(stream, vectors, allow_pickle=False)
    write_bytes(join(uri, VECTORS_FILE), stream.getvalue())
