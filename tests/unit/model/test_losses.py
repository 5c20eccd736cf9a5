"""Both losses against references in plain torch that hold every logit at once; ranks are threads that wait for each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from urbanclip_ray.model import losses
from urbanclip_ray.model.losses import caption_loss, contrastive_loss, shift_tokens

ROWS, WIDTH = 12, 8
KEYS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 4, 5, 6, 7, 3])  # twins inside a rank and across ranks, of two and of three
KINDS = ["softmax", "sigmoid"]


class Made(TorchDispatchMode):
    """Shapes of the tensors that are made inside, and those of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(value.shape) for value in tree_leaves(result) if isinstance(value, torch.Tensor)}
        if "mm" in str(function):
            self.products.append(tuple(result.shape))
        return result

    @property
    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes)


def make_pairs(dtype=torch.float32, rows=ROWS):
    """Images, texts, scale and bias, all with gradients."""
    random = torch.Generator().manual_seed(0)
    made = [F.normalize(torch.randn(rows, WIDTH, generator=random, dtype=dtype), dim=-1) for _ in range(2)]
    return [value.requires_grad_() for value in (*made, torch.tensor(7.0, dtype=dtype), torch.tensor(-2.0, dtype=dtype))]


def losses_of_ranks(pairs, keys, num_ranks, **options):
    """What every rank's call returns, all of them running at once."""
    image, text, scale, bias = pairs
    shares = [torch.split(values, len(values) // num_ranks) for values in (image, text, keys)]
    meeting, rows_of_ranks = threading.Barrier(num_ranks, timeout=60), [None] * num_ranks

    def on(rank):
        def gather(rows):
            assert not torch.is_grad_enabled()
            rows_of_ranks[rank] = rows
            meeting.wait()
            gathered = torch.cat(rows_of_ranks)
            meeting.wait()
            return gathered

        own = [share[rank] for share in shares]
        return contrastive_loss(*own, scale, bias, gather=gather, first_row=rank * len(own[0]), **options)

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(on, range(num_ranks)))


def reference(pairs, keys, kind, rows=None):
    """Of the terms that belong to some rows; by default of the whole batch."""
    image, text, scale, bias = pairs
    rows = torch.arange(len(keys)) if rows is None else rows
    itself = torch.eye(len(keys), dtype=torch.bool)
    twins = (keys[:, None] == keys[None]) & ~itself
    logits = scale * image @ text.T
    if kind == "softmax":
        logits = logits.masked_fill(twins, float("-inf"))
        return (F.cross_entropy(logits[rows], rows) + F.cross_entropy(logits.T[rows], rows)) / 2
    terms = -F.logsigmoid(torch.where(itself, logits + bias, -logits - bias)).masked_fill(twins, 0)
    return terms[rows].sum() / len(rows)


def gradients(loss, values):
    found = torch.autograd.grad(loss, values, allow_unused=True)
    return [torch.zeros_like(value) if gradient is None else gradient for gradient, value in zip(found, values, strict=True)]


def assert_close(found, expected, **tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def loss_of_all(pairs, keys, kind="softmax", **options):
    image, text, scale, bias = pairs
    return contrastive_loss(image, text, torch.as_tensor(keys), scale, bias, kind=kind, **options)


def test_with_different_texts_softmax_is_clips_loss():
    from open_clip.loss import ClipLoss

    pairs = make_pairs()
    torch.testing.assert_close(loss_of_all(pairs, range(ROWS)), ClipLoss()(*pairs[:3]))


def test_with_different_texts_sigmoid_is_siglips_loss():
    from open_clip.loss import SigLipLoss

    pairs = make_pairs()
    ours, theirs = loss_of_all(pairs, range(ROWS), "sigmoid"), SigLipLoss()(*pairs)
    torch.testing.assert_close(ours, theirs)
    assert_close(gradients(ours, pairs), gradients(theirs, pairs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 12, 1024])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_values_and_gradients_are_those_of_all_logits_at_once(kind, dtype, chunk, num_ranks):
    pairs = make_pairs(dtype)
    shares = losses_of_ranks(pairs, KEYS, num_ranks, kind=kind, chunk=chunk)
    whole = reference(pairs, KEYS, kind)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(torch.stack(shares).mean(), whole, **tolerance)
    assert_close(gradients(sum(shares), pairs), gradients(whole * num_ranks, pairs), **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ranks_rows_get_the_gradient_of_all_ranks_losses_and_the_scale_that_of_its_own(kind):
    pairs = make_pairs(torch.float64)
    shares = losses_of_ranks(pairs, KEYS, 3, kind=kind, chunk=5)
    whole = gradients(reference(pairs, KEYS, kind) * 3, pairs)
    for loss, rows in zip(shares, torch.arange(ROWS).split(4), strict=True):
        own = reference(pairs, KEYS, kind, rows)
        torch.testing.assert_close(loss, own)
        found = gradients(loss, pairs)
        for ours, theirs in zip(found[:2], whole[:2], strict=True):
            torch.testing.assert_close(ours[rows], theirs[rows])
            assert int((ours != 0).any(dim=1).sum()) == len(rows)  # and no others
        assert_close(found[2:], gradients(own, pairs)[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_scale_with_what_flows_back_as_often_as_it_does(kind):
    pairs = make_pairs(torch.float64)
    loss, whole = loss_of_all(pairs, KEYS, kind), gradients(reference(pairs, KEYS, kind), pairs)
    for factor in (3.0, -0.5):
        found = torch.autograd.grad(loss * factor, pairs, retain_graph=True)
        assert_close(found, [gradient * factor for gradient in whole])


@pytest.mark.parametrize("kind", KINDS)
def test_the_place_of_a_rank_matters(kind):
    image, text, scale, bias = make_pairs()
    second = [values[4:8] for values in (image, text, KEYS)]

    def gather(rows):
        return next(whole.detach() for whole, own in zip((image, text, KEYS), second, strict=True) if torch.equal(own, rows))

    with torch.no_grad():  # else the ranks would also ask each other for their normalisers
        right, wrong = (contrastive_loss(*second, scale, bias, kind=kind, first_row=first, gather=gather) for first in (4, 0))
    torch.testing.assert_close(right, reference((image, text, scale, bias), KEYS, kind, torch.arange(4, 8)).detach())
    assert not torch.isclose(right, wrong)


@pytest.mark.parametrize("chunk", [5, 1024])
def test_a_batch_of_one_text_has_nothing_to_tell_apart(chunk):
    pairs = make_pairs()
    loss = loss_of_all(pairs, [3] * ROWS, chunk=chunk)
    assert float(loss.detach()) == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in torch.autograd.grad(loss, pairs))


def test_a_batch_of_one_text_still_teaches_the_sigmoid_that_pairs_belong_together():
    pairs = make_pairs()
    image, text, scale, bias = pairs
    own = -F.logsigmoid(scale * (image * text).sum(dim=1) + bias).mean()
    torch.testing.assert_close(loss_of_all(pairs, [3] * ROWS, "sigmoid"), own)


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_stay_finite_and_exact(kind):
    """A scale of 100, at which the exponential of a logit is no fp32 number."""
    pairs = [*make_pairs(torch.float64)[:2], torch.tensor(100.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)]
    loss = loss_of_all([value.float() for value in pairs], KEYS, kind)
    torch.testing.assert_close(loss.double(), reference(pairs, KEYS, kind), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_autocast_says_the_loss_is_taken_in_fp32(kind):
    pairs = make_pairs()
    plain = loss_of_all(pairs, KEYS, kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of_all(pairs, KEYS, kind)
    assert torch.equal(loss, plain)
    assert all(map(torch.equal, gradients(loss, pairs), gradients(plain, pairs)))


def test_bf16_embeddings_are_judged_in_fp32_and_get_bf16_gradients():
    image, text, scale, bias = make_pairs()
    image, text = (value.detach().bfloat16().requires_grad_() for value in (image, text))
    loss = loss_of_all((image, text, scale, bias), range(ROWS))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of_all((image.float(), text.float(), scale, bias), range(ROWS)))
    assert [gradient.dtype for gradient in torch.autograd.grad(loss, (image, text, scale))] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_a_bias_has_a_bias_of_zero(kind):
    image, text, scale, _ = make_pairs()
    none, zero = contrastive_loss(image, text, KEYS, scale, kind=kind), torch.zeros(())
    assert torch.equal(none, contrastive_loss(image, text, KEYS, scale, zero, kind=kind))
    assert len(torch.autograd.grad(none, (image, text, scale))) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_batch_is_held_in_blocks(kind):
    rows, chunk = 160, 16
    pairs = make_pairs(rows=rows)
    with Made() as made:
        torch.autograd.grad(loss_of_all(pairs, torch.arange(rows) // 2, kind, chunk=chunk), pairs[:3])
    assert made.largest == rows * WIDTH < rows * chunk  # the embeddings themselves and their gradients
    assert (chunk, chunk) in made.shapes


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_none_are_made_and_the_value_is_the_same(kind):
    pairs = make_pairs(torch.float64)
    with Made() as with_gradients:
        loss = loss_of_all(pairs, KEYS, kind)
    with torch.no_grad(), Made() as without:
        value = loss_of_all(pairs, KEYS, kind)
    assert torch.equal(value, loss.detach())
    assert not value.requires_grad
    assert with_gradients.products.count((ROWS, WIDTH)) == 2  # of images and of texts
    assert set(without.products) == {(ROWS, ROWS)}


def test_every_place_predicts_the_next_one():
    inputs, labels = shift_tokens(torch.tensor([[1, 5, 6, 2, 0]]))
    assert inputs.tolist() == [[1, 5, 6, 2]]
    assert labels.tolist() == [[5, 6, 2, 0]]


VOCABULARY, PLACES = 20, 7


def make_captions(dtype=torch.float32):
    """Hidden states, projection and labels of four rows, the third without a label."""
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, PLACES, WIDTH, generator=random, dtype=dtype).requires_grad_()
    projection = torch.randn(WIDTH, VOCABULARY, generator=random, dtype=dtype).requires_grad_()
    labels = torch.randint(1, VOCABULARY, (4, PLACES), generator=random)
    labels[0, 3:] = labels[1, 1:] = labels[2] = 0
    return hidden, projection, labels


def caption_reference(hidden, projection, labels):
    """Of each row."""
    logits = (hidden @ projection).float() if hidden.dtype != torch.float64 else hidden @ projection
    return F.cross_entropy(logits.permute(0, 2, 1), labels, ignore_index=0, reduction="none").sum(dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("places_at_once", [1, 2, 3, 4, 11, 100])
@pytest.mark.parametrize("places_cached", [1, 3, 100])
def test_the_caption_loss_is_the_cross_entropy_over_labels_that_are_no_padding(
    monkeypatch, dtype, places_at_once, places_cached
):
    monkeypatch.setattr(losses, "CACHED_VALUES", places_cached * VOCABULARY)
    hidden, projection, labels = make_captions(dtype)
    loss = caption_loss(hidden, projection, labels, pad_id=0, chunk_values=places_at_once * VOCABULARY)
    expected = caption_reference(hidden, projection, labels)
    assert int(loss.num_labels) == 3 + 1 + 0 + 7
    assert not loss.rows.requires_grad
    torch.testing.assert_close(loss.rows, expected.detach())
    assert float(loss.rows[2]) == 0
    torch.testing.assert_close(loss.total, expected.sum())
    for factor in (1.0, -0.25):
        found = torch.autograd.grad(loss.total * factor, (hidden, projection), retain_graph=True)
        assert_close(found, torch.autograd.grad(expected.sum() * factor, (hidden, projection), retain_graph=True))


def test_captions_without_a_label_cost_nothing():
    hidden, projection, labels = make_captions()
    loss = caption_loss(hidden, projection, torch.zeros_like(labels), 0)
    assert loss.total.item() == loss.num_labels.item() == 0
    assert loss.rows.tolist() == [0] * 4
    for gradient, value in zip(torch.autograd.grad(loss.total, (hidden, projection)), (hidden, projection), strict=True):
        assert torch.equal(gradient, torch.zeros_like(value))


def test_a_label_that_the_model_rules_out_has_a_finite_loss():
    """Its probability is no fp32 number, its logarithm is."""
    hidden = torch.tensor([[[1.0]]], requires_grad=True)
    projection = torch.tensor([[0.0, 200.0]])
    loss = caption_loss(hidden, projection, torch.tensor([[0]]), pad_id=9)
    assert loss.total.item() == 200
    assert float(torch.autograd.grad(loss.total, hidden)[0]) == 200


def test_a_row_whose_states_are_no_numbers_is_the_only_one_whose_loss_is_none():
    hidden, projection, labels = make_captions()
    with torch.no_grad():
        hidden[1, 0] = float("nan")
        rows = caption_loss(hidden, projection, labels, 0, chunk_values=2 * VOCABULARY).rows
    assert torch.isnan(rows).tolist() == [False, True, False, False]


@pytest.mark.parametrize("places_at_once", [3, 100])
def test_in_bf16_autocast_the_caption_loss_is_near_fp32_and_as_near_as_plain_cross_entropy(monkeypatch, places_at_once):
    monkeypatch.setattr(losses, "CACHED_VALUES", 2 * VOCABULARY)
    hidden, projection, labels = make_captions()
    exact = caption_reference(hidden, projection, labels)
    exact_gradients = torch.autograd.grad(exact.sum(), (hidden, projection))
    with torch.autocast("cpu", torch.bfloat16):
        loss = caption_loss(hidden, projection, labels, 0, places_at_once * VOCABULARY)
        plain = caption_reference(hidden, projection, labels)
    assert loss.total.dtype == loss.rows.dtype == torch.float32
    torch.testing.assert_close(loss.rows, plain.detach(), rtol=1e-5, atol=1e-5)  # the products are rounded alike
    torch.testing.assert_close(loss.rows, exact.detach(), rtol=0.02, atol=0.02)
    assert not torch.allclose(loss.rows, exact.detach(), rtol=1e-5, atol=1e-5)  # they are bf16 products
    found = torch.autograd.grad(loss.total, (hidden, projection))
    for ours, theirs, right in zip(found, torch.autograd.grad(plain.sum(), (hidden, projection)), exact_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - right).norm() / right.norm()) < max(0.01, 1.2 * float((theirs - right).norm() / right.norm()))


def test_gradients_come_in_the_dtypes_of_what_they_belong_to():
    hidden, projection, labels = make_captions()
    low = hidden.detach().bfloat16().requires_grad_(), projection.detach().bfloat16().requires_grad_()
    loss = caption_loss(*low, labels, 0)
    torch.testing.assert_close(loss.total, caption_reference(*(value.float() for value in low), labels).sum())
    assert {gradient.dtype for gradient in torch.autograd.grad(loss.total, low)} == {torch.bfloat16}


def test_a_frozen_projection_gets_no_gradient_and_hidden_states_do():
    hidden, projection, labels = make_captions()
    loss = caption_loss(hidden, projection.detach(), labels, 0)
    expected = torch.autograd.grad(caption_reference(hidden, projection, labels).sum(), hidden)
    assert_close(torch.autograd.grad(loss.total, hidden), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_more_logits_are_held_than_a_chunk_has(autocast):
    rows, places, vocabulary, at_once = 8, 40, 500, 64
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, places, WIDTH, generator=random).requires_grad_()
    projection = torch.randn(WIDTH, vocabulary, generator=random).requires_grad_()
    labels = torch.randint(1, vocabulary, (rows, places), generator=random)
    with Made() as made, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = caption_loss(hidden, projection, labels, 0, at_once * vocabulary + 7)
        torch.autograd.grad(loss.total, (hidden, projection))
    assert made.largest == at_once * vocabulary < hidden.numel() * vocabulary // WIDTH


@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients_the_caption_loss_makes_none(autocast):
    hidden, projection, labels = make_captions()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = caption_loss(hidden, projection, labels, 0)
        with torch.no_grad(), Made() as made:
            value = caption_loss(hidden, projection, labels, 0)
    assert torch.equal(value.total, loss.total.detach())
    assert not value.total.requires_grad
    made_of_weights = made.shapes & {(WIDTH, VOCABULARY), (VOCABULARY, WIDTH)}
    assert made_of_weights <= ({(WIDTH, VOCABULARY)} if autocast else set())  # the bf16 copy alone
