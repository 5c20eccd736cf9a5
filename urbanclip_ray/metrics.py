"""What the project's processes tell Ray's metrics, every name in one place, with its unit and its tags.

Ray serves them for Prometheus at each node's metrics port and puts `ray_` before the name; cluster/prometheus.yml scrapes them
and cluster/grafana/urbanclip.json shows them. Without Ray nothing happens: a call costs a look into a dictionary, and with it
about 10 µs. Tags take few values: a run, a stage, a rank, a reason; never a tile.

A gauge is gone 20 s after it was last set, so what happens seldom is a counter. Seconds are counters too: Ray keeps of a
histogram's sum only an estimate.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from typing import Any, Literal, NamedTuple

PREFIX = "ray_"  # Ray's, in Prometheus
MAX_REASON_CHARACTERS = 60
NUMBER = re.compile(r"\d[\d.,]*")


class Metric(NamedTuple):
    """A counter or a gauge; names follow Prometheus' conventions: the unit last, `_total` behind it for counters."""

    kind: Literal["counter", "gauge"]
    name: str
    help: str
    tags: tuple[str, ...]

    @property
    def exported_name(self) -> str:
        """What Prometheus calls it."""
        return PREFIX + self.name

    def add(self, amount: float, **tags: object) -> None:
        """Count so much more; nothing for 0, which Ray refuses."""
        if amount > 0 and _is_connected():
            _instrument(self).inc(float(amount), _as_text(tags))

    def set(self, value: float, **tags: object) -> None:
        """The gauge's value from now on."""
        if _is_connected():
            _instrument(self).set(float(value), _as_text(tags))


TILES_READ = Metric("counter", "urbanclip_tiles_read_total", "Tiles read from the source, usable or not", ("run",))
ROWS_WRITTEN = Metric("counter", "urbanclip_rows_written_total", "Rows written to datasets by Ray Data", ("run", "stage"))
BYTES_WRITTEN = Metric("counter", "urbanclip_written_bytes_total", "Bytes of these rows' Parquet files", ("run", "stage"))
ROWS_REJECTED = Metric(
    "counter",
    "urbanclip_rows_rejected_total",
    "What a finished stage left out, in its own unit",
    ("run", "stage", "reason"),
)
STAGES = Metric("counter", "urbanclip_stages_total", "Stages made", ("run", "stage"))
STAGE_SECONDS = Metric("counter", "urbanclip_stage_seconds_total", "Seconds spent on making stages", ("run", "stage"))

CAPTIONS = Metric("counter", "urbanclip_captions_total", "Texts committed to the caption store", ("run",))
CAPTION_ATTEMPTS = Metric("counter", "urbanclip_caption_attempts_total", "Tiles shown to a captioner, again or not", ("run",))
CAPTION_SECONDS = Metric("counter", "urbanclip_caption_seconds_total", "Seconds spent in captioners, all actors", ("run",))
CAPTION_FAILURES = Metric(
    "counter", "urbanclip_caption_failures_total", "Tiles given up by a captioner, by the kind of error", ("run", "reason")
)

TRAIN_SAMPLES = Metric("counter", "urbanclip_train_samples_total", "Training rows in optimizer steps taken", ("run",))
TRAIN_TOKENS = Metric("counter", "urbanclip_train_tokens_total", "Tokens of their texts, padding left out", ("run",))
TRAIN_PROGRESS = Metric("gauge", "urbanclip_train_progress_ratio", "Optimizer steps taken, of all", ("run",))
TRAIN_LOSS = Metric("gauge", "urbanclip_train_loss", "Loss of the last step, by kind (nats; total: weighted)", ("run", "kind"))
VALIDATION_LOSS = Metric("gauge", "urbanclip_validation_loss", "Loss on validation rows, by kind (nats)", ("run", "kind"))
LEARNING_RATE = Metric("gauge", "urbanclip_train_learning_rate", "Learning rate of the last step", ("run",))
GRADIENT_NORM = Metric("gauge", "urbanclip_train_gradient_norm", "Norm of the gradient before it was clipped", ("run",))
SAMPLES_PER_SECOND = Metric("gauge", "urbanclip_train_samples_per_second", "Training rows a second, all ranks", ("run",))
FLOPS_RATIO = Metric(
    "gauge", "urbanclip_train_flops_utilisation_ratio", "FLOP/s, of those of plain matrix products on the rank", ("run", "rank")
)
DATA_WAIT_RATIO = Metric(
    "gauge", "urbanclip_train_data_wait_ratio", "Share of the last step that the rank waited for its rows", ("run", "rank")
)

CHECKPOINTS = Metric("counter", "urbanclip_checkpoints_total", "Checkpoints committed", ("run",))
CHECKPOINT_BYTES = Metric("counter", "urbanclip_checkpoint_bytes_total", "Bytes of checkpoints by rank", ("run", "rank"))
CHECKPOINT_STALL_SECONDS = Metric(
    "counter", "urbanclip_checkpoint_stall_seconds_total", "Seconds that training stood still for a copy", ("run", "rank")
)
CHECKPOINT_WRITE_SECONDS = Metric(
    "counter", "urbanclip_checkpoint_write_seconds_total", "Seconds of writing beside the training", ("run", "rank")
)

PROBE_FITS = Metric("counter", "urbanclip_probe_fits_total", "Tasks of a probe that are done", ("run",))

METRICS: tuple[Metric, ...] = tuple(value for value in globals().values() if isinstance(value, Metric))


def bounded(reason: str) -> str:
    """A reason as a tag: numbers and what follows a colon are one tile's own."""
    return NUMBER.sub("#", reason.partition(":")[0])[:MAX_REASON_CHARACTERS].strip()


def _is_connected() -> bool:
    ray = sys.modules.get("ray")  # who has not imported it has not joined
    return ray is not None and bool(ray.is_initialized())


@lru_cache
def _instrument(metric: Metric) -> Any:
    from ray.util.metrics import Counter, Gauge

    return {"counter": Counter, "gauge": Gauge}[metric.kind](metric.name, metric.help, metric.tags)


def _as_text(tags: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in tags.items()}
