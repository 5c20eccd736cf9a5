"""Text to tile search: the tiles nearest to a text, by the weights that embedded them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from urbanclip_ray.config import ConfigError
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.page import render_page
from urbanclip_ray.evaluate.prompts import vectors_of
from urbanclip_ray.evaluate.thumbnails import read_images, thumbnail_uri
from urbanclip_ray.storage import Dataset, join, write_bytes
from urbanclip_ray.terminal import open_console

if TYPE_CHECKING:
    from urbanclip_ray.model.weights import LoadedModel

THUMBNAIL_PX = 224


class SearchError(UserError, ValueError):
    """A text that cannot be searched for; the message says what to give instead."""


class FoundTile(NamedTuple):
    """A tile and the cosine of its embedding and the text's, which compares with that of other tiles for this text alone."""

    tile_id: str
    score: float


def search_tiles(text: str, embeddings: Dataset, weights_uri: str, num_tiles: int = 12) -> list[FoundTile]:
    """The tiles nearest to a text, nearest first; tiles that are equally near come in the order of their ids.

    Raises SearchError for an empty text, ConfigError where the weights are not those that made the embeddings.
    """
    from urbanclip_ray.evaluate.retrieval import embed_texts

    if not text.strip():
        raise SearchError("the text to search for is empty: write what a tile should show, such as 'a harbour with ships'")
    loaded = load_matching(embeddings, weights_uri)
    rows = embeddings.read(["tile_id", "embedding"]).sort_by("tile_id").combine_chunks()
    scores = vectors_of(rows) @ embed_texts(loaded, [text])[0]
    order = np.argsort(-scores, kind="stable")[:num_tiles]
    return [FoundTile(rows["tile_id"][int(at)].as_py(), float(scores[at])) for at in order]


def load_matching(embeddings: Dataset, weights_uri: str) -> LoadedModel:
    """The model whose image side made the embeddings; other weights have another space, and their texts mean nothing in it."""
    from urbanclip_ray.model.weights import load_model

    loaded = load_model(weights_uri)
    made_by = embeddings.manifest.facts["weights"]["digest"]
    if made_by != loaded.digest:
        raise ConfigError(
            f"{embeddings.uri} was made by weights {made_by}, but {weights_uri} has {loaded.digest}: texts and tiles need "
            "the same weights, so embed the tiles again"
        )
    return loaded


def search_table(text: str, found: list[FoundTile]) -> Table:
    table = Table(title=Text(f"tiles nearest to {text!r}"), title_justify="left")  # no markup
    for name in ("", "tile", "cosine"):
        table.add_column(name, justify="left" if name == "tile" else "right", overflow="fold")
    for place, tile in enumerate(found, start=1):
        table.add_row(str(place), Text(tile.tile_id), f"{tile.score:.3f}")
    return table


def search_run(run: Any, text: str, num_tiles: int) -> None:
    """Print the table of a run whose tiles are embedded (`stages.Run`), and where its page was written."""
    found = search_tiles(text, run.datasets["embeddings"], run.weights_uri(), num_tiles)
    console = open_console()
    console.print(search_table(text, found))
    page = write_search_page(text, found, run.datasets["tiles"], run.uri)
    console.print(f"tiles: {page}", highlight=False, soft_wrap=True, markup=False)


def write_search_page(text: str, found: list[FoundTile], tiles: Dataset, run_uri: str) -> str:
    """Write `<run>/search/<digest of the text>.html`, one file that needs no other; returns its URI."""
    images = read_images(tiles, [tile.tile_id for tile in found])
    page = render_page(
        "search.html",
        text=text,
        num_tiles=tiles.manifest.rows_out,
        rows=[tile._asdict() | {"image": thumbnail_uri(images.get(tile.tile_id), THUMBNAIL_PX)} for tile in found],
    )
    uri = join(run_uri, "search", f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.html")
    write_bytes(uri, page.encode())
    return uri
