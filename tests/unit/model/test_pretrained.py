"""Weights to start from: found, told apart by content, fitted exactly, and never unpickled."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import huggingface_hub.constants
import open_clip
import pytest
import safetensors.torch
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.push_to_hf_hub import save_for_hf
from torch.nn import functional as F

from urbanclip_ray.config import ConfigError, ModelConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.pretrained import download_start, file_sha256, fill_start, identify_start, start_file
from urbanclip_ray.model.tokenize import open_clip_tokenizer, train_bpe
from urbanclip_ray.model.weights import WEIGHTS_FILE, weight_files
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "models--laion--CoCa-ViT-B-32-laion2B-s13B-b90k"
TAG = "laion2b_s13b_b90k"
HUB_ID = "hf-hub:laion/CoCa-ViT-B-32-laion2B-s13B-b90k"


def named(pretrained, **more):
    return ModelConfig(architecture="coca_ViT-B-32", tokenizer="open_clip", pretrained=pretrained, **more)


def small_model(seed):
    return build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), 300), seed)


@pytest.fixture
def file(tmp_path):
    tokenizer = train_bpe(["a river"], 300, 24)
    (tmp_path / WEIGHTS_FILE).write_bytes(weight_files(small_model(seed=1), tokenizer)[WEIGHTS_FILE])
    return tmp_path / WEIGHTS_FILE


def test_a_model_takes_the_weights_of_a_file_all_of_them(file):
    model = small_model(seed=2)
    fill_start(model, str(file))
    expected = small_model(seed=1).inner.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.inner.state_dict().items())
    assert model.inner.logit_scale.shape == (1,)  # a scalar in the file


@pytest.mark.parametrize("damage", ["pickle", "other architecture", "a tensor is missing"])
def test_weights_that_do_not_fit_are_refused_by_name_and_nothing_is_unpickled(file, tmp_path, damage):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "unpickled"), "w")

    state = safetensors.torch.load(file.read_bytes())
    if damage == "pickle":
        file.write_bytes(pickle.dumps({"logit_scale": Payload()}))
    elif damage == "other architecture":
        file.write_bytes(safetensors.torch.save(state | {"text.cls_emb": torch.zeros(3)}))
    else:
        del state["visual.proj"]
        file.write_bytes(safetensors.torch.save(state))
    with pytest.raises(ConfigError, match=rf"model\.pretrained: .*{WEIGHTS_FILE} does not fit model\.architecture"):
        fill_start(small_model(seed=2), str(file))
    assert not (tmp_path / "unpickled").exists()


def test_a_file_is_known_by_its_bytes_and_a_tag_by_its_revision(file, tmp_path):
    folder, twin = named(str(tmp_path)), tmp_path / "twin.safetensors"
    twin.write_bytes(file.read_bytes())
    assert start_file(folder) == str(file)
    assert identify_start(folder) == identify_start(named(str(twin))) == file_sha256(str(file))
    twin.write_bytes(b"other")
    assert identify_start(named(str(twin))) != identify_start(folder)
    assert identify_start(named(TAG)) == f"coca_ViT-B-32/{TAG}@main"
    assert identify_start(named(TAG, pretrained_revision=COMMIT)) == f"coca_ViT-B-32/{TAG}@{COMMIT}"
    assert identify_start(named(HUB_ID, pretrained_revision=COMMIT)) == f"{HUB_ID}@{COMMIT}"
    assert not named(HUB_ID).pretrained_is_file
    assert identify_start(named("")) == ""


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.pretrained: .*gone\.safetensors is not there"):
        identify_start(named(str(tmp_path / "gone.safetensors")))


def test_a_tokenizer_of_the_runs_own_cannot_go_with_published_weights():
    with pytest.raises(ConfigError, match=r"set model\.tokenizer=open_clip, or start from random weights"):
        apply_overrides(load_recipe("tiny_test"), [f"model.pretrained={TAG}"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub out of reach, and a cache of it: huggingface_hub reads both from the environment when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_published_weights_come_from_the_hubs_cache_as_safetensors(hub):
    repository = hub / REPOSITORY
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / WEIGHTS_FILE).write_bytes(b"weights")
    for name in (TAG, HUB_ID):
        assert str(download_start(named(name))).endswith(f"snapshots/{COMMIT}/{WEIGHTS_FILE}")

    (snapshot / WEIGHTS_FILE).rename(snapshot / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError) as refused:
        download_start(named(TAG))
    said = str(refused.value)
    assert f"model.pretrained={TAG}: {WEIGHTS_FILE} of laion/CoCa-ViT-B-32-laion2B-s13B-b90k" in said
    assert "bring the file yourself: --set model.pretrained=FILE.safetensors" in said


def test_an_unknown_tag_is_refused_with_those_there_are(hub):
    with pytest.raises(ConfigError) as refused:
        download_start(named("openai"))
    assert f"'openai' is no tag of open_clip's coca_ViT-B-32 (it has {TAG}, mscoco_finetuned_{TAG})" in str(refused.value)


@pytest.mark.parametrize("recipe", ["urbanclip_beijing", "urbanclip_four_cities"])
def test_the_weights_of_the_paper_recipes_are_published(recipe):
    model = load_recipe(recipe).model
    assert model.pretrained in list_pretrained_tags_by_model(model.architecture)
    assert get_pretrained_cfg(model.architecture, model.pretrained)["hf_hub"].startswith("laion/")


def small_architecture(config):
    """As narrow and shallow as a test wants it, with everything else that published weights have."""
    config["embed_dim"] = 32
    config["vision_cfg"] |= {"image_size": 64, "layers": 2, "width": 64, "attn_pooler_heads": 2}
    config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 2}
    config["multimodal_cfg"] |= {"width": 32, "heads": 2, "layers": 2, "attn_pooler_heads": 2}
    return config


@pytest.mark.parametrize("shrink", [small_architecture, pytest.param(lambda config: config, marks=pytest.mark.slow)])
def test_a_checkpoint_of_open_clips_goes_in_and_comes_out_with_open_clips_outputs(tmp_path, shrink):
    architecture = "coca_of_this_test"
    config = shrink(open_clip_config(ModelConfig(architecture="coca_ViT-B-32", tokenizer="open_clip"), None))
    (tmp_path / f"{architecture}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{architecture}.json")
    theirs = open_clip.create_model(architecture).eval()
    with torch.no_grad():  # open_clip leaves it as it was in memory
        theirs.text_decoder.text_projection.normal_(std=0.05)
    no_tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)  # CLIP's own is in no file
    save_for_hf(theirs, no_tokenizer, config, tmp_path / "theirs", safe_serialization=True)

    ours = build_model(config, seed=3).eval()
    fill_start(ours, start_file(named(str(tmp_path / "theirs"))))
    tokenizer = open_clip_tokenizer(context_length=76)
    texts = ["a river runs through the city", "dense housing"]
    images = torch.randn(2, 3, ours.image_px, ours.image_px, generator=torch.Generator().manual_seed(0))
    (tmp_path / "ours").mkdir()
    for name, data in weight_files(ours, tokenizer).items():
        (tmp_path / "ours" / name).write_bytes(data)
    returned = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}").eval()
    tokens = open_clip.get_tokenizer(architecture)(texts, context_length=76)
    with torch.no_grad():
        expected, back, found = theirs(images, tokens), returned(images, tokens), ours(images, tokenizer.encode(texts))
        losses = F.cross_entropy(expected["logits"].permute(0, 2, 1), expected["labels"], ignore_index=0, reduction="none")
    for name, value in expected.items():
        assert torch.equal(back[name], value), name
    torch.testing.assert_close(found.image, expected["image_features"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.text, expected["text_features"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.caption_rows, losses.sum(dim=1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.logit_scale, expected["logit_scale"].squeeze())
