"""All fits of a probe as one Ray job: every indicator, method, split, fold and draw over matrices that lie there once.

One task fits the methods of one representation, on one draw, to all indicators at once: indicators that are usable on the
same tiles share their standardisation, their eigendecomposition and their network's program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from rich.console import Console
from rich.progress import Progress

from urbanclip_ray import metrics
from urbanclip_ray.evaluate.methods import features_of
from urbanclip_ray.evaluate.metrics import r2
from urbanclip_ray.evaluate.regression import MLP, Probe, ProbeData
from urbanclip_ray.evaluate.splits import PARTS

MIN_ROWS = 2  # of a part: one row has no variance to fit, select or judge by
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
ALL_REGIONS = ""


class Draw(NamedTuple):
    """One assignment of all tiles to train, validation and test."""

    split: str
    fold: int
    seed: int


class Fit(NamedTuple):
    """What is fitted at once: a draw on the tiles of all regions, or of one."""

    draw: Draw
    region: str = ALL_REGIONS


class Result(NamedTuple):
    """What one method says of one indicator: its R² on validation (NaN where undefined) and the predictions of test."""

    validation: float
    predicted: np.ndarray  # [num_test]


class Rows(NamedTuple):
    """The usable tiles [rows] of each part."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


Results = dict[tuple[Fit, str, str], Result]  # by fit, indicator and method


@dataclass(frozen=True)
class Inputs:
    """What every task needs; rows of all arrays are the same tiles, in the order of their ids."""

    features: dict[str, np.ndarray]  # name -> [tiles, width]
    targets: dict[str, np.ndarray]  # indicator -> [tiles] in the probe's space, NaN where unusable
    parts: dict[Draw, np.ndarray]  # [tiles], the index in PARTS, -1 for a tile outside the split
    regions: np.ndarray  # [tiles], their names
    probes: dict[str, Probe]  # by method

    def rows(self, fit: Fit, indicator: str) -> Rows:
        parts = self.parts[fit.draw]
        usable = ~np.isnan(self.targets[indicator])
        if fit.region != ALL_REGIONS:
            usable = usable & (self.regions == fit.region)
        return Rows(*(np.flatnonzero(usable & (parts == part)) for part in range(len(PARTS))))


def parts_by_draw(rows: pa.Table, tile_ids: pa.Array) -> dict[Draw, np.ndarray]:
    """The part of every tile in every draw, see :class:`Inputs`, from rows of :data:`schema.SPLITS`."""
    tile = pc.index_in(rows["tile_id"], value_set=tile_ids).to_numpy()
    part = pc.fill_null(pc.index_in(rows["part"], value_set=pa.array(PARTS)), -1).to_numpy()
    draws = rows.select(Draw._fields).to_pandas().groupby(list(Draw._fields), sort=False).indices
    found = {}
    for (split, fold, seed), own in draws.items():
        parts = np.full(len(tile_ids), -1, dtype=np.int8)
        parts[tile[own]] = part[own]
        found[Draw(str(split), int(fold), int(seed))] = parts
    return found


def run_fits(inputs: Inputs, fits: list[Fit], run: str = "") -> Results:
    """Everything fitted, in parallel; indicators with too few tiles in a part of a fit are left out of it.

    `run` is its name in the metrics.
    """
    work = ray.remote(num_cpus=1, runtime_env={"env_vars": ONE_THREAD})(_fit)
    shared = ray.put(inputs)
    names = dict.fromkeys(features_of(method) for method in inputs.probes)
    # The networks take longest: first, so that no core waits for the last of them.
    ordered = sorted(names, key=lambda name: f"{name}{MLP}" not in inputs.probes)
    pending: list[Any] = [work.remote(shared, fit, name) for name in ordered for fit in fits]
    results: Results = {}
    try:
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("probe", total=len(pending))
            while pending:
                done, pending = ray.wait(pending, num_returns=1)
                for found in ray.get(done):
                    results |= found
                progress.advance(bar, len(done))
                metrics.PROBE_FITS.add(len(done), run=run)
    finally:
        for reference in pending:
            ray.cancel(reference)  # after an error, the rest would compute for nobody
    return results


def fittable(inputs: Inputs, fit: Fit, indicator: str) -> bool:
    return all(len(rows) >= MIN_ROWS for rows in inputs.rows(fit, indicator))


def _fit(inputs: Inputs, fit: Fit, features: str) -> Results:
    """What the methods on these features say of every indicator."""
    x, results = inputs.features[features], {}
    for rows, indicators in _same_rows(inputs, fit):
        y = np.stack([inputs.targets[indicator] for indicator in indicators], axis=1)
        asked = np.concatenate([rows.val, rows.test])
        data = ProbeData(x[rows.train], y[rows.train], x[rows.val], y[rows.val], x[asked])
        for method, head in inputs.probes.items():
            if features_of(method) == features:
                predicted = head.fit_predict(data, fit.draw.seed)
                val, test = predicted[: len(rows.val)], predicted[len(rows.val) :]
                for column, indicator in enumerate(indicators):
                    score = r2(y[rows.val, column], val[:, column])
                    results[fit, indicator, method] = Result(score, test[:, column])
    return results


def _same_rows(inputs: Inputs, fit: Fit) -> Iterator[tuple[Rows, list[str]]]:
    """The indicators that can be fitted, together where they are usable on the same tiles."""
    together: dict[bytes, tuple[Rows, list[str]]] = {}
    for indicator in inputs.targets:
        if fittable(inputs, fit, indicator):
            rows = inputs.rows(fit, indicator)
            together.setdefault(np.concatenate(rows).tobytes(), (rows, []))[1].append(indicator)
    yield from together.values()
