"""Pixels of a step that do not lie in memory: written to a temporary file, read back a micro-batch at a time."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor


class TrainBatch(NamedTuple):
    """A micro-batch: images uint8 [rows, px, px, 3], tokens [rows, places], text_keys [rows] (equal texts, equal keys),
    row_ids [rows]."""

    images: Tensor
    tokens: Tensor
    text_keys: Tensor
    row_ids: Tensor


class Spooled(NamedTuple):
    """Where the pixels of a micro-batch lie in the file, and what stays in memory of it."""

    start: int  # bytes
    shape: tuple[int, ...]
    rest: TrainBatch  # without a row of pixels


class PixelSpool:
    """A file without a name, in the folder of TMPDIR: it is gone with this object, and with the process however that ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 closed by the finalizer
        self.close = weakref.finalize(self, self._file.close)

    def add(self, batch: TrainBatch) -> Spooled:
        """Take the pixels of a micro-batch over. Raises OSError with the fix where the disk is full."""
        start = self._file.seek(0, os.SEEK_END)
        try:
            waiting = batch.images.contiguous().numpy().reshape(-1).data
            while len(waiting):
                waiting = waiting[self._file.write(waiting) :]
        except OSError as error:
            self.close()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"{tempfile.gettempdir()} is full: the pixels of a step are kept there between its forwards. Set TMPDIR to a "
                f"folder with space, or train.micro_batch_size to a rank's share of a step, which then stays in memory",
            ) from error
        return Spooled(start, tuple(batch.images.shape), batch._replace(images=batch.images[:0].clone()))

    def read(self, spooled: Spooled) -> TrainBatch:
        """The micro-batch as it was, its pixels in memory of their own."""
        images = np.empty(spooled.shape, np.uint8)
        self._file.seek(spooled.start)
        missing = images.reshape(-1).data
        while len(missing):
            if not (num_read := self._file.readinto(missing)):
                raise OSError(errno.EIO, "a temporary file of pixels was cut short")
            missing = missing[num_read:]
        return spooled.rest._replace(images=torch.from_numpy(images))


class SpooledBatches(Sequence[TrainBatch]):
    """Micro-batches that are read from their spool one at a time, as often as they are asked for; slices share the spool."""

    def __init__(self, spool: PixelSpool, batches: Sequence[Spooled]) -> None:
        self._spool = spool
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> TrainBatch: ...

    @overload
    def __getitem__(self, index: slice) -> SpooledBatches: ...

    def __getitem__(self, index: int | slice) -> TrainBatch | SpooledBatches:
        if isinstance(index, slice):
            return SpooledBatches(self._spool, self._batches[index])
        return self._spool.read(self._batches[index])

    def close(self) -> None:
        """Remove the file now: what was read from it stays."""
        self._spool.close()
