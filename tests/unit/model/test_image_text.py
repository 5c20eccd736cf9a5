"""Both towers by URI: open_clip's own model is the reference, and ours that of its own folder."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional as F

from urbanclip_ray.config import ConfigError, ModelConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.image_text import load_image_text
from urbanclip_ray.model.tokenize import open_clip_tokenizer, train_bpe
from urbanclip_ray.model.weights import weight_files

CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
TEXTS = ["A wide river.", "Many green trees stand along a long and winding road near houses.", ""]
CPU = torch.device("cpu")


def write_clip(folder, model, config=CLIP):
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}})
    )
    (folder / "open_clip_model.safetensors").write_bytes(safetensors.torch.save(model.state_dict()))
    return str(folder)


@pytest.mark.parametrize("kind", ["clip", "custom_text"])
def test_a_model_of_open_clip_gives_its_own_vectors(tmp_path, kind):
    torch.manual_seed(1)
    config = CLIP | ({"custom_text": True} if kind == "custom_text" else {})
    model = (open_clip.CLIP(**CLIP) if kind == "clip" else open_clip.CustomTextCLIP(**CLIP)).eval()
    loaded = load_image_text(write_clip(tmp_path / "clip", model, config))
    transform = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    images = torch.stack([transform(Image.fromarray(image)) for image in PIXELS])
    tokens = open_clip.SimpleTokenizer(context_length=20)(TEXTS)
    with torch.inference_mode():
        expected = F.normalize(model.encode_image(images), dim=-1), F.normalize(model.encode_text(tokens), dim=-1)
        found = loaded.encode_images(torch.from_numpy(PIXELS)), loaded.encode_texts(TEXTS, CPU)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-5)


def test_weights_of_ours_use_the_tokenizer_that_they_were_trained_with(tmp_path):
    tokenizer = train_bpe(TEXTS * 4, vocab_size=300, context_length=76)
    config = open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size)
    model = build_model(config, seed=0).eval()
    (tmp_path / "ours").mkdir()
    for name, data in weight_files(model, tokenizer).items():
        (tmp_path / "ours" / name).write_bytes(data)
    loaded = load_image_text(str(tmp_path / "ours"))
    with torch.inference_mode():
        expected = model(None, tokenizer.encode(TEXTS)).text
        np.testing.assert_allclose(loaded.encode_texts(TEXTS, CPU).numpy(), expected.numpy(), atol=1e-6)
        pixels = torch.from_numpy(PIXELS[:, :16, :16])
        assert loaded.encode_images(pixels).norm(dim=-1).numpy() == pytest.approx([1, 1, 1], abs=1e-5)
    assert loaded.digest == load_image_text(f"local-dir:{tmp_path / 'ours'}").digest


def test_a_model_without_a_text_tower_or_with_another_s_is_refused(tmp_path):
    model = open_clip.CLIP(**CLIP)
    only_images = {name: value for name, value in CLIP.items() if name != "text_cfg"}
    with pytest.raises(ConfigError, match="has no text tower"):
        load_image_text(write_clip(tmp_path / "images", model, only_images))
    hub = CLIP | {"text_cfg": {"hf_model_name": "roberta-base"}}
    with pytest.raises(ConfigError, match="from a model hub"):
        load_image_text(write_clip(tmp_path / "hub", model, hub))
    other = CLIP | {"text_cfg": CLIP["text_cfg"] | {"width": 64}}
    with pytest.raises(ConfigError, match="does not hold both towers"):
        load_image_text(write_clip(tmp_path / "other", model, other))


def test_clip_s_own_tokenizer_is_the_one_of_open_clip():
    ours = open_clip_tokenizer(20).encode(TEXTS)
    theirs = open_clip.SimpleTokenizer(context_length=20)(TEXTS)
    assert torch.equal(F.pad(ours, (0, 20 - ours.shape[1])), theirs)
