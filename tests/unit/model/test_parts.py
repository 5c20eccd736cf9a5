"""Every parameter of a CoCa belongs to one part, and frozen parts are not trained."""

from __future__ import annotations

import pytest
from torch import nn

from urbanclip_ray.config import ModelConfig
from urbanclip_ray.config.training import MODEL_PARTS
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.model.parts import freeze_parts, part_of


@pytest.fixture
def model() -> CoCa:
    return build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), 300, logit_bias=-10.0), 0)


def test_the_parts_share_out_all_parameters(model):
    found = {name: part_of(name) for name, _ in model.named_parameters()}
    assert set(found.values()) == set(MODEL_PARTS)
    assert {name for name, part in found.items() if part == "heads"} == {
        "inner.visual.proj",
        "inner.text.text_projection",
        "inner.text_decoder.text_projection",
        "inner.logit_scale",
        "inner.logit_bias",
    }
    assert found["inner.visual.transformer.resblocks.0.attn.in_proj_weight"] == "image"
    assert found["inner.text.token_embedding.weight"] == "text"
    assert found["inner.text_decoder.cross_attn.0.mlp.c_fc.bias"] == "decoder"


def test_what_is_frozen_is_its_part_alone(model):
    freeze_parts(model, ("image", "decoder"))
    for name, value in model.named_parameters():
        assert value.requires_grad == (part_of(name) in ("text", "heads")), name


def test_parameters_of_other_models_have_no_part():
    assert [part_of(name) for name, _ in nn.Linear(2, 2).named_parameters()] == [None, None]
