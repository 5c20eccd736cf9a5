"""Both losses against references in plain torch, a whole batch at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from urbanclip_ray.model.losses import caption_loss_sum, contrastive_loss, shift_tokens

ROWS, WIDTH = 6, 8
SCALE = torch.tensor(10.0)


@pytest.fixture
def pairs():
    random = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(ROWS, WIDTH, generator=random), dim=-1).requires_grad_() for _ in range(2)]


def loss_of_all(image, text, keys):
    return contrastive_loss(image, text, image, text, torch.tensor(keys), 0, SCALE)


def test_with_different_texts_it_is_clips_loss(pairs):
    from open_clip.loss import ClipLoss

    image, text = pairs
    reference = ClipLoss()(image, text, SCALE)
    torch.testing.assert_close(loss_of_all(image, text, list(range(ROWS))), reference)


def test_pairs_of_equal_texts_are_no_negatives_of_each_other(pairs):
    image, text = pairs
    keys = [0, 1, 0, 2, 1, 0]
    terms = []
    for row in range(ROWS):
        kept = [other for other in range(ROWS) if other == row or keys[other] != keys[row]]
        own = kept.index(row)
        terms.append(-F.log_softmax(SCALE * image[row] @ text[kept].T, dim=0)[own])
        terms.append(-F.log_softmax(SCALE * text[row] @ image[kept].T, dim=0)[own])
    reference = torch.stack(terms).mean()
    loss = loss_of_all(image, text, keys)
    torch.testing.assert_close(loss, reference)
    for ours, theirs in zip(torch.autograd.grad(loss, pairs), torch.autograd.grad(reference, pairs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_batch_of_one_text_has_nothing_to_tell_apart(pairs):
    image, text = pairs
    loss = loss_of_all(image, text, [3] * ROWS)
    assert float(loss.detach()) == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in torch.autograd.grad(loss, pairs))


def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(pairs):
    image, text = pairs
    keys = torch.tensor([0, 1, 0, 2, 1, 3])
    ranks = [
        contrastive_loss(image[first : first + 2], text[first : first + 2], image, text, keys, first, SCALE)
        for first in (0, 2, 4)
    ]
    torch.testing.assert_close(torch.stack(ranks).mean(), loss_of_all(image, text, keys.tolist()))
    misplaced = contrastive_loss(image[2:4], text[2:4], image, text, keys, 0, SCALE)
    assert not torch.isclose(misplaced, ranks[1])


def test_bf16_embeddings_are_judged_in_fp32(pairs):
    image, text = (value.detach().bfloat16() for value in pairs)
    loss = loss_of_all(image, text, list(range(ROWS)))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of_all(image.float(), text.float(), list(range(ROWS))))


def test_every_place_predicts_the_next_one():
    inputs, labels = shift_tokens(torch.tensor([[1, 5, 6, 2, 0]]))
    assert inputs.tolist() == [[1, 5, 6, 2]]
    assert labels.tolist() == [[5, 6, 2, 0]]


def test_the_caption_loss_is_the_cross_entropy_over_labels_that_are_no_padding():
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 7, WIDTH, generator=random, requires_grad=True)
    projection = torch.randn(WIDTH, 20, generator=random, requires_grad=True)
    labels = torch.randint(1, 20, (3, 7), generator=random)
    labels[0, 3:] = labels[2, 1:] = 0
    total, count = caption_loss_sum(hidden, projection, labels, pad_id=0)
    reference = F.cross_entropy((hidden @ projection).permute(0, 2, 1), labels, ignore_index=0)
    assert int(count) == 3 + 7 + 1
    torch.testing.assert_close(total / count, reference)
    ours, theirs = (torch.autograd.grad(loss, (hidden, projection)) for loss in (total / count, reference))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


def test_captions_without_a_label_cost_nothing():
    total, count = caption_loss_sum(torch.randn(2, 3, WIDTH), torch.randn(WIDTH, 20), torch.zeros(2, 3, dtype=torch.int64), 0)
    assert float(total) == float(count) == 0
