"""Shards to tensors: micro-batches of a rank, one optimizer step at a time, prepared one step ahead."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from urbanclip_ray.config import PixelsConfig, TrainConfig
from urbanclip_ray.imagery import crop_margins, decode, to_square
from urbanclip_ray.model.texts import shown_texts
from urbanclip_ray.model.tokenize import PAD_ID, TextTokenizer
from urbanclip_ray.train.augment import augment
from urbanclip_ray.train.order import Order, StepRows
from urbanclip_ray.train.shards import ShardReader
from urbanclip_ray.train.spool import PixelSpool, SpooledBatches
from urbanclip_ray.train.spool import TrainBatch as TrainBatch  # a step's record is whole here

T = TypeVar("T")


class TrainStep(NamedTuple):
    """The micro-batches of one optimizer step on one rank; they may be gone through more than once.

    Every `num_forwards` consecutive ones are this rank's share of a contrastive batch (`TrainConfig.cut_step`). Where there
    is more than one, their pixels lie in a temporary file and are read as a micro-batch is asked for.
    """

    step: int
    epoch: int
    num_labels: int  # tokens to be predicted: all after a text's first, of all the micro-batches
    micro_batches: Sequence[TrainBatch]


def text_key(text: str) -> int:
    """A 63-bit key of a text; case and blanks do not make texts different."""
    folded = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(folded.encode(), digest_size=8).digest()) >> 1


class BatchMaker:
    """Turns rows into micro-batches, augmented for training or plain for validation."""

    def __init__(
        self, config: TrainConfig, pixels: PixelsConfig, tokenizer: TextTokenizer, image_px: int, num_threads: int = 1
    ) -> None:
        self._config = config
        self._pixels = pixels
        self._tokenizer = tokenizer
        self._image_px = image_px
        # a GPU takes thousands of tiles a second, one core decodes hundreds; decoding and resizing let go of Python's lock
        self._threads = ThreadPoolExecutor(num_threads, "tiles") if num_threads > 1 else None

    def training(self, rows: list[dict[str, Any]], epochs: np.ndarray) -> TrainBatch:
        """Text and augmentation are functions of seed, epoch and row id."""
        images, texts = zip(*self._map(self._training_pair, rows, epochs), strict=True)
        return self._batch(images, texts, rows)

    def _training_pair(self, row: dict[str, Any], epoch: np.int64) -> tuple[np.ndarray, str]:
        random = np.random.default_rng([self._config.seed, int(epoch), row["row_id"]])
        shown = shown_texts(row["texts"], self._config.text_mode)
        text = shown[int(random.integers(len(shown)))]
        return augment(self._image(row), self._image_px, self._config.augment, random), text

    def validation(self, rows: list[dict[str, Any]]) -> TrainBatch:
        """The whole tile, and the first sentence or the paragraph."""
        texts = [shown_texts(row["texts"], self._config.text_mode)[0] for row in rows]
        images = list(self._map(lambda row: to_square(self._image(row), self._image_px), rows))
        return self._batch(images, texts, rows)

    def _image(self, row: dict[str, Any]) -> Image.Image:
        return crop_margins(decode(row["image"]), self._pixels)

    def _map(self, function: Callable[..., T], *values: Iterable[Any]) -> Iterator[T]:
        """What the function makes of every value, in their order."""
        return map(function, *values) if self._threads is None else self._threads.map(function, *values)

    def _batch(self, images: Sequence[np.ndarray], texts: Sequence[str], rows: list[dict[str, Any]]) -> TrainBatch:
        return TrainBatch(
            images=torch.from_numpy(np.stack(images)),
            tokens=self._tokenizer.encode(list(texts)),
            text_keys=torch.tensor([text_key(text) for text in texts]),
            row_ids=torch.tensor([row["row_id"] for row in rows]),
        )


def train_steps(reader: ShardReader, maker: BatchMaker, order: Order, rank: int) -> Iterator[TrainStep]:
    """The steps that a rank has still to take. Rows are read a micro-batch at a time."""
    return (make_step(reader, maker, chosen, order.cut.rows_per_forward) for chosen in order.steps(rank))


def make_step(reader: ShardReader, maker: BatchMaker, chosen: StepRows, rows_per_forward: int) -> TrainStep:
    """The step of the chosen rows, its pixels spooled where it is more than one micro-batch."""
    place, origin = chosen.rows
    cuts = [slice(first, first + rows_per_forward) for first in range(0, len(place), rows_per_forward)]
    made = (maker.training(list(reader.rows(place[cut])), origin[cut]) for cut in cuts)
    if len(cuts) == 1:
        batch = next(made)
        return TrainStep(chosen.step, chosen.epoch, count_labels(batch.tokens), [batch])
    spool = PixelSpool()
    spooled = [spool.add(batch) for batch in made]
    num_labels = sum(count_labels(batch.rest.tokens) for batch in spooled)
    return TrainStep(chosen.step, chosen.epoch, num_labels, SpooledBatches(spool, spooled))


def count_labels(tokens: Tensor) -> int:
    """Tokens that a caption's loss predicts: those after a text's first that are no padding."""
    return int((tokens[:, 1:] != PAD_ID).sum())


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
                continue  # the step takes its time: look whether it is still wanted

    def fill() -> None:
        try:
            for item in items:
                offer(item)
                if stopped.is_set():
                    return
            offer(done)
        except BaseException as error:  # of a thread: raised where the items are taken
            offer(error)

    threading.Thread(target=fill, daemon=True, name="prefetch").start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
