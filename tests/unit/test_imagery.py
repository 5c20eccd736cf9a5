"""Bytes to pixels: every kind of image that a tile source delivers, good and bad."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from urbanclip_ray.config import PixelsConfig
from urbanclip_ray.imagery import TileImageError, crop_margins, decode, to_square


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def noise(side_px: int = 32) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixel(data: bytes) -> tuple[int, ...]:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_lossless_formats_keep_every_pixel(file_format):
    np.testing.assert_array_equal(np.asarray(decode(encode(noise(), file_format))), np.asarray(noise()))


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_lossy_formats_keep_the_colour(file_format):
    data = encode(Image.new("RGB", (16, 16), (200, 100, 50)), file_format)
    assert pixel(data) == pytest.approx((200, 100, 50), abs=6)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (8, 8), 90), (90, 90, 90)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (200, 100, 50, 0)), (0, 0, 0)),
        (Image.new("RGBA", (8, 8), (200, 100, 50, 255)), (200, 100, 50)),
        (Image.new("LA", (8, 8), (120, 0)), (0, 0, 0)),
        (Image.new("RGB", (8, 8), (200, 100, 50)).quantize(4), (200, 100, 50)),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((8, 8), 32768, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((8, 8), 300, np.uint16)), (1, 1, 1)),
    ],
    ids=["grey", "1-bit", "clear", "opaque", "grey alpha", "palette", "16-bit white", "16-bit middle", "16-bit dark"],
)
def test_every_colour_kind_becomes_rgb(image, expected):
    assert pixel(encode(image)) == expected


def test_half_transparent_pixels_are_mixed_with_black():
    assert pixel(encode(Image.new("RGBA", (8, 8), (200, 100, 50, 128)))) == pytest.approx((100, 50, 25), abs=1)


def test_a_transparent_palette_colour_is_black():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([250, 10, 10] * 256)
    assert pixel(encode(image, transparency=0)) == (0, 0, 0)


def test_cmyk_jpeg_becomes_rgb():
    assert pixel(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")) == pytest.approx((254, 0, 0), abs=4)


def test_16_bit_rgb_is_scaled_and_not_clipped():
    row = b"\x00" + struct.pack(">3H", 65535, 32768, 256) * 2
    assert pixel(png(2, 2, 16, 2, row * 2)) == (255, 128, 1)


def test_big_endian_16_bit_tiff_is_scaled():
    assert pixel(encode(Image.fromarray(np.full((8, 8), 32768, ">u2")), "TIFF")) == (128, 128, 128)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>404 not found</html>", "not an image"),
        (encode(Image.new("RGB", (8, 8)), "GIF"), "not an image"),
        (encode(noise(), "JPEG")[:-200], "truncated or damaged"),
        (encode(noise(), "JPEG")[:12], "truncated or damaged"),
        (encode(noise(), "PNG")[:1500], "truncated or damaged"),
        (encode(noise(), "WEBP")[:300], "truncated or damaged"),
        (encode(noise(), "TIFF")[:-400], "truncated or damaged"),
        (encode(Image.new("RGB", (1, 1))), "too small"),
        (encode(Image.new("RGB", (100, 4))), "too small"),
        (encode(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "unsupported pixels"),
        (encode(Image.fromarray(np.zeros((8, 8), np.int32)), "TIFF"), "unsupported pixels"),
        (png(9000, 9000, 8, 2, b""), "too many pixels"),  # refused by our limit
        (png(9900, 9900, 8, 2, b""), "too many pixels"),  # Pillow would only warn
        (png(60000, 60000, 8, 2, b""), "too many pixels"),  # Pillow raises
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(data, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and without a warning
        with pytest.raises(TileImageError) as caught:
            decode(data, min_side_px=8)
    assert caught.value.reason == reason


def test_pillows_limit_holds_where_ours_is_higher():
    with pytest.raises(TileImageError, match="too many pixels"):
        decode(png(9900, 9900, 8, 2, b""), max_pixels=10**9)


def test_flipped_bits_are_refused():
    data = bytearray(encode(noise()))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(TileImageError, match="truncated or damaged"):
        decode(bytes(data))


def test_decoding_leaves_pillow_and_warnings_as_they_were():
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    decode(encode(noise()))
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_the_error_survives_the_way_between_workers():
    error = pickle.loads(pickle.dumps(TileImageError("too small", "1 x 1 px")))
    assert (error.reason, error.detail, str(error)) == ("too small", "1 x 1 px", "too small: 1 x 1 px")


def test_margins_are_cut_in_source_pixels():
    pixels = PixelsConfig(crop_left_px=1, crop_top_px=2, crop_right_px=3, crop_bottom_px=4)
    cropped = np.asarray(crop_margins(noise(), pixels))
    np.testing.assert_array_equal(cropped, np.asarray(noise())[2:28, 1:29])


def test_margins_that_leave_nothing_are_refused():
    with pytest.raises(TileImageError, match=r"pixels\.crop_"):
        crop_margins(noise(), PixelsConfig(crop_left_px=16, crop_right_px=16))


def test_resizing_is_antialiased():
    checkerboard = Image.fromarray((np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    small = to_square(checkerboard, 16)
    assert small.shape == (16, 16, 3)
    assert small.dtype == np.uint8
    assert np.abs(small.astype(int) - 127).max() <= 3  # without a filter it would be black and white
    small[0] = 0  # writable, as torch wants it
