"""Recall at k on cases that can be counted by hand, and chance against simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from urbanclip_ray.model import recall
from urbanclip_ray.model.recall import chance_recall, recall_at_k


def test_a_case_by_hand():
    """Twelve images along a line; every text points at its own image, but two that point elsewhere."""
    image = torch.eye(12)
    owner = torch.arange(12)
    text = torch.eye(12)
    text[0] = torch.tensor([3.0, 4.0] + [0.0] * 10) / 5  # image 1 first, its own second
    text[5] = torch.linspace(12, 1, 12)  # its own is the sixth
    text[5] /= text[5].norm()
    found = recall_at_k(image, text, owner)
    mean_rank = (10 * 1 + 2 + 6) / 12
    shares = {"r1": 10 / 12, "r5": 11 / 12, "r10": 1.0}
    assert found["text_to_image"] == pytest.approx(shares | {"median_rank": 1.0, "mean_rank": mean_rank})
    # image 0: text 0 (0.6) before text 5 (0.47); image 5: only text 5 has anything there
    shares = {"r1": 1.0, "r5": 1.0, "r10": 1.0}
    assert found["image_to_text"] == pytest.approx(shares | {"median_rank": 1.0, "mean_rank": 1.0})


def test_an_image_is_found_by_any_of_its_texts_and_twins_are_misses():
    image = torch.eye(3)
    owner = torch.tensor([2, 0, 0, 1])  # in no order
    text = torch.tensor([[0, 0, 1.0], [0.6, 0.8, 0], [1.0, 0, 0], [0, 1.0, 0]])
    found = recall_at_k(image, text, owner)
    assert found["image_to_text"]["r1"] == 1.0
    assert found["text_to_image"]["r1"] == pytest.approx(3 / 4)
    stolen = torch.tensor([[0, 0, 1.0], [0.6, 0.8, 0], [0, 1.0, 0], [0.9, 0, 0.4]])
    assert recall_at_k(image, stolen, owner)["image_to_text"]["r1"] == pytest.approx(1 / 3)


def test_galleries_smaller_than_k_are_found_whole():
    found = recall_at_k(torch.eye(2), torch.eye(2).flip(0), torch.arange(2))
    assert found["image_to_text"] == {"r1": 0.0, "r5": 1.0, "r10": 1.0, "median_rank": 2.0, "mean_rank": 2.0}


def test_the_twin_of_a_text_is_a_miss_unless_equal_texts_count():
    """Two tiles with one caption, whose images lie at different distances from it."""
    image = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1.0]])
    text = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    owner, same_text = torch.arange(3), torch.tensor([7, 7, 2])
    strict = recall_at_k(image, text, owner)
    assert strict["text_to_image"] | {"r5": 1.0} == pytest.approx(
        {"r1": 2 / 3, "r5": 1.0, "r10": 1.0, "median_rank": 1.0, "mean_rank": 4 / 3}
    )
    assert strict["image_to_text"]["mean_rank"] == pytest.approx((1.5 + 1.5 + 1) / 3)  # one of two equal texts is its own
    fair = recall_at_k(image, text, owner, same_text)
    assert fair["text_to_image"]["r1"] == fair["image_to_text"]["r1"] == 1.0
    assert fair["image_to_text"]["mean_rank"] == 1.0


@pytest.mark.parametrize("with_twins", [False, True])
def test_ranks_are_those_of_a_sorted_gallery(with_twins):
    random = torch.Generator().manual_seed(1)
    normal = torch.nn.functional.normalize
    image, text = (normal(torch.randn(rows, 6, generator=random), dim=1) for rows in (40, 130))
    owner, same_text = (torch.randint(most, (130,), generator=random) for most in (38, 60))  # two images have no text
    found = recall_at_k(image, text, owner, same_text if with_twins else None)
    own = [set(same_text[owner == at].tolist()) for at in range(40)]
    for name, queries, gallery in (("image_to_text", image, text), ("text_to_image", text, image)):
        ranks = []
        for at in range(len(queries)):
            order = (gallery @ queries[at]).argsort(descending=True).tolist()
            if name == "image_to_text":
                true = [(int(same_text[i]) in own[at]) if with_twins else int(owner[i]) == at for i in order]
            else:
                true = [(int(same_text[at]) in own[i]) if with_twins else int(owner[at]) == i for i in order]
            ranks.append(1 + true.index(True) if True in true else 1 + len(gallery))
        assert found[name]["mean_rank"] == pytest.approx(np.mean(ranks))
        assert found[name]["median_rank"] == pytest.approx(np.median(ranks))
        assert found[name]["r5"] == pytest.approx(np.mean(np.array(ranks) <= 5))


def test_an_image_without_a_text_ranks_behind_the_gallery():
    found = recall_at_k(torch.eye(2), torch.eye(2)[:1], torch.tensor([0]))
    assert found["image_to_text"] == {"r1": 0.5, "r5": 0.5, "r10": 0.5, "median_rank": 1.5, "mean_rank": 1.5}


def test_chunks_of_queries_do_not_change_the_figures(monkeypatch):
    random = torch.Generator().manual_seed(0)
    image, text = torch.randn(50, 6, generator=random), torch.randn(120, 6, generator=random)
    owner = torch.randint(50, (120,), generator=random)
    whole = recall_at_k(image, text, owner)
    monkeypatch.setattr(recall, "QUERIES_PER_CHUNK", 7)
    assert recall_at_k(image, text, owner) == whole


def test_chance_is_what_a_random_order_reaches():
    owner = torch.tensor([0] * 1 + [1] * 2 + [2] * 5 + [3] * 5 + [4] * 3)
    chance = chance_recall(owner, num_images=6)  # one image has no text
    random = np.random.default_rng(0)
    hits = {k: [] for k in recall.KS}
    for _ in range(4000):
        order = owner.numpy()[random.permutation(len(owner))]
        for k in recall.KS:
            hits[k].append(len(set(order[:k].tolist())) / 6)
    for k in recall.KS:
        assert chance["image_to_text"][f"r{k}"] == pytest.approx(float(np.mean(hits[k])), abs=0.01)
    assert chance["text_to_image"] == {"r1": pytest.approx(1 / 6), "r5": pytest.approx(5 / 6), "r10": 1.0}
