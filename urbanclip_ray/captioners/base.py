"""The protocol of every captioner: tiles in, texts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from PIL import Image

from urbanclip_ray.config import PixelsConfig
from urbanclip_ray.imagery import crop_margins, decode


class Tile(NamedTuple):
    """What a captioner may look at. Pixels are decoded only when asked for: not every captioner needs them."""

    tile_id: str
    image: bytes
    pixels: PixelsConfig

    def rgb(self) -> Image.Image:
        """The decoded tile, [height, width] RGB, margins cut off; raises :class:`imagery.TileImageError`."""
        return crop_margins(decode(self.image), self.pixels)


class Captioner(Protocol):
    """Describes tiles. The first four fields and the tile's bytes decide the text, so they make its key."""

    model: str
    revision: str
    prompt: str
    decoding: dict[str, float | int | str]

    def describe(self, tiles: Sequence[Tile]) -> list[list[str] | Exception]:
        """For every tile its texts, in order, or the exception that kept it from having one."""
        ...
