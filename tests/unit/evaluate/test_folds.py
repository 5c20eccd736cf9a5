"""Splits by fold, by city and from city to city, the buffer around test tiles, and how near the parts lie."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from urbanclip_ray.config import ConfigError, RunConfig, SplitConfig
from urbanclip_ray.evaluate.nearness import EARTH_RADIUS_KM, describe_nearness, nearest_km
from urbanclip_ray.evaluate.splits import SplitError, assign_splits, cluster_units, publish_splits
from urbanclip_ray.overrides import build_config
from urbanclip_ray.schema import TILES
from urbanclip_ray.storage import Dataset, open_dataset, publish

CENTRES = {"Beijing": (116.4, 39.9), "Lhasa": (91.1, 29.65), "Shanghai": (121.5, 31.2)}


def make_tiles(**num_tiles: int) -> pa.Table:
    """Tiles within about 25 km of the centres of cities."""
    rng = np.random.default_rng(0)
    regions = [city for city, number in num_tiles.items() for _ in range(number)]
    centres = np.array([CENTRES[city] for city in regions])
    places = centres + rng.uniform(-0.25, 0.25, centres.shape)
    return pa.table(
        {
            "tile_id": [f"{city}/{index:05d}" for index, city in enumerate(regions)],
            "region": regions,
            "lon": places[:, 0],
            "lat": places[:, 1],
            "group": pa.array([f"g{index % 17}" for index in range(len(regions))]),
            "error": pa.nulls(len(regions), pa.string()),
        }
    )


def parts_of(rows: pa.Table, split: str, fold: int = 0, seed: int = 0) -> dict[str, str]:
    found = {}
    for row in rows.to_pylist():
        if (row["split"], row["fold"], row["seed"]) == (split, fold, seed):
            assert row["tile_id"] not in found
            found[row["tile_id"]] = row["part"]
    return found


def members(parts: dict[str, str], part: str) -> set[str]:
    return {tile_id for tile_id, own in parts.items() if own == part}


@pytest.mark.parametrize("kind", ["random", "blocks", "group"])
def test_every_tile_is_in_test_in_exactly_one_fold_and_units_stay_whole(kind):
    tiles = make_tiles(Beijing=300)
    config = SplitConfig(outer=kind, num_folds=5, outer_fold=None, num_draws=2, block_km=6)
    rows, _ = assign_splits(tiles, config, None)
    units = dict(zip(tiles["tile_id"].to_pylist(), cluster_units(kind, tiles, 6)[1].tolist(), strict=True))
    for seed in range(2):
        folds = [members(parts_of(rows, kind, fold, seed), "test") for fold in range(5)]
        assert sum(map(len, folds)) == 300
        assert set.union(*folds) == set(units)
        if kind != "random":
            for fold in folds:
                assert not {units[tile] for tile in fold} & {units[tile] for tile in set(units) - fold}
    # one pretraining belongs to a fold, so the outer split is not redrawn; validation is
    assert members(parts_of(rows, kind, 3, 0), "test") == members(parts_of(rows, kind, 3, 1), "test")
    assert members(parts_of(rows, kind, 3, 0), "val") != members(parts_of(rows, kind, 3, 1), "val")


def test_the_outer_split_has_the_fold_of_its_pretraining_alone_and_the_others_have_all():
    config = SplitConfig(outer="blocks", also=("random",), num_folds=4, outer_fold=2, num_draws=1, block_km=6)
    rows, _ = assign_splits(make_tiles(Beijing=200), config, None)
    folds = {(row["split"], row["fold"]) for row in rows.to_pylist()}
    assert folds == {("blocks", 2), *(("random", fold) for fold in range(4))}


def test_more_folds_than_pieces_are_refused_with_the_fix():
    with pytest.raises(SplitError, match=r"17 pieces .* split\.num_folds=20.*finer groups"):
        assign_splits(make_tiles(Beijing=100), SplitConfig(outer="group", num_folds=20), None)


def test_folds_that_cannot_be_are_refused_when_the_config_is_made():
    with pytest.raises(ValidationError, match=r"split\.outer_fold=3 is not one of split\.num_folds=3"):
        SplitConfig(num_folds=3, outer_fold=3)
    with pytest.raises(ValidationError, match=r"take split\.outer=city"):
        SplitConfig(outer="transfer")
    with pytest.raises(ConfigError, match="keeps no tile out of a pretraining"):
        build_config({"split": {"num_folds": 3, "outer_fold": None}})
    assert RunConfig.model_validate({"split": {"outer_fold": None}, "embed": {"weights": "here"}}).split.outer_fold is None


def test_every_city_is_left_out_once():
    tiles = make_tiles(Beijing=120, Lhasa=10, Shanghai=90)  # a city with ten tiles is one as well
    rows, _ = assign_splits(tiles, SplitConfig(outer="random", also=("city",), num_draws=2, block_km=5), None)
    for fold, city in enumerate(sorted(CENTRES)):
        parts = parts_of(rows, "city", fold)
        assert {tile.partition("/")[0] for tile in members(parts, "test")} == {city}
        assert len(parts) == 220
        assert members(parts, "val") != members(parts_of(rows, "city", fold, seed=1), "val")
        assert 0.1 < len(members(parts, "val")) / len(members(parts, "val") | members(parts, "train")) < 0.4


def test_transfer_learns_from_one_city_and_tests_another_for_every_pair():
    tiles = make_tiles(Beijing=120, Lhasa=10, Shanghai=90)
    rows, _ = assign_splits(tiles, SplitConfig(outer="random", also=("transfer",), num_draws=1, block_km=5), None)
    cities = sorted(CENTRES)
    for fold, (known, unseen) in enumerate((known, unseen) for known in cities for unseen in cities):
        parts = parts_of(rows, "transfer", fold)
        place = {part: {tile.partition("/")[0] for tile in members(parts, part)} for part in ("train", "val", "test")}
        assert place == {"train": {known}, "val": {known}, "test": {unseen}}
        if known != unseen:
            assert len(members(parts, "test")) == {"Beijing": 120, "Lhasa": 10, "Shanghai": 90}[unseen]


def test_one_city_alone_cannot_be_left_out():
    with pytest.raises(SplitError, match="needs two cities, but all tiles are of 'Beijing'"):
        assign_splits(make_tiles(Beijing=50), SplitConfig(outer="city"), None)
    with pytest.raises(SplitError, match=r"split\.outer_fold=2, but there are 2 cities, from 0 on: Beijing, Lhasa"):
        assign_splits(make_tiles(Beijing=50, Lhasa=20), SplitConfig(outer="city", outer_fold=2), None)


def test_a_block_with_one_tile_is_a_piece_like_any_other():
    tiles = make_tiles(Beijing=100)
    far = pa.table(
        {**{name: tiles[name].slice(0, 1) for name in tiles.column_names}, "tile_id": ["Beijing/far"], "lon": [100.0]}
    )
    config = SplitConfig(outer="blocks", num_folds=5, outer_fold=None, num_draws=1, block_km=5)
    rows, _ = assign_splits(pa.concat_tables([tiles, far]), config, None)
    found = [row["part"] for row in rows.to_pylist() if row["tile_id"] == "Beijing/far"]
    assert found.count("test") == 1
    assert len(found) == 5


def test_no_tile_is_learned_from_within_the_buffer_and_none_beyond_it_is_left_out():
    tiles = make_tiles(Beijing=400)
    config = SplitConfig(outer="blocks", also=("random",), num_draws=1, block_km=8, buffer_km=3)
    rows, _ = assign_splits(tiles, config, None)
    parts = parts_of(rows, "blocks")
    assert len(parts) == 400
    place = {row["tile_id"]: (row["lon"], row["lat"]) for row in tiles.to_pylist()}
    test, kept, near = (
        np.array([place[tile] for part in names for tile in members(parts, part)])
        for names in (("test",), ("train", "val"), ("buffer",))
    )
    assert nearest_km(*test.T, *kept.T).min() >= 3
    assert len(near) > 10
    assert nearest_km(*test.T, *near.T).max() < 3
    assert "buffer" not in parts_of(rows, "random").values()  # it would leave nothing


def test_a_buffer_that_leaves_nothing_or_has_no_places_is_refused():
    tiles = make_tiles(Beijing=100)
    with pytest.raises(SplitError, match=r"train and val would be empty.*split\.buffer_km"):
        assign_splits(tiles, SplitConfig(outer="blocks", buffer_km=500), None)
    unplaced = tiles.set_column(tiles.column_names.index("lon"), "lon", pa.nulls(100, pa.float64()))
    with pytest.raises(SplitError, match=r"split 'group' needs lon and lat for split\.buffer_km of every tile, but 100 of 100"):
        assign_splits(unplaced, SplitConfig(outer="group", buffer_km=1), None)


def test_distances_are_great_circles_and_cross_the_date_line():
    quarter = nearest_km(np.array([0.0]), np.array([0.0]), np.array([90.0, 0.0]), np.array([0.0, 90.0]))
    np.testing.assert_allclose(quarter, np.pi / 2 * EARTH_RADIUS_KM)
    across = nearest_km(np.array([179.9]), np.array([0.0]), np.array([-179.9]), np.array([0.0]))
    np.testing.assert_allclose(across, np.radians(0.2) * EARTH_RADIUS_KM)


def test_nearness_says_that_blocks_lie_farther_from_train_than_random_tiles():
    tiles = make_tiles(Beijing=800)
    config = SplitConfig(outer="blocks", also=("random",), num_draws=1, block_km=10)
    found = describe_nearness(assign_splits(tiles, config, None)[0], tiles, 10)
    assert found["random"]["median_km"] < found["blocks"]["median_km"]
    assert found["random"]["nearest_in_train"] == pytest.approx(0.6, abs=0.12)  # as many as there are in train
    assert found["blocks"]["nearest_in_train"] < 0.3
    assert found["random"]["within_block_km"] == 1
    unplaced = tiles.set_column(tiles.column_names.index("lat"), "lat", pa.nulls(800, pa.float64()))
    rows, _ = assign_splits(unplaced, SplitConfig(outer="random", num_draws=1), None)
    assert describe_nearness(rows, unplaced, 10) == {"random": {"unknown": "tiles have no lon and lat"}}


def test_what_is_drawn_whole_is_a_group_a_block_or_a_tile():
    tiles = make_tiles(Beijing=60)
    assert cluster_units("group", tiles, 5)[0] == "group"
    name, codes = cluster_units("random", tiles, 5)
    assert name == "block"
    assert 1 < len(np.unique(codes)) < 60
    unplaced = tiles.set_column(tiles.column_names.index("lat"), "lat", pa.nulls(60, pa.float64()))
    assert cluster_units("random", unplaced, 5)[0] == "tile"


def publish_tiles(where: str, tiles: pa.Table) -> Dataset:
    columns = {name: tiles[name] for name in tiles.column_names}
    rest = {field.name: "none" if field.name == "scheme" else None for field in TILES}
    full = [columns.get(field.name, pa.array([rest[field.name]] * tiles.num_rows, field.type)) for field in TILES]
    with publish(where, "tiles", {}, {}) as publication:
        publication.write_table(pa.table(full, schema=TILES))
    return open_dataset(where)


def test_the_facts_name_folds_count_the_buffer_and_say_how_near_test_is(tmp_path):
    tiles = publish_tiles(f"{tmp_path}/tiles", make_tiles(Beijing=100, Shanghai=100))
    config = SplitConfig(outer="blocks", also=("city", "transfer"), num_draws=1, buffer_km=2)
    with publish(f"{tmp_path}/splits", "splits", config.content(), {}) as publication:
        publish_splits(tiles, config, None, publication)
    facts = open_dataset(f"{tmp_path}/splits").manifest.facts
    assert facts["folds"] == {
        "city": ["Beijing", "Shanghai"],
        "transfer": ["Beijing → Beijing", "Beijing → Shanghai", "Shanghai → Beijing", "Shanghai → Shanghai"],
    }
    assert facts["buffer"]["blocks"] > 0
    assert facts["nearness"]["city"]["median_km"] > 1000
    assert facts["nearness"]["blocks"]["p5_km"] >= 2
