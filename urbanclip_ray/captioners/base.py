"""The protocol of every captioner: tiles in, texts out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from PIL import Image

from urbanclip_ray.config import PixelsConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.imagery import crop_margins, decode
from urbanclip_ray.schema import caption_key


class UnusableCaptionerError(UserError, RuntimeError):
    """A captioner that cannot describe anything, whatever the tile; the message names the key and the fix."""


class TransientError(RuntimeError):
    """What kept a tile from its text may pass by itself: it is tried again, `caption.max_attempts` times in all."""


class DeadEngineError(TransientError):
    """The captioner itself has died and must be loaded anew before anything is tried again."""


class Tile(NamedTuple):
    """What a captioner may look at. Pixels are decoded only when asked for: not every captioner needs them."""

    tile_id: str
    image: bytes
    pixels: PixelsConfig
    prompt: str = ""  # what is asked about it, its own metadata filled in; for captioners that are asked

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.image).hexdigest()

    def rgb(self) -> Image.Image:
        """The decoded tile, [height, width] RGB, margins cut off; raises :class:`imagery.TileImageError`."""
        return crop_margins(decode(self.image), self.pixels)


class Origin(NamedTuple):
    """What makes captions, apart from the tile: with the tile's bytes it decides the text, so it makes the key."""

    model: str
    revision: str
    prompt: str
    decoding: dict[str, float | int | str]

    def key(self, sha256: str, sample: int) -> str:
        """The caption key of one sample for a tile with these bytes."""
        return caption_key(sha256, self.model, self.revision, self.prompt, self.decoding, sample)


class Captioner(Protocol):
    """Describes tiles."""

    def describe(self, tiles: Sequence[Tile]) -> list[list[str] | Exception]:
        """For every tile its texts, in order, or the exception that kept it from having one.

        What is raised instead is of the whole batch: a :class:`TransientError` is tried again, after any other error the batch
        is halved until the tile at fault stands alone, and :class:`UnusableCaptionerError` ends the job.
        """
        ...
