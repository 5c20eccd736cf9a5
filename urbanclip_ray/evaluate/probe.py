"""The probe: what frozen vectors, and what is free without them, say about urban indicators on held-out tiles.

Every method learns from train, selects on validation and predicts test, for every indicator, split, fold and draw; see
`methods` for what they are, `fits` for how they are run, `leaks` for what is looked for first, and `scores` for what is made
of the predictions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather

from urbanclip_ray import dataflow
from urbanclip_ray.config import PixelsConfig, ProbeConfig, SplitConfig
from urbanclip_ray.evaluate.fits import (
    ALL_REGIONS,
    MIN_ROWS,
    Fit,
    Inputs,
    Results,
    fittable,
    parts_by_draw,
    run_fits,
)
from urbanclip_ray.evaluate.leaks import Leak, find_leaks, refuse_leaks, show_leaks
from urbanclip_ray.evaluate.methods import ProbeError, choose_methods, locate, make_probe, read_features
from urbanclip_ray.evaluate.regression import Standardiser
from urbanclip_ray.evaluate.scores import Setting, score_predictions
from urbanclip_ray.evaluate.splits import PARTS, cluster_units
from urbanclip_ray.evaluate.targets import count_unusable, space_name, target_of, to_space
from urbanclip_ray.evaluate.training_tiles import transductive_splits
from urbanclip_ray.schema import PREDICTIONS
from urbanclip_ray.storage import Dataset, Publication

OWN_FITS = "own_fits.feather"  # predictions of probes that were fitted on one region alone; not Parquet, which is `read()`
PLACES = ["tile_id", "region", "group", "lon", "lat", "sha256"]


def probe(
    labels: Dataset,
    splits: Dataset,
    tiles: Dataset,
    embeddings: dict[str, Dataset],
    config: ProbeConfig,
    pixels: PixelsConfig,
    publication: Publication,
    split: SplitConfig,
) -> None:
    """Fit and judge the methods of the config, or all that these representations allow; publishes predictions and
    `scores.json`, and with `probe.per_city` `own_fits.feather`.

    `embeddings` are representations by name. Predictions are of test tiles alone. The publication's facts say which methods
    were skipped and why, how many targets of each indicator are unusable, which fits had too few tiles, and which leaks
    were found. Raises :class:`ProbeError` when an indicator or a method is unknown, embeddings do not cover the splits, or a
    part is too small; :class:`leaks.LeakError` on a leak that makes the scores worthless, unless the config takes it.
    """
    methods = choose_methods(config, embeddings)
    rows = splits.read()
    tile_ids = pc.unique(rows["tile_id"]).sort()
    if not len(tile_ids):
        raise ProbeError(f"{splits.uri} has no tiles: make the splits again")
    raw = read_indicators(labels, tile_ids, config)
    dataflow.connect()
    features = read_features(tiles, embeddings, tile_ids, methods, pixels)
    places = _places(tiles, tile_ids)
    inputs = Inputs(
        features=features.matrices,
        targets={name: to_space(values, target_of(name, config)) for name, values in raw.items()},
        parts=parts_by_draw(rows, tile_ids),
        regions=places["region"].to_numpy(zero_copy_only=False).astype(str),
        probes={method: make_probe(method, config) for method in methods if method not in features.skipped},
    )
    if not inputs.probes:
        raise ProbeError(f"every method of probe.methods is skipped: {features.skipped}")
    _check_sizes(inputs, config)
    leaks = find_leaks(inputs, rows, places, embeddings, split)
    show_leaks(leaks)
    if config.refuse_leaks:
        refuse_leaks(leaks)
    fits, too_small = _plan_fits(inputs, config)
    results = run_fits(inputs, fits, publication.run)
    setting = _setting(inputs, places, results, embeddings, splits, split)
    _publish(inputs, tile_ids, results, config, publication, setting, split, leaks)
    publication.facts["skipped"] = features.skipped
    publication.facts["unusable_targets"] = {
        name: count_unusable(values, target_of(name, config)) for name, values in raw.items()
    }
    publication.facts["too_small"] = too_small
    publication.facts["leaks"] = [leak._asdict() for leak in leaks]


def read_indicators(labels: Dataset, tile_ids: pa.Array, config: ProbeConfig) -> dict[str, np.ndarray]:
    """Raw values [tiles] of every asked indicator, NaN where a tile has none."""
    table = labels.read()
    known = [name for name in table.column_names if name != "tile_id"]
    wanted = config.indicators or tuple(known)
    for key, names in (("indicators", wanted), ("targets", tuple(config.targets))):
        if unknown := [name for name in names if name not in known]:
            raise ProbeError(f"probe.{key} names {unknown}, but {labels.uri} has {known or 'none'}")
    if not wanted:
        raise ProbeError(f"{labels.uri} has no indicators: bring a label column with the source")
    where = locate(table, tile_ids, labels.uri)
    return {
        name: table[name].cast(pa.float64()).take(where).to_numpy(zero_copy_only=False).astype(np.float64) for name in wanted
    }


def _places(tiles: Dataset, tile_ids: pa.Array) -> pa.Table:
    table = tiles.read(PLACES)
    return table.take(locate(table, tile_ids, tiles.uri))


def _check_sizes(inputs: Inputs, config: ProbeConfig) -> None:
    for indicator, y in inputs.targets.items():
        if np.isnan(y).all():
            raise ProbeError(
                f"indicator {indicator!r} has no usable value in space {target_of(indicator, config)!r} on any tile: bring its "
                "labels, take it out of probe.indicators, or choose another probe.target"
            )
        for draw in inputs.parts:
            for part, found in zip(PARTS, inputs.rows(Fit(draw), indicator), strict=True):
                if len(found) < MIN_ROWS:
                    raise ProbeError(
                        f"{draw.split}, draw {draw.seed}: {part} has {len(found)} tiles with a usable {indicator!r} in "
                        f"space {target_of(indicator, config)!r}, fewer than {MIN_ROWS}: take it out of probe.indicators, "
                        "choose another probe.target, or change split.test_share and split.val_share"
                    )


def _plan_fits(inputs: Inputs, config: ProbeConfig) -> tuple[list[Fit], dict[str, int]]:
    """Every fit, and how many of each region's have too few tiles for an indicator."""
    fits = [Fit(draw) for draw in inputs.parts]
    names = np.unique(inputs.regions)
    if not config.per_city or len(names) < 2:
        return fits, {}
    # A city that is held out whole has nothing of its own to learn from.
    own = [Fit(draw, str(name)) for draw in inputs.parts if draw.split not in ("city", "transfer") for name in names]
    too_small = {
        str(name): sum(
            not fittable(inputs, fit, indicator) for fit in own if fit.region == name for indicator in inputs.targets
        )
        for name in names
    }
    return fits + own, {name: count for name, count in too_small.items() if count}


def _setting(
    inputs: Inputs,
    places: pa.Table,
    results: Results,
    embeddings: dict[str, Dataset],
    splits: Dataset,
    split: SplitConfig,
) -> Setting:
    kinds = dict.fromkeys(draw.split for draw in inputs.parts)
    used = {name: dataset for name, dataset in embeddings.items() if name in inputs.features}
    ids = places["tile_id"].to_pylist()
    units = {kind: cluster_units(kind, places, split.block_km) for kind in kinds}
    validation: dict[tuple[str, str, str], list[float]] = {}
    for (fit, indicator, method), result in sorted(results.items(), key=lambda item: item[0]):
        if fit.region == ALL_REGIONS:
            validation.setdefault((indicator, fit.draw.split, method), []).append(result.validation)
    return Setting(
        transductive=transductive_splits(inputs.parts, places["tile_id"], used, split),
        units={kind: (name, pd.Series(codes, index=ids)) for kind, (name, codes) in units.items()},
        folds=splits.manifest.facts.get("folds", {}),
        validation={key: float(np.mean(values)) for key, values in validation.items()},
    )


def _publish(
    inputs: Inputs,
    tile_ids: pa.Array,
    results: Results,
    config: ProbeConfig,
    publication: Publication,
    setting: Setting,
    split: SplitConfig,
    leaks: list[Leak],
) -> None:
    predictions = pa.concat_tables(_tables(inputs, tile_ids, results, config, ALL_REGIONS)).combine_chunks()
    publication.write_table(predictions)
    if config.per_city:
        setting = replace(setting, regions=pd.Series(inputs.regions, index=tile_ids.to_pylist()))
    if regions := sorted({fit.region for fit, _, _ in results} - {ALL_REGIONS}):
        own = pa.concat_tables(
            table.append_column("region", pa.repeat(region, table.num_rows))
            for region in regions
            for table in _tables(inputs, tile_ids, results, config, region)
        )
        setting = replace(setting, own_fits=own)
        sink = pa.BufferOutputStream()
        pyarrow.feather.write_feather(own, sink)
        publication.write_file(OWN_FITS, sink.getvalue())
    scores = score_predictions(predictions, split.outer, setting) | {"leaks": [leak._asdict() for leak in leaks]}
    publication.write_file("scores.json", json.dumps(scores, indent=1, allow_nan=False).encode())
    publication.count(unit="predictions", rows_in=predictions.num_rows, rows_out=predictions.num_rows, rejects={})


def _tables(inputs: Inputs, tile_ids: pa.Array, results: Results, config: ProbeConfig, region: str) -> Iterator[pa.Table]:
    """The predictions of one indicator and draw by one method each, in the space that is judged."""
    for indicator, y in inputs.targets.items():
        for draw in inputs.parts:
            fit = Fit(draw, region)
            rows = inputs.rows(fit, indicator)
            for method in inputs.probes:
                if (fit, indicator, method) not in results:
                    continue
                truth, predicted = y[rows.test], results[fit, indicator, method].predicted
                if config.zscore:
                    scale = Standardiser.fit(y[rows.train])
                    truth, predicted = scale.apply(truth), scale.apply(predicted)
                columns: dict[str, Any] = {
                    "tile_id": tile_ids.take(pa.array(rows.test)),
                    "indicator": pa.repeat(indicator, len(truth)),
                    "method": pa.repeat(method, len(truth)),
                    "split": pa.repeat(draw.split, len(truth)),
                    "fold": pa.repeat(pa.scalar(draw.fold, pa.int32()), len(truth)),
                    "seed": pa.repeat(pa.scalar(draw.seed, pa.int32()), len(truth)),
                    "y": pa.array(truth),
                    "y_pred": pa.array(predicted),
                    "space": pa.repeat(space_name(indicator, config), len(truth)),
                }
                yield pa.table(columns, schema=PREDICTIONS)
