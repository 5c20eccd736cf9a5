"""Our forward with trimmed and packed texts is open_clip's own at full length: embeddings, caption loss and gradients."""

from __future__ import annotations

import copy

import open_clip.coca_model
import pytest
import torch
from torch.nn import functional as F
from writing_models import shrunken_b32

from urbanclip_ray.config import ModelConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.model.losses import contrastive_loss
from urbanclip_ray.model.tokenize import PAD_ID
from urbanclip_ray.train.speed import count_flops

VOCAB_SIZE = 400


CONFIGS = {
    "coca_test_16": open_clip_config(ModelConfig(architecture="coca_test_16"), VOCAB_SIZE),
    "coca_ViT-B-32": shrunken_b32(VOCAB_SIZE),
}


MASKS = ("legacy", "correct")  # of the class token


@pytest.fixture(params=[(name, mask) for name in CONFIGS for mask in MASKS], ids="-".join)
def model(request) -> CoCa:
    """In evaluation mode, with weights far from their small initial values, so that places and masks matter."""
    name, mask = request.param
    model = build_model(copy.deepcopy(CONFIGS[name]), seed=1).eval()
    model.inner.text.correct_cls_mask = mask == "correct"
    with torch.no_grad():
        random = torch.Generator().manual_seed(2)
        for parameter in (
            model.inner.text.positional_embedding,
            model.inner.text.cls_emb,
            model.inner.text.token_embedding.weight,
        ):
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return model


def as_open_clip(model: CoCa) -> open_clip.coca_model.CoCa:
    """The same weights in open_clip's own model, which runs its own attention."""
    settings = {key: value for key, value in model.config.items() if key != "custom_text"}
    theirs = open_clip.coca_model.CoCa(**settings, nonscalar_logit_scale=True)
    theirs.load_state_dict(model.inner.state_dict())
    theirs.text.correct_cls_mask = model.inner.text.correct_cls_mask
    return theirs.eval()


def make_tokens(lengths: list[int], places: int) -> torch.Tensor:
    """Rows of start (1), words, end (2) and padding; `lengths` count start and end."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.full((len(lengths), places), PAD_ID)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(4, VOCAB_SIZE, (length,), generator=random)
        tokens[row, 0], tokens[row, length - 1] = 1, 2
    return tokens


def trim(tokens: torch.Tensor) -> torch.Tensor:
    longest = int((tokens != PAD_ID).sum(dim=1).max())
    return tokens[:, : min(longest + 1, tokens.shape[1])]


def make_images(model: CoCa, rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, model.image_px, model.image_px, generator=torch.Generator().manual_seed(3))


def lengths_of(model: CoCa, kind: str) -> list[int]:
    context = model.inner.text.context_length
    return {"short": [5, 3, 9, 2], "nearly full": [5, context - 1, 9, 2], "full": [context, 4, context, 7]}[kind]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", ["short", "nearly full", "full"])
def test_trimmed_text_gives_open_clips_full_length_results(model, kind):
    tokens = make_tokens(lengths_of(model, kind), model.inner.text.context_length)
    images = make_images(model, len(tokens))
    with torch.no_grad():
        ours = model(images, trim(tokens))
        theirs = as_open_clip(model)(images, tokens)
    close(ours.text, theirs["text_features"])
    close(ours.image, theirs["image_features"])
    close(model.inner.encode_text(tokens), ours.text)
    assert float(ours.logit_scale) == pytest.approx(float(theirs["logit_scale"]))
    reference = F.cross_entropy(theirs["logits"].permute(0, 2, 1), theirs["labels"], ignore_index=PAD_ID)
    close(ours.caption_sum / ours.caption_count, reference)
    losses = F.cross_entropy(theirs["logits"].permute(0, 2, 1), theirs["labels"], ignore_index=PAD_ID, reduction="none")
    close(ours.caption_rows, losses.sum(dim=1))
    assert int(ours.caption_count) == int((tokens[:, 1:] != PAD_ID).sum())


def test_gradients_are_those_of_the_full_length(model):
    tokens = make_tokens(lengths_of(model, "short"), model.inner.text.context_length)
    images = make_images(model, len(tokens))
    weights = torch.randn(2, len(tokens), model.embedding_width, generator=torch.Generator().manual_seed(4))

    reference = as_open_clip(model)

    def gradients(module, image, text, caption, scale):
        ((image * weights[0]).sum() + (text * weights[1]).sum() * scale / 10 + caption).backward()
        return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}

    ours = model(images, trim(tokens))
    found = gradients(model.inner, ours.image, ours.text, ours.caption_sum / ours.caption_count, ours.logit_scale)
    theirs = reference(images, tokens)
    caption = F.cross_entropy(theirs["logits"].permute(0, 2, 1), theirs["labels"], ignore_index=PAD_ID)
    scale = theirs["logit_scale"].squeeze()
    expected = gradients(reference, theirs["image_features"], theirs["text_features"], caption, scale)
    assert found.keys() == expected.keys()
    assert len(found) > 30
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert float(error) < 1e-4, name


def losses_and_gradients(
    model: CoCa, images: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(images, tokens)
    keys = torch.arange(len(tokens))
    contrastive = contrastive_loss(output.image, output.text, keys, output.logit_scale)
    losses = torch.stack([contrastive, output.caption_sum / output.caption_count])
    losses.sum().backward()
    return losses.detach(), {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_losses_and_gradients_do_not_depend_on_the_padding(name, mask, dtype, tolerance):
    """Of weights as they are initialised; gradients by the norm of their parameter's."""
    model = build_model(CONFIGS[name], seed=1).to(dtype)
    model.inner.text.correct_cls_mask = mask == "correct"
    tokens = make_tokens(lengths_of(model, "short"), model.inner.text.context_length)
    images = make_images(model, len(tokens)).to(dtype)
    losses, gradients = losses_and_gradients(model, images, trim(tokens))
    full_losses, full_gradients = losses_and_gradients(model, images, tokens)
    assert float((losses - full_losses).abs().max()) <= tolerance
    assert gradients.keys() == full_gradients.keys()
    for parameter, gradient in full_gradients.items():
        error = (gradients[parameter] - gradient).norm() / gradient.norm().clamp(min=1)
        assert float(error) <= tolerance, parameter


def test_padding_costs_no_products(model):
    """Of whole models, as torch counts them: on a CPU, all but those of fused attention."""
    tokens = make_tokens(16 * lengths_of(model, "short"), model.inner.text.context_length)
    images = make_images(model, len(tokens))
    flops = [count_flops(lambda shown=shown: model(images, shown))[1] for shown in (trim(tokens), tokens)]
    assert flops[0] == flops[1] > count_flops(lambda: model(images, tokens[:, :3]))[1]


def test_a_token_with_the_number_of_padding_inside_a_text_is_open_clips(model):
    """Published vocabularies have a word there."""
    tokens = make_tokens([9, 5, 2], model.inner.text.context_length)
    tokens[0, 4] = tokens[1, 3] = PAD_ID
    images = make_images(model, len(tokens))
    with torch.no_grad():
        ours, theirs = model(images, tokens[:, :10]), as_open_clip(model)(images, tokens)
    close(ours.text, theirs["text_features"])
    losses = F.cross_entropy(theirs["logits"].permute(0, 2, 1), theirs["labels"], ignore_index=PAD_ID, reduction="none")
    close(ours.caption_rows, losses.sum(dim=1))


def test_the_class_token_keeps_the_last_position_and_needs_one_column_of_padding(model):
    context = model.inner.text.context_length
    tokens = make_tokens([5, 3], context)
    with torch.no_grad():
        kept = model.encode_text(trim(tokens))[0]
        close(model.encode_text(tokens[:, :10])[0], kept)  # any width from longest + 1 on
        is_legacy = not model.inner.text.correct_cls_mask
        assert torch.allclose(model.encode_text(tokens[:, :5])[0], kept, atol=1e-3) != is_legacy  # the other needs no column
        model.inner.text.positional_embedding[6:-1] += 1.0  # rows that a trimmed text does not read
        close(model.encode_text(trim(tokens))[0], kept)
        model.inner.text.positional_embedding[-1] += torch.randn(model.inner.text.width)
        assert not torch.allclose(model.encode_text(trim(tokens))[0], kept, atol=1e-3)


def test_a_row_does_not_depend_on_the_other_rows_of_its_batch(model):
    tokens = make_tokens([5, 20, 3], model.inner.text.context_length)
    images = make_images(model, 3)
    with torch.no_grad():
        together = model(images, trim(tokens))
        alone = [model(images[row : row + 1], trim(tokens[row : row + 1])) for row in range(3)]
    close(torch.cat([output.text for output in alone]), together.text)
    close(torch.cat([output.image for output in alone]), together.image)
    close(torch.stack([output.caption_sum for output in alone]), together.caption_rows)
    close(together.caption_rows.sum(), together.caption_sum)


@pytest.mark.parametrize("way", ["checkpoint_activations", pytest.param("compile_blocks", marks=pytest.mark.slow)])
def test_activations_computed_again_and_compiled_blocks_change_no_result(way):
    name = "coca_ViT-B-32"
    model, changed = (build_model(CONFIGS[name], seed=1) for _ in range(2))
    getattr(changed, way)()
    tokens = trim(make_tokens(lengths_of(model, "short"), model.inner.text.context_length))
    images = make_images(model, len(tokens))
    losses, gradients = losses_and_gradients(model, images, tokens)
    other_losses, other_gradients = losses_and_gradients(changed, images, tokens)
    close(other_losses, losses)
    assert other_gradients.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)


def test_images_or_texts_alone_have_no_rows_of_the_other_and_no_caption_loss(model):
    images, tokens = make_images(model, 2), trim(make_tokens([5, 3], model.inner.text.context_length))
    with torch.no_grad():
        pairs, without = model(images, tokens), model(images, tokens, with_caption=False)
        only_images, only_texts = model(images, None), model(None, tokens)
    assert torch.equal(only_images.image, pairs.image)
    assert torch.equal(only_texts.text, pairs.text)
    assert only_images.text.shape == only_texts.image.shape == (0, model.embedding_width)
    assert float(pairs.caption_sum) > 0
    for output in (only_images, only_texts, without):
        assert float(output.caption_sum) == float(output.caption_count) == 0
        assert output.caption_rows.tolist() == [0] * len(output.text)


def test_the_seed_decides_the_weights_and_the_callers_random_state_is_left_alone():
    config = CONFIGS["coca_test_16"]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = build_model(config, seed=7), build_model(config, seed=7), build_model(config, seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["inner.text_decoder.text_projection"], states[2]["inner.text_decoder.text_projection"])
    assert all(torch.isfinite(value).all() for value in first.parameters())  # the decoder's projection is set too
    assert float(first.inner.text_decoder.text_projection.detach().std()) == pytest.approx(64**-0.5, rel=0.05)


def test_the_temperature_starts_where_it_is_asked_to():
    scale = build_model(CONFIGS["coca_test_16"], 0, init_temperature=0.2).inner.logit_scale
    assert float(scale.detach().exp()) == pytest.approx(5.0)


def test_the_bias_is_the_models_own_and_zero_where_it_has_none():
    config = open_clip_config(ModelConfig(architecture="coca_test_16"), VOCAB_SIZE, logit_bias=-10.0)
    model = build_model(config, 0)
    images, tokens = make_images(model, 2), trim(make_tokens([5, 3], model.inner.text.context_length))
    bias = model(images, tokens).logit_bias
    assert (bias.shape, bias.item()) == ((), -10.0)
    (bias * 3).backward()
    assert model.inner.logit_bias.grad.tolist() == [3.0]
    without = build_model(CONFIGS["coca_test_16"], 0)(images, tokens).logit_bias
    assert (without.shape, without.item(), without.requires_grad) == ((), 0.0, False)


def test_in_bf16_the_loss_of_a_model_is_near_that_in_fp32_and_trains_the_same_parameters(model):
    tokens = trim(make_tokens(lengths_of(model, "short"), model.inner.text.context_length))
    images = make_images(model, len(tokens))
    found = {}
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(images, tokens)
        (output.caption_sum / output.caption_count).backward()
        found[bf16] = output, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    (exact, gradients), (output, low_gradients) = found[False], found[True]
    torch.testing.assert_close(output.caption_rows, exact.caption_rows, rtol=0.03, atol=0.05)
    assert output.caption_sum.dtype == torch.float32
    assert low_gradients.keys() == gradients.keys()
    name = "inner.text_decoder.text_projection"
    assert low_gradients[name].dtype == torch.float32
    assert float((low_gradients[name] - gradients[name]).norm() / gradients[name].norm()) < 0.05
