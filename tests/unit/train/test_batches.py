"""Shards to tensors: what a row becomes does not depend on who reads it, or from where a run went on."""

from __future__ import annotations

import io
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from urbanclip_ray.config import AugmentConfig, PixelsConfig, TrainConfig
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import open_dataset, publish
from urbanclip_ray.train.batches import BatchMaker, prefetch, text_key, train_steps
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


def png(seed):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


ROWS = [
    {
        "row_id": row,
        "tile_id": f"r/{row}",
        "image": png(row),
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


def steps(packed, rank=0, num_ranks=1, first_step=0, config=CONFIG):
    reader = ShardReader(packed, "train", config.shuffle_window_rows)
    return list(train_steps(reader, maker(config), config, rank, num_ranks, first_step))


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
        assert batch.images.shape == (2, 3, IMAGE_PX, IMAGE_PX)
        assert batch.images.dtype == torch.float32
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
    through, resumed = steps(packed, 1, 2), steps(packed, 1, 2, first_step)
    assert len(through) == count_steps(NUM_ROWS, CONFIG.epochs, CONFIG.global_batch_size) == 8
    assert [(step.step, step.epoch) for step in resumed] == [(step.step, step.epoch) for step in through[first_step:]]
    for ours, theirs in zip(resumed, through[first_step:], strict=True):
        for mine, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert all(torch.equal(left, right) for left, right in zip(mine, other, strict=True))


def test_a_finished_run_has_no_more_steps(packed):
    assert steps(packed, first_step=8) == []


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
    assert all(channel.unique().numel() == 1 for channel in cut[0])
    assert maker().validation([row]).images[0, 0].unique().numel() > 1


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
