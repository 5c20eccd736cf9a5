"""The captioner `coca`: a CoCa that was pretrained here, or published, describes tiles in the words it was pretrained on.

It is asked nothing. Which words it draws is a function of the seed and of the tile's own bytes, so neither the other tiles of a
batch nor the order of tiles decide; what remains is rounding, which differs a little between batches and devices.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from urbanclip_ray.captioners.base import Origin, Tile, UnusableCaptionerError
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.config import CaptionConfig, ConfigError
from urbanclip_ray.imagery import TileImageError, to_square
from urbanclip_ray.storage import digest

if TYPE_CHECKING:
    from urbanclip_ray.model.image_text import ImageText

NAME = "coca"  # in keys of captions: weights are told apart by their revision, wherever they lie
LOOSE_PUNCTUATION = re.compile(r" (?=[.,;:?!%)]|'(?:s|t|re|ve|m|ll|d)\b)")  # as CLIP's tokenizer leaves it
SENTENCE_START = re.compile(r"(^|[.!?…] +)(\w)")


def identify_weights(uri: str) -> ModelReference:
    """The weights at a URI as `model.image_text` reads them; raises ConfigError where they are not a CoCa's."""
    return ModelReference(NAME, _revision(_load(uri)), uri, is_hub=False)


def origin_of(config: CaptionConfig, reference: ModelReference, prompt: str) -> Origin:
    """What decides the texts; `prompt` is empty."""
    decoding = config.decoding
    names = ("max_new_tokens", "temperature", "top_p", "seed") if decoding.temperature > 0 else ("max_new_tokens", "num_beams")
    settings = {name: getattr(decoding, name) for name in names}
    return Origin(reference.name, reference.revision, prompt, settings | {"dtype": _dtype_name(config), "back_end": "coca"})


class CocaCaptioner:
    """A loaded CoCa on this process's device; raises UnusableCaptionerError when it cannot be had."""

    def __init__(self, config: CaptionConfig, reference: ModelReference) -> None:
        import torch

        try:
            self._model = _load(reference.place)
        except ConfigError as error:  # the driver could load it, so it is this node that cannot
            raise UnusableCaptionerError(f"{error}. Put the weights where every node sees them, for example on s3://") from None
        if _revision(self._model) != reference.revision:
            raise UnusableCaptionerError(
                f"caption.model={reference.place} was changed while the run used it: run the command again"
            )
        self._decoding = config.decoding
        self._dtype = getattr(torch, _dtype_name(config))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.module.to(self._device, self._dtype)

    def describe(self, tiles: Sequence[Tile]) -> list[list[str] | Exception]:
        """A batch that does not fit into memory fails as a whole, and is then tried in halves by who asked."""
        pixels = [self._pixels(tile) for tile in tiles]
        images = [each for each in pixels if isinstance(each, np.ndarray)]
        seeds = [
            _seed(self._decoding.seed, tile) for tile, each in zip(tiles, pixels, strict=True) if isinstance(each, np.ndarray)
        ]
        texts = iter(self._generate(np.stack(images), seeds) if images else [])
        return [each if isinstance(each, TileImageError) else next(texts) for each in pixels]

    def _pixels(self, tile: Tile) -> np.ndarray | TileImageError:
        try:
            return to_square(tile.rgb(), self._model.image_px)
        except TileImageError as error:
            return error

    def _generate(self, pixels: np.ndarray, seeds: list[int]) -> list[list[str]]:
        import torch

        from urbanclip_ray.model.generation import generate_texts
        from urbanclip_ray.model.preprocess import normalise

        model = self._model
        images = normalise(torch.from_numpy(pixels).to(self._device), model.mean, model.std).to(self._dtype)
        written = generate_texts(model.coca, model.tokenizer, images, self._decoding, seeds)
        return [[as_sentences(text) for text in texts] for texts in written]


def as_sentences(text: str) -> str:
    """A text as one writes it: both tokenizers know small letters alone, and sentences are told apart by their capitals."""
    joined = LOOSE_PUNCTUATION.sub("", text)
    return SENTENCE_START.sub(lambda found: found[1] + found[2].upper(), joined)


def _load(uri: str) -> ImageText:
    from urbanclip_ray.model.image_text import load_image_text

    try:
        model = load_image_text(uri)
        model.coca  # noqa: B018 raises where there is no decoder
    except ConfigError as error:
        raise ConfigError(f"caption.model={uri}: {error}") from None
    return model


def _revision(model: ImageText) -> str:
    """Of weights, config and tokenizer: without the last, ids are not words."""
    tokenizer = model.tokenizer
    return digest([model.digest, tokenizer.backend.get_vocab(), tokenizer.start_id, tokenizer.end_id])[:16]


def _dtype_name(config: CaptionConfig) -> str:
    """Weights are kept in fp32, whatever a file holds."""
    return "float32" if config.dtype == "auto" else config.dtype


def _seed(seed: int, tile: Tile) -> int:
    """From the tile's bytes, as the key of its captions: equal tiles have equal texts."""
    return int.from_bytes(hashlib.sha256(f"{seed} {tile.sha256}".encode()).digest()[:8], "big")
