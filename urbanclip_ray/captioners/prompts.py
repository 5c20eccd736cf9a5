"""What each tile is asked: the config's prompt as it stands, or its templates filled with the tile's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from urbanclip_ray.captioners.texts import clean_text
from urbanclip_ray.config import CaptionConfig, PixelsConfig
from urbanclip_ray.config.prompts import PromptFieldError, fill_template
from urbanclip_ray.geo.earth import ground_resolution_m

METADATA_COLUMNS = ["region", "width", "west", "south", "east", "north"]
ROWS_PER_BATCH = 8_192
MAX_NAME_CHARACTERS = 100  # of a region: a prompt is no place for an essay


class FilledPrompt(NamedTuple):
    """A prompt as tiles are asked it, or the template and the `reason` why it cannot be filled for them."""

    text: str
    reason: str | None = None


def fill_prompts(tiles: pa.Table, config: CaptionConfig, pixels: PixelsConfig) -> tuple[list[FilledPrompt], np.ndarray]:
    """The prompts of many tiles (`METADATA_COLUMNS`, where the config has templates), each once, and whom they are for.

    The array has each tile's places in the list, [tiles, prompts of a tile], in the config's order.
    """
    if not config.prompts:
        return [FilledPrompt(prompt) for prompt in config.asked()], np.zeros((tiles.num_rows, 1), np.int32)
    place_of: dict[FilledPrompt, int] = {}
    places = np.zeros((tiles.num_rows, len(config.asked())), np.int32)
    rows = (row for batch in tiles.select(METADATA_COLUMNS).to_batches(ROWS_PER_BATCH) for row in batch.to_pylist())
    for tile_places, row in zip(places, rows, strict=True):
        for number, (template, prompt) in enumerate(zip(config.asked(), prompts_of(row, config, pixels), strict=True)):
            filled = FilledPrompt(prompt) if isinstance(prompt, str) else FilledPrompt(template, str(prompt))
            tile_places[number] = place_of.setdefault(filled, len(place_of))
    return list(place_of), places


def prompts_of(tile: Mapping[str, Any], config: CaptionConfig, pixels: PixelsConfig) -> list[str | PromptFieldError]:
    """The prompts for one tile (`METADATA_COLUMNS`) in the config's order; an error stands for one that cannot be filled."""
    if not config.prompts:
        return list(config.asked())  # as it stands: braces in it are braces
    known = describe_metadata(tile, pixels)
    return [_filled(template, known) for template in config.asked()]


def _filled(template: str, known: Mapping[str, str]) -> str | PromptFieldError:
    try:
        return fill_template(template, known)
    except PromptFieldError as error:
        return error


def describe_metadata(tile: Mapping[str, Any], pixels: PixelsConfig) -> dict[str, str]:
    """What is known of a tile, by the names of the prompts' fields. Margins that are cut off are not part of its width."""
    known: dict[str, str] = {}
    if city := " ".join(clean_text(tile["region"][: 2 * MAX_NAME_CHARACTERS]).split())[:MAX_NAME_CHARACTERS]:
        known["city"] = city
    bounds = [tile[edge] for edge in ("west", "south", "east", "north")]
    if None in bounds or not tile["width"]:
        return known
    west, south, east, north = bounds
    m_per_px = ground_resolution_m((south + north) / 2, west, east, tile["width"])
    width_px = tile["width"] - pixels.crop_left_px - pixels.crop_right_px
    if m_per_px > 0 and width_px > 0:
        known["ground_resolution_m"] = two_digits(m_per_px)
        known["width_m"] = two_digits(m_per_px * width_px)
    return known


def two_digits(value: float) -> str:
    """A number as one says it: tiles of one zoom and city get one prompt, though their widths differ by centimetres."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:.0f}" if rounded >= 10 else f"{rounded:g}"
