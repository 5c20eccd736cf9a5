"""The captioner `land_cover`: a rule-based baseline that describes measured colour and texture.

It is no language model and is called a baseline wherever it shows. Every pixel is sorted into one of seven covers by
its hue, saturation and value; shares, lay-out, texture and mean colour are then put into sentences. Nothing in them
speaks of directions, so a flipped or turned tile keeps its text, but for a word now and then where a measure lies on the
border of two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from urbanclip_ray.captioners.base import Origin, Tile

ORIGIN = Origin("land_cover (rule-based baseline)", "1", "", {})
ANALYSIS_PX = 96  # tiles are reduced to this before they are measured
MIN_SHARE = 0.04  # covers below it are not mentioned

COVERS = {
    "forest": "dark green forest or dense vegetation",
    "green": "green grassland or cropland",
    "dry": "dry grass and brown soil",
    "bare": "bare sand or rock",
    "bright": "bright snow, ice, salt or roofs",
    "grey": "grey built-up or stony ground",
    "water": "dark water or deep shadow",
}


class Measurement(NamedTuple):
    """What is measured of one tile; shares are of its pixels."""

    shares: dict[str, float]
    centre: dict[str, float]  # share of each cover inside the middle half, over its share outside
    patchiness: dict[str, float]  # borders of a cover per pixel of it, 0 one block .. 1 salt and pepper
    edge_density: float
    brightness: float
    saturation: float
    contrast: float
    mean_rgb: tuple[float, float, float]


def classify(rgb: np.ndarray) -> np.ndarray:
    """Cover index of every pixel. rgb: float [height, width, 3] in 0..1; result: int [height, width] into COVERS."""
    high, low = rgb.max(-1), rgb.min(-1)
    value, saturation = high, (high - low) / np.maximum(high, 1e-6)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    names = list(COVERS)
    rules = [
        ("water", (value < 0.14) | ((blue >= green) & (blue > red * 1.1) & (value < 0.5))),
        ("bright", (value > 0.8) & (saturation < 0.18)),
        ("forest", (green >= red) & (green >= blue) & (value < 0.32)),
        ("green", (green >= red * 0.98) & (green > blue)),
        ("grey", saturation < 0.16),
        ("bare", (value > 0.55) & (red >= green)),
    ]
    cover = np.full(value.shape, names.index("dry"))
    taken = np.zeros(value.shape, dtype=bool)
    for name, rule in rules:
        cover[rule & ~taken] = names.index(name)
        taken |= rule
    return cover


def measure(image: Image.Image) -> Measurement:
    """Measure one RGB tile of any size."""
    small = image.resize((ANALYSIS_PX, ANALYSIS_PX), Image.Resampling.BOX)
    rgb = np.asarray(small, dtype=np.float64) / 255
    cover = classify(rgb)
    quarter = ANALYSIS_PX // 4
    inner = np.zeros(cover.shape, dtype=bool)
    inner[quarter:-quarter, quarter:-quarter] = True
    shares, centre, patchiness = {}, {}, {}
    for index, name in enumerate(COVERS):
        mask = cover == index
        shares[name] = float(mask.mean())
        outside = float(mask[~inner].mean())
        centre[name] = float(mask[inner].mean()) / max(outside, 1e-3)
        borders = float((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())
        patchiness[name] = min(1.0, borders / max(4.0 * min(mask.sum(), (~mask).sum()), 1.0))
    grey = rgb.mean(-1)
    gradient = np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1])
    high, low = rgb.max(-1), rgb.min(-1)
    return Measurement(
        shares=shares,
        centre=centre,
        patchiness=patchiness,
        edge_density=float((gradient > 0.06).mean()),
        brightness=float(grey.mean()),
        saturation=float(((high - low) / np.maximum(high, 1e-6)).mean()),
        contrast=float(grey.std()),
        mean_rgb=(float(rgb[..., 0].mean()), float(rgb[..., 1].mean()), float(rgb[..., 2].mean())),
    )


def sentences(seen: Measurement) -> list[str]:
    """The description of a measurement, most important first."""
    ranked = sorted(COVERS, key=lambda name: -seen.shares[name])
    main, *others = [name for name in ranked if seen.shares[name] >= MIN_SHARE]
    parts = [f"{_amount(seen.shares[main])} of the tile is {COVERS[main]}, {_layout(main, seen)}."]
    parts += [f"{_amount(seen.shares[name])} is {COVERS[name]}, {_layout(name, seen)}." for name in others[:3]]
    vegetation = seen.shares["forest"] + seen.shares["green"]
    parts.append(f"Green vegetation takes {_percent(vegetation)} and open ground {_percent(_open_ground(seen))}.")
    parts.append(f"The surface is {_texture(seen.edge_density)} with {_contrast(seen.contrast)} contrast.")
    parts.append(f"Its average colour is {_colour(seen)}.")
    return parts


def _open_ground(seen: Measurement) -> float:
    return seen.shares["dry"] + seen.shares["bare"] + seen.shares["bright"] + seen.shares["grey"]


def _percent(share: float) -> str:
    return f"about {round(share * 20) * 5} percent"


def _amount(share: float) -> str:
    steps = [
        (0.97, "All"),
        (0.85, "Almost all"),
        (0.65, "Most"),
        (0.55, "More than half"),
        (0.45, "About half"),
        (0.29, "About a third"),
        (0.2, "About a quarter"),
        (0.12, "A small part"),
    ]
    return next((word for limit, word in steps if share >= limit), "A little")


def _layout(name: str, seen: Measurement) -> str:
    if seen.shares[name] >= 0.97:
        return "from edge to edge"
    if seen.patchiness[name] > 0.45:
        return "in many scattered specks"
    if seen.patchiness[name] > 0.2:
        return "in broken patches"
    if seen.centre[name] > 1.6:
        return "mainly in the middle"
    if seen.centre[name] < 0.6:
        return "mainly along the edges"
    return "in large areas"


def _texture(density: float) -> str:
    steps = [(0.3, "very rough and busy"), (0.15, "rough"), (0.05, "finely textured"), (0.01, "mostly smooth")]
    return next((word for limit, word in steps if density >= limit), "completely smooth")


def _contrast(contrast: float) -> str:
    return next((word for limit, word in [(0.18, "strong"), (0.1, "clear"), (0.05, "weak")] if contrast >= limit), "no")


def _colour(seen: Measurement) -> str:
    red, green, blue = seen.mean_rgb
    lightness = next(
        (w for limit, w in [(0.7, "very light"), (0.5, "light"), (0.33, "medium"), (0.2, "dark")] if seen.brightness >= limit),
        "very dark",
    )
    if seen.saturation < 0.12:
        tone = "grey"
    elif green >= red and green >= blue:
        tone = "green" if green > 1.08 * red else "olive"
    elif blue > red and blue > green:
        tone = "blue"
    else:
        tone = "reddish brown" if red > 1.3 * green else "brown" if seen.brightness < 0.4 else "tan"
    return f"{lightness} {tone}"


class LandCoverCaptioner:
    """A rule-based baseline: one description of several sentences per tile."""

    def describe(self, tiles: Sequence[Tile]) -> list[list[str] | Exception]:
        return [_describe_one(tile) for tile in tiles]


def _describe_one(tile: Tile) -> list[str] | Exception:
    try:
        return [" ".join(sentences(measure(tile.rgb())))]
    except ValueError as error:  # TileImageError is one: the row keeps the reason
        return error
