"""tiles + splits ─train─▶ baselines: one Ray task trains one encoder; all that are missing run at once where they fit.

A task returns the files of its encoder; the stage that owns it publishes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from urbanclip_ray import dataflow
from urbanclip_ray.config import AugmentConfig, BaselineName, ConfigError, RunConfig
from urbanclip_ray.evaluate.targets import target_of, to_space
from urbanclip_ray.logs import say
from urbanclip_ray.storage import Dataset, Publication

NO_AUGMENTATION = AugmentConfig(min_area_share=1, flips=False)
PCA_WIDTH = 256  # at most


class BaselineWork(NamedTuple):
    """What a baseline is trained from. `labels` are looked at by the supervised one alone."""

    config: RunConfig
    tiles: Dataset
    splits: Dataset
    labels: Dataset | None


class BaselineFiles(NamedTuple):
    """The files of an encoder by name, the tiles that it learned from, and what its training says of itself."""

    files: dict[str, bytes]
    tile_ids: list[str]
    facts: dict[str, Any]


def start_baseline(name: BaselineName, work: BaselineWork) -> Any:
    """A reference to the :class:`BaselineFiles` of a task that has been started."""
    dataflow.connect()
    config = work.config.baselines
    task = ray.remote(num_cpus=config.cpus_per_task, num_gpus=config.gpus_per_task or None, max_retries=1)(train_baseline)
    return task.options(name=f"baseline {name}").remote(name, work)


def publish_baseline(reference: Any, publication: Publication) -> None:
    """Wait for a started baseline, write its files and the ids of the tiles that it learned from, and account in these."""
    made: BaselineFiles = ray.get(reference)
    publication.write_table(pa.table({"tile_id": pa.array(made.tile_ids, pa.string())}))
    for name, data in made.files.items():
        publication.write_file(name, data)
    publication.facts.update(made.facts)
    num_tiles = len(made.tile_ids)
    publication.count(unit="tiles", rows_in=num_tiles, rows_out=num_tiles, rejects={})


def train_baseline(name: BaselineName, work: BaselineWork) -> BaselineFiles:
    """Train one baseline in this process. `wall_s` is of its reading and training on the CPUs or the GPU of one task."""
    import torch

    from urbanclip_ray.evaluate.trained.encoder_files import encoder_files
    from urbanclip_ray.evaluate.trained.tiles import read_training_tiles

    config, start_s = work.config, time.monotonic()
    torch.set_num_threads(config.baselines.cpus_per_task)
    torch.manual_seed(config.baselines.seed)
    tiles = read_training_tiles(work.tiles, work.splits, config.split, config.pixels)
    report = partial(_report, name, start_s)
    if name == "pca":
        plan, encoder, facts = _fit_pca(tiles, config)
    else:
        plan, encoder, facts = _fit_by_gradient(name, tiles, work, report)
    facts |= {"num_tiles": len(tiles), "wall_s": round(time.monotonic() - start_s, 3), "seed": config.baselines.seed}
    facts["num_parameters"] = sum(value.numel() for value in encoder.state_dict().values())
    return BaselineFiles(encoder_files(plan, encoder), tiles.tile_ids, facts)


def _report(name: str, start_s: float, text: str) -> None:
    seconds = time.monotonic() - start_s
    say(f"baseline {name}: {text}, {seconds:.0f} s", baseline=name, seconds=seconds)


def _fit_pca(tiles: Any, config: RunConfig) -> tuple[Any, Any, dict[str, Any]]:
    from urbanclip_ray.evaluate.trained.encoder_files import EncoderPlan
    from urbanclip_ray.evaluate.trained.pca import fit_projection

    side = config.baselines.pca_side_px
    shown = tiles.view(np.arange(len(tiles)), side, NO_AUGMENTATION, [0])
    projection = fit_projection(shown.transpose(0, 3, 1, 2).astype(np.float32) / 255, PCA_WIDTH, config.baselines.seed)
    width = len(projection.directions)
    return EncoderPlan("projection", {"image_px": side, "width": width}), projection, {"num_samples": len(tiles)}


def _fit_by_gradient(
    name: BaselineName, tiles: Any, work: BaselineWork, report: Callable[[str], None]
) -> tuple[Any, Any, dict[str, Any]]:
    from urbanclip_ray.evaluate.trained.encoder_files import build_encoder, input_of, plan_encoder
    from urbanclip_ray.evaluate.trained.loop import train_encoder

    config = work.config
    plan = plan_encoder(name, config.model)
    encoder = build_encoder(plan, config.baselines.seed)
    objective = _objective(name, encoder, plan, tiles, work)
    train = config.train.model_copy(update={"lr": config.baselines.lr or config.train.lr})
    trained = train_encoder(objective, tiles, input_of(plan), train, config.baselines.seed, report)
    tenth = max(1, trained.num_steps // 10)
    facts = {
        "num_steps": trained.num_steps,
        "num_samples": trained.num_samples,
        "loss_first_tenth": float(np.mean(trained.losses[:tenth])),
        "loss_last_tenth": float(np.mean(trained.losses[-tenth:])),
    }
    return plan, encoder, facts


def _objective(name: BaselineName, encoder: Any, plan: Any, tiles: Any, work: BaselineWork) -> Any:
    from urbanclip_ray.evaluate.trained import autoencoder, image_only, resnet18, simclr, tile2vec
    from urbanclip_ray.evaluate.trained.neighbours import Neighbourhood

    config = work.config.baselines
    if name == "autoencoder":
        return autoencoder.Reconstruction(encoder, **plan.settings)
    if name == "image_only":
        return image_only.AugmentationContrast(encoder, work.config.model.init_temperature, work.config.train.max_logit_scale)
    if name == "resnet18":
        if config.resnet18_weights:
            resnet18.fill_residual(encoder, config.resnet18_weights)
        return resnet18.Regression(encoder, read_targets(tiles.tile_ids, work))
    neighbourhood = Neighbourhood(tiles.lon, tiles.lat, config.num_neighbours, config.neighbour_km)
    if name == "tile2vec":
        return tile2vec.Triplets(encoder, neighbourhood, config.tile2vec_margin, config.tile2vec_norm_weight)
    return simclr.NeighbourContrast(
        encoder, plan.settings["embed_dim"], neighbourhood, config.simclr_projection, config.simclr_temperature
    )


def read_targets(tile_ids: list[str], work: BaselineWork) -> np.ndarray:
    """Indicators of training tiles in the probe's space, [tiles, indicators], NaN where unusable; no other label is read.

    Raises ConfigError where there are none, or an indicator that no training tile has.
    """
    if work.labels is None:
        raise ConfigError("baselines.names: resnet18 learns from indicators, and the source brings none: take it out")
    table = work.labels.read(filters=pc.field("tile_id").isin(tile_ids))
    names = work.config.probe.indicators or [name for name in table.column_names if name != "tile_id"]
    where = pc.index_in(pa.array(tile_ids), value_set=table["tile_id"].combine_chunks())
    columns = []
    for name in names:
        values = table[name].cast(pa.float64()).take(where).to_numpy().astype(np.float64)
        columns.append(to_space(values, target_of(name, work.config.probe)))
        if np.isnan(columns[-1]).all():
            raise ConfigError(f"no training tile has a usable {name!r}: take it out of probe.indicators, or resnet18 out")
    return np.stack(columns, axis=1)
