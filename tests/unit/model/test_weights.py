"""Weights out and in: the same outputs here and in open_clip, and clear words for what is no folder of weights."""

from __future__ import annotations

import json
import pickle

import open_clip
import pytest
import safetensors.torch
import torch

from urbanclip_ray.config import ConfigError, ModelConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.tokenize import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, train_bpe
from urbanclip_ray.model.weights import CONFIG_FILE, WEIGHTS_FILE, fill_model, load_model, weight_files

TEXTS = ["a river runs through the city", "dense housing beside a river", "green fields and a lake", "the city from above"]


@pytest.fixture(scope="module")
def made():
    """A model that is not as it was initialised, with its tokenizer and files."""
    tokenizer = train_bpe(TEXTS, 320, 24)
    model = build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size), seed=0).eval()
    with torch.no_grad():
        model.inner.logit_scale.fill_(1.25)
        model.inner.text.positional_embedding.normal_(generator=torch.Generator().manual_seed(0))
    return model, tokenizer, weight_files(model, tokenizer)


@pytest.fixture
def folder(made, tmp_path):
    for name, data in made[2].items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_saved_and_loaded_model_gives_equal_outputs(made, folder):
    model, tokenizer, _ = made
    loaded = load_model(str(folder))
    assert not loaded.model.training
    assert torch.equal(loaded.tokenizer.encode(TEXTS), tokenizer.encode(TEXTS))
    with torch.no_grad():
        expected = model(images(), tokenizer.encode(TEXTS))
        found = loaded.model(images(), loaded.tokenizer.encode(TEXTS))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert weight_files(loaded.model, loaded.tokenizer) == made[2]


def test_open_clip_loads_the_folder_and_gives_the_same_embeddings(made, folder):
    model, tokenizer, _ = made
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    their_tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    tokens = tokenizer.encode(TEXTS)
    assert their_tokens.shape == (4, 24)
    assert torch.equal(their_tokens[:, : tokens.shape[1]], tokens)
    assert (their_tokens[:, tokens.shape[1] :] == 0).all()
    with torch.no_grad():
        output = model(images(), tokens)
        torch.testing.assert_close(theirs.encode_image(images(), normalize=True), output.image)
        torch.testing.assert_close(theirs.encode_text(their_tokens, normalize=True), output.text)
    assert theirs.logit_scale.shape == ()
    assert float(theirs.logit_scale.detach()) == pytest.approx(1.25)


def test_other_values_can_be_written_in_the_place_of_the_models(made):
    model, tokenizer, files = made
    files_of_other = weight_files(
        model, tokenizer, {"inner.logit_scale": torch.tensor([2.0]), "inner.visual.proj": torch.zeros(64 * 64)}
    )
    state, before = (safetensors.torch.load(found[WEIGHTS_FILE]) for found in (files_of_other, files))
    assert (state["logit_scale"].shape, float(state["logit_scale"])) == ((), 2.0)
    assert (state["visual.proj"].shape, float(state["visual.proj"].abs().max())) == ((64, 64), 0.0)
    assert all(torch.equal(state[name], value) for name, value in before.items() if name not in ("logit_scale", "visual.proj"))


def test_the_logit_scale_is_a_scalar_outside_and_a_vector_of_one_inside(made, folder):
    assert safetensors.torch.load(made[2][WEIGHTS_FILE])["logit_scale"].shape == ()
    assert load_model(str(folder)).model.inner.logit_scale.shape == (1,)


@pytest.fixture
def biased(tmp_path):
    """A model with a logit bias, and its folder."""
    tokenizer = train_bpe(TEXTS, 320, 24)
    config = open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size, logit_bias=-10.0)
    model = build_model(config, seed=0)
    with torch.no_grad():
        model.inner.logit_bias.fill_(-7.5)
    for name, data in weight_files(model, tokenizer).items():
        (tmp_path / name).write_bytes(data)
    return model, tmp_path


def test_a_logit_bias_goes_out_as_a_scalar_and_comes_back_here_and_in_open_clip(biased):
    model, folder = biased
    assert model.inner.logit_bias.shape == (1,)
    assert safetensors.torch.load_file(folder / WEIGHTS_FILE)["logit_bias"].shape == ()
    assert load_model(str(folder)).model.inner.logit_bias.tolist() == [-7.5]
    theirs = open_clip.create_model(f"local-dir:{folder}")
    assert (theirs.logit_bias.shape, theirs.logit_bias.item()) == ((), -7.5)


def test_weights_without_a_bias_leave_a_models_bias_as_it_was(biased, made):
    model, _ = biased
    fill_model(model, made[2][WEIGHTS_FILE])
    assert model.inner.logit_bias.tolist() == [-7.5]
    assert model.inner.logit_scale.tolist() == [1.25]


def test_the_digest_names_the_weights(made, folder):
    first = load_model(str(folder)).digest
    assert load_model(str(folder)).digest == first
    state = safetensors.torch.load(made[2][WEIGHTS_FILE])
    state["logit_scale"] += 1
    (folder / WEIGHTS_FILE).write_bytes(safetensors.torch.save(state))
    assert load_model(str(folder)).digest != first


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE])
def test_a_missing_file_is_named_with_all_that_are_needed(folder, name):
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"{folder.name} is not a folder of weights: it needs {WEIGHTS_FILE}.*{name}"):
        load_model(str(folder))


def pickled(path):
    """What `torch.save` would write, with code that runs when it is unpickled."""

    class Payload:
        def __reduce__(self):
            return open, (str(path / "unpickled"), "w")

    return pickle.dumps({"logit_scale": Payload()})


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "truncated", "empty", "other shapes", "other names", "no scale"])
def test_weights_that_do_not_fit_are_refused_and_nothing_is_unpickled(made, folder, kind):
    state = safetensors.torch.load(made[2][WEIGHTS_FILE])
    where = folder / WEIGHTS_FILE
    if kind == "pickle":
        where.write_bytes(pickled(folder))
    elif kind == "torch.save":
        torch.save(state, where)
    elif kind == "truncated":
        where.write_bytes(made[2][WEIGHTS_FILE][:-100])
    elif kind == "empty":
        where.write_bytes(b"")
    elif kind == "other shapes":
        where.write_bytes(safetensors.torch.save(state | {"text.cls_emb": torch.zeros(3)}))
    elif kind == "other names":
        where.write_bytes(safetensors.torch.save({f"module.{name}": value for name, value in state.items()}))
    else:
        del state["logit_scale"]
        where.write_bytes(safetensors.torch.save(state))
    with pytest.raises(ConfigError, match=f"{folder.name}: {WEIGHTS_FILE} does not fit {CONFIG_FILE}"):
        load_model(str(folder))
    assert not (folder / "unpickled").exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"model_cfg": {"embed_dim": 8}}', b'{"model_cfg": 3}'],
)
def test_a_config_that_is_none_is_refused_by_name(folder, data):
    (folder / CONFIG_FILE).write_bytes(data)
    with pytest.raises(UserError, match=f"{folder.name}.*{CONFIG_FILE}"):
        load_model(str(folder))


@pytest.mark.parametrize("name", [TOKENIZER_FILE, TOKENIZER_CONFIG_FILE])
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_tokenizer_that_is_none_is_refused_by_name(folder, name, data):
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        load_model(str(folder))


def test_the_config_says_how_open_clip_prepares_images(made):
    settings = json.loads(made[2][CONFIG_FILE])["preprocess_cfg"]
    assert settings["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert settings["std"] == list(open_clip.OPENAI_DATASET_STD)
    assert settings["resize_mode"] == "squash"  # an oblong tile is stretched, as here


@pytest.mark.parametrize(("tower", "key"), [("text_cfg", "hf_model_name"), ("vision_cfg", "timm_model_name")])
def test_weights_that_would_fetch_a_tower_from_a_hub_are_refused(folder, tower, key):
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"][tower][key] = "somebody/something"
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="model hub"):
        load_model(str(folder))
