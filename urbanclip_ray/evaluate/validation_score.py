"""R² of validation tiles under the weights of a training that is still running: what a search judges its trials by.

All ranks embed their share of fixed training and validation rows with the current weights; a ridge probe learns from the
first and predicts the second. The rows are those of the shards, which hold no test tile. The penalty is chosen on the rows that
are scored, so a score compares trials and says nothing of unseen tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from urbanclip_ray.config import ConfigError, PixelsConfig, RunConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.fits import MIN_ROWS
from urbanclip_ray.evaluate.metrics import r2
from urbanclip_ray.evaluate.probe import read_indicators
from urbanclip_ray.evaluate.regression import ProbeData, RidgeProbe
from urbanclip_ray.evaluate.targets import target_of, to_space
from urbanclip_ray.imagery import crop_margins, decode, to_square
from urbanclip_ray.model.preprocess import normalise, turned_views
from urbanclip_ray.storage import Dataset


class ScoreError(UserError, ArithmeticError):
    """Embeddings that cannot be judged; the message says what to change."""


class ProbeRows(NamedTuple):
    """Rows of the shards that judge a training: `num_train` to learn from, then those to predict."""

    row_ids: np.ndarray  # [rows]
    num_train: int
    targets: dict[str, np.ndarray]  # indicator -> [rows] in the probe's space, NaN where unusable


def choose_rows(shards: Sequence[Dataset], labels: Dataset, config: RunConfig) -> list[ProbeRows]:
    """A seeded subset of the training and validation tiles that have a usable target and a row in all of these shards.

    They are the same tiles, in the same order, for each of them. Raises ConfigError when an indicator cannot be learned or
    judged on them.
    """
    table, *others = (dataset.read(["row_id", "tile_id", "part"]).sort_by("row_id") for dataset in shards)
    for other in others:
        table = table.filter(pc.is_in(table["tile_id"], value_set=other["tile_id"].combine_chunks()))
    same_tiles = [other.take(pc.index_in(table["tile_id"], value_set=other["tile_id"].combine_chunks())) for other in others]
    raw = read_indicators(labels, table["tile_id"].combine_chunks(), config.probe)
    targets = {name: to_space(values, target_of(name, config.probe)) for name, values in raw.items()}
    usable = np.any([np.isfinite(values) for values in targets.values()], axis=0)
    part = table["part"].to_numpy()
    random = np.random.default_rng(config.tune.seed)
    chosen = [
        np.sort(random.permutation(np.flatnonzero(usable & (part == name)))[:limit])
        for name, limit in (("train", config.tune.max_train_tiles), ("val", config.tune.max_val_tiles))
    ]
    places = np.concatenate(chosen)
    num_train, chosen_targets = len(chosen[0]), {name: values[places] for name, values in targets.items()}
    _refuse_too_few(chosen_targets, num_train)
    return [ProbeRows(own["row_id"].to_numpy()[places], num_train, chosen_targets) for own in (table, *same_tiles)]


def _refuse_too_few(targets: dict[str, np.ndarray], num_train: int) -> None:
    for name, values in targets.items():
        for part_name, short, own in (("training", "train", values[:num_train]), ("validation", "val", values[num_train:])):
            found = own[np.isfinite(own)]
            if len(found) < MIN_ROWS or np.ptp(found) == 0:
                raise ConfigError(
                    f"{len(found)} {part_name} tiles with a usable {name!r} cannot judge a trial: they are fewer than "
                    f"{MIN_ROWS}, or all equal; take it out of probe.indicators, or raise tune.max_{short}_tiles"
                )


def score_vectors(vectors: np.ndarray, rows: ProbeRows, alphas: tuple[float, ...]) -> dict[str, float]:
    """R² of the validation rows by indicator, of a ridge probe on vectors [rows, width]."""
    is_train = np.arange(len(rows.row_ids)) < rows.num_train
    scores = {}
    for name, y in rows.targets.items():
        train, val = (np.flatnonzero(np.isfinite(y) & part) for part in (is_train, ~is_train))
        x_val, y_val = vectors[val], y[val]
        _, predicted = RidgeProbe(alphas).select(ProbeData(vectors[train], y[train], x_val, y_val, test_x=x_val))
        scores[name] = r2(y_val, predicted)
    return scores


class RowVectors:
    """Embeds the judged rows by a DeepSpeed engine around a CoCa; called by all ranks, it returns all vectors on each.

    Every rank takes equally many rows, the last one repeated where they do not divide: under ZeRO-3 a forward waits for all
    ranks. The engine is left in training mode.
    """

    def __init__(self, rows: ProbeRows, shards: Dataset, config: RunConfig) -> None:
        self.rows = rows
        self._shards = shards
        self._pixels: PixelsConfig = config.pixels
        self._views = config.embed.views
        self._rows_per_forward = config.train.micro_batch_size
        self._images: np.ndarray | None = None  # uint8 [rows of this rank, px, px, 3], read once

    @torch.no_grad()
    def __call__(self, engine: Any) -> np.ndarray:
        """Vectors [rows, width] of length 1; raises :class:`ScoreError` where one is not finite."""
        if self._images is None:
            self._images = self._read(rank_share(self.rows.row_ids), engine.module.image_px)
        engine.eval()
        parts: list[Tensor] = []
        for first in range(0, len(self._images), self._rows_per_forward):
            pixels = torch.from_numpy(self._images[first : first + self._rows_per_forward])
            images = normalise(pixels.to(engine.device))
            views = [engine(view, None, False).image for view in turned_views(images, self._views)]
            parts.append(F.normalize(torch.stack(views).sum(dim=0), dim=-1))
        engine.train()
        mine = torch.cat(parts)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        vectors: np.ndarray = torch.cat(everyone)[: len(self.rows.row_ids)].cpu().numpy()
        if not np.isfinite(vectors).all():
            raise ScoreError("the embeddings are not finite: lower train.lr, or set train.precision=fp32")
        return vectors

    def _read(self, row_ids: np.ndarray, image_px: int) -> np.ndarray:
        table = self._shards.read(["row_id", "image"], filters=pc.field("row_id").isin(row_ids.tolist()))
        place = pc.index_in(pa.array(row_ids), value_set=table["row_id"].combine_chunks())
        images = table["image"].take(place).to_pylist()
        return np.stack([to_square(crop_margins(decode(image), self._pixels), image_px) for image in images])


def rank_share(row_ids: np.ndarray) -> np.ndarray:
    """This rank's rows, as many as every other rank's."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    per_rank = -(-len(row_ids) // num_ranks)
    places = np.minimum(np.arange(rank * per_rank, (rank + 1) * per_rank), len(row_ids) - 1)
    share: np.ndarray = row_ids[places]
    return share
