"""Scenes cut into tiles, on real small GeoTIFFs."""

from __future__ import annotations

import io
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import rasterio
from geotiffs import LEFT, TOP, UTM_50N, write_geotiff
from PIL import Image
from pyproj import Transformer

from urbanclip_ray.config import ConfigError, IngestConfig, SceneSource
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.sources import SourceError, open_source
from urbanclip_ray.sources.ingest import IngestError, ingest_tiles
from urbanclip_ray.storage import open_dataset, publish

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(1, 256, (3, 100, 140), dtype=np.uint8)


def source_of(uri, **fields):
    return open_source(SceneSource(uri=str(uri), **{"tile_px": 32, **fields}))


def pixels_of(source, location):
    """uint8 [height, width, 3] of a tile as ingest would decode it."""
    with Image.open(io.BytesIO(source.read(location))) as image:
        assert image.format == "PNG"
        return np.asarray(image)


@pytest.fixture
def scene(tmp_path):
    return write_geotiff(tmp_path / "scenes" / "beijing" / "may.tif", BYTES)


def test_windows_are_the_scenes_pixels_where_they_lie(scene, tmp_path):
    source = source_of(tmp_path / "scenes")
    tiles = source.tiles()
    assert len(tiles) == 4 * 3
    tile = next(tile for tile in tiles if tile.location == "beijing/may.tif#x00032_y00064")
    assert (tile.tile_id, tile.region, tile.scheme) == ("beijing/may_x00032_y00064", "beijing", "geotiff")
    assert (pixels_of(source, tile.location) == BYTES[:, 64:96, 32:64].transpose(1, 2, 0)).all()
    lon, lat = Transformer.from_crs(UTM_50N, "EPSG:4326", always_xy=True).transform(LEFT + 480, TOP - 800)
    assert (tile.lon, tile.lat) == pytest.approx((lon, lat), abs=1e-9)
    assert tile.west < tile.lon < tile.east
    assert tile.south < tile.lat < tile.north


def test_one_file_is_a_scene_of_its_own_name(scene):
    assert {tile.region for tile in source_of(scene).tiles()} == {"may"}
    assert source_of(scene).tiles()[0].location == "may.tif#x00000_y00000"


def test_a_stride_below_the_side_makes_overlapping_tiles(scene):
    assert len(source_of(scene, stride_px=16).tiles()) == 7 * 5


def test_pixels_in_no_tile_are_said(scene, caplog):
    with caplog.at_level(logging.WARNING):
        source_of(scene).tiles()
    assert "12 px at its right edge and 4 px at its bottom edge are in no tile" in caplog.text


def test_bands_are_chosen_and_one_is_grey(scene):
    source = source_of(scene, bands=(3, 2, 1))
    assert (pixels_of(source, "may.tif#x00000_y00000") == BYTES[::-1, :32, :32].transpose(1, 2, 0)).all()
    grey = pixels_of(source_of(scene, bands=(2,)), "may.tif#x00000_y00000")
    assert (grey == BYTES[1, :32, :32, None]).all()


def test_sixteen_bits_are_spread_over_a_given_range(tmp_path):
    values = RANDOM.integers(0, 12_000, (3, 64, 64), dtype=np.uint16)
    scene = write_geotiff(tmp_path / "s.tif", values)
    found = pixels_of(source_of(scene, value_range=(1000, 3000), tile_px=64), "s.tif#x00000_y00000")
    expected = np.rint(np.clip((values.astype(float) - 1000) / 2000, 0, 1) * 255)
    assert (found == expected.transpose(1, 2, 0)).all()


def test_without_a_range_percentiles_of_each_band_are_black_and_white_in_every_worker(tmp_path):
    values = (RANDOM.random((3, 64, 96)) * np.array([1, 10, 1000])[:, None, None]).astype(np.float32)
    scene = write_geotiff(tmp_path / "s.tif", values)
    source = source_of(scene)
    assert len(source.tiles()) == 6
    travelled = pickle.loads(pickle.dumps(source))
    found = pixels_of(travelled, "s.tif#x00032_y00032").transpose(2, 0, 1)
    low, high = np.percentile(values, (2, 98), axis=(1, 2))[:, :, None, None]
    expected = np.clip((values[:, 32:64, 32:64] - low) / (high - low), 0, 1) * 255
    assert np.abs(found - expected).max() <= 0.51  # rounded
    assert found.std(axis=(1, 2)).min() > 60  # bands of other units are spread alike


def test_windows_with_too_little_data_say_so_and_holes_are_black(tmp_path):
    values = BYTES[:, :64, :64].copy()
    values[:, :, :16] = 0
    values[:, :32, 20:32] = 0
    scene = write_geotiff(tmp_path / "s.tif", values, nodata=0)
    source = source_of(scene, max_nodata_share=0.6)
    assert len(source.tiles()) == 4
    with pytest.raises(TileImageError, match=r"no data: 88% of s\.tif#x00000_y00000"):
        source.read("s.tif#x00000_y00000")
    below = pixels_of(source, "s.tif#x00000_y00032")
    assert (below[:, :16] == 0).all()
    assert (below[:, 16:] > 0).all()


def test_a_dark_pixel_of_one_band_is_data(tmp_path):
    values = BYTES[:, :32, :32].copy()
    values[0] = 0
    scene = write_geotiff(tmp_path / "s.tif", values, nodata=0)
    assert pixels_of(source_of(scene, max_nodata_share=0), "s.tif#x00000_y00000")[..., 1:].min() > 0


def test_pixels_that_are_no_numbers_are_no_data(tmp_path):
    values = np.full((1, 32, 32), 5, np.float32)
    values[0, :20] = np.nan
    scene = write_geotiff(tmp_path / "s.tif", values)
    with pytest.raises(TileImageError, match=r"no data: 6[23]%"):
        source_of(scene).read("s.tif#x00000_y00000")
    assert pixels_of(source_of(scene, max_nodata_share=0.7), "s.tif#x00000_y00000").max() == 0  # one value: the darkest


def test_a_cloud_optimised_scene_is_read_alike(tmp_path, scene):
    from rasterio.shutil import copy

    copy(scene, str(tmp_path / "cog.tif"), driver="COG", blocksize=128, compress="deflate")
    with rasterio.open(tmp_path / "cog.tif") as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    found = pixels_of(source_of(tmp_path / "cog.tif"), "cog.tif#x00064_y00032")
    assert (found == BYTES[:, 32:64, 64:96].transpose(1, 2, 0)).all()


ALASKA = {"crs": "EPSG:4326", "left": 179.9, "top": 52.0, "cell": 0.001}
TURNED = rasterio.Affine(7, 7, LEFT, 7, -7, TOP)
SOUTH_UP = rasterio.Affine(10, 0, LEFT, 0, 10, TOP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crs": None}, r"s\.tif names no coordinate reference system.*rio edit-info --crs"),
        ({"transform": rasterio.Affine.identity()}, r"s\.tif does not say where its pixels lie"),
        ({"transform": TURNED}, r"s\.tif is turned against its coordinate reference system: straighten it with gdalwarp"),
        ({"transform": SOUTH_UP}, r"s\.tif has its south at the top"),
        (ALASKA, r"s\.tif crosses the antimeridian \(180 degrees\).*cut it there"),
        ({"crs": "EPSG:3995", "left": 1e6, "top": 1e6}, r"north is turned by \d+ degrees.*UTM zone"),
        ({"left": 1e9}, r"no place: cut it, or correct its CRS|turned by|antimeridian"),
    ],
)
def test_scenes_without_a_usable_place_are_refused_by_name(tmp_path, options, message):
    scene = write_geotiff(tmp_path / "s.tif", RANDOM.integers(0, 255, (3, 64, 256), dtype=np.uint8), **options)
    with pytest.raises(SourceError, match=message):
        source_of(scene).tiles()


def test_other_files_without_a_use_are_named(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"no tiff")
    with pytest.raises(SourceError, match=r"a\.tif is not a GeoTIFF that can be read"):
        source_of(tmp_path).tiles()
    (tmp_path / "a.tif").rename(tmp_path / "a.jp2")
    with pytest.raises(SourceError, match=r"holds no GeoTIFF .* among its 1 files"):
        source_of(tmp_path).tiles()
    with pytest.raises(SourceError, match=r"not a folder"):
        source_of(tmp_path / "absent").tiles()
    with pytest.raises(SourceError, match=r"source\.uri=FOLDER"):
        source_of("")


def test_a_scene_smaller_than_a_tile_or_without_the_bands_is_named(scene, tmp_path):
    with pytest.raises(SourceError, match=r"140 x 100 px, less than a tile: lower source\.tile_px=128"):
        source_of(scene, tile_px=128).tiles()
    with pytest.raises(SourceError, match=r"may\.tif has 3 bands: set source\.bands"):
        source_of(scene, bands=(4,)).tiles()
    empty = write_geotiff(tmp_path / "e.tif", np.zeros((1, 64, 64), np.uint16), nodata=0)
    with pytest.raises(SourceError, match=r"e\.tif holds no data at all"):
        source_of(empty).tiles()


def test_two_scenes_of_one_name_are_refused(scene, tmp_path):
    write_geotiff(tmp_path / "scenes" / "beijing" / "may.tiff", BYTES)
    with pytest.raises(SourceError, match=r"are both 'beijing/may_x00000_y00000': rename one"):
        source_of(tmp_path / "scenes").tiles()


def test_a_file_that_names_other_files_is_not_followed(tmp_path):
    """A VRT with a GeoTIFF's name would read whatever it names."""
    other = write_geotiff(tmp_path / "other" / "secret.tif", BYTES)
    (tmp_path / "s.tif").write_text(
        f'<VRTDataset rasterXSize="140" rasterYSize="100"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{other}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(SourceError, match=r"s\.tif is not a GeoTIFF"):
        source_of(tmp_path / "s.tif").tiles()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("source.bands=[1, 2]", r"name three bands"),
        ("source.bands=[0]", r"the first is 1"),
        ("source.value_range=[3, 1]", r"not a range"),
        ("source.percentiles=[-1, 50]", r"not between 0 and 100"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(item, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(load_recipe("own_tiles"), ["source.kind=scene", item])


def test_the_fingerprint_follows_what_decides_the_tiles(scene):
    seen = {source_of(scene).fingerprint(), source_of(scene, tile_px=16).fingerprint()}
    write_geotiff(Path(scene), BYTES, nodata=3)
    seen.add(source_of(scene).fingerprint())
    assert len(seen) == 3


def ingest(scene, root):
    with publish(str(root), "tiles", {}, {}) as publication:
        ingest_tiles(source_of(scene), IngestConfig(max_error_share=0.05), publication)
    return open_dataset(str(root)).manifest


def test_windows_without_data_are_counted_and_do_not_stop_an_ingest(tmp_path, ray_cluster):
    values = BYTES[:, :64, :64].copy()
    values[:, :, :32] = 0
    manifest = ingest(write_geotiff(tmp_path / "half.tif", values, nodata=0), tmp_path / "half")
    assert (manifest.rows_in, manifest.rows_out, manifest.rejects) == (4, 2, {"no data": 2})
    empty = write_geotiff(tmp_path / "empty.tif", np.zeros((3, 64, 64), np.uint8), nodata=0)
    with pytest.raises(IngestError, match=r"none of 4 tiles has enough data .*raise source\.max_nodata_share"):
        ingest(empty, tmp_path / "empty")
