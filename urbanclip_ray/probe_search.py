"""The second level of a search: settings of the MLP probe, tried on the embeddings that finished trials have left.

A setting learns from the training tiles that judged its trial and predicts the validation tiles. Whatever space it learns in
(`probe.target`), its predictions are judged in that of the config, after they are cut to the range of the training labels: an
exponential of a slip is else without bounds.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence

import numpy as np
import ray

from urbanclip_ray.config import ProbeConfig, RunConfig
from urbanclip_ray.evaluate.fits import MIN_ROWS, ONE_THREAD
from urbanclip_ray.evaluate.methods import make_probe
from urbanclip_ray.evaluate.metrics import r2
from urbanclip_ray.evaluate.regression import MLP, ProbeData
from urbanclip_ray.evaluate.targets import from_space, target_of, to_space
from urbanclip_ray.evaluate.validation_score import ProbeRows
from urbanclip_ray.search_results import VECTORS_FILE, ProbeResult, TrialResult, reduce_r2
from urbanclip_ray.search_space import Trial, plan_probes
from urbanclip_ray.storage import join, read_bytes


def search_probes(config: RunConfig, finished: Sequence[tuple[TrialResult, ProbeRows]]) -> list[ProbeResult]:
    """Every setting on every finished trial, in parallel, in the order of trials and settings."""
    settings = plan_probes(config)
    work = ray.remote(num_cpus=1, runtime_env={"env_vars": ONE_THREAD})(_try_settings)
    pending = [work.remote(result.uri, rows, config, settings) for result, rows in finished if settings]
    found: list[list[tuple[dict[str, float], float]]] = ray.get(pending)
    return [
        ProbeResult(
            trial=result.trial.number,
            values=setting.values,
            set=setting.overrides,
            score=reduce_r2(scores, config.tune.metric),
            r2=scores,
            seconds=seconds,
        )
        for (result, _), tried in zip(finished, found, strict=False)
        for setting, (scores, seconds) in zip(settings, tried, strict=True)
    ]


def _try_settings(
    uri: str, rows: ProbeRows, config: RunConfig, settings: Sequence[Trial]
) -> list[tuple[dict[str, float], float]]:
    """R² by indicator and wall seconds of each setting on one trial's vectors."""
    vectors = np.load(io.BytesIO(read_bytes(join(uri, VECTORS_FILE))), allow_pickle=False)
    found = []
    for setting in settings:
        start = time.perf_counter()
        scores = score_setting(vectors, rows, config.probe, setting.config.probe, config.tune.seed)
        found.append((scores, time.perf_counter() - start))
    return found


def score_setting(vectors: np.ndarray, rows: ProbeRows, judged: ProbeConfig, tried: ProbeConfig, seed: int) -> dict[str, float]:
    """R² of the validation rows by indicator, in the spaces of `judged`, of the MLP that `tried` describes.

    Vectors are [rows, width]. An indicator with too few usable rows in the space tried scores as if its mean were predicted.
    """
    is_train = np.arange(len(rows.row_ids)) < rows.num_train
    scores = {}
    for name, y in rows.targets.items():
        raw = from_space(y, target_of(name, judged))
        own = to_space(raw, target_of(name, tried))
        train, val = (np.flatnonzero(np.isfinite(own) & part) for part in (is_train, ~is_train))
        asked = np.flatnonzero(np.isfinite(y) & ~is_train)
        if min(len(train), len(val)) < MIN_ROWS or np.ptp(own[train]) == 0:
            scores[name] = 0.0
            continue
        data = ProbeData(vectors[train], own[train], vectors[val], own[val], vectors[asked])
        predicted = make_probe(f"pretrained{MLP}", tried).fit_predict(data, seed)
        bounded = from_space(predicted, target_of(name, tried)).clip(raw[train].min(), raw[train].max())
        scores[name] = r2(y[asked], to_space(bounded, target_of(name, judged)))
    return scores
