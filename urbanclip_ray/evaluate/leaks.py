"""Named checks for what makes a score say less than it seems to: run by every probe before anything is fitted.

They look at labels of test tiles, so that nothing is ever chosen by what they find: they warn, or they refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from urbanclip_ray.config import SplitConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.fits import Inputs
from urbanclip_ray.evaluate.splits import PARTS
from urbanclip_ray.evaluate.training_tiles import training_tiles
from urbanclip_ray.storage import Dataset
from urbanclip_ray.terminal import open_console

COPY_CORRELATION = 0.999  # above it a column is the label, not a measurement of the image
MIN_TILES = 10  # below it any column may correlate by chance
TWIN_COSINE = 0.99999  # of centred vectors: the same image, perhaps compressed again
ROWS_AT_ONCE = 1024


class LeakError(UserError, ValueError):
    """A leak that makes the scores worthless; the message names it, the count and the fix."""


class Leak(NamedTuple):
    """What a check found. `num_found` is in the unit that the detail names."""

    name: str
    severity: Literal["error", "warning"]
    num_found: int
    detail: str


def find_leaks(
    inputs: Inputs, rows: pa.Table, places: pa.Table, embeddings: dict[str, Dataset], split: SplitConfig
) -> list[Leak]:
    """Everything that the checks find, errors first.

    `rows` are of :data:`schema.SPLITS`; `places` are `tile_id` and `sha256` in the order of the inputs' tiles.

    - `label_in_features`: a column of a representation is an indicator, up to scale.
    - `tile_in_two_parts`: the splits name a tile twice in one draw.
    - `pretrained_on_test`: weights were trained on test tiles of the outer split, and the recipe does not say transductive.
    - `same_image_in_train_and_test`: the bytes of a test tile's image are those of a training or validation tile.
    - `same_embedding_in_train_and_test`: so is, very nearly, its vector.
    """
    found = [
        *_label_in_features(inputs),
        *_tile_in_two_parts(rows),
        *_pretrained_on_test(inputs, places, embeddings, split),
        *_same_image(inputs, places),
        *_same_embedding(inputs),
    ]
    return sorted(found, key=lambda leak: leak.severity != "error")


def refuse_leaks(leaks: list[Leak]) -> None:
    """Raise :class:`LeakError` where one of them is an error."""
    if errors := [leak for leak in leaks if leak.severity == "error"]:
        named = "; ".join(f"{leak.name}: {leak.detail}" for leak in errors)
        raise LeakError(f"{named}. Correct it, or set probe.refuse_leaks=false to publish scores that say so")


def show_leaks(leaks: list[Leak]) -> None:
    """Print them; nothing where there are none."""
    if not leaks:
        return
    table = Table(title="leaks", title_justify="left")
    for name in ("check", "", "count", "what was found"):
        table.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
    for leak in leaks:
        table.add_row(leak.name, leak.severity, f"{leak.num_found:,}", leak.detail)
    open_console().print(table, markup=False)


def _label_in_features(inputs: Inputs) -> Iterator[Leak]:
    for name, x in inputs.features.items():
        for indicator, y in inputs.targets.items():
            usable = ~np.isnan(y)
            if name in ("mean", "coordinates") or usable.sum() < MIN_TILES or np.ptp(y[usable]) == 0:
                continue
            columns = np.flatnonzero(np.abs(_correlations(x[usable], y[usable])) > COPY_CORRELATION)
            if len(columns):
                yield Leak(
                    "label_in_features",
                    "error",
                    len(columns),
                    f"column {columns[0]} of {name!r} is the indicator {indicator!r} up to scale (|correlation| above "
                    f"{COPY_CORRELATION}; {len(columns)} such columns): take the label out of what is embedded",
                )


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of every column with the target [width]; 0 for a constant column."""
    x, y = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64), y - y.mean()
    size = np.sqrt((x**2).sum(axis=0) * (y**2).sum())
    correlations: np.ndarray = np.divide(x.T @ y, size, out=np.zeros(x.shape[1]), where=size > 0)
    return correlations


def _tile_in_two_parts(rows: pa.Table) -> Iterator[Leak]:
    keys = ["tile_id", "split", "seed", "fold"]
    if repeated := int(rows.select(keys).to_pandas().duplicated().sum()):
        detail = f"the splits name {repeated} tiles twice in one draw: make the splits again"
        yield Leak("tile_in_two_parts", "error", repeated, detail)


def _pretrained_on_test(inputs: Inputs, places: pa.Table, embeddings: dict[str, Dataset], split: SplitConfig) -> Iterator[Leak]:
    if split.transductive:
        return
    held_out = np.any([own == PARTS.index("test") for draw, own in inputs.parts.items() if draw.split == split.outer], axis=0)
    for name, dataset in embeddings.items():
        seen = training_tiles(dataset)
        if seen is None or name not in inputs.features:
            continue
        if count := int((pc.is_in(places["tile_id"], value_set=seen).to_numpy() & held_out).sum()):
            yield Leak(
                "pretrained_on_test",
                "error",
                count,
                f"the weights of {name!r} were trained on {count} test tiles of the outer split {split.outer!r}: pretrain on "
                "this split, or set split.transductive=true, which every score then carries",
            )


def _same_image(inputs: Inputs, places: pa.Table) -> Iterator[Leak]:
    codes = pc.dictionary_encode(places["sha256"].combine_chunks()).indices
    codes = pc.fill_null(codes, -1).to_numpy()
    yield from _twins(inputs, codes, "same_image_in_train_and_test", "the very image of")


def _same_embedding(inputs: Inputs) -> Iterator[Leak]:
    """By one representation, our own where it is there: an image that looks the same to it is the same to the others."""
    names = [name for name, x in inputs.features.items() if name not in ("coordinates", "colour") and x.shape[1] > 1]
    if names:
        name = "pretrained" if "pretrained" in names else names[0]
        codes = _twin_codes(inputs.features[name])
        yield from _twins(inputs, codes, "same_embedding_in_train_and_test", f"very nearly the {name!r} vector of")


def _twin_codes(x: np.ndarray) -> np.ndarray:
    """One code for tiles whose vectors point the same way from the mean: the first of them. No other tile has it."""
    centred = x.astype(np.float32) - x.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    codes = np.arange(len(x))
    for first in range(0, len(x), ROWS_AT_ONCE):
        alike = centred[first : first + ROWS_AT_ONCE] @ centred.T > TWIN_COSINE
        rows = first + np.flatnonzero(alike.any(axis=1))  # a vector that is the mean has no direction
        codes[rows] = alike[rows - first].argmax(axis=1)
    while (codes[codes] != codes).any():  # a twin's twin
        codes = codes[codes]
    return codes


def _twins(inputs: Inputs, codes: np.ndarray, name: str, what: str) -> Iterator[Leak]:
    """By split: test tiles, in any draw, that share a code (not -1) with a tile of train or validation of that draw."""
    for split in dict.fromkeys(draw.split for draw in inputs.parts):
        found = np.zeros(len(codes), dtype=bool)
        for draw, parts in inputs.parts.items():
            if draw.split == split:
                test = parts == PARTS.index("test")
                known = codes[(parts >= 0) & ~test]
                found |= test & (codes >= 0) & np.isin(codes, known)
        if count := int(found.sum()):
            detail = f"{count} test tiles of split {split!r} have {what} a tile in train or val: leave one of each out"
            yield Leak(name, "warning", count, detail)
