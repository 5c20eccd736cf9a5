from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from urbanclip_ray.config import PixelsConfig, SplitConfig
from urbanclip_ray.evaluate.baselines import (
    NUM_COLOUR_FEATURES,
    MeanProbe,
    NeighboursProbe,
    colour_features,
    colour_table,
    unit_vectors,
)
from urbanclip_ray.evaluate.regression import ProbeData
from urbanclip_ray.evaluate.splits import assign_splits
from urbanclip_ray.schema import TILES
from urbanclip_ray.storage import Dataset, open_dataset, publish


def noise(side_px: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(side_px, side_px, 3), dtype=np.uint8))


def plain(colour: tuple[int, int, int], side_px: int = 40) -> Image.Image:
    return Image.new("RGB", (side_px, side_px), colour)


def test_colour_features_are_finite_and_of_one_width_for_any_size() -> None:
    for image in (noise(8), noise(300), plain((0, 0, 0)), plain((255, 255, 255)), Image.new("RGB", (20, 90))):
        features = colour_features(image)
        assert features.shape == (NUM_COLOUR_FEATURES,) == (78,)
        assert features.dtype == np.float32
        assert np.isfinite(features).all()


def test_a_plain_colour_is_described_by_hand() -> None:
    features = colour_features(plain((0, 255, 0)))
    np.testing.assert_allclose(features[:6], [0, 1, 0, 0, 0, 0])  # channel means, deviations
    np.testing.assert_allclose(features[28:31], [2, 0, 1], atol=1e-6)  # excess green of pure green is 2
    histogram = features[31:58]
    assert histogram.sum() == pytest.approx(1)
    assert histogram[2 * 3] == 1  # red bin 0, green bin 2, blue bin 0
    np.testing.assert_allclose(features[58:70], 0)  # no gradient


def test_texture_shows_in_gradients_and_in_the_ring_of_its_frequency() -> None:
    columns = np.arange(128)
    power = []
    for cycles in (2, 40):
        wave = np.uint8(127 + 100 * np.sin(2 * np.pi * cycles * columns / 128))
        image = Image.fromarray(np.repeat(np.tile(wave, (128, 1))[..., None], 3, axis=2))
        power.append(colour_features(image))
    slow, fast = power
    assert np.argmax(slow[70:]) < np.argmax(fast[70:])
    assert slow[58] < fast[58]


def make_tiles(where: str, images: list[bytes | None], errors: list[str | None]) -> Dataset:
    values = {
        "tile_id": [f"city/{index}" for index in range(len(images))],
        "image": images,
        "error": errors,
        "region": ["city"] * len(images),
        "scheme": ["none"] * len(images),
    }
    table = pa.table([pa.array(values.get(field.name, [None] * len(images)), field.type) for field in TILES], schema=TILES)
    with publish(where, "tiles", {}, {}) as publication:
        publication.write_table(table)
        publication.count(unit="tiles", rows_in=len(images), rows_out=len(images), rejects={})
    return open_dataset(where)


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.usefixtures("ray_cluster")
def test_the_colour_table_has_every_readable_tile_with_its_margins_cut(tmp_path: object) -> None:
    framed = Image.new("RGB", (60, 60), (255, 0, 0))
    framed.paste(noise(40), (10, 10))
    tiles = make_tiles(f"{tmp_path}/tiles", [encode(framed), None, encode(noise(30, 1))], [None, "zero bytes", None])
    pixels = PixelsConfig(crop_left_px=10, crop_top_px=10, crop_right_px=10, crop_bottom_px=10)
    table = colour_table(tiles, pixels)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), NUM_COLOUR_FEATURES)
    rows = {row["tile_id"]: row["embedding"] for row in table.to_pylist()}
    assert set(rows) == {"city/0", "city/2"}
    np.testing.assert_array_equal(rows["city/0"], colour_features(noise(40)))


@pytest.mark.usefixtures("ray_cluster")
def test_a_tile_that_cannot_be_described_is_named(tmp_path: object) -> None:
    tiles = make_tiles(f"{tmp_path}/tiles", [encode(noise(20)), encode(noise(6))], [None, None])
    with pytest.raises(Exception, match="tile city/1"):
        colour_table(tiles, PixelsConfig(crop_left_px=6))


def test_neighbours_reach_across_the_date_line() -> None:
    train = unit_vectors(np.array([179.9, 170.0, -170.0]), np.zeros(3))
    train_y = np.array([10.0, 0.0, 0.0])
    empty = np.empty((0, 3))
    test = unit_vectors(np.array([-179.9]), np.zeros(1))
    predicted = NeighboursProbe(1).fit_predict(ProbeData(train, train_y, empty, np.empty(0), test), 0)
    assert predicted.tolist() == [10.0]


def test_neighbours_are_weighted_by_inverse_distance_and_need_not_exist_in_full() -> None:
    train = np.array([[0.0, 0, 0], [3.0, 0, 0]])
    empty = np.empty((0, 3))
    test = np.array([[1.0, 0, 0], [3.0, 0, 0]])
    predicted = NeighboursProbe(5).fit_predict(ProbeData(train, np.array([0.0, 9.0]), empty, np.empty(0), test), 0)
    np.testing.assert_allclose(predicted, [3.0, 9.0])  # weights 1 and 1/2; a tile at the very place decides alone


def test_the_mean_is_of_train_alone() -> None:
    x = np.empty((2, 0))
    data = ProbeData(x, np.array([1.0, 2.0]), x, np.array([50.0, 60.0]), np.empty((3, 0)))
    predicted = MeanProbe().fit_predict(data, 0)
    np.testing.assert_array_equal(predicted, [1.5, 1.5, 1.5])


def test_a_random_split_leaks_place_and_blocks_leak_less() -> None:
    """A field that is smooth over a few kilometres and carries no image: place alone predicts it where it leaks."""
    rng = np.random.default_rng(0)
    lon, lat = (axis.ravel() for axis in np.meshgrid(np.linspace(116, 116.7, 40), np.linspace(39.7, 40.2, 40)))
    waves = rng.normal(size=(30, 2)) * 45  # radians a degree
    field = np.cos(np.stack([lon, lat], axis=1) @ waves.T + rng.uniform(0, 6, 30)).sum(axis=1)
    tiles = pa.table(
        {
            "tile_id": [f"{index:04d}" for index in range(1600)],
            "lon": lon,
            "lat": lat,
            "group": pa.nulls(1600, pa.string()),
            "error": pa.nulls(1600, pa.string()),
        }
    )
    rows, _ = assign_splits(tiles, SplitConfig(outer="blocks", also=("random",), block_km=15, num_draws=1), None)
    x, y = unit_vectors(lon, lat), field
    scores = {}
    for split in ("blocks", "random"):
        parts = np.array([row["part"] for row in rows.to_pylist() if row["split"] == split])
        train, val, test = (parts == part for part in ("train", "val", "test"))
        predicted = NeighboursProbe(5).fit_predict(ProbeData(x[train], y[train], x[val], y[val], x[test]), 0)
        scores[split] = 1 - ((predicted - y[test]) ** 2).sum() / ((y[test] - y[test].mean()) ** 2).sum()
    assert scores["random"] > 0.8
    assert scores["blocks"] < 0.4
