"""Rows of shards by their place: found without opening a file, few files in memory, no finished file opened again."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import StorageError, list_files, open_dataset, publish
from urbanclip_ray.train import parts, shards
from urbanclip_ray.train.order import Order
from urbanclip_ray.train.parts import ROWS_OF_FILES, describe_files, rows_of_files
from urbanclip_ray.train.shards import ShardReader

NUM_TRAIN, NUM_VAL = 45, 8
ROWS_PER_FILE = 5  # the training rows fill nine files, the validation rows lie in the last two


def store(uri, rows, rows_per_file, *, facts, **how):
    """Shards whose manifest says which rows their files hold, as pack has it, or does not."""
    table = pa.Table.from_pylist(rows, schema=SHARDS)
    with publish(uri, "shards", {}, {}) as publication:
        for number, first in enumerate(range(0, len(rows), rows_per_file)):
            path = f"{publication.data_uri}/part-{number:03d}.parquet"
            parts.pq.write_table(table.slice(first, rows_per_file), path, **how)
        if facts:
            names = [f"{publication.attempt}/{info.base_name}" for info in list_files(publication.data_uri)]
            publication.facts[ROWS_OF_FILES] = describe_files(uri, names)
    return open_dataset(uri)


@pytest.fixture(scope="module", params=[True, False], ids=["manifest", "footers"])
def packed(request, tmp_path_factory):
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
    return store(str(tmp_path_factory.mktemp("packed") / "shards"), rows, ROWS_PER_FILE, facts=request.param)


@pytest.fixture
def reads(monkeypatch):
    """Paths of files that are read, in order."""
    found = []
    real = shards.read_parquet

    def read(filesystem, paths, columns):
        found.extend(paths)
        return real(filesystem, paths, columns)

    monkeypatch.setattr(shards, "read_parquet", read)
    return found


def test_a_reader_finds_rows_by_their_place_in_a_part_across_files(packed):
    train, val = ShardReader(packed, "train", window=10), ShardReader(packed, "val", window=10)
    assert (train.num_rows, val.num_rows) == (NUM_TRAIN, NUM_VAL)
    assert train.rows_per_file == [5] * 9
    places = np.array([44, 0, 5, 4, 43, 0])
    assert [row["row_id"] for row in train.rows(places)] == places.tolist()
    assert [row["row_id"] for row in val.rows(np.arange(NUM_VAL))] == list(range(NUM_TRAIN, NUM_TRAIN + NUM_VAL))
    (row,) = train.rows(np.array([7]))
    assert row == {"row_id": 7, "tile_id": "r/7", "image": b"7", "texts": ["text 7"], "part": "train"}


MIXED = ["train", "val", "train", "val", "val", "train", "train"]


@pytest.mark.parametrize("how", [{}, {"row_group_size": 2}, {"write_statistics": False}, {"row_group_size": 1}], ids=str)
@pytest.mark.parametrize("facts", [True, False])
def test_a_file_with_rows_of_both_parts_gives_each_its_own(tmp_path, facts, how):
    rows = [{"row_id": n, "tile_id": str(n), "image": b"", "texts": ["t"], "part": part} for n, part in enumerate(MIXED)]
    dataset = store(str(tmp_path / "s"), rows, len(rows), facts=facts, **how)
    for part, expected in (("val", [1, 3, 4]), ("train", [0, 2, 5, 6])):
        reader = ShardReader(dataset, part, window=10)
        assert [row["row_id"] for row in reader.rows(np.arange(len(expected)))] == expected


def test_files_are_in_the_order_of_their_rows_whatever_they_are_called(tmp_path):
    rows = [{"row_id": 9 - n, "tile_id": str(n), "image": b"", "texts": ["t"], "part": "train"} for n in range(10)]
    for facts in (True, False):
        reader = ShardReader(store(str(tmp_path / str(facts)), rows, 1, facts=facts), "train", window=10)
        assert [row["row_id"] for row in reader.rows(np.arange(10))] == list(range(10))


def test_only_a_mixed_row_group_without_a_manifest_has_columns_read_at_the_start(packed, monkeypatch):
    opened, columns = [], []
    real_file, real_read = parts.pq.ParquetFile, parts._read_parts
    monkeypatch.setattr(parts.pq, "ParquetFile", lambda path, **named: opened.append(path) or real_file(path, **named))
    monkeypatch.setattr(parts, "_read_parts", lambda *group: columns.append(group) or real_read(*group))
    reader = ShardReader(packed, "train", window=10)
    has_facts = ROWS_OF_FILES in packed.manifest.facts
    assert sorted(opened) == ([] if has_facts else sorted(packed.parquet_paths()))
    assert columns == []
    assert reader._open == {}


def test_a_manifest_that_does_not_know_its_files_is_refused_with_the_fix(packed, tmp_path):
    known = rows_of_files(packed)
    path, entry = next(iter(known.items()))
    broken = [
        {},
        {name: value for name, value in known.items() if name != path},
        known | {"data/other.parquet": entry},
        known | {path: {"train": [0, [[0, -5]]]}},
        known | {path: {"train": [0]}},
        known | {path: {"train": [0, []]}},
        [],
    ]
    for fact in broken:
        packed_badly = packed.manifest.model_copy(update={"facts": {ROWS_OF_FILES: fact}})
        (tmp_path / "manifest.json").write_bytes(packed_badly.to_bytes())
        with pytest.raises(StorageError, match=r"its manifest .* pack it again"):
            rows_of_files(open_dataset(str(tmp_path)))


def test_an_epoch_reads_every_file_once_and_holds_only_what_its_window_needs(packed, reads):
    window = 2 * ROWS_PER_FILE
    reader = ShardReader(packed, "train", window)
    most = 0
    for step in Order(reader.rows_per_file, configure(1, window), 1).steps(0):
        for _ in reader.rows(step.rows.place):
            most = max(most, len(reader._open))
    assert sorted(reads) == sorted(packed.parquet_paths()[:9])
    assert most <= window // ROWS_PER_FILE + 2


def configure(rows_per_step, window):
    rows_per_step = max(2, rows_per_step)
    sizes = ("micro_batch_size", "contrastive_batch_size", "global_batch_size")
    return TrainConfig(epochs=1, shuffle_window_rows=window, **dict.fromkeys(sizes, rows_per_step))


def read_steps(packed, config, num_ranks, progress=None, until=None):
    """Row ids by rank, and the progress after the last step."""
    reader = ShardReader(packed, "train", config.shuffle_window_rows)
    order = Order(reader.rows_per_file, config, num_ranks, progress)
    until = order.num_steps if until is None else until
    found = []
    for rank in range(num_ranks):
        reader = ShardReader(packed, "train", config.shuffle_window_rows)  # a process of its own
        steps = [step for step in order.steps(rank) if step.step < until]
        found += [row["row_id"] for step in steps for row in reader.rows(step.rows.place)]
    return found, order.progress_after(until)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("killed_after", [1, 5, 8, 10])
def test_no_finished_file_is_opened_again_after_a_restart(packed, reads, killed_after, num_ranks):
    config = configure(4, window=4)  # 11 steps
    before, progress = read_steps(packed, config, 2, until=killed_after)
    finished = {packed.parquet_paths()[file] for file in range(9) if set(range(5 * file, 5 * file + 5)) <= set(before)}
    assert len(finished) >= {1: 0, 5: 2, 8: 4, 10: 7}[killed_after]
    reads.clear()
    after, _ = read_steps(packed, config, num_ranks, progress)
    assert reads
    assert not finished & set(reads)
    assert len(set(before) | set(after)) == len(before) + len(after) == 44


def test_memory_is_bounded_even_where_places_come_in_no_order(packed):
    reader = ShardReader(packed, "train", window=1)
    for _ in reader.rows(np.random.default_rng(0).permutation(NUM_TRAIN)):
        assert len(reader._open) <= 2


def test_a_part_that_is_not_there_is_empty(packed):
    assert ShardReader(packed, "test", window=4).num_rows == 0


@pytest.mark.parametrize("window", [1, 4, 10, 23])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_other_ranks_have_no_more_files_open_than_in_a_whole_epoch(packed, reads, window, num_ranks):
    """A file is read again at most where two windows share it, and where a window is no longer than a file not even there."""
    config = configure(4, window)
    num_again = NUM_TRAIN // window if window > ROWS_PER_FILE else 0
    for killed_after in range(11):
        _, progress = read_steps(packed, config, 4, until=killed_after)
        for rank in range(num_ranks):
            reader, most = ShardReader(packed, "train", window), 0
            reads.clear()
            for step in Order(reader.rows_per_file, config, num_ranks, progress).steps(rank):
                for _ in reader.rows(step.rows.place):
                    most = max(most, len(reader._open))
            assert len(reads) <= len(set(reads)) + num_again, f"killed after {killed_after} steps, rank {rank}"
            assert most <= window // ROWS_PER_FILE + 2
