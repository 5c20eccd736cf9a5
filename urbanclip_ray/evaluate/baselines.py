"""What a learned representation has to beat: hand-made colour features, the coordinates alone, and the mean."""

# ruff: noqa: ARG002  (all probes share one signature; these two look at less)
from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from urbanclip_ray.config import PixelsConfig
from urbanclip_ray.dataflow import collect, map_files
from urbanclip_ray.evaluate.regression import ProbeData
from urbanclip_ray.imagery import TileImageError, crop_margins, decode, to_square
from urbanclip_ray.storage import Dataset

COLOUR_SIDE_PX = 128  # tiles of any size are compared at this one
PERCENTILES = (5, 25, 50, 75, 95)
HISTOGRAM_BINS = 3  # per channel, so 27 joint bins
GRADIENT_STEPS_PX = (1, 2, 4)
EDGE_THRESHOLD = 0.1  # of the full range of brightness
NUM_SPECTRUM_BANDS = 8


def colour_features(image: Image.Image) -> np.ndarray:
    """78 hand-made features of an RGB image, float32: what colour and texture alone say.

    In order: mean, standard deviation and five percentiles of each channel (21); saturation-weighted hue direction,
    mean and deviation of saturation and value, share of grey pixels (7); excess green 2g - r - b of the chromatic
    coordinates: mean, deviation, share above 0.1 (3); joint RGB histogram with 3 bins a channel (27); mean, deviation,
    90th percentile and edge density of the brightness gradient over 1, 2 and 4 px (12); log power of the spectrum in 8
    octave-like rings (8).
    """
    square = to_square(image, COLOUR_SIDE_PX)
    rgb = square.astype(np.float64) / 255
    brightness = rgb.mean(axis=2)
    features = [
        _channel_statistics(rgb),
        _hue_statistics(square),
        _excess_green(rgb),
        _joint_histogram(square),
        _gradients(brightness),
        _spectrum(brightness),
    ]
    return np.concatenate(features).astype(np.float32)


def colour_table(tiles: Dataset, pixels: PixelsConfig) -> pa.Table:
    """Colour features of every tile without an error, by Ray Data: `tile_id`, `embedding` (float32 list of fixed size).

    In no particular order. Raises :class:`imagery.TileImageError` naming a tile that cannot be decoded or cropped.
    """
    return pa.concat_tables(collect(map_files(tiles, ["tile_id", "image", "error"], partial(_describe, pixels=pixels))))


def unit_vectors(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Points on the unit sphere [rows, 3] of coordinates in degrees, so that the date line is no border."""
    lon, lat = np.radians(lon), np.radians(lat)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


@dataclass(frozen=True)
class NeighboursProbe:
    """Distance-weighted mean of the nearest training tiles: how far place alone predicts, without any image."""

    num_neighbours: int

    def fit_predict(self, data: ProbeData, seed: int) -> np.ndarray:
        """See :class:`regression.Probe`; `x` is [rows, 3] of :func:`unit_vectors`. Nothing is selected or random."""
        from sklearn.neighbors import KNeighborsRegressor

        model = KNeighborsRegressor(min(self.num_neighbours, len(data.train_x)), weights="distance")
        return np.asarray(model.fit(data.train_x, data.train_y).predict(data.test_x), dtype=np.float64)


@dataclass(frozen=True)
class MeanProbe:
    """The mean of the training targets, whatever the tile."""

    def fit_predict(self, data: ProbeData, seed: int) -> np.ndarray:
        """See :class:`regression.Probe`; features are not looked at."""
        return np.full((len(data.test_x), *data.train_y.shape[1:]), data.train_y.mean(axis=0))


def _describe(batch: pa.Table, pixels: PixelsConfig) -> pa.Table:
    batch = batch.filter(pc.is_null(batch["error"]))
    vectors = []
    for tile_id, data in zip(batch["tile_id"].to_pylist(), batch["image"].to_pylist(), strict=True):
        try:
            image = crop_margins(decode(data), pixels)
        except TileImageError as error:
            raise TileImageError(error.reason, f"tile {tile_id}: {error.detail}") from error
        vectors.append(colour_features(image))
    values = np.concatenate(vectors) if vectors else np.empty(0, np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(values), NUM_COLOUR_FEATURES)
    return pa.table({"tile_id": batch["tile_id"].cast(pa.string()), "embedding": embedding})


def _channel_statistics(rgb: np.ndarray) -> np.ndarray:
    pixels = rgb.reshape(-1, 3)
    return np.concatenate([pixels.mean(0), pixels.std(0), np.percentile(pixels, PERCENTILES, axis=0).ravel()])


def _hue_statistics(square: np.ndarray) -> np.ndarray:
    """Hue is an angle: its mean is a direction, weighted by saturation, as grey pixels have no hue."""
    hsv = np.asarray(Image.fromarray(square).convert("HSV"), dtype=np.float64) / 255
    angle, saturation, value = 2 * np.pi * hsv[..., 0], hsv[..., 1], hsv[..., 2]
    return np.array(
        [
            (saturation * np.cos(angle)).mean(),
            (saturation * np.sin(angle)).mean(),
            saturation.mean(),
            saturation.std(),
            value.mean(),
            value.std(),
            (saturation < 0.1).mean(),
        ]
    )


def _excess_green(rgb: np.ndarray) -> np.ndarray:
    """Vegetation index of Woebbecke et al. 1995, on chromatic coordinates."""
    chromatic = rgb / np.maximum(rgb.sum(axis=2, keepdims=True), 1e-6)
    index = 2 * chromatic[..., 1] - chromatic[..., 0] - chromatic[..., 2]
    return np.array([index.mean(), index.std(), (index > 0.1).mean()])


def _joint_histogram(square: np.ndarray) -> np.ndarray:
    bins = square.reshape(-1, 3).astype(np.int64) * HISTOGRAM_BINS // 256
    codes = (bins[:, 0] * HISTOGRAM_BINS + bins[:, 1]) * HISTOGRAM_BINS + bins[:, 2]
    return np.bincount(codes, minlength=HISTOGRAM_BINS**3) / len(codes)


def _gradients(brightness: np.ndarray) -> np.ndarray:
    features: list[float] = []
    for step in GRADIENT_STEPS_PX:
        across = brightness[:-step, step:] - brightness[:-step, :-step]
        down = brightness[step:, :-step] - brightness[:-step, :-step]
        size = np.hypot(across, down)
        features += [size.mean(), size.std(), np.percentile(size, 90), (size > EDGE_THRESHOLD).mean()]
    return np.array(features)


def _spectrum(brightness: np.ndarray) -> np.ndarray:
    """Log mean power in rings of equal width in log frequency, from one cycle a tile to the finest detail."""
    side = brightness.shape[0]
    power = np.abs(np.fft.fft2(brightness - brightness.mean())) ** 2 / side**2
    cycles = np.fft.fftfreq(side) * side
    radius = np.hypot(cycles[:, None], cycles[None, :])
    edges = np.geomspace(1, side / 2 * np.sqrt(2) + 1, NUM_SPECTRUM_BANDS + 1)
    ring = np.digitize(radius, edges) - 1
    return np.array([np.log10(power[ring == band].mean() + 1e-9) for band in range(NUM_SPECTRUM_BANDS)])


NUM_COLOUR_FEATURES = 3 * (2 + len(PERCENTILES)) + 7 + 3 + HISTOGRAM_BINS**3 + 4 * len(GRADIENT_STEPS_PX) + NUM_SPECTRUM_BANDS
