"""What a checkpoint says of the rows is believed only where it fits the shards and the config."""

from __future__ import annotations

import base64
import json
import tracemalloc
import zlib

import numpy as np
import pytest

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.train.order import Order
from urbanclip_ray.train.progress import Progress, ProgressError, read_bitmap, write_bitmap

FILES = [9, 4, 8]  # 21 rows; 4 a step: one row is left over by the first epoch
CONFIG = TrainConfig(epochs=3, micro_batch_size=4, contrastive_batch_size=4, global_batch_size=4, shuffle_window_rows=5, seed=1)


@pytest.fixture
def progress() -> Progress:
    """After two steps of the second epoch, the second of which other ranks took: 1 row was carried into it."""
    first = Order(FILES, CONFIG, 2).progress_after(6)
    return Order(FILES, CONFIG, 4, first).progress_after(7)


def bits_of(progress: Progress) -> np.ndarray:
    return read_bitmap(progress.now.consumed, 21)


def test_it_says_which_rows_were_consumed():
    order = Order(FILES, CONFIG, 1)
    taken = [(int(place), int(epoch)) for step in order.steps(0) for place, epoch in zip(*step.rows, strict=True)]
    for step in range(order.num_steps + 1):
        progress = order.progress_after(step)
        done = set(taken[: step * 4])
        assert set(np.flatnonzero(bits_of(progress)).tolist()) == {place for place, epoch in done if epoch == progress.epoch}
        carried = {(int(p), epoch) for epoch, bits in progress.now.carried for p in np.flatnonzero(read_bitmap(bits, 21))}
        assert carried == {(place, epoch) for epoch in range(progress.epoch) for place in range(21)} - done


def test_it_comes_back_from_json(progress):
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert (progress.step, progress.epoch, progress.num_rows, progress.num_ranks) == (7, 1, 21, 4)
    assert progress.base.step == 6


def changed(progress: Progress, path: str, value: object) -> dict:
    found = json.loads(json.dumps(progress.to_json()))
    *folders, name = path.split(".")
    inner = found
    for folder in folders:
        inner = inner[folder]
    inner[name] = value
    return found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("num_rows", -1),
        ("num_rows", 2**70),
        ("num_rows", "21"),
        ("epoch", 1.5),
        ("epoch", True),
        ("num_ranks", None),
        ("now.step", [7]),
        ("now.consumed", 3),
        ("now.carried", {"0": "x"}),
        ("base.carried", [[0]]),
        ("base.carried", [[-1, ""]]),
        ("base", []),
        ("more", 1),
    ],
)
def test_a_value_that_is_no_progress_is_refused_with_the_place_and_the_fix(progress, path, value):
    with pytest.raises(ProgressError, match=rf"damaged \({path}.*resume from another checkpoint"):
        Progress.from_json(changed(progress, path, value))


@pytest.mark.parametrize("value", [None, [], "progress", 7, {}])
def test_something_else_altogether_is_refused(value):
    with pytest.raises(ProgressError, match="the progress is damaged"):
        Progress.from_json(value)


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


@pytest.mark.parametrize(
    "bitmap",
    [
        "",
        "not base64!",
        base64.b64encode(b"not zlib").decode(),
        packed(b""),
        packed(bytes(2)),
        packed(bytes(4)),
        packed(b"\0\0\x01"),  # a bit behind the last row
        base64.b64encode(zlib.compress(bytes(3)) + b"more").decode(),
        base64.b64encode(zlib.compress(bytes(3))[:-2]).decode(),
    ],
)
def test_a_damaged_bitmap_is_refused(progress, bitmap):
    for where in ("base", "now"):
        found = Progress.from_json(changed(progress, f"{where}.consumed", bitmap))
        with pytest.raises(ProgressError, match=r"damaged \(a bitmap"):
            Order(FILES, CONFIG, 4, found)


def test_a_bitmap_comes_back():
    for num_rows in (0, 1, 8, 21):
        places = np.arange(0, num_rows, 3)
        assert np.flatnonzero(read_bitmap(write_bitmap(places, num_rows), num_rows)).tolist() == places.tolist()


def test_no_declared_size_is_allocated(progress):
    bomb = packed(bytes(100_000_000))
    hostile = changed(progress, "now.consumed", bomb) | {"num_rows": 2**50}
    tracemalloc.start()
    try:
        with pytest.raises(ProgressError, match="1125899906842624 training rows and the shards have 21"):
            Order(FILES, CONFIG, 4, Progress.from_json(hostile))
        with pytest.raises(ProgressError, match="not one of 21 rows"):
            Order(FILES, CONFIG, 4, Progress.from_json(hostile | {"num_rows": 21}))
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_other_shards_are_refused_with_the_fix(progress):
    with pytest.raises(
        ProgressError, match=r"knows 21 training rows and the shards have 25: .* or remove the run's checkpoints"
    ):
        Order([*FILES, 4], CONFIG, 4, progress)


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"shuffle_window_rows": 1}, {"epochs": 1}, {"global_batch_size": 8}, {"files": FILES[::-1]}]
)
def test_another_order_is_refused_with_what_to_set_back(progress, other):
    files, fields = other.get("files", FILES), {name: value for name, value in other.items() if name != "files"}
    with pytest.raises(ProgressError, match=r"train\.seed=\d+, train\.global_batch_size=\d+ .*set them to what the run began"):
        Order(files, CONFIG.model_copy(update=fields), 4, progress)


def moved(bitmap: str) -> str:
    """As many rows, one of them another."""
    bits = read_bitmap(bitmap, 21)
    first, other = np.flatnonzero(bits)[0], np.flatnonzero(~bits)[0]
    bits[first], bits[other] = False, True
    return write_bitmap(np.flatnonzero(bits), 21)


def test_rows_that_the_steps_did_not_take_are_refused(progress):
    opening = Order(FILES, CONFIG, 4).progress_after(5)  # the carried row is still to come
    ((origin, left_over),) = opening.now.carried
    wrong = [
        changed(progress, "now.consumed", moved(progress.now.consumed)),
        changed(progress, "base.consumed", moved(progress.base.consumed)),
        changed(progress, "now.consumed", progress.base.consumed),
        changed(progress, "now.step", 8),
        changed(progress, "now.step", 5),
        changed(progress, "base.step", 7),
        changed(progress, "base.step", 8),
        changed(progress, "now.step", 2**40),
        changed(progress, "epoch", 0),
        changed(progress, "epoch", 2),
        changed(progress, "num_ranks", 0),
        changed(progress, "num_ranks", 3),
        changed(progress, "now.carried", []),
        changed(progress, "now.carried", [[1, write_bitmap(np.arange(1), 21)]]),
        changed(opening, "now.carried", []),
        changed(opening, "base.carried", [[origin, moved(left_over)]]),
        changed(opening, "now.carried", [[origin, left_over]] * 2),
        changed(opening, "now.carried", [[7, left_over]]),
    ]
    for value in wrong:
        found = Progress.from_json(value)
        with pytest.raises(ProgressError, match="set them to what the run began with"):
            Order(FILES, CONFIG, found.num_ranks if found.num_ranks in (1, 2, 4) else 4, found)


def test_a_row_that_no_step_of_the_epoch_takes_cannot_be_consumed():
    """The last row of the files' order is the next epoch's: it would be passed over there."""
    order = Order(FILES, CONFIG, 1)
    progress = order.progress_after(1)
    ((_, left_over),) = order.progress_after(5).now.carried
    bits = read_bitmap(progress.now.consumed, 21)
    bits[np.flatnonzero(bits)[0]] = False
    bits |= read_bitmap(left_over, 21)
    standing = {"step": 1, "consumed": write_bitmap(np.flatnonzero(bits), 21), "carried": []}
    hostile = Progress.from_json(progress.to_json() | {"base": standing, "now": standing})
    with pytest.raises(ProgressError, match="set them to what the run began with"):
        Order(FILES, CONFIG, 1, hostile)
