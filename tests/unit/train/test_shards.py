"""The order of training rows: every row once per epoch, whoever reads it, and few files open."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import open_dataset, publish
from urbanclip_ray.train import shards
from urbanclip_ray.train.shards import ShardReader, count_steps, no_rows, plan_epoch, rank_rows

FILES = st.lists(st.integers(1, 30), min_size=1, max_size=8)
SEEDS = st.integers(0, 1000)


def run_through(files, seed, epochs, num_ranks, rows_per_rank, window):
    """(place, epoch) of every row in the order of all ranks, what is left, and the number of steps."""
    carried, seen, steps = no_rows(), [], 0
    for epoch in range(epochs):
        rows, carried = plan_epoch(files, seed, epoch, carried, num_ranks * rows_per_rank)
        for rank in range(num_ranks):
            mine = rank_rows(rows, rank, num_ranks, window, seed, epoch)
            assert len(mine.place) % rows_per_rank == 0, "whole steps only"
            seen += list(zip(mine.place.tolist(), mine.epoch.tolist(), strict=True))
        steps += len(rows.place) // (num_ranks * rows_per_rank)
    return seen, list(zip(carried.place.tolist(), carried.epoch.tolist(), strict=True)), steps


@settings(max_examples=60, deadline=None)
@given(FILES, SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40))
def test_every_row_comes_exactly_once_per_epoch_over_all_ranks(files, seed, epochs, num_ranks, rows_per_rank, window):
    seen, left, steps = run_through(files, seed, epochs, num_ranks, rows_per_rank, window)
    every = {(place, epoch) for place in range(sum(files)) for epoch in range(epochs)}
    assert Counter(seen + left) == Counter(every)
    assert len(left) < num_ranks * rows_per_rank  # less than one step is left over
    assert steps == count_steps(sum(files), epochs, num_ranks * rows_per_rank)


@settings(max_examples=60, deadline=None)
@given(FILES, SEEDS, st.integers(1, 4), st.integers(1, 20))
def test_ranks_share_an_epoch_in_disjoint_contiguous_spans_shuffled_within_the_window(files, seed, num_ranks, window):
    rows, _ = plan_epoch(files, seed, 0, no_rows(), num_ranks)
    span = len(rows.place) // num_ranks
    before = {int(place): at for at, place in enumerate(rows.place)}
    for rank in range(num_ranks):
        mine = rank_rows(rows, rank, num_ranks, window, seed, 0)
        came_from = np.array([before[int(place)] for place in mine.place], dtype=int)
        assert sorted(came_from) == list(range(rank * span, (rank + 1) * span))
        assert (np.abs(came_from - rank * span - np.arange(span)) < window).all()


@settings(max_examples=40, deadline=None)
@given(FILES, SEEDS, st.integers(1, 12))
def test_files_are_read_whole_one_after_another_and_carried_rows_come_first(files, seed, rows_per_step):
    rows, carried = plan_epoch(files, seed, 0, no_rows(), rows_per_step)
    file_of = np.repeat(np.arange(len(files)), files)
    order = file_of[np.concatenate([rows.place, carried.place])]
    assert int((np.diff(order) != 0).sum()) == len(files) - 1
    following, _ = plan_epoch(files, seed, 1, carried, rows_per_step)
    num_first = min(len(carried.place), len(following.place))
    assert following.place[:num_first].tolist() == carried.place[:num_first].tolist()
    assert (following.epoch[:num_first] == 0).all()


def test_the_order_follows_from_seed_and_epoch():
    files = [8] * 6

    def order(seed, epoch):
        rows, _ = plan_epoch(files, seed, epoch, no_rows(), 4)
        return rank_rows(rows, 0, 1, 16, seed, epoch).place.tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_a_data_set_smaller_than_a_step_fills_it_over_several_epochs():
    seen, left, steps = run_through([2, 1], seed=0, epochs=5, num_ranks=2, rows_per_rank=2, window=8)
    assert (steps, len(seen), len(left)) == (3, 12, 3)
    assert count_steps(3, 5, 4) == 3


NUM_TRAIN, NUM_VAL = 45, 8
ROWS_PER_FILE = 5  # the training rows fill nine files, the validation rows lie in the last two


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("packed") / "shards")
    rows = [
        {
            "row_id": row,
            "tile_id": f"r/{row}",
            "image": b"%d" % row,
            "texts": [f"text {row}"],
            "part": "train" if row < NUM_TRAIN else "val",
        }
        for row in range(NUM_TRAIN + NUM_VAL)
    ]
    table = pa.Table.from_pylist(rows, schema=SHARDS)
    with publish(uri, "shards", {}, {}) as publication:
        for number, first in enumerate(range(0, len(rows), ROWS_PER_FILE)):
            publication.write_table(table.slice(first, ROWS_PER_FILE), f"part-{number:03d}.parquet")
    return open_dataset(uri)


def test_a_reader_finds_rows_by_their_place_in_a_part_across_files(packed):
    train, val = ShardReader(packed, "train", window=10), ShardReader(packed, "val", window=10)
    assert (train.num_rows, val.num_rows) == (NUM_TRAIN, NUM_VAL)
    assert train.rows_per_file == [5] * 9
    places = np.array([44, 0, 5, 4, 43, 0])
    assert [row["row_id"] for row in train.rows(places)] == places.tolist()
    assert [row["row_id"] for row in val.rows(np.arange(NUM_VAL))] == list(range(NUM_TRAIN, NUM_TRAIN + NUM_VAL))
    (row,) = train.rows(np.array([7]))
    assert row == {"row_id": 7, "tile_id": "r/7", "image": b"7", "texts": ["text 7"], "part": "train"}


def test_a_file_with_rows_of_both_parts_gives_each_its_own(tmp_path):
    parts = ["train", "val", "train", "val", "val"]
    rows = [{"row_id": n, "tile_id": str(n), "image": b"", "texts": ["t"], "part": part} for n, part in enumerate(parts)]
    with publish(str(tmp_path / "s"), "shards", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=SHARDS))
    reader = ShardReader(open_dataset(str(tmp_path / "s")), "val", window=10)
    assert [row["row_id"] for row in reader.rows(np.arange(3))] == [1, 3, 4]


def test_an_epoch_reads_every_file_once_and_holds_only_what_its_window_needs(packed, monkeypatch):
    reads = []
    window = 2 * ROWS_PER_FILE
    reader = ShardReader(packed, "train", window)
    real = shards.pq.read_table
    monkeypatch.setattr(shards.pq, "read_table", lambda path, **named: reads.append(path) or real(path, **named))
    rows, _ = plan_epoch(reader.rows_per_file, 0, 0, no_rows(), 1)
    mine = rank_rows(rows, 0, 1, window, 0, 0)
    most = 0
    for _ in reader.rows(mine.place):
        most = max(most, len(reader._open))
    assert sorted(reads) == sorted(packed.parquet_paths()[:9])
    assert most <= window // ROWS_PER_FILE + 2


def test_memory_is_bounded_even_where_places_come_in_no_order(packed):
    reader = ShardReader(packed, "train", window=1)
    for _ in reader.rows(np.random.default_rng(0).permutation(NUM_TRAIN)):
        assert len(reader._open) <= 2


def test_a_part_that_is_not_there_is_empty(packed):
    assert ShardReader(packed, "test", window=4).num_rows == 0
