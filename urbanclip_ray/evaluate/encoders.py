"""Any frozen image encoder by URI: weights of ours, trained baselines, and open_clip weights of any CLIP."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from urbanclip_ray.config import Features
from urbanclip_ray.evaluate.trained.encoder_files import ENCODER_CONFIG_FILE, input_of, load_encoder_files
from urbanclip_ray.evaluate.trained.loop import Input
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.image_tower import TowerFeatures, fill_tower, read_tower, tower_px
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.storage import exists, join


class Encoder(NamedTuple):
    """A frozen encoder, what it is shown, and the digest by which its embeddings name it."""

    module: nn.Module  # normalised images [rows, 3, px, px] -> vectors [rows, width]
    shown: Input
    digest: str
    unit_length: bool  # whether vectors, and the mean over a tile's views, have length 1

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 [rows, px, px, 3] -> what the module takes."""
        return normalise(pixels, self.shown.mean, self.shown.std)


def load_encoder(uri: str, features: Features = "embedding", untrained_seed: int | None = None) -> Encoder:
    """The encoder of weights that :func:`places.find_weights` found. Nothing is unpickled, no text tower is built.

    `features` says what is taken of an encoder with blocks; others have their one vector. With `untrained_seed` the
    architecture, a CoCa of ours, has the random weights that a pretraining of that seed starts from. Raises ConfigError naming
    the file that does not fit.
    """
    if "@" not in uri and exists(join(uri, ENCODER_CONFIG_FILE)):
        loaded = load_encoder_files(uri)
        is_tower = loaded.plan.kind == "tower"
        module = TowerFeatures(loaded.module, features) if is_tower else loaded.module
        return Encoder(module.eval(), input_of(loaded.plan), loaded.digest, is_tower and features == "embedding")
    files = read_tower(uri)
    tower, digest = fill_tower(files, uri), files.digest
    if untrained_seed is not None:
        tower = build_model(files.model, untrained_seed).inner.visual
        digest = f"{digest}-untrained-{untrained_seed}"
    shown = Input(tower_px(files.model), files.mean, files.std)
    return Encoder(TowerFeatures(tower, features).eval(), shown, digest, features == "embedding")
