from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from urbanclip_ray.config import SplitConfig
from urbanclip_ray.evaluate.splits import SplitError, assign_splits, block_codes, publish_splits
from urbanclip_ray.schema import SPLITS, TILES
from urbanclip_ray.storage import open_dataset, publish


def make_tiles(num_tiles: int = 400, seed: int = 0, num_groups: int = 23) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "tile_id": [f"city/{index:05d}" for index in range(num_tiles)],
            "lon": pa.array(rng.uniform(116.0, 116.6, num_tiles)),
            "lat": pa.array(rng.uniform(39.7, 40.2, num_tiles)),
            "group": [f"zip{index}" for index in rng.integers(num_groups, size=num_tiles)],
            "error": pa.nulls(num_tiles, pa.string()),
        }
    )


def set_column(tiles: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return tiles.set_column(tiles.column_names.index(name), name, values)


def parts_of(rows: pa.Table, split: str, seed: int) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for row in rows.to_pylist():
        if row["split"] == split and row["seed"] == seed:
            assert row["tile_id"] not in found[row["part"]]
            found[row["part"]].add(row["tile_id"])
    return found


ALL = SplitConfig(outer="blocks", also=("random", "group"), num_draws=4, block_km=4)


def test_every_draw_places_every_tile_in_exactly_one_part() -> None:
    tiles = make_tiles()
    rows, rejects = assign_splits(tiles, ALL, None)
    assert rows.schema.equals(SPLITS)
    assert rejects == {}
    for split in ("blocks", "random", "group"):
        for seed in range(4):
            parts = parts_of(rows, split, seed)
            assert sum(len(part) for part in parts.values()) == 400
            assert set.union(*parts.values()) == set(tiles["tile_id"].to_pylist())


@pytest.mark.parametrize("outer", ["blocks", "random", "group"])
def test_outer_test_is_fixed_over_draws_while_train_and_val_vary(outer: str) -> None:
    rows, _ = assign_splits(make_tiles(), SplitConfig(outer=outer, num_draws=4, block_km=4), None)
    draws = [parts_of(rows, outer, seed) for seed in range(4)]
    assert all(draw["test"] == draws[0]["test"] for draw in draws)
    assert len({frozenset(draw["val"]) for draw in draws}) == 4


def test_further_splits_redraw_the_test_part_too() -> None:
    rows, _ = assign_splits(make_tiles(), ALL, None)
    for split in ("random", "group"):
        assert len({frozenset(parts_of(rows, split, seed)["test"]) for seed in range(4)}) == 4


def test_shares_are_close_to_those_asked_for() -> None:
    rows, _ = assign_splits(make_tiles(), ALL, None)
    for split, tolerance in (("random", 0.002), ("blocks", 0.02), ("group", 0.03)):
        for seed in range(4):
            parts = parts_of(rows, split, seed)
            assert len(parts["test"]) / 400 == pytest.approx(0.2, abs=tolerance)
            assert len(parts["val"]) / 400 == pytest.approx(0.2, abs=tolerance)


def test_blocks_and_groups_stay_whole() -> None:
    tiles = make_tiles()
    rows, _ = assign_splits(tiles, ALL, None)
    codes = block_codes(tiles["lon"].to_numpy(), tiles["lat"].to_numpy(), 4)
    ids = tiles["tile_id"].to_pylist()
    for split, units in (("blocks", codes.tolist()), ("group", tiles["group"].to_pylist())):
        unit_of = dict(zip(ids, units, strict=True))
        for seed in range(4):
            seen: dict[object, str] = {}
            for part, members in parts_of(rows, split, seed).items():
                for tile_id in members:
                    assert seen.setdefault(unit_of[tile_id], part) == part


def test_order_of_rows_changes_nothing_and_the_seed_does() -> None:
    tiles = make_tiles()
    shuffled = tiles.take(np.random.default_rng(1).permutation(400))
    expected, _ = assign_splits(tiles, ALL, None)
    assert assign_splits(shuffled, ALL, None)[0].equals(expected)
    other = SplitConfig(**{**ALL.model_dump(), "seed": 1})
    assert not assign_splits(tiles, other, None)[0].equals(expected)


def test_a_kind_is_drawn_alike_whatever_stands_beside_it() -> None:
    alone, _ = assign_splits(make_tiles(), SplitConfig(outer="blocks", num_draws=4, block_km=4), None)
    beside, _ = assign_splits(make_tiles(), ALL, None)
    assert parts_of(alone, "blocks", 2) == parts_of(beside, "blocks", 2)


def test_unreadable_tiles_are_rejected_and_counted() -> None:
    tiles = set_column(make_tiles(), "error", pa.array(["truncated"] * 3 + [None] * 397, pa.string()))
    rows, rejects = assign_splits(tiles, ALL, None)
    assert rejects == {"unreadable tile": 3}
    assert "city/00000" not in rows["tile_id"].to_pylist()


def test_a_lacking_coordinate_or_group_names_the_count_and_the_fix() -> None:
    tiles = set_column(make_tiles(), "lon", pa.array([None, float("nan")] + [116.1] * 398, pa.float64()))
    with pytest.raises(SplitError, match=r"2 of 400 tiles.*split\.outer=random"):
        assign_splits(tiles, SplitConfig(outer="blocks"), None)
    with pytest.raises(SplitError, match=r"2 of 400 tiles.*take 'blocks' out of split\.also"):
        assign_splits(tiles, SplitConfig(outer="random", also=("blocks",)), None)
    tiles = set_column(make_tiles(), "group", pa.array([None] * 5 + ["a"] * 395, pa.string()))
    with pytest.raises(SplitError, match="5 of 400"):
        assign_splits(tiles, SplitConfig(outer="group"), None)


def test_an_unreadable_tile_needs_no_coordinates() -> None:
    tiles = set_column(make_tiles(), "lon", pa.array([None] + [116 + i / 1000 for i in range(399)], pa.float64()))
    tiles = set_column(tiles, "error", pa.array(["zero bytes"] + [None] * 399, pa.string()))
    assert assign_splits(tiles, SplitConfig(num_draws=1), None)[1] == {"unreadable tile": 1}


def test_a_part_that_would_be_empty_is_refused_with_the_fix() -> None:
    with pytest.raises(SplitError, match=r"empty.*split\.block_km smaller"):
        assign_splits(make_tiles(), SplitConfig(outer="blocks", block_km=5000), None)
    with pytest.raises(SplitError, match="finer groups"):
        assign_splits(make_tiles(num_groups=2), SplitConfig(outer="group"), None)


def test_large_groups_still_fill_every_part() -> None:
    tiles = set_column(make_tiles(100), "group", pa.array(["a"] * 45 + ["b"] * 45 + ["c"] * 10))
    parts = parts_of(assign_splits(tiles, SplitConfig(outer="group", num_draws=1), None)[0], "group", 0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 45, "val": 45, "test": 10}


def test_repeated_kinds_and_repeated_tiles_are_refused() -> None:
    with pytest.raises(SplitError, match="twice"):
        assign_splits(make_tiles(), SplitConfig(outer="random", also=("random",)), None)
    with pytest.raises(SplitError, match="repeat"):
        assign_splits(pa.concat_tables([make_tiles(5), make_tiles(5)]), SplitConfig(outer="random"), None)


@pytest.mark.parametrize("block_km", [1.0, 5.0, 300.0])
def test_blocks_are_about_square_and_equal_on_the_globe(block_km: float) -> None:
    """Tiles in a dense row along a parallel: a block's extent east and north is about block_km, at any latitude."""
    km_per_degree = 111.195
    for lat in (-70.0, 0.3, 40.0, 60.0):
        step_deg = block_km / 50 / km_per_degree / np.cos(np.radians(lat))
        row = block_codes(np.arange(1000) * step_deg, np.full(1000, lat), block_km)
        inner = np.unique(row, return_counts=True)[1][1:-1]  # the outermost are cut by the row's ends
        assert inner.mean() == pytest.approx(50, rel=0.1)
        column = block_codes(np.zeros(500), lat + np.arange(500) * block_km / 50 / km_per_degree, block_km)
        bands = column // (round(2 * np.pi * 6371.0088 / block_km) + 1)
        assert np.unique(bands, return_counts=True)[1][1:-1] == pytest.approx(50, abs=2)


def test_the_date_line_and_the_poles_are_ordinary() -> None:
    around = block_codes(np.array([180.0, -180.0, 539.999, 179.999]), np.full(4, 10.2), 50)
    assert around[0] == around[1]
    assert around[2] == around[3]
    dense = np.linspace(-180, 180, 36_001)[:-1]
    num_in_block = np.unique(block_codes(dense, np.full(36_000, 10.2), 50), return_counts=True)[1]
    assert num_in_block.min() >= num_in_block.max() - 1  # no thin remainder at the line
    assert block_codes(np.array([0.0]), np.array([90.0]), 50)[0] == block_codes(np.array([0.0]), np.array([89.9]), 50)[0]


def source_table(parts: list[str | None], ids: list[str] | None = None) -> pa.Table:
    ids = ids or [f"city/{index:05d}" for index in range(len(parts))]
    return pa.table({"tile_id": ids, "part": pa.array(parts, pa.string())})


def test_the_sources_own_parts_are_honoured() -> None:
    parts = ["train"] * 60 + ["val"] * 20 + ["test"] * 20
    rows, _ = assign_splits(make_tiles(100), SplitConfig(outer="source", num_draws=2), source_table(parts))
    for seed in (0, 1):
        found = parts_of(rows, "source", seed)
        assert found["val"] == {f"city/{index:05d}" for index in range(60, 80)}
        assert found["test"] == {f"city/{index:05d}" for index in range(80, 100)}


def test_validation_is_drawn_from_the_sources_train_when_it_has_none() -> None:
    parts = ["train"] * 80 + ["test"] * 20
    rows, _ = assign_splits(make_tiles(100), SplitConfig(outer="source", num_draws=3), source_table(parts))
    draws = [parts_of(rows, "source", seed) for seed in range(3)]
    assert all(len(draw["val"]) == 20 for draw in draws)
    assert all(draw["test"] == {f"city/{index:05d}" for index in range(80, 100)} for draw in draws)
    assert len({frozenset(draw["val"]) for draw in draws}) == 3


def test_source_splits_that_cannot_be_used_name_the_reason() -> None:
    config = SplitConfig(outer="source")
    with pytest.raises(SplitError, match="no split of its own"):
        assign_splits(make_tiles(10), config, None)
    with pytest.raises(SplitError, match="2 of 10 tiles have no part"):
        assign_splits(make_tiles(10), config, source_table(["train"] * 4 + ["test"] * 4))
    with pytest.raises(SplitError, match="'holdout'"):
        assign_splits(make_tiles(10), config, source_table(["train"] * 5 + ["holdout"] * 5))
    with pytest.raises(SplitError, match="two parts"):
        assign_splits(make_tiles(2), config, source_table(["train", "test"], ids=["city/00000"] * 2))


def test_published_splits_account_in_tiles(tmp_path: object) -> None:
    small = make_tiles(50)
    columns = {name: small[name] for name in small.column_names}
    full = pa.table(
        {
            field.name: columns.get(field.name, pa.array(["x" if pa.types.is_string(field.type) else None] * 50, field.type))
            for field in TILES
        }
    )
    errors = pa.array(["zero bytes"] * 2 + [None] * 48, pa.string())
    full = set_column(full, "error", errors)
    with publish(f"{tmp_path}/tiles", "tiles", {}, {}) as publication:
        publication.write_table(full)
        publication.count(unit="tiles", rows_in=50, rows_out=50, rejects={})
    tiles = open_dataset(f"{tmp_path}/tiles")
    config = SplitConfig(outer="source", also=("random",), num_draws=3)
    parts = source_table(["train"] * 40 + ["test"] * 10 + ["test"], [*small["tile_id"].to_pylist(), "city/absent"])
    with publish(f"{tmp_path}/splits", "splits", config.content(), {"tiles": tiles}) as publication:
        publish_splits(tiles, config, parts, publication)
    splits = open_dataset(f"{tmp_path}/splits")
    manifest = splits.manifest
    assert (manifest.unit, manifest.rows_in, manifest.rows_out) == ("tiles", 50, 48)
    assert manifest.rejects == {"unreadable tile": 2}
    assert manifest.facts["source_parts_without_tile"] == 1
    assert splits.read().num_rows == 48 * 2 * 3
    assert pq.read_schema(splits.parquet_paths()[0]).equals(SPLITS)
