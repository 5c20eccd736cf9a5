"""The image side of any open_clip model, from files that nobody vouches for: safetensors, or tensors alone of a .pt.

No captions, tokenizer or text tower are needed. A pickle may name any code, so it is read by torch's reader of bare tensors.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from typing import Any, NamedTuple

import safetensors.torch
import torch
from open_clip.factory import get_model_config, list_models
from open_clip.model import _build_vision_tower
from torch import Tensor, nn
from torch.nn import functional as F

from urbanclip_ray.config import ConfigError, Features
from urbanclip_ray.errors import one_line
from urbanclip_ray.model.attention import use_own_attention
from urbanclip_ray.model.preprocess import IMAGE_MEAN, IMAGE_STD
from urbanclip_ray.model.weights import CONFIG_FILE, WEIGHTS_FILE
from urbanclip_ray.storage import join, read_bytes

PREFIX = "visual."  # of the image tower's values in open_clip's files
PICKLED_FILE = "open_clip_pytorch_model.bin"  # beside the config where a published model has no safetensors
LOCAL_DIR = "local-dir:"
STATE_KEY = "state_dict"  # of a training's checkpoint, as SkyScript's
PARALLEL_PREFIX = "module."  # of weights saved by a data-parallel wrapper


class TowerFiles(NamedTuple):
    """What an image tower is built of: an open_clip model config, mean and deviation of its pixels, and its values."""

    model: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    state: dict[str, Tensor]
    digest: str


def read_tower(uri: str) -> TowerFiles:
    """The image tower of a folder in open_clip's layout (also `local-dir:FOLDER`), or of `ARCHITECTURE@FILE`.

    Raises ConfigError where it is neither, or where a file holds anything but tensors.
    """
    return tower_files(*read_model_files(uri))


def read_model_files(uri: str) -> tuple[bytes, bytes, str]:
    """The config and the weights behind a URI as :func:`read_tower` takes it, and the name of the file of weights."""
    uri = uri.removeprefix(LOCAL_DIR)
    architecture, _, file = uri.partition("@")
    if file and "/" not in architecture:
        found = get_model_config(architecture)
        if found is None:
            raise ConfigError(f"{uri}: {architecture!r} is no model of open_clip; it has {', '.join(list_models())}")
        config = json.dumps({"model_cfg": found}).encode()
        return config, _read(file, f"{uri} names"), file
    config_file = join(uri, CONFIG_FILE)
    config = _read(config_file, f"{uri} is not a folder of weights: it needs")
    try:
        return config, read_bytes(join(uri, WEIGHTS_FILE)), join(uri, WEIGHTS_FILE)
    except FileNotFoundError:
        file = join(uri, PICKLED_FILE)
        return config, _read(file, f"{uri} is not a folder of weights: it needs {WEIGHTS_FILE} or"), file


def _read(uri: str, problem: str) -> bytes:
    try:
        return read_bytes(uri)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{problem} {uri}, which is not there") from None


def tower_files(config: bytes, weights: bytes, name: str) -> TowerFiles:
    """The image tower in the files of a model; `name` is the file of weights, for errors and for its kind."""
    try:
        tree = json.loads(config)
        model, preprocess = tree["model_cfg"], tree.get("preprocess_cfg") or {}
        model["embed_dim"], model["vision_cfg"]["image_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}: {CONFIG_FILE} beside it describes no open_clip model ({one_line(error)})") from None
    state = read_tensors(weights, name)
    own = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    if not own:
        raise ConfigError(f"{name} has no values named {PREFIX}*: it is no open_clip model with an image tower")
    mean, std = preprocess.get("mean") or IMAGE_MEAN, preprocess.get("std") or IMAGE_STD
    digest = hashlib.sha256(weights + config).hexdigest()[:16]
    return TowerFiles(model, tuple(mean), tuple(std), own, digest)


def read_tensors(data: bytes, name: str) -> dict[str, Tensor]:
    """Named tensors of a safetensors file, or of a .pt that holds nothing but tensors and plain values.

    Raises ConfigError for a pickle that wants to run code, a TorchScript archive, or anything else.
    """
    try:
        if name.endswith(".safetensors"):
            return dict(safetensors.torch.load(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        state = state.get(STATE_KEY, state)
        named = {str(key).removeprefix(PARALLEL_PREFIX): value for key, value in state.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, safetensors.SafetensorError) as error:
        raise ConfigError(
            f"{name} does not hold tensors alone and is not opened further ({one_line(error)}): give its state_dict, best as "
            "safetensors"
        ) from None
    return {key: value for key, value in named.items() if isinstance(value, Tensor)}


def make_tower(model: dict[str, Any], seed: int) -> nn.Module:
    """The image tower of an open_clip model config with random weights: images [rows, 3, px, px] -> [rows, embed_dim]."""
    vision = model["vision_cfg"] | {"output_tokens": False}
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False  # or timm would download
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower: nn.Module = _build_vision_tower(model["embed_dim"], vision, model.get("quick_gelu", False))
    use_own_attention(tower)
    return tower


def fill_tower(files: TowerFiles, name: str) -> nn.Module:
    """The tower with its values, in evaluation mode; raises ConfigError where they do not fit its config."""
    try:
        tower = make_tower(files.model, seed=0)
        tower.load_state_dict({key: value.float() for key, value in files.state.items()})
    except (RuntimeError, TypeError, KeyError, AssertionError) as error:
        raise ConfigError(f"{name}: its image tower does not fit its config ({one_line(error)})") from None
    return tower.eval()


def tower_px(model: dict[str, Any]) -> int:
    size = model["vision_cfg"]["image_size"]
    return int(size[0] if isinstance(size, list | tuple) else size)


class TowerFeatures(nn.Module):
    """What a probe is given of a tower: its output at length 1, or that and the statistics of three of its blocks.

    `tokens`: [output, mean and standard deviation over the places of blocks at a third, two thirds and the end], [rows,
    embed_dim + 6 x width] where blocks have one width. The output is what the loss was taken of, so it drops what texts do not
    speak of; blocks before it still hold texture.
    """

    def __init__(self, tower: nn.Module, features: Features) -> None:
        super().__init__()
        self.tower: Any = tower  # open_clip's, which has more methods than a Module
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        if self.features == "embedding":
            found = self.tower(images)
            pooled: Tensor = found[0] if isinstance(found, tuple) else found
            return F.normalize(pooled.float(), dim=-1)
        found = self.tower.forward_intermediates(images)
        parts = [F.normalize(found["image_features"].float(), dim=-1)]
        blocks = found["image_intermediates"]
        for place in sorted({-(-len(blocks) * third // 3) - 1 for third in (1, 2, 3)}):
            places = blocks[place].float().flatten(2)  # [rows, width, high x wide]
            parts += [places.mean(dim=2), places.std(dim=2)]
        return torch.cat(parts, dim=1)
