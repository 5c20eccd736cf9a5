"""What a checkpoint says of the rows: which were consumed, and from which state the ranks planned their order.

Consumed means that the optimizer step was taken. Rows are named by their places in the training part, one bitmap an epoch:
a million rows are 125 kB before compression, and a few kB where most of them lie together.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from urbanclip_ray.errors import UserError

Count: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Bitmap: TypeAlias = Annotated[str, Field(strict=True)]  # packed bits of all places, zlib, base64


class ProgressError(UserError, ValueError):
    """A progress that is damaged or belongs to another run; the message says what to change."""


class Standing(NamedTuple):
    """The rows of an epoch after `step` optimizer steps of the run."""

    step: Count
    consumed: Bitmap  # rows of the epoch
    carried: tuple[tuple[Count, Bitmap], ...]  # (earlier epoch, its rows that were left over and are still to come)


class Progress(NamedTuple):
    """Where a run stands, and where its ranks stood when they planned: the same number of them plans the same again."""

    num_rows: Count  # of the training part
    epoch: Count  # of the next step
    num_ranks: Count
    base: Standing
    now: Standing

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.now.step

    def to_json(self) -> dict[str, Any]:
        """A value for `json.dumps`; :meth:`from_json` brings it back."""
        return self._asdict() | {"base": self.base._asdict(), "now": self.now._asdict()}

    @staticmethod
    def from_json(value: Any) -> Progress:
        """The progress of a JSON value. Raises :class:`ProgressError` where it is none of ours.

        Bitmaps stay compressed until :func:`read_bitmap` knows from the shards how long they may be.
        """
        try:
            return _PROGRESS.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ProgressError(
                f"the progress is damaged ({where or 'value'}: {first['msg']}): resume from another checkpoint, or remove the "
                "run's checkpoints to start anew"
            ) from None


_PROGRESS = TypeAdapter(Progress)


def write_bitmap(places: np.ndarray, num_rows: int) -> str:
    """The bitmap of the given places among `num_rows`."""
    bits = np.zeros(num_rows, bool)
    bits[places] = True
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()


def read_bitmap(bitmap: str, num_rows: int) -> np.ndarray:
    """bool [num_rows]; takes no more memory than that, whatever was packed. Raises :class:`ProgressError`."""
    num_bytes = -(-num_rows // 8)
    unpacker = zlib.decompressobj()
    try:
        packed = unpacker.decompress(base64.b64decode(bitmap, validate=True), num_bytes + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise ProgressError(f"the progress is damaged (a bitmap: {error}): resume from another checkpoint") from None
    bits = np.unpackbits(np.frombuffer(packed, np.uint8)).astype(bool)
    if len(packed) != num_bytes or not unpacker.eof or unpacker.unused_data or bits[num_rows:].any():
        raise ProgressError(f"the progress is damaged (a bitmap is not one of {num_rows} rows): resume from another checkpoint")
    return bits[:num_rows]
