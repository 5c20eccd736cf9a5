"""Indicators from rasters and CSVs, in one dataset with those of the source, on real small GeoTIFFs."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from geotiffs import write_geotiff
from pyproj import Transformer

from urbanclip_ray.config import ConfigError, LabelsConfig, RasterConfig
from urbanclip_ray.geo.boxes import boxes_around
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.schema import TILES
from urbanclip_ray.sources import SourceError
from urbanclip_ray.sources.label_csv import read_csv_labels
from urbanclip_ray.sources.label_files import fingerprint_labels
from urbanclip_ray.sources.label_rasters import measure_rasters
from urbanclip_ray.sources.labels import footprints_of, publish_labels, raster_table
from urbanclip_ray.storage import open_dataset, publish

pytestmark = pytest.mark.usefixtures("ray_cluster")

BOXES = np.array([[116.0 + 0.02 * at, 39.9, 116.02 + 0.02 * at, 39.92] for at in range(5)])  # side by side
NAMES = [f"beijing/{at}" for at in range(5)]
IDS = pa.array(NAMES)
GRID = {"crs": "EPSG:4326", "left": 116.0, "top": 39.94, "cell": 0.01}  # two cells by two a tile, from its own corner
CELLS = np.arange(1, 41, dtype=np.float32).reshape(1, 4, 10)  # the tiles are its lower two rows


def measure(rasters, boxes=BOXES, **config):
    table, facts = measure_rasters(LabelsConfig(rasters=rasters, **config), IDS, boxes)
    return {name: table[name].to_pylist() for name in table.column_names if name != "tile_id"}, facts


def raster_of(uri, operation="sum", **options):
    return RasterConfig(uri=str(uri), operation=operation, **options)


def test_sums_and_means_of_the_cells_inside(tmp_path):
    uri = write_geotiff(tmp_path / "people.tif", CELLS, **GRID)
    found, facts = measure({"population": raster_of(uri), "light": raster_of(uri, "mean")})
    blocks = CELLS[0, 2:].reshape(2, 5, 2).transpose(1, 0, 2).reshape(5, 4)
    assert found["population"] == pytest.approx(blocks.sum(axis=1), rel=1e-6)
    assert found["light"] == pytest.approx(blocks.mean(axis=1), rel=1e-4)  # cells are wider by 0.03% in the south
    assert facts["population"]["labelled"] == 5
    assert facts["population"]["cells_per_tile"] == 4
    assert facts["population"]["tiles_sharing_a_cell"] == 0


def test_a_raster_in_metres_gives_the_same_people(tmp_path):
    """A density that falls to the east, in UTM: every tile's mean is that of its middle."""
    columns = np.arange(1200)
    values = np.broadcast_to(5000 - columns, (1, 400, 1200)).astype(np.float64)
    left, top = 412_000.0, 4_422_000.0
    uri = write_geotiff(tmp_path / "utm.tif", values, left=left, top=top, cell=20.0)
    found, _ = measure({"density": raster_of(uri, "mean"), "people": raster_of(uri)})
    to_utm = Transformer.from_crs("EPSG:4326", "EPSG:32650", always_xy=True)
    x, _ = to_utm.transform(BOXES[:, [0, 2]].mean(axis=1), BOXES[:, [1, 3]].mean(axis=1))
    assert found["density"] == pytest.approx(5000 - ((x - left) / 20 - 0.5), abs=0.1)
    area_in_cells = 1708.5 * 2220.5 / 400
    assert found["people"] == pytest.approx(np.array(found["density"]) * area_in_cells, rel=2e-3)


def test_unknown_cells_leave_partly_covered_tiles_null_and_counted(tmp_path):
    cells = CELLS.copy()
    cells[0, 2:, 2] = -999  # a half of the second tile
    cells[0, 2:, 4:6] = -999  # all of the third one
    cells[0, 2, 6] = np.nan  # a quarter of the fourth one
    uri = write_geotiff(tmp_path / "people.tif", cells, nodata=-999, **GRID)
    found, facts = measure({"strict": raster_of(uri), "lenient": raster_of(uri, "mean", min_covered_share=0.4)})
    assert [value is None for value in found["strict"]] == [False, True, True, True, False]
    assert [value is None for value in found["lenient"]] == [False, False, True, False, False]
    assert found["lenient"][1] == pytest.approx(cells[0, 2:, 3].mean(), rel=1e-4)
    assert {key: facts["strict"][key] for key in ("labelled", "partly_covered", "not_covered")} == {
        "labelled": 2,
        "partly_covered": 2,
        "not_covered": 1,
    }


def test_a_value_can_be_declared_unknown(tmp_path):
    cells = np.full((1, 4, 10), 7, np.int32)
    cells[0, 2:, 0] = -1
    uri = write_geotiff(tmp_path / "people.tif", cells, **GRID)
    found, _ = measure({"gdp": raster_of(uri, "sum", nodata=-1)})
    assert found["gdp"][0] is None
    assert found["gdp"][1:] == pytest.approx([28.0] * 4)


def test_scaled_cells_are_read_in_their_unit_and_a_band_is_chosen(tmp_path):
    import rasterio

    uri = write_geotiff(tmp_path / "light.tif", np.stack([CELLS[0], np.full((4, 10), 3, np.float32)]).astype(np.int16), **GRID)
    with rasterio.open(uri, "r+") as dataset:
        dataset.scales, dataset.offsets = (1.0, 0.5), (0.0, 10.0)
    found, _ = measure({"light": raster_of(uri, "mean", band=2)})
    assert found["light"] == pytest.approx([11.5] * 5)


def test_a_raster_with_its_south_at_the_top_is_read_alike(tmp_path):
    import rasterio

    up = write_geotiff(tmp_path / "up.tif", CELLS, **GRID)
    turned = rasterio.Affine(0.01, 0, 116.0, 0, 0.01, 39.90)
    down = write_geotiff(tmp_path / "down.tif", CELLS[:, ::-1], crs="EPSG:4326", transform=turned)
    found, _ = measure({"up": raster_of(up), "down": raster_of(down)})
    assert found["down"] == pytest.approx(found["up"])


def test_a_raster_that_counts_degrees_from_0_to_360_is_met(tmp_path):
    west_of_0 = BOXES - np.array([116.0 + 100, 0, 116.0 + 100, 0])
    uri = write_geotiff(tmp_path / "globe.tif", np.full((1, 40, 360), 8, np.float32), "EPSG:4326", 0.0, 60.0, 1.0)
    found, _ = measure({"gdp": raster_of(uri)}, west_of_0)
    assert found["gdp"] == pytest.approx([8 * 0.02 * 0.02] * 5, rel=1e-5)


def test_tiles_that_share_a_cell_are_counted_and_shown(tmp_path):
    uri = write_geotiff(tmp_path / "coarse.tif", np.full((1, 2, 4), 8, np.float32), "EPSG:4326", 116.0, 40.0, 0.06)
    _, facts = measure({"gdp": raster_of(uri, "mean")})
    assert (facts["gdp"]["tiles_sharing_a_cell"], facts["gdp"]["most_tiles_in_a_cell"]) == (5, 3)
    assert facts["gdp"]["cells_per_tile"] == pytest.approx(1 / 9, abs=1e-3)
    from rich.console import Console

    console = Console(record=True, width=200)
    console.print(raster_table(facts))
    assert "5 (up to 3 in one)" in console.export_text()


def test_many_small_tasks_give_what_one_gives(tmp_path):
    uri = write_geotiff(tmp_path / "people.tif", CELLS, **GRID)
    whole, _ = measure({"population": raster_of(uri)})
    parts, _ = measure({"population": raster_of(uri)}, footprints_per_task=2)
    assert parts == whole


def test_tiles_without_a_footprint_or_across_the_antimeridian_are_null_and_counted(tmp_path):
    uri = write_geotiff(tmp_path / "people.tif", CELLS, **GRID)
    boxes = BOXES.copy()
    boxes[0] = np.nan
    boxes[1] = [179.9, 39.9, -179.9, 39.92]
    boxes[2] = [10, 50, 10.02, 50.02]
    found, facts = measure({"population": raster_of(uri)}, boxes)
    assert [value is None for value in found["population"]] == [True, True, True, False, False]
    assert (facts["population"]["without_footprint"], facts["population"]["not_covered"]) == (2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crs": None}, r"people\.tif names no coordinate reference system"),
        (
            {"crs": "EPSG:4326", "left": 10.0, "top": 50.0, "cell": 0.01},
            r"labels\.rasters\.population: .*under none of 5 tiles",
        ),
        ({"nodata": 7}, r"under none of 5 tiles: it lies elsewhere, or its cells there hold no data"),
        ({"band": 2}, r"has 1 bands, not 2"),
        ({"absent": True}, r"labels\.rasters\.population: .*absent\.tif is not there"),
    ],
)
def test_rasters_that_cannot_be_used_are_named(tmp_path, options, message):
    band, absent = options.pop("band", 1), options.pop("absent", False)
    uri = write_geotiff(tmp_path / "people.tif", np.full((1, 4, 10), 7, np.float32), **(GRID | options))
    uri = str(tmp_path / "absent.tif") if absent else uri
    with pytest.raises(SourceError, match=message):
        measure({"population": raster_of(uri, band=band)})


def test_where_no_tile_has_a_footprint_the_fix_is_named(tmp_path):
    uri = write_geotiff(tmp_path / "people.tif", CELLS, **GRID)
    with pytest.raises(SourceError, match=r"none of 5 tiles has a footprint: set labels\.tile_side_m"):
        measure({"population": raster_of(uri)}, np.full((5, 4), np.nan))


def tiles_dataset(root, boxes=BOXES, places=None):
    """A `tiles` dataset of the five tiles without images."""
    places = boxes.reshape(-1, 2, 2).mean(axis=1) if places is None else places
    known = {"tile_id": NAMES, "region": ["beijing"] * 5, "scheme": ["none"] * 5}
    known |= {"lon": places[:, 0], "lat": places[:, 1]}
    known |= dict(zip(("west", "south", "east", "north"), boxes.T, strict=True))
    columns = [pa.array(known.get(field.name, [None] * 5), field.type, from_pandas=True) for field in TILES]
    with publish(str(root / "tiles"), "tiles", {}, {}) as publication:
        publication.write_table(pa.table(columns, schema=TILES))
        publication.count(unit="tiles", rows_in=5, rows_out=5, rejects={})
    return open_dataset(str(root / "tiles"))


def labels_of(root, config, given=None, tiles=None):
    with publish(str(root / "labels"), "labels", {}, {}) as publication:
        publish_labels(given, config, tiles or tiles_dataset(root), publication)
    return open_dataset(str(root / "labels"))


def test_all_indicators_are_in_one_dataset(tmp_path):
    uri = write_geotiff(tmp_path / "people.tif", CELLS, **GRID)
    (tmp_path / "prices.csv").write_text("tile_id,price\nbeijing/1,10\nelsewhere/1,3\n")
    given = pa.table({"tile_id": ["beijing/4", "beijing/0"], "carbon": [4.0, 0.5]})
    config = LabelsConfig(rasters={"population": raster_of(uri)}, csv=str(tmp_path / "prices.csv"))
    labels = labels_of(tmp_path, config, given)
    rows = {row["tile_id"]: row for row in labels.read().to_pylist()}
    assert list(labels.read().column_names) == ["tile_id", "carbon", "price", "population"]
    assert set(rows) == set(NAMES)
    assert [rows[name]["carbon"] for name in NAMES] == [0.5, None, None, None, 4.0]
    assert [rows[name]["price"] for name in NAMES] == [None, 10.0, None, None, None]
    assert rows["beijing/0"]["population"] == pytest.approx(21 + 22 + 31 + 32)
    assert labels.manifest.rejects == {"unknown tile": 1}
    assert labels.manifest.facts["rasters"]["population"]["labelled"] == 5


def test_without_more_labels_the_sources_are_as_they_were(tmp_path):
    given = pa.table({"tile_id": ["beijing/4", "beijing/0"], "carbon": [4.0, 0.5]})
    assert labels_of(tmp_path, LabelsConfig(), given).read().to_pylist() == given.to_pylist()


def test_two_indicators_of_one_name_are_refused(tmp_path):
    (tmp_path / "more.csv").write_text("tile_id,carbon\nbeijing/1,10\n")
    given = pa.table({"tile_id": ["beijing/4"], "carbon": [4.0]})
    with pytest.raises(SourceError, match=r"the indicator 'carbon' comes from the source and from .*more\.csv: rename"):
        labels_of(tmp_path, LabelsConfig(csv=str(tmp_path / "more.csv")), given)


def test_a_csv_of_other_tiles_is_refused_even_beside_a_raster(tmp_path):
    uri = write_geotiff(tmp_path / "people.tif", CELLS, **GRID)
    (tmp_path / "more.csv").write_text("tile_id,price\nparis/1,10\n")
    with pytest.raises(SourceError, match=r"more\.csv: none of its 1 rows.*such as 'beijing/0'"):
        labels_of(tmp_path, LabelsConfig(csv=str(tmp_path / "more.csv"), rasters={"population": raster_of(uri)}))


def test_a_side_on_the_ground_makes_footprints_of_centres(tmp_path):
    nowhere = np.full((5, 4), np.nan)
    centres = BOXES.reshape(-1, 2, 2).mean(axis=1)
    tiles = tiles_dataset(tmp_path, nowhere, centres)
    places = tiles.read(["lon", "lat", "west", "south", "east", "north"])
    assert np.isnan(footprints_of(places, None)).all()
    assert footprints_of(places, 500.0) == pytest.approx(boxes_around(*centres.T, 500.0))
    uri = write_geotiff(tmp_path / "people.tif", np.full((1, 4, 10), 3, np.float32), **GRID)
    config = LabelsConfig(rasters={"light": raster_of(uri, "mean")}, tile_side_m=800)
    assert labels_of(tmp_path, config, tiles=tiles).read()["light"].to_pylist() == pytest.approx([3.0] * 5)


def read_places(root, csv, boxes=BOXES, **config):
    (root / "places.csv").write_text(csv)
    table, facts = read_csv_labels(LabelsConfig(csv=str(root / "places.csv"), **config), NAMES, boxes)
    return table.to_pylist(), facts


def test_rows_join_the_tile_that_they_lie_in(tmp_path):
    csv = "lon,lat,price,rooms\n116.01,39.91,5,1\n116.07,39.919,7,\n100,39.9,9,3\n,,1,1\n"
    rows, facts = read_places(tmp_path, csv)
    assert rows == [
        {"tile_id": "beijing/0", "price": 5.0, "rooms": 1.0},
        {"tile_id": "beijing/3", "price": 7.0, "rooms": None},
    ]
    assert facts == {"rows": 4, "rows_in_no_tile": 2, "rows_without_place": 1}


def test_several_rows_of_a_tile_are_combined_as_asked(tmp_path):
    csv = "longitude,latitude,price\n116.01,39.91,5\n116.005,39.905,7\n116.01,39.915,\n"
    with pytest.raises(SourceError, match=r"rows 2 and 3 both lie in the tile 'beijing/0': set labels\.rows_per_tile"):
        read_places(tmp_path, csv)
    assert read_places(tmp_path, csv, rows_per_tile="mean")[0] == [{"tile_id": "beijing/0", "price": 6.0}]
    assert read_places(tmp_path, csv, rows_per_tile="sum")[0] == [{"tile_id": "beijing/0", "price": 12.0}]


def test_a_row_belongs_to_every_overlapping_tile(tmp_path):
    boxes = BOXES.copy()
    boxes[1] -= [0.01, 0, 0.01, 0]
    rows, _ = read_places(tmp_path, "lon,lat,price\n116.015,39.91,5\n", boxes)
    assert [row["tile_id"] for row in rows] == ["beijing/0", "beijing/1"]


SOUTH = BOXES - [80.0, 0, 80.0, 0]  # 36° E, 39.9° N: both orders are places


@pytest.mark.parametrize(
    ("csv", "boxes", "message"),
    [
        ("lon,lat,price\n39.91,116.01,5\n", BOXES, r"row 2: longitude 39\.91 and latitude 116\.01.*look swapped"),
        ("lon,lat,price\n39.91,36.01,5\n", SOUTH, r"0 of 1 rows lie in a tile as they are, 1 when longitude and latitude"),
        ("lon,lat,price\n10,50,5\n", BOXES, r"none of 1 rows lies in a tile"),
        ("name,price\na,5\n", BOXES, r"has neither a column 'tile_id' nor longitude and latitude"),
        ("tile_id,name\nbeijing/0,a\n", BOXES, r"has no column of numbers"),
        ("tile_id,price\nbeijing/0,1\nbeijing/0,2\n", BOXES, r"rows 2 and 3 both describe the tile 'beijing/0'"),
        ("lon,price\n116.01,5\n", BOXES, r"gives only 'lon'.*set labels\.lon_column"),
        ("lon,lat,price\n116.01,39.91,5\n", np.full((5, 4), np.nan), r"no tile has a footprint: set labels\.tile_side_m"),
    ],
)
def test_csvs_that_cannot_be_joined_are_named(tmp_path, csv, boxes, message):
    with pytest.raises(SourceError, match=message):
        read_places(tmp_path, csv, boxes)


def test_the_fingerprint_follows_files_and_config_and_not_where_they_lie(tmp_path):
    uri = write_geotiff(tmp_path / "people.tif", CELLS, **GRID)
    config = LabelsConfig(rasters={"population": raster_of(uri)})
    first = fingerprint_labels(config)
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "people.tif").rename(tmp_path / "moved" / "p.tif")
    assert fingerprint_labels(LabelsConfig(rasters={"population": raster_of(moved)})) == first
    assert fingerprint_labels(LabelsConfig(rasters={"population": raster_of(moved, "mean")})) != first
    write_geotiff(moved, CELLS * 2, **GRID)
    assert fingerprint_labels(LabelsConfig(rasters={"population": raster_of(moved)})) != first
    assert fingerprint_labels(LabelsConfig()) == {}
    with pytest.raises(SourceError, match=r"labels\.rasters\.population: .*people\.tif is not there"):
        fingerprint_labels(config)


def test_rasters_are_written_on_the_command_line():
    item = "labels.rasters={population: {uri: a.tif, operation: sum}, light: {uri: s3://b/c.tif, operation: mean, band: 2}}"
    config = apply_overrides(load_recipe("own_tiles"), [item])
    assert config.labels.rasters["population"] == raster_of("a.tif")
    assert config.labels.rasters["light"].band == 2
    for wrong, message in (("{a: {uri: x}}", "operation"), ("{tile_id: {uri: x, operation: sum}}", "cannot be 'tile_id'")):
        with pytest.raises(ConfigError, match=message):
            apply_overrides(load_recipe("own_tiles"), [f"labels.rasters={wrong}"])
