"""Both towers of any CLIP-like model by URI: weights of ours, and open_clip's, from files that nobody vouches for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn
from torch.nn import functional as F

from urbanclip_ray.config import ConfigError
from urbanclip_ray.errors import one_line
from urbanclip_ray.model.coca import CoCa
from urbanclip_ray.model.image_tower import LOCAL_DIR, read_model_files, read_tensors, tower_files, tower_px
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.model.tokenize import PAD_ID, TOKENIZER_CONFIG_FILE, TextTokenizer, open_clip_tokenizer
from urbanclip_ray.model.weights import SCALARS, load_model
from urbanclip_ray.storage import exists, join, read_bytes

OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")  # that OpenAI's files hold as tensors


class ImageText(NamedTuple):
    """A frozen model in evaluation mode, what it is shown, and the digest by which its scores name it."""

    module: nn.Module
    tokenizer: TextTokenizer
    image_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    def encode_images(self, pixels: Tensor) -> Tensor:
        """uint8 [rows, px, px, 3] -> float32 [rows, width], of length 1."""
        found = self._towers.encode_image(normalise(pixels, self.mean, self.std))
        return F.normalize((found[0] if isinstance(found, tuple) else found).float(), dim=-1)

    def encode_texts(self, texts: list[str], device: torch.device) -> Tensor:
        """float32 [texts, width], of length 1."""
        tokens = self.tokenizer.encode(texts)
        if not isinstance(self.module, CoCa):  # open_clip's own towers take texts of full length alone
            tokens = F.pad(tokens, (0, self.tokenizer.context_length - tokens.shape[1]), value=PAD_ID)
        found = self._towers.encode_text(tokens.to(device))
        return F.normalize((found[0] if isinstance(found, tuple) else found).float(), dim=-1)

    @property
    def coca(self) -> CoCa:
        """The model, where it is one that writes text; raises ConfigError where it is not."""
        if not isinstance(self.module, CoCa):
            raise ConfigError("it has no text decoder: give weights of a CoCa")
        return self.module

    @property
    def _towers(self) -> Any:
        return self.module  # open_clip's or ours: both have more methods than a Module


def load_image_text(uri: str) -> ImageText:
    """The model that :func:`places.find_weights` found, or ARCHITECTURE@FILE. Nothing is unpickled or fetched.

    Raises ConfigError naming what does not fit, as where there is no text tower.
    """
    folder = uri.removeprefix(LOCAL_DIR)
    if "@" not in folder and _is_ours(folder):
        loaded, files = load_model(folder), tower_files(*read_model_files(folder))
        return ImageText(loaded.model, loaded.tokenizer, loaded.model.image_px, files.mean, files.std, loaded.digest)
    config, weights, name = read_model_files(uri)
    files = tower_files(config, weights, name)
    context_length = _context_length(files.model, name)
    try:
        module = _build(files.model, read_tensors(weights, name))
    except (RuntimeError, TypeError, KeyError, AssertionError) as error:
        raise ConfigError(
            f"{name} does not hold both towers of its config ({one_line(error)}): give weights of a CLIP"
        ) from None
    return ImageText(
        module.eval(), open_clip_tokenizer(context_length), tower_px(files.model), files.mean, files.std, files.digest
    )


def _is_ours(folder: str) -> bool:
    """Whether a folder of weights brings the tokenizer that it was trained with, as ours do."""
    place = join(folder, TOKENIZER_CONFIG_FILE)
    return exists(place) and b'"start_id"' in read_bytes(place)


def _context_length(model: dict[str, Any], name: str) -> int:
    text = model.get("text_cfg")
    if not isinstance(text, dict):
        raise ConfigError(f"{name} has no text tower: give weights of a model of images and texts")
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise ConfigError(f"{name} takes its text tower or tokenizer from a model hub: give a model with CLIP's own tokenizer")
    return int(text.get("context_length", 77))


def _build(model: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    values = {key: value.float() for key, value in state.items() if key not in OPENAI_SIZES}
    settings = {key: value for key, value in model.items() if key != "custom_text"}
    if "multimodal_cfg" in model:
        coca = CoCa(model)
        values |= {name: values[name].reshape(1) for name in SCALARS if name in values}
        coca.inner.load_state_dict(values)
        return coca
    vision = settings["vision_cfg"]
    if vision.get("timm_model_name"):
        settings["vision_cfg"] = vision | {"timm_model_pretrained": False}  # or timm would download
    module: nn.Module = CustomTextCLIP(**settings) if model.get("custom_text") else CLIP(**settings)
    module.load_state_dict(values)
    return module
