"""Means and sums over footprints, against cells weighted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from urbanclip_ray.geo import zonal
from urbanclip_ray.geo.boxes import outlines
from urbanclip_ray.geo.zonal import Grid, count_shared_cells, measure_block, plan_blocks, shape_blocks

GRID = Grid(left=100.0, top=40.0, cell_width=0.01, cell_height=0.02, num_columns=300, num_rows=200)
RANDOM = np.random.default_rng(1)
CELLS = np.where(RANDOM.random((200, 300)) < 0.1, np.nan, RANDOM.random((200, 300)) * 100)


def boxes_in(num, width=0.031, height=0.047):
    west, south = RANDOM.uniform(100, 102.9, num), RANDOM.uniform(36.1, 39.9, num)
    return np.stack([west, south, west + width, south + height], axis=1)


def by_hand(box, operation, in_degrees):
    """Value and covered share, from the overlap of every cell of the raster with the box."""

    def overlaps(start, end, count):
        edges = np.arange(count)
        return np.clip(np.minimum(edges + 1, end) - np.maximum(edges, start), 0, None)

    across = overlaps((box[0] - GRID.left) / GRID.cell_width, (box[2] - GRID.left) / GRID.cell_width, GRID.num_columns)
    down = overlaps((GRID.top - box[3]) / GRID.cell_height, (GRID.top - box[1]) / GRID.cell_height, GRID.num_rows)
    share = down[:, None] * across * np.isfinite(CELLS)
    edges = np.sin(np.radians(GRID.top - GRID.cell_height * np.arange(GRID.num_rows + 1)))
    area = (edges[:-1] - edges[1:])[:, None] if in_degrees else 1.0
    weights = share * (area if operation == "mean" else 1.0)
    value = np.nansum(weights * np.nan_to_num(CELLS))
    full = (box[2] - box[0]) * (box[3] - box[1]) / (GRID.cell_width * GRID.cell_height)
    return value / weights.sum() if operation == "mean" else value, share.sum() / full


def measure(boxes, operation, in_degrees, shape=(300, 200)):
    rings = outlines(boxes)
    value, covered = np.full(len(boxes), np.nan), np.zeros(len(boxes))
    for block in plan_blocks(rings, GRID, shape):
        window = CELLS[block.row : block.row + block.num_rows, block.column : block.column + block.num_columns]
        found = measure_block(window, block, rings[block.members], GRID, operation, in_degrees)
        value[block.members], covered[block.members] = found
    return value, covered


@pytest.mark.parametrize("in_degrees", [False, True])
@pytest.mark.parametrize("operation", ["mean", "sum"])
def test_every_cell_counts_by_its_share_inside(operation, in_degrees):
    boxes = boxes_in(60)
    value, covered = measure(boxes, operation, in_degrees)
    expected = np.array([by_hand(box, operation, in_degrees) for box in boxes])
    assert value == pytest.approx(expected[:, 0], rel=1e-6)
    assert covered == pytest.approx(expected[:, 1], rel=1e-6)


def test_several_reads_give_what_one_gives(monkeypatch):
    boxes = boxes_in(200)
    rings = outlines(boxes)
    whole = np.stack(measure(boxes, "mean", True))
    assert len(plan_blocks(rings, GRID, (300, 200))) == 1
    for shape, least in (((32, 32), 40), ((300, 10), 15)):
        blocks = plan_blocks(rings, GRID, shape)
        assert len(blocks) >= least
        assert sorted(np.concatenate([block.members for block in blocks])) == list(range(200))
        assert np.stack(measure(boxes, "mean", True, shape)) == pytest.approx(whole, rel=1e-12)
    monkeypatch.setattr(zonal, "MAX_BLOCK_CELLS", 100)
    assert len(plan_blocks(rings, GRID, (300, 200))) == 200  # one by one, where a read would be too large
    assert np.stack(measure(boxes, "mean", True)) == pytest.approx(whole, rel=1e-12)


def test_strips_are_read_as_whole_rows_and_tiles_as_squares():
    wide = GRID._replace(num_columns=40_000, num_rows=20_000)
    assert shape_blocks(wide, is_striped=True) == (40_000, 104)
    assert shape_blocks(wide, is_striped=False) == (2048, 2048)
    assert shape_blocks(GRID, is_striped=False)[0] == 300


def test_what_lies_beside_the_raster_is_not_covered():
    boxes = np.array([[99.0, 38, 99.5, 38.1], [99.98, 38, 100.02, 38.1], [102.99, 36.0, 103.01, 36.1], [150.0, 80, 151, 81]])
    value, covered = measure(boxes, "sum", False)
    assert np.isnan(value[[0, 3]]).all()
    assert covered[[0, 3]].tolist() == [0, 0]
    assert (covered[1:3] < 0.55).all()
    assert (covered[1:3] > 0.3).all()


def test_footprints_in_one_cell_are_counted():
    boxes = np.array([[100.001, 39.981, 100.002, 39.982], [100.003, 39.985, 100.004, 39.986], [101, 38, 101.01, 38.02]])
    found = count_shared_cells(outlines(boxes), GRID)
    assert (found.num_tiles, found.num_sharing, found.most_in_one) == (3, 2, 2)
    assert found.cells_per_tile == pytest.approx(0.005)
    assert count_shared_cells(outlines(boxes + 50), GRID).num_tiles == 0
