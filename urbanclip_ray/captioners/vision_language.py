"""The captioner `transformers`: any image-text-to-text model of the transformers library, and BLIP.

A model with a chat template is asked the tile's prompt as a user's turn with the tile, and its answer is the caption. A model
whose processor marks the image's place in the prompt gets the prompt as it stands. A model like BLIP knows neither: it
takes the prompt as the caption's first words and goes on from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from urbanclip_ray.captioners.base import Origin, Tile, UnusableCaptionerError
from urbanclip_ray.captioners.model_files import ModelReference, fetch_model
from urbanclip_ray.config import CaptionConfig, DecodingConfig
from urbanclip_ray.errors import one_line
from urbanclip_ray.imagery import TileImageError


class GenerationError(RuntimeError):
    """The model could not describe one tile."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"the model failed: {detail}")


class Question(NamedTuple):
    """One image and what is asked about it."""

    image: Image.Image
    prompt: str


def origin_of(config: CaptionConfig, reference: ModelReference, prompt: str) -> Origin:
    """What decides the model's texts. The chat template is a file of the model, so the revision covers it."""
    decoding = {name: value for name, value in config.decoding.content().items() if name != "num_samples"}
    if config.decoding.temperature == 0:
        decoding = {name: decoding[name] for name in ("max_new_tokens", "num_beams")}  # nothing is drawn
    return Origin(reference.name, reference.revision, prompt, decoding | {"dtype": config.dtype})


class VisionLanguageCaptioner:
    """A loaded model with its processor on this process's device; raises UnusableCaptionerError when it cannot be loaded.

    With a temperature, texts depend on the seed and on the tiles that were described together.
    """

    def __init__(self, config: CaptionConfig, reference: ModelReference) -> None:
        folder = fetch_model(reference, config.cache_folder)
        self._decoding = config.decoding
        self._processor, self._model = _load(folder, config, reference)
        self._has_chat = getattr(self._processor, "chat_template", None) is not None
        self._most_images: int | None = None  # that fit in memory together, once they did not
        self._answers = self._has_chat or getattr(self._processor, "image_token", None) is not None

    def describe(self, tiles: Sequence[Tile]) -> list[list[str] | Exception]:
        """Tiles with one prompt are described together: BLIP does not hide what fills up a shorter prompt."""
        questions = [_question(tile) for tile in tiles]
        texts = {
            prompt: iter(self._texts([each for each in questions if isinstance(each, Question) and each.prompt == prompt]))
            for prompt in dict.fromkeys(tile.prompt for tile in tiles)
        }
        return [next(texts[each.prompt]) if isinstance(each, Question) else each for each in questions]

    def _texts(self, images: list[Question]) -> list[list[str] | Exception]:
        """Texts or errors of images; a batch that fails is halved until the image at fault stands alone.

        What ran out of memory is not tried at that size again.
        """
        import torch

        if not images:
            return []
        step = self._most_images or len(images)
        if len(images) > step:
            return [texts for at in range(0, len(images), step) for texts in self._texts(images[at : at + step])]
        half = len(images) // 2
        try:
            return list(self._generate(images))
        except torch.OutOfMemoryError as error:
            failure = GenerationError(one_line(error))
            self._most_images = max(half, 1)
            torch.cuda.empty_cache()
        except Exception as error:  # whatever a model stumbles over
            failure = GenerationError(one_line(error))
        if len(images) == 1:
            return [failure]
        return self._texts(images[:half]) + self._texts(images[half:])

    def _generate(self, questions: list[Question]) -> list[list[str]]:
        import torch

        images, prompts = [list(column) for column in zip(*questions, strict=True)]
        torch.manual_seed(_seed(self._decoding.seed, images))
        inputs = self._inputs(images, prompts).to(self._model.device, dtype=self._model.dtype)
        with torch.inference_mode():
            output = self._model.generate(**inputs, **_options(self._decoding))
        if self._answers:
            output = _without_prompt(output, inputs["input_ids"])
        words = self._processor.batch_decode(output, skip_special_tokens=True)
        each = self._decoding.num_samples
        return [[text.strip() for text in words[at : at + each]] for at in range(0, len(words), each)]

    def _inputs(self, images: list[Image.Image], prompts: list[str]) -> Any:
        if self._has_chat:
            turns = [
                [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
                for image, prompt in zip(images, prompts, strict=True)
            ]
            return self._processor.apply_chat_template(
                turns,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        if not any(prompts):
            return self._processor(images=images, return_tensors="pt")
        return self._processor(images=images, text=prompts, padding=True, return_tensors="pt")


def _load(folder: str, config: CaptionConfig, reference: ModelReference) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    safely = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(folder, **safely)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=config.dtype, use_safetensors=True, device_map=config.device_map or None, **safely
        )
        if not config.device_map:
            model.to("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # foreign files: the library raises whatever it stumbles over
        raise UnusableCaptionerError(
            f"caption.model={reference.place} cannot be loaded as an image-text-to-text model of the transformers library: "
            f"{one_line(error)}. Choose a model that takes images and writes text, with safetensors weights and its processor"
        ) from None
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise UnusableCaptionerError(
            f"caption.model={reference.place} has no processor for images and text: choose a model that comes with one"
        )
    processor.tokenizer.padding_side = "left"  # a model goes on from the last position of its prompt
    return processor, model.eval()


def _question(tile: Tile) -> Question | TileImageError:
    try:
        return Question(tile.rgb(), tile.prompt)
    except TileImageError as error:
        return error


def _options(decoding: DecodingConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_new_tokens": decoding.max_new_tokens,
        "num_beams": decoding.num_beams,
        "num_return_sequences": decoding.num_samples,
        "do_sample": decoding.temperature > 0,
    }
    if decoding.temperature > 0:
        options |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}  # 0: no limit of its own
    return options


def _seed(seed: int, images: list[Image.Image]) -> int:
    """A seed from the images, so that a batch draws the same words wherever and whenever it is described."""
    hasher = hashlib.sha256(str(seed).encode())
    for image in images:
        hasher.update(image.tobytes())
    return int.from_bytes(hasher.digest()[:8], "big") >> 1


def _without_prompt(output: Any, prompt: Any) -> Any:
    """Token ids [images x samples, length] without the prompt [images, length] that decoder-only models repeat."""
    import torch

    repeated = prompt.repeat_interleave(output.shape[0] // prompt.shape[0], dim=0)
    length = prompt.shape[1]
    return output[:, length:] if torch.equal(output[:, :length], repeated) else output
