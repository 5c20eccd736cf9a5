"""How pairs are named in files: what an export writes and a source reads, for WebDataset and Hugging Face alike."""

from __future__ import annotations

from urllib.parse import quote, unquote

# Our parts, and the names that Hugging Face's loaders know for them.
SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test", "buffer": "buffer"}
UNASSIGNED = "unassigned"  # tiles without a place in a split that others have one in
DATA_FOLDER = "data"

# What a row says beside its image and its texts; the same words in JSON members and in columns.
FACTS = ("region", "lon", "lat", "west", "south", "east", "north", "scheme", "group", "width", "height", "sha256")
COORDINATES = FACTS[1:7]


def key_of(tile_id: str) -> str:
    """A tile id as a WebDataset key and file name: no separator, and no dot, at which WebDataset cuts off the extension."""
    return quote(tile_id, safe="").replace(".", "%2E")


def tile_id_of(key: str) -> str:
    """The tile id that :func:`key_of` made this key of."""
    return unquote(key)


def image_extension(image: bytes) -> str:
    """`jpg`, `png`, `webp` or `tif` by the first bytes; ValueError for anything else, which ingest has refused."""
    if image.startswith(b"\xff\xd8"):
        return "jpg"
    if image.startswith(b"\x89PNG"):
        return "png"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[:4] in (b"II*\0", b"MM\0*"):
        return "tif"
    raise ValueError("the image is no JPEG, PNG, WebP or TIFF")
