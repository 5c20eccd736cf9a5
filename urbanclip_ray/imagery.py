"""From encoded bytes to pixels: decode what a source delivers, cut its margins, make it square."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from urbanclip_ray.config import PixelsConfig
from urbanclip_ray.errors import one_line

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")  # nothing else is opened: fewer parsers see foreign bytes


class TileImageError(ValueError):
    """An image that cannot be used: `reason` is one of a few fixed phrases for counting, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both as args, so that it survives pickling between workers
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def decode(data: bytes, *, min_side_px: int = 1, max_pixels: int = 64_000_000) -> Image.Image:
    """The first frame of a JPEG, PNG, WebP or TIFF as an 8-bit RGB image; transparent pixels become black (no data).

    Raises :class:`TileImageError` for zero bytes, other formats, truncated data, a side below `min_side_px`, pixels
    without a known range (32-bit integers, floats), and more than `max_pixels` (or than Pillow's own limit), which is
    judged from the header before anything is decoded.
    """
    if not data:
        raise TileImageError("zero bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on damaged metadata; the pixels are judged below
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with _open(data) as image:
            _check_size(image.size, min_side_px, max_pixels)
            try:
                image.load()
                return _to_rgb(image)
            except TileImageError:
                raise
            except Exception as error:  # foreign bytes: Pillow's parsers raise whatever they stumble over
                raise TileImageError("truncated or damaged", one_line(error)) from error


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise TileImageError("not an image", f"{len(data)} bytes are not {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TileImageError("too many pixels", one_line(error)) from error
    except Exception as error:  # the same as above, for headers
        raise TileImageError("truncated or damaged", one_line(error)) from error


def _check_size(size: tuple[int, int], min_side_px: int, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise TileImageError("too many pixels", f"{width} x {height} px are more than {max_pixels}; cut it into tiles")
    if min(size) < min_side_px:
        raise TileImageError("too small", f"{width} x {height} px has a side below {min_side_px} px")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255; the high byte is what it takes for 16-bit RGB, so grey is treated alike.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise TileImageError("unsupported pixels", "32-bit pixels have no known range; convert them to 8 or 16 bit")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def crop_margins(image: Image.Image, pixels: PixelsConfig) -> Image.Image:
    """The image without its configured margins; raises :class:`TileImageError` when nothing would remain."""
    left, top = pixels.crop_left_px, pixels.crop_top_px
    right, bottom = image.width - pixels.crop_right_px, image.height - pixels.crop_bottom_px
    if right <= left or bottom <= top:
        raise TileImageError(
            "too small", f"pixels.crop_* leaves nothing of {image.width} x {image.height} px; set smaller margins"
        )
    return image.crop((left, top, right, bottom))


def to_square(image: Image.Image, size_px: int) -> np.ndarray:
    """uint8 [size_px, size_px, 3] by bicubic resampling, antialiased; an oblong image is stretched, never cut."""
    return np.array(image.resize((size_px, size_px), Image.Resampling.BICUBIC), dtype=np.uint8)
