"""The tiles that baselines learn from: the training part of the outer split's first draw, as for the pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray.config import AugmentConfig, ConfigError, PixelsConfig, SplitConfig
from urbanclip_ray.imagery import crop_margins, decode
from urbanclip_ray.storage import Dataset
from urbanclip_ray.train.augment import augment
from urbanclip_ray.train.pack import outer_parts


class TrainingTiles(NamedTuple):
    """Encoded images [tiles] in the order of their ids, all of them in memory, and degrees [tiles], NaN where unknown."""

    tile_ids: list[str]
    images: list[bytes]
    lon: np.ndarray
    lat: np.ndarray
    pixels: PixelsConfig

    def __len__(self) -> int:
        return len(self.images)

    def view(self, places: np.ndarray, image_px: int, config: AugmentConfig, seeds: Sequence[int]) -> np.ndarray:
        """uint8 [rows, px, px, 3]: the tiles at `places`, each augmented by seeds and its row alone."""
        shown = []
        for row, place in enumerate(places):
            image = crop_margins(decode(self.images[place]), self.pixels)
            shown.append(augment(image, image_px, config, np.random.default_rng([*seeds, row])))
        return np.stack(shown)


def read_training_tiles(tiles: Dataset, splits: Dataset, split: SplitConfig, pixels: PixelsConfig) -> TrainingTiles:
    """No validation or test tile is read. Raises ConfigError where there are none to learn from."""
    parts = outer_parts(splits, split.outer, split.transductive)
    wanted = parts.filter(pc.equal(parts["part"], "train"))["tile_id"].combine_chunks()
    is_wanted = pc.field("tile_id").isin(wanted) & pc.field("error").is_null()
    table = tiles.read(["tile_id", "image", "lon", "lat"], filters=is_wanted).sort_by("tile_id")
    if table.num_rows < 2:
        raise ConfigError(
            f"{table.num_rows} tiles in the training part of split {split.outer!r}: baselines have nothing to learn from"
        )
    lon, lat = (table[name].cast(pa.float64()).to_numpy().astype(np.float64) for name in ("lon", "lat"))
    return TrainingTiles(table["tile_id"].to_pylist(), table["image"].to_pylist(), lon, lat, pixels)
