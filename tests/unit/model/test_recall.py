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
    assert found["text_to_image"] == pytest.approx({"r1": 10 / 12, "r5": 11 / 12, "r10": 1.0})
    # image 0: text 0 (0.6) before text 5 (0.47); image 5: only text 5 has anything there
    assert found["image_to_text"] == pytest.approx({"r1": 1.0, "r5": 1.0, "r10": 1.0})


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
    assert found["image_to_text"] == {"r1": 0.0, "r5": 1.0, "r10": 1.0}


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
