"""The two losses of UrbanCLIP (paper section 3; released code: open_clip's CoCaLoss), in fp32.

    total = contrastive_weight * 1/2 (CE(s I T') + CE(s T I')) + caption_weight * CE(next token)

All functions are rank-blind: the caller gathers columns and sums over ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LossTerms(NamedTuple):
    """Losses of one rank, scaled so that their mean over ranks is the loss of the whole batch."""

    total: Tensor
    contrastive: Tensor
    caption: Tensor


def contrastive_loss(
    image_rows: Tensor,
    text_rows: Tensor,
    image_columns: Tensor,
    text_columns: Tensor,
    text_keys: Tensor,
    first_row: int,
    logit_scale: Tensor,
) -> Tensor:
    """Mean symmetric cross-entropy of this rank's rows against all columns.

    image_rows, text_rows: [rows, width], L2-normalised; *_columns: [batch, width], all ranks in rank order; text_keys: int64
    [batch], equal where texts are equal; first_row: this rank's place in the batch. Pairs whose texts are equal are not
    negatives of each other: their logits are left out.
    """
    rows = image_rows.shape[0]
    targets = torch.arange(first_row, first_row + rows, device=image_rows.device)
    same_text = text_keys[targets][:, None] == text_keys[None, :]
    same_text[torch.arange(rows, device=targets.device), targets] = False
    image_logits = (logit_scale * image_rows.float() @ text_columns.float().T).masked_fill(same_text, float("-inf"))
    text_logits = (logit_scale * text_rows.float() @ image_columns.float().T).masked_fill(same_text, float("-inf"))
    return (F.cross_entropy(image_logits, targets) + F.cross_entropy(text_logits, targets)) / 2


def shift_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Decoder inputs and labels of a caption: every place predicts the next one. tokens: [batch, places]."""
    return tokens[:, :-1], tokens[:, 1:]


def caption_loss_sum(hidden: Tensor, projection: Tensor, labels: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Sum of the next-token cross-entropy over valid labels, and their number.

    hidden: [batch, places, width] before the vocabulary projection [width, vocabulary]; labels: [batch, places]. Only the
    places whose label is no padding are projected.
    """
    valid = labels != pad_id
    logits = hidden[valid] @ projection
    return F.cross_entropy(logits.float(), labels[valid], reduction="sum"), valid.sum()
