"""Shards to tensors: micro-batches of a rank, one optimizer step at a time, prepared one step ahead."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from urbanclip_ray.config import PixelsConfig, TrainConfig
from urbanclip_ray.imagery import crop_margins, decode, to_square
from urbanclip_ray.model.preprocess import to_tensor
from urbanclip_ray.model.texts import shown_texts
from urbanclip_ray.model.tokenize import TextTokenizer
from urbanclip_ray.train.augment import augment
from urbanclip_ray.train.shards import ShardReader, count_steps, no_rows, plan_epoch, rank_rows

T = TypeVar("T")


class TrainBatch(NamedTuple):
    """A micro-batch: images [rows, 3, px, px], tokens [rows, places], text_keys [rows] (equal texts, equal keys), row_ids."""

    images: Tensor
    tokens: Tensor
    text_keys: Tensor
    row_ids: Tensor


class TrainStep(NamedTuple):
    """The micro-batches of one optimizer step on one rank."""

    step: int
    epoch: int
    micro_batches: list[TrainBatch]


def text_key(text: str) -> int:
    """A 63-bit key of a text; case and blanks do not make texts different."""
    folded = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(folded.encode(), digest_size=8).digest()) >> 1


class BatchMaker:
    """Turns rows into micro-batches, augmented for training or plain for validation."""

    def __init__(self, config: TrainConfig, pixels: PixelsConfig, tokenizer: TextTokenizer, image_px: int) -> None:
        self._config = config
        self._pixels = pixels
        self._tokenizer = tokenizer
        self._image_px = image_px

    def training(self, rows: list[dict[str, Any]], epochs: np.ndarray) -> TrainBatch:
        """Text and augmentation are functions of seed, epoch and row id."""
        images, texts = [], []
        for row, epoch in zip(rows, epochs, strict=True):
            random = np.random.default_rng([self._config.seed, int(epoch), row["row_id"]])
            shown = shown_texts(row["texts"], self._config.text_mode)
            texts.append(shown[int(random.integers(len(shown)))])
            image = crop_margins(decode(row["image"]), self._pixels)
            images.append(augment(image, self._image_px, self._config.augment, random))
        return self._batch(images, texts, rows)

    def validation(self, rows: list[dict[str, Any]]) -> TrainBatch:
        """The whole tile, and the first sentence or the paragraph."""
        texts = [shown_texts(row["texts"], self._config.text_mode)[0] for row in rows]
        images = [to_square(crop_margins(decode(row["image"]), self._pixels), self._image_px) for row in rows]
        return self._batch(images, texts, rows)

    def _batch(self, images: list[np.ndarray], texts: list[str], rows: list[dict[str, Any]]) -> TrainBatch:
        return TrainBatch(
            images=to_tensor(np.stack(images)),
            tokens=self._tokenizer.encode(texts),
            text_keys=torch.tensor([text_key(text) for text in texts]),
            row_ids=torch.tensor([row["row_id"] for row in rows]),
        )


def train_steps(
    reader: ShardReader, maker: BatchMaker, config: TrainConfig, rank: int, num_ranks: int, first_step: int
) -> Iterator[TrainStep]:
    """The steps of a run from `first_step` on; earlier ones are planned but not read."""
    cut = config.cut_step(num_ranks)
    rows_per_rank = cut.rows_per_step
    last = count_steps(reader.num_rows, config.epochs, config.global_batch_size)
    carried, step, epoch = no_rows(), 0, 0
    while step < last:
        rows, carried = plan_epoch(reader.rows_per_file, config.seed, epoch, carried, config.global_batch_size)
        mine = rank_rows(rows, rank, num_ranks, config.shuffle_window_rows, config.seed, epoch)
        for first in range(0, len(mine.place), rows_per_rank):
            if step >= first_step:
                chosen = slice(first, first + rows_per_rank)
                rows_now = list(reader.rows(mine.place[chosen]))
                size = cut.rows_per_forward
                micro = [
                    maker.training(rows_now[at : at + size], mine.epoch[chosen][at : at + size])
                    for at in range(0, rows_per_rank, size)
                ]
                yield TrainStep(step, epoch, micro)
            step += 1
        epoch += 1


def prefetch(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """The same items, made in a thread `depth` ahead; an error in the thread is raised here."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    done = object()
    stopped = threading.Event()

    def offer(item: Any) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.5)
                break
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for item in items:
                offer(item)
                if stopped.is_set():
                    return
            offer(done)
        except BaseException as error:
            offer(error)

    threading.Thread(target=fill, daemon=True, name="prefetch").start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
