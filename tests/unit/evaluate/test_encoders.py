"""Any image encoder by URI: open_clip's own model as the reference; files that want to run code are refused."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional as F

from urbanclip_ray.config import ConfigError, ModelConfig
from urbanclip_ray.evaluate.encoders import load_encoder
from urbanclip_ray.evaluate.training_tiles import training_tiles
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.image_tower import TowerFeatures, make_tower
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.model.weights import load_model, weight_files
from urbanclip_ray.places import find_weights
from urbanclip_ray.storage import open_dataset, publish

CLIP = {  # no CoCa: a plain CLIP with its own pixel statistics
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 400, "width": 32, "heads": 2, "layers": 1},
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip() -> torch.nn.Module:
    torch.manual_seed(1)
    return open_clip.CLIP(**CLIP).eval()


def write_clip(folder: Path, clip: torch.nn.Module, data: bytes | None = None, name="open_clip_model.safetensors") -> str:
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": CLIP, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / name).write_bytes(safetensors.torch.save(clip.state_dict()) if data is None else data)
    return str(folder)


def pickled(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def encode(uri: str, pixels: np.ndarray = PIXELS, **options) -> np.ndarray:
    encoder = load_encoder(uri, **options)
    with torch.inference_mode():
        return encoder.module(encoder.prepare(torch.from_numpy(pixels))).numpy()


def reference(clip: torch.nn.Module) -> np.ndarray:
    """Through open_clip's own preprocessing and model."""
    transform = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    images = torch.stack([transform(Image.fromarray(image)) for image in PIXELS])
    with torch.inference_mode():
        return F.normalize(clip.encode_image(images), dim=-1).numpy()


def test_a_plain_clip_gives_open_clips_vectors_with_its_own_pixel_statistics(clip, tmp_path):
    uri = write_clip(tmp_path / "clip", clip)
    np.testing.assert_allclose(encode(uri), reference(clip), atol=1e-5)
    np.testing.assert_allclose(encode(f"local-dir:{uri}"), reference(clip), atol=1e-5)


@pytest.mark.parametrize("wrap", [dict, lambda s: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_a_checkpoint_of_tensors_alone_is_read_from_a_pt(clip, tmp_path, wrap):
    uri = write_clip(tmp_path / "clip", clip, pickled(wrap(clip.state_dict())), "open_clip_pytorch_model.bin")
    np.testing.assert_allclose(encode(uri), reference(clip), atol=1e-5)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self):
        return os.mkdir, (self.where,)


@pytest.mark.parametrize("dump", [pickled, pickle.dumps])
def test_a_pickle_with_code_is_refused_and_not_run(clip, tmp_path, dump):
    data = dump({"visual.proj": torch.zeros(2), "trap": Trap(str(tmp_path / "sprung"))})
    uri = write_clip(tmp_path / "clip", clip, data, "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"open_clip_pytorch_model\.bin does not hold tensors alone"):
        load_encoder(uri)
    assert not (tmp_path / "sprung").exists()


def test_an_architecture_of_open_clip_names_the_model_of_a_lone_file(tmp_path):
    model = open_clip.get_model_config("ViT-S-32-alt")
    tower = make_tower(model, seed=4).eval()
    state = {f"visual.{name}": value for name, value in tower.state_dict().items()}
    (tmp_path / "remote.pt").write_bytes(pickled(state))
    pixels = np.zeros((2, 224, 224, 3), np.uint8)
    encoder = load_encoder(f"ViT-S-32-alt@{tmp_path}/remote.pt")
    assert encoder.shown.image_px == 224
    with torch.inference_mode():
        expected = F.normalize(tower(encoder.prepare(torch.from_numpy(pixels))), dim=-1)
    np.testing.assert_allclose(encode(f"ViT-S-32-alt@{tmp_path}/remote.pt", pixels), expected.numpy(), atol=1e-5)
    with pytest.raises(ConfigError, match="'moon' is no model of open_clip"):
        load_encoder(f"moon@{tmp_path}/remote.pt")
    with pytest.raises(ConfigError, match="does not fit its config"):
        load_encoder(f"ViT-B-32@{tmp_path}/remote.pt")
    with pytest.raises(ConfigError, match=r"gone\.pt, which is not there"):
        load_encoder(f"ViT-B-32@{tmp_path}/gone.pt")


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    tokenizer = train_bpe(["a river beside houses"], 300, 24)
    model = build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size), seed=3)
    for name, data in weight_files(model, tokenizer).items():
        (folder / name).write_bytes(data)
    return folder


def test_tokens_hold_the_output_and_the_statistics_of_blocks(ours):
    pixels = PIXELS[:, :16, :16]
    embedding, tokens = encode(str(ours), pixels), encode(str(ours), pixels, features="tokens")
    assert tokens.shape == (5, 64 + 2 * 64)  # one block of 64
    np.testing.assert_allclose(tokens[:, :64], embedding, atol=1e-6)
    encoder = load_encoder(str(ours))
    found = []
    hook = encoder.module.tower.transformer.resblocks[-1].register_forward_hook(lambda *given: found.append(given[2]))
    with torch.inference_mode():
        encoder.module(encoder.prepare(torch.from_numpy(pixels)))
    hook.remove()
    places = found[0][:, 1:]  # without the class token
    np.testing.assert_allclose(tokens[:, 64:128], places.mean(dim=1).numpy(), atol=1e-5)
    np.testing.assert_allclose(tokens[:, 128:], places.std(dim=1).numpy(), atol=1e-5)


@pytest.mark.parametrize(("num_layers", "num_taken"), [(1, 1), (2, 2), (3, 3), (6, 3)])
def test_of_many_blocks_three_are_taken(num_layers, num_taken):
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": num_layers}
    tower = make_tower({"embed_dim": 32, "vision_cfg": vision}, seed=0).eval()
    with torch.inference_mode():
        assert TowerFeatures(tower, "tokens")(torch.zeros(1, 3, 16, 16)).shape == (1, 32 + num_taken * 128)


def test_untrained_weights_are_those_that_the_seed_starts_from(ours):
    pixels = PIXELS[:, :16, :16]
    start = build_model(load_model(str(ours)).model.config, seed=7).eval()
    with torch.inference_mode():
        expected = start.encode_image(load_encoder(str(ours)).prepare(torch.from_numpy(pixels)))[0]
    np.testing.assert_allclose(encode(str(ours), pixels, untrained_seed=7), expected.numpy(), atol=1e-6)


def test_a_baseline_is_found_in_its_run_by_name(tmp_path):
    dataset = tmp_path / "storage" / "run" / "trained_simclr" / "0123"
    with publish(str(dataset), "trained_simclr", {}, {}) as publication:
        publication.write_file("encoder.json", b"{}")
    run = tmp_path / "storage" / "run"
    (run / "run.json").write_text(json.dumps({"datasets": {"trained_simclr": "trained_simclr/0123"}}))
    folder = find_weights(f"{run}#simclr")
    assert folder == find_weights(str(dataset))
    assert (Path(folder) / "encoder.json").exists()
    with pytest.raises(ConfigError, match="that run has no trained_pca; it has trained_simclr"):
        find_weights(f"{run}#pca")
    with pytest.raises(ConfigError, match="that run has no pretrain"):
        find_weights(str(run))
    with pytest.raises(ConfigError, match="is no run"):
        find_weights(f"{tmp_path}#pca")


def test_the_probe_finds_out_which_tiles_a_baseline_was_trained_on(tmp_path):
    ids = pa.table({"tile_id": ["r/1", "r/2"]})
    with publish(str(tmp_path / "trained_simclr" / "0123"), "trained_simclr", {}, {}) as publication:
        publication.write_table(ids)
        publication.write_file("encoder.json", b"{}")
    folder = find_weights(str(tmp_path / "trained_simclr" / "0123"))
    with publish(str(tmp_path / "baseline_simclr"), "baseline_simclr", {}, {}) as publication:
        publication.facts["weights"] = {"uri": folder, "digest": "0123"}
    assert training_tiles(open_dataset(str(tmp_path / "baseline_simclr"))).to_pylist() == ["r/1", "r/2"]


def test_a_folder_without_an_image_tower_is_refused(clip, tmp_path):
    uri = write_clip(tmp_path / "clip", clip, safetensors.torch.save({"text.x": torch.zeros(2)}))
    with pytest.raises(ConfigError, match="has no values named visual"):
        load_encoder(uri)
