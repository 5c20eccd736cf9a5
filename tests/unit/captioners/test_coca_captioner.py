"""The captioner `coca` with weights from files: what it learned comes back, and each tile's words are its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch
from images import noise_png

from urbanclip_ray.captioners.back_ends import load_captioner
from urbanclip_ray.captioners.base import Tile, UnusableCaptionerError
from urbanclip_ray.captioners.coca import CocaCaptioner, as_sentences, identify_weights, origin_of
from urbanclip_ray.config import CaptionConfig, ConfigError, DecodingConfig, ModelConfig, PixelsConfig
from urbanclip_ray.imagery import TileImageError, to_square
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.model.tokenize import TextTokenizer, train_bpe
from urbanclip_ray.model.weights import CONFIG_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, weight_files

CAPTIONS = [
    "A wide river flows past green fields. A road crosses it.",
    "Many houses stand along a road, near a park.",
    "Bare sand.",
    "A harbour's ships lie at two piers.",
]
TILES = [Tile(f"r/{seed}", noise_png(seed, 40, 40), PixelsConfig()) for seed in range(len(CAPTIONS))]
NUM_STEPS = 120
DRAWN = {"temperature": 5.0, "top_p": 0.95, "max_new_tokens": 12}


def pixels_of(tiles: list[Tile], model: CoCa) -> torch.Tensor:
    return normalise(torch.stack([torch.from_numpy(to_square(tile.rgb(), model.image_px)) for tile in tiles]))


def learn(model: CoCa, tokenizer: TextTokenizer) -> CoCa:
    images, tokens = pixels_of(TILES, model), tokenizer.encode(CAPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(NUM_STEPS):
        output = model(images, tokens)
        (output.caption_sum / output.caption_count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def write(folder: Path, model: CoCa, tokenizer: TextTokenizer) -> str:
    folder.mkdir()
    for name, data in weight_files(model, tokenizer).items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe(CAPTIONS * 3, vocab_size=400, context_length=24)


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory) -> str:
    """The four captions, learned by heart."""
    config = open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size)
    return write(tmp_path_factory.mktemp("trained") / "weights", learn(build_model(config, seed=0), tokenizer), tokenizer)


def load(uri: str, **keys) -> CocaCaptioner:
    return CocaCaptioner(CaptionConfig(captioner="coca", model=uri, **keys), identify_weights(uri))


@pytest.mark.parametrize("keys", [{}, {"decoding": {"num_beams": 3}}, {"dtype": "bfloat16"}], ids=["greedy", "beams", "bf16"])
def test_captions_that_were_learned_come_back_as_they_are_written(trained, keys):
    expected = [[caption] for caption in CAPTIONS]
    captioner = load(trained, **keys)
    assert captioner.describe(TILES) == expected
    assert captioner.describe(TILES[::-1]) == expected[::-1]
    assert [captioner.describe([tile])[0] for tile in TILES] == expected


def test_the_tokenizer_and_the_pixels_of_a_published_folder_are_open_clips_own(tokenizer, tmp_path):
    config = open_clip_config(ModelConfig(architecture="coca_test_16"), 49408)
    del config["text_cfg"]["hf_tokenizer_name"]
    folder = Path(write(tmp_path / "weights", build_model(config, seed=0), tokenizer))
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        (folder / name).unlink()
    config_text = (folder / CONFIG_FILE).read_text()
    texts = load(str(folder), decoding={"max_new_tokens": 6}).describe(TILES)
    assert all(text for (text,) in texts)
    (folder / CONFIG_FILE).write_text(config_text.replace("0.26862954", "0.5"))
    assert load(str(folder), decoding={"max_new_tokens": 6}).describe(TILES) != texts


def test_what_is_drawn_is_of_the_seed_and_the_tile_s_bytes(trained):
    captioner = load(trained, decoding=DRAWN | {"num_samples": 3})
    texts = captioner.describe(TILES)
    assert all(len(set(each)) > 1 for each in texts)
    assert captioner.describe(TILES[::-1]) == texts[::-1]
    assert [captioner.describe([tile])[0] for tile in TILES] == texts
    assert captioner.describe([TILES[0]._replace(tile_id="another")]) == texts[:1]  # its key is that of its bytes
    assert [each[0] for each in texts] == [text for (text,) in load(trained, decoding=DRAWN).describe(TILES)]
    assert load(trained, decoding=DRAWN | {"num_samples": 3, "seed": 1}).describe(TILES) != texts


def test_a_tile_that_cannot_be_decoded_is_an_error_among_texts(trained):
    broken = TILES[1]._replace(image=TILES[1].image[:60])
    captioner = load(trained)
    first, error, last = captioner.describe([TILES[0], broken, TILES[2]])
    assert isinstance(error, TileImageError)
    assert [first, last] == [[CAPTIONS[0]], [CAPTIONS[2]]]
    (alone,) = captioner.describe([broken])
    assert isinstance(alone, TileImageError)
    assert captioner.describe([]) == []


def test_margins_are_cut_before_the_model_sees_the_tile(trained):
    cut = [tile._replace(pixels=PixelsConfig(crop_bottom_px=20)) for tile in TILES]
    assert load(trained).describe(cut) != load(trained).describe(TILES)


def test_weights_are_known_by_what_they_are_and_not_by_where_they_lie(trained, tmp_path):
    reference = identify_weights(trained)
    assert (reference.name, reference.place) == ("coca", trained)
    moved = Path(shutil.copytree(trained, tmp_path / "elsewhere"))
    for uri in (str(moved), f"file://{moved}", f"local-dir:{moved}"):
        assert identify_weights(uri)[:2] == reference[:2]
    assert load(f"file://{moved}").describe(TILES[:1]) == [[CAPTIONS[0]]]
    state = safetensors.torch.load((moved / WEIGHTS_FILE).read_bytes())
    state["text.positional_embedding"][0, 0] += 1e-3
    (moved / WEIGHTS_FILE).write_bytes(safetensors.torch.save(state))
    assert identify_weights(str(moved)).revision != reference.revision
    shutil.copy(f"{trained}/{WEIGHTS_FILE}", moved)
    assert identify_weights(str(moved)).revision == reference.revision
    words = json.loads((moved / TOKENIZER_FILE).read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (moved / TOKENIZER_FILE).write_text(json.dumps(words))
    assert identify_weights(str(moved)).revision != reference.revision  # the same ids are other words


def test_what_decides_the_text_is_in_the_origin_and_nothing_else(trained):
    reference = identify_weights(trained)

    def origin(**keys):
        config = CaptionConfig(captioner="coca", model=trained, **keys)
        return origin_of(config, reference, *config.asked())

    base = origin()
    assert (base.model, base.revision, base.prompt) == ("coca", reference.revision, "")
    for same in ({"num_actors": 5, "gpus_per_actor": 1}, {"decoding": {"seed": 3}}, {"prompt": ""}, {"dtype": "float32"}):
        assert origin(**same) == base
    for other in ({"dtype": "bfloat16"}, {"decoding": {"num_beams": 2}}, {"decoding": {"temperature": 1}}):
        assert origin(**other) != base
    assert origin(decoding=DRAWN | {"seed": 1}) != origin(decoding=DRAWN)
    assert origin(decoding=DRAWN | {"num_samples": 2}) == origin(decoding=DRAWN)  # more samples keep the first


def test_weights_that_changed_or_are_not_on_this_node_are_refused(trained, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "weights")
    config, reference = CaptionConfig(captioner="coca", model=str(moved)), identify_weights(str(moved))
    assert load_captioner(config, reference).describe(TILES[:1]) == [[CAPTIONS[0]]]
    with pytest.raises(UnusableCaptionerError, match="was changed while the run used it"):
        CocaCaptioner(config, reference._replace(revision="another"))
    shutil.rmtree(moved)
    with pytest.raises(UnusableCaptionerError, match=rf"caption\.model={moved}: .*which is not there\. Put the weights where"):
        CocaCaptioner(config, reference)


def test_weights_without_a_text_decoder_are_refused(tmp_path):
    clip = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_cfg": clip}))
    (tmp_path / WEIGHTS_FILE).write_bytes(safetensors.torch.save(open_clip.CLIP(**clip).state_dict()))
    with pytest.raises(ConfigError, match=rf"caption\.model={tmp_path}: it has no text decoder: give weights of a CoCa"):
        identify_weights(str(tmp_path))
    with pytest.raises(ConfigError, match=r"caption\.model=/nowhere: .*is not there"):
        identify_weights("/nowhere")


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("a wide river . green trees , 5 % of it .", "A wide river. Green trees, 5% of it."),
        ("the city 's park isn 't large ! it 's green", "The city's park isn't large! It's green"),
        ("about 2.5 km. élan (once) … none", "About 2.5 km. Élan (once) … None"),
        ("", ""),
    ],
)
def test_texts_are_written_with_capitals_and_without_blanks_before_punctuation(written, text):
    assert as_sentences(written) == text


def test_a_decoding_that_is_asked_for_reaches_the_model(trained):
    (short,) = load(trained, decoding=DecodingConfig(max_new_tokens=2)).describe(TILES[:1])
    assert CAPTIONS[0].startswith(short[0])
    assert len(short[0]) < 12
