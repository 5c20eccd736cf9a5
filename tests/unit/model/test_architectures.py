"""Architectures by name: ours build and run, others are refused with what to choose instead."""

from __future__ import annotations

import pytest
import torch

from urbanclip_ray.config import ConfigError, ModelConfig
from urbanclip_ray.model.architectures import ARCHITECTURES, open_clip_config
from urbanclip_ray.model.coca import build_model

VOCAB_SIZE = 400


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_of_ours_takes_a_batch_through_both_losses(name):
    model = build_model(open_clip_config(ModelConfig(architecture=name), VOCAB_SIZE), seed=0).eval()
    context = ARCHITECTURES[name]["text_cfg"]["context_length"]
    tokens = torch.randint(3, VOCAB_SIZE, (2, context))
    with torch.no_grad():
        output = model(torch.randn(2, 3, model.image_px, model.image_px), tokens)
    assert output.image.shape == output.text.shape == (2, model.embedding_width)
    assert int(output.caption_count) == 2 * (context - 1)
    assert torch.isfinite(output.caption_sum)
    assert float(output.logit_scale) == pytest.approx(1 / 0.07)


def test_the_vocabulary_is_that_of_the_tokenizer_and_the_table_of_architectures_is_left_alone():
    found = open_clip_config(ModelConfig(architecture="coca_test_16", patch_dropout=0.25), VOCAB_SIZE)
    assert found["text_cfg"]["vocab_size"] == found["multimodal_cfg"]["vocab_size"] == VOCAB_SIZE
    assert found["vision_cfg"]["patch_dropout"] == 0.25
    assert ARCHITECTURES["coca_test_16"]["text_cfg"]["vocab_size"] == 0
    assert "patch_dropout" not in ARCHITECTURES["coca_test_16"]["vision_cfg"]


def test_open_clips_own_coca_keeps_its_vocabulary_with_its_own_tokenizer():
    config = ModelConfig(architecture="coca_ViT-B-32", tokenizer="open_clip")
    assert open_clip_config(config, None)["text_cfg"]["vocab_size"] == 49_408
    assert open_clip_config(config, VOCAB_SIZE)["multimodal_cfg"]["vocab_size"] == VOCAB_SIZE


@pytest.mark.parametrize(
    ("name", "vocab_size", "message"),
    [
        ("coca_tiny_95", VOCAB_SIZE, r"'coca_tiny_95' is not known; choose one of .*coca_tiny_96.*coca_ViT-B-32"),
        ("ViT-B-32", None, r"'ViT-B-32' is not a CoCa: it has no text decoder; choose one of .*coca_ViT-B-32"),
        ("coca_roberta-ViT-B-32", None, r"model\.architecture='coca_roberta-ViT-B-32' takes its text tower from a model hub"),
        ("coca_test_16", None, r"model\.architecture=coca_test_16 needs model\.tokenizer=bpe"),
    ],
)
def test_a_name_that_cannot_be_built_says_what_to_choose(name, vocab_size, message):
    with pytest.raises(ConfigError, match=message):
        open_clip_config(ModelConfig(architecture=name), vocab_size)
