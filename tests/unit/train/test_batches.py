"""Shards to tensors: what a row becomes does not depend on who reads it, or from where a run went on."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from images import noise_png
from PIL import Image

from urbanclip_ray.config import AugmentConfig, PixelsConfig, TrainConfig
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import open_dataset, publish
from urbanclip_ray.train import spool
from urbanclip_ray.train.batches import BatchMaker, prefetch, text_key, train_steps
from urbanclip_ray.train.order import Order
from urbanclip_ray.train.progress import Progress
from urbanclip_ray.train.shards import ShardReader, count_steps

IMAGE_PX = 12
NUM_ROWS = 22  # not a multiple of a step: rows are carried into the next epoch
CONFIG = TrainConfig(
    epochs=3,
    micro_batch_size=2,
    contrastive_batch_size=4,
    global_batch_size=8,
    shuffle_window_rows=6,
    augment=AugmentConfig(min_area_share=0.5, brightness=0.3),
)


ROWS = [
    {
        "row_id": row,
        "tile_id": f"r/{row}",
        "image": noise_png(row),
        "texts": [f"Tile {row} has {count} trees" + " and more" * count for count in range(4)],
        "part": "train",
    }
    for row in range(NUM_ROWS)
]
TOKENIZER = train_bpe([text for row in ROWS for text in row["texts"]], vocab_size=300, context_length=40)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("packed") / "shards")
    table = pa.Table.from_pylist(ROWS, schema=SHARDS)
    with publish(uri, "shards", {}, {}) as publication:
        for number, first in enumerate(range(0, NUM_ROWS, 5)):
            publication.write_table(table.slice(first, 5), f"part-{number}.parquet")
    return open_dataset(uri)


def maker(config=CONFIG, pixels=None):
    return BatchMaker(config, pixels or PixelsConfig(), TOKENIZER, IMAGE_PX)


def steps(packed, rank=0, num_ranks=1, progress=None, config=CONFIG):
    reader = ShardReader(packed, "train", config.shuffle_window_rows)
    return list(train_steps(reader, maker(config), Order(reader.rows_per_file, config, num_ranks, progress), rank))


def progress_at(packed, step, num_ranks=1, progress=None):
    """What a checkpoint after that step brings back."""
    reader = ShardReader(packed, "train", CONFIG.shuffle_window_rows)
    found = Order(reader.rows_per_file, CONFIG, num_ranks, progress).progress_after(step)
    return Progress.from_json(json.loads(json.dumps(found.to_json())))


def open_files():
    """Paths under /proc of this process's temporary files."""
    here = Path("/proc/self/fd")
    deleted = []
    for entry in here.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists this folder
            if os.readlink(entry).endswith("(deleted)"):
                deleted.append(str(entry))
    return set(deleted)


def samples(all_steps):
    """(row, epoch of the row) is not in a batch, so: row id -> the samples that it became, in order."""
    found: dict[int, list[tuple[bytes, tuple[int, ...]]]] = {}
    for step in all_steps:
        for batch in step.micro_batches:
            for image, tokens, row in zip(batch.images, batch.tokens, batch.row_ids.tolist(), strict=True):
                text = tuple(token for token in tokens.tolist() if token)  # batches are trimmed to their own longest text
                found.setdefault(row, []).append((image.numpy().tobytes(), text))
    return found


def test_a_batch_has_the_stated_shapes(packed):
    first = steps(packed, num_ranks=2)[0]
    assert (first.step, first.epoch) == (0, 0)
    assert len(first.micro_batches) == 2  # 8 rows a step over two ranks, two at a time
    for batch in first.micro_batches:
        assert batch.images.shape == (2, IMAGE_PX, IMAGE_PX, 3)
        assert batch.images.dtype == torch.uint8
        assert batch.tokens.shape[0] == batch.text_keys.shape[0] == batch.row_ids.shape[0] == 2
        assert batch.text_keys.dtype == batch.row_ids.dtype == batch.tokens.dtype == torch.int64


def test_text_and_pixels_are_a_function_of_seed_epoch_and_row(packed):
    rows = ROWS[:4]
    epochs = np.array([0, 1, 0, 2])
    whole = maker().training(rows, epochs)
    single = [maker().training([row], epochs[at : at + 1]) for at, row in enumerate(rows)]
    assert torch.equal(whole.images, torch.cat([batch.images for batch in single]))
    assert torch.equal(whole.text_keys, torch.cat([batch.text_keys for batch in single]))
    later = maker().training(rows, epochs + 1)
    assert not torch.equal(whole.images, later.images)
    other_seed = maker(CONFIG.model_copy(update={"seed": 1})).training(rows, epochs)
    assert not torch.equal(whole.images, other_seed.images)


def test_any_number_of_threads_makes_the_same_batches(packed):
    rows = list(ShardReader(packed, "train", window=4).rows(np.arange(8)))
    alone, together = (BatchMaker(CONFIG, PixelsConfig(), TOKENIZER, IMAGE_PX, num_threads) for num_threads in (1, 3))
    for made, expected in (
        (together.training(rows, np.arange(8)), alone.training(rows, np.arange(8))),
        (together.validation(rows), alone.validation(rows)),
    ):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, expected, strict=True))


def test_every_sentence_comes_up_over_the_epochs():
    keys = {int(maker().training(ROWS[:1], np.array([epoch])).text_keys[0]) for epoch in range(40)}
    assert keys == {text_key(text) for text in ROWS[0]["texts"]}


def test_a_row_carried_into_the_next_epoch_keeps_its_own(packed):
    for row, found in samples(steps(packed)).items():
        own = [maker().training([ROWS[row]], np.array([epoch])).images[0].numpy().tobytes() for epoch in range(CONFIG.epochs)]
        pixels = [image for image, _ in found]
        assert pixels == own[: len(pixels)], f"row {row} was given the pixels of another epoch"


def test_a_row_becomes_the_same_samples_whatever_rank_reads_it(packed):
    alone = samples(steps(packed))
    shared: dict[int, list] = {}
    for rank in range(2):
        for row, found in samples(steps(packed, rank, 2)).items():
            shared.setdefault(row, []).extend(found)
    last = count_steps(NUM_ROWS, CONFIG.epochs, CONFIG.global_batch_size)
    assert sum(len(found) for found in alone.values()) == last * CONFIG.global_batch_size
    everything = {row: {pair for found in (alone, shared) for pair in found.get(row, [])} for row in range(NUM_ROWS)}
    for row, found in everything.items():
        assert len(found) <= CONFIG.epochs, f"row {row} became something else on another rank"
    assert {row: sorted(found) for row, found in alone.items()} == {row: sorted(found) for row, found in shared.items()}


@pytest.mark.parametrize("first_step", [1, 3, 5])
def test_going_on_at_a_step_gives_the_same_batches_as_running_through(packed, first_step):
    through, resumed = steps(packed, 1, 2), steps(packed, 1, 2, progress_at(packed, first_step, 2))
    assert len(through) == count_steps(NUM_ROWS, CONFIG.epochs, CONFIG.global_batch_size) == 8
    assert [(step.step, step.epoch) for step in resumed] == [(step.step, step.epoch) for step in through[first_step:]]
    for ours, theirs in zip(resumed, through[first_step:], strict=True):
        for mine, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert all(torch.equal(left, right) for left, right in zip(mine, other, strict=True))


def test_a_finished_run_has_no_more_steps(packed):
    assert steps(packed, progress=progress_at(packed, 8)) == []


def test_a_run_goes_on_with_other_ranks_to_the_same_samples_and_no_sample_twice(packed):
    through, progress, taken = samples(steps(packed)), None, []
    for num_ranks, last in ((4, 2), (1, 5), (2, 8)):  # killed after steps 2 and 5; the second epoch begins within step 3
        for rank in range(num_ranks):
            taken += [step for step in steps(packed, rank, num_ranks, progress) if step.step < last]
        progress = progress_at(packed, last, num_ranks, progress)
    assert {row: sorted(found) for row, found in samples(taken).items()} == {
        row: sorted(found) for row, found in through.items()
    }


def test_a_step_counts_the_labels_of_all_its_micro_batches(packed):
    for step in steps(packed):
        labels = [token for batch in step.micro_batches for row in batch.tokens.tolist() for token in row[1:] if token]
        assert step.num_labels == len(labels) > 0


def test_consecutive_micro_batches_are_a_contrastive_batch_and_can_be_gone_through_again(packed):
    cut = CONFIG.cut_step(1)
    assert (cut.rows_per_forward, cut.num_forwards, cut.num_contrastive) == (2, 2, 2)
    spooled = steps(packed)[0].micro_batches
    in_memory = steps(packed, config=CONFIG.model_copy(update={"micro_batch_size": 8, "contrastive_batch_size": 8}))[
        0
    ].micro_batches
    assert (len(spooled), len(in_memory)) == (4, 1)
    for _ in range(2):
        for name in ("images", "row_ids", "text_keys"):
            joined = torch.cat([getattr(batch, name) for batch in spooled])
            assert torch.equal(joined, getattr(in_memory[0], name))
    second = spooled[cut.num_forwards :]
    assert [batch.row_ids.tolist() for batch in second] == [spooled[at].row_ids.tolist() for at in (2, 3)]
    assert torch.equal(second[-1].images, spooled[3].images)


def test_memory_grows_with_the_micro_batch_and_not_with_the_step(packed):
    """Peaks while a step is made and gone through, twice as with cached embeddings, at 0.8 MB a row."""
    row_bytes = 512 * 512 * 3

    def measure(rows_per_step, rows_per_forward):
        sizes = {
            "micro_batch_size": rows_per_forward,
            "contrastive_batch_size": rows_per_step,
            "global_batch_size": rows_per_step,
        }
        config = CONFIG.model_copy(update=sizes)
        reader = ShardReader(packed, "train", config.shuffle_window_rows)
        order = Order(reader.rows_per_file, config, 1)
        made = train_steps(reader, BatchMaker(config, PixelsConfig(), TOKENIZER, 512), order, 0)
        next(made)  # whatever is loaded once
        tracemalloc.start()
        try:
            step = next(made)
            kept = tracemalloc.get_traced_memory()[0]
            assert sum(int(batch.images.any()) for _ in range(2) for batch in step.micro_batches) > 0
            return kept, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    (kept, peak), (kept_of_more, peak_of_more) = measure(4, 1), measure(16, 1)
    assert max(kept, kept_of_more) < row_bytes / 2, "what is kept of a step has no pixels"
    assert abs(peak_of_more - peak) < row_bytes / 2
    kept_in_memory, peak_in_memory = measure(16, 16)
    assert kept_in_memory > 16 * row_bytes  # so the pixels are seen where they are in memory
    assert peak_in_memory > peak_of_more + 8 * row_bytes


def test_a_file_of_pixels_is_gone_with_its_step(packed):
    before = open_files()
    step = steps(packed)[0]
    (file,) = open_files() - before  # the other steps are gone
    assert os.stat(file).st_nlink == 0  # nobody else sees it, and a killed process leaves nothing behind
    batch = step.micro_batches[3]
    step.micro_batches.close()
    assert batch.images.shape == (2, IMAGE_PX, IMAGE_PX, 3)
    with pytest.raises(ValueError, match="closed"):
        step.micro_batches[0]
    assert open_files() == before
    part = steps(packed)[0].micro_batches[1:2]
    assert len(open_files() - before) == 1, "a part of a step keeps its pixels"
    assert part[0].images.shape == (2, IMAGE_PX, IMAGE_PX, 3)
    del part
    assert open_files() == before
    single = CONFIG.model_copy(update={"micro_batch_size": 8, "contrastive_batch_size": 8})
    kept = steps(packed, config=single)
    assert len(kept) == 8
    assert open_files() == before, "a step of one micro-batch stays in memory"


def test_a_full_disk_is_named_with_the_fix(packed, monkeypatch):
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **how: open("/dev/full", "w+b", **how))  # noqa: SIM115 closed by the spool
    with pytest.raises(OSError, match="TMPDIR") as caught:
        steps(packed)
    assert caught.value.errno == errno.ENOSPC


def test_validation_takes_the_whole_tile_and_the_first_sentence_or_the_paragraph():
    plain = maker().validation(ROWS[:2])
    assert plain.text_keys.tolist() == [text_key(row["texts"][0]) for row in ROWS[:2]]
    assert torch.equal(plain.images, maker(CONFIG.model_copy(update={"seed": 9})).validation(ROWS[:2]).images)
    paragraph = maker(CONFIG.model_copy(update={"text_mode": "paragraph"}))
    joined = [text_key(" ".join(row["texts"])) for row in ROWS[:2]]
    assert paragraph.validation(ROWS[:2]).text_keys.tolist() == joined
    assert paragraph.training(ROWS[:2], np.array([0, 1])).text_keys.tolist() == joined


def test_margins_are_cut_before_a_tile_is_resized():
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    white.paste((0, 0, 0), (0, 12, 16, 16))
    stream = io.BytesIO()
    white.save(stream, "PNG")
    row = ROWS[0] | {"image": stream.getvalue()}
    cut = maker(pixels=PixelsConfig(crop_bottom_px=4)).validation([row]).images
    assert cut.unique().numel() == 1
    assert maker().validation([row]).images.unique().numel() > 1


def test_case_and_blanks_do_not_make_texts_different():
    assert text_key("A  Green\nfield ") == text_key("a green field")
    assert text_key("a green field") != text_key("a green field.")
    keys = [text_key(str(number)) for number in range(1000)]
    assert len(set(keys)) == 1000
    assert all(0 <= key < 2**63 for key in keys)  # fits int64


def prefetchers():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(condition, limit_s=5.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_prefetched_items_are_the_same_in_the_same_order():
    assert list(prefetch(range(50), depth=3)) == list(range(50))
    assert list(prefetch([])) == []


def test_an_error_in_the_thread_is_raised_after_the_items_before_it():
    def broken():
        yield 1
        yield 2
        raise RuntimeError("row 3 cannot be decoded")

    items = prefetch(broken())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(RuntimeError, match="row 3"):
        next(items)
    wait_until(lambda: not prefetchers())


def test_the_thread_is_only_a_little_ahead_and_stops_with_its_reader():
    made = []

    def endless():
        while True:
            made.append(len(made))
            yield made[-1]

    items = prefetch(endless(), depth=2)
    assert [next(items) for _ in range(5)] == list(range(5))
    time.sleep(0.1)
    assert len(made) <= 5 + 2 + 1  # read, waiting, and one in hand
    items.close()
    wait_until(lambda: not prefetchers())
