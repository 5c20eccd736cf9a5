"""A contact sheet: a few tiles beside their captions, one HTML file that needs no other.

Captions and tile ids are hostile input: the template autoescapes, and a content security policy keeps the page from
fetching anything.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
from typing import Any

import jinja2
import pyarrow as pa

from urbanclip_ray.captioners.base import Tile
from urbanclip_ray.captioners.caption import CaptionError, CaptionWork, refuse_unusable
from urbanclip_ray.captioners.sample import SAMPLE_SEED, caption_sample, draw_tiles
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.storage import join, write_bytes

NUM_TILES_SHOWN = 50
THUMBNAIL_PX = 224
PAGE = "caption_preview.html"


def preview_captions(work: CaptionWork, run_uri: str, num_tiles: int = NUM_TILES_SHOWN) -> str:
    """Caption a seeded sample of the readable tiles and write `<run>/caption_preview.html`; returns its URI.

    No dataset is published, but what is generated goes to the store. Raises CaptionError when the captioner cannot be
    used, or when no tile can be read.
    """
    ids = work.tiles.read(["tile_id", "error"])
    readable = [row["tile_id"] for row in ids.to_pylist() if row["error"] is None]
    if not readable:
        raise CaptionError(f"{work.tiles.uri} has no tile that can be read: see the column error, and mend the source")
    tiles = draw_tiles(work.tiles, readable, num_tiles)
    captions = caption_sample(tiles, work)
    refuse_unusable([error for error in captions["error"].to_pylist() if error is not None])
    *before, origin = work.origins()
    page = _template().render(
        origin=origin,
        captioner=work.config.captioner,
        before=before,
        num_tiles=tiles.num_rows,
        num_readable=len(readable),
        seed=SAMPLE_SEED,
        rows=_rows(tiles, captions, work),
    )
    uri = join(run_uri, PAGE)
    write_bytes(uri, page.encode())
    return uri


def _rows(tiles: pa.Table, captions: pa.Table, work: CaptionWork) -> list[dict[str, Any]]:
    by_tile: dict[str, list[dict[str, Any]]] = {}
    for caption in captions.to_pylist():
        by_tile.setdefault(caption["tile_id"], []).append(caption)
    return [
        {
            "tile_id": tile["tile_id"],
            "image": _thumbnail(Tile(tile["tile_id"], tile["image"], work.pixels)),
            "model": by_tile[tile["tile_id"]][0]["model"],
            "texts": [caption["text"] for caption in by_tile[tile["tile_id"]] if caption["error"] is None],
            "errors": [caption["error"] for caption in by_tile[tile["tile_id"]] if caption["error"] is not None],
        }
        for tile in tiles.to_pylist()
    ]


def _thumbnail(tile: Tile) -> str | None:
    """A data URI of what the captioner saw, margins cut off; None where nothing of it is left."""
    try:
        image = tile.rgb()
    except TileImageError:
        return None
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _template() -> jinja2.Template:
    source = importlib.resources.files("urbanclip_ray.captioners").joinpath("preview.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
