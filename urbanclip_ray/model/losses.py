"""The two losses of UrbanCLIP (paper section 3; released code: open_clip's CoCaLoss), in fp32.

    total = contrastive_weight * contrastive + caption_weight * CE(next token)
    contrastive = 1/2 (CE(s I T') + CE(s T I')), or SigLIP's sigmoid loss

All functions are rank-blind: the caller brings what gathers rows, and sums over ranks. Neither loss holds its logits: they are
made in blocks, and where gradients are wanted these are made from the same blocks, so that a backward only scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from urbanclip_ray.model.packing import fill_up, num_filled

ContrastiveKind = Literal["softmax", "sigmoid"]
Gather = Callable[[Tensor], Tensor]

# how much of a chunk the softmax of the caption loss takes at a time
CACHED_VALUES = 2**20  # on a CPU: 4 MB of fp32 stay in its caches from one operation to the next
LAUNCHED_VALUES = 2**24  # elsewhere: few kernels


def _alone(rows: Tensor) -> Tensor:
    """The rows of all ranks where there is one."""
    return rows


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    text_keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    kind: ContrastiveKind = "softmax",
    gather: Gather = _alone,
    first_row: int = 0,
    chunk: int = 1024,
) -> Tensor:
    """This rank's share of the contrastive loss: the mean over ranks is that of the whole batch.

    softmax: the mean symmetric cross-entropy of this rank's rows (CLIP). sigmoid: -log sigmoid(z (s I T' + b)), summed over
    this rank's images and all texts, by its number of rows; z is 1 for a pair and -1 for all else (SigLIP, arXiv 2303.15343,
    eq. 1). Pairs whose texts are equal are not negatives of each other: their logits are left out. A softmax knows no bias.

    image, text: [rows, width], L2-normalised, as many on every rank; text_keys: int64 [rows], equal where texts are equal;
    logit_scale, logit_bias: scalars. `gather` returns the rows of all ranks in rank order and needs no gradient; all ranks
    call it equally often, in the forward alone. first_row: this rank's place in the batch.

    What flows back into `image` and `text` is the gradient of the *sum* of all ranks' losses, exact and made without
    communication; into the scale and the bias it is that of this rank's loss, which all ranks' sum completes. Blocks of
    `chunk` x `chunk` logits are the most that is held at a time, whatever the size of the batch.
    """
    inputs = [value for value in (image, text, logit_scale, logit_bias) if value is not None]
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in inputs)
    loss: Tensor = _ContrastiveLoss.apply(
        image, text, logit_scale, logit_bias, text_keys, kind, gather, first_row, chunk, wanted
    )
    return loss


class _Block(NamedTuple):
    """Some images (rows) against some texts (columns) of the batch."""

    rows: slice
    columns: slice
    cosines: Tensor
    logits: Tensor  # -inf where a pair is left out

    def own(self, values: Tensor) -> Tensor:
        """A view of those of the values that belong to an image and its own text."""
        return values.diagonal(self.rows.start - self.columns.start)


class _Batch(NamedTuple):
    """Rows of all ranks, and which of them are ours: two strips of the matrix of logits.

    Strip 0 has our images against all texts, strip 1 all images against our texts. An image's gradient is a sum over its row,
    a text's over its column, so that each strip has all that one kind of our rows needs.
    """

    image: Tensor
    text: Tensor
    keys: Tensor
    scale: Tensor
    bias: Tensor
    first: int
    num_own: int
    chunk: int

    @property
    def ours(self) -> slice:
        return slice(self.first, self.first + self.num_own)

    def strip(self, side: int) -> Iterator[_Block]:
        ours = _pieces(self.first, self.first + self.num_own, self.chunk)
        everyone = _pieces(0, len(self.image), self.chunk)
        for own in ours:
            for other in everyone:
                yield self._block(own, other) if side == 0 else self._block(other, own)

    def _block(self, rows: slice, columns: slice) -> _Block:
        cosines = self.image[rows] @ self.text[columns].T
        block = _Block(rows, columns, cosines, torch.addcmul(self.bias, cosines, self.scale))
        twins = self.keys[rows, None] == self.keys[None, columns]
        block.own(twins).fill_(False)
        block.logits.masked_fill_(twins, float("-inf"))
        return block


def _pieces(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


class _Softmax:
    """Twice the number of our rows times the loss, and its slopes: its derivatives by each logit."""

    terms_per_row = 2

    def __init__(self, batch: _Batch) -> None:
        self._own = [self._normalise(batch, side) for side in (0, 1)]
        self.total = torch.stack([normalisers - positives for normalisers, positives in self._own]).sum()

    @staticmethod
    def _normalise(batch: _Batch, side: int) -> tuple[Tensor, Tensor]:
        """Of our images (side 0) or texts (side 1): the log of the sum over all the others, and the logit of their own."""
        normalisers = batch.image.new_full((len(batch.image),), float("-inf"))
        positives = torch.zeros_like(normalisers)
        for block in batch.strip(side):
            lines = normalisers[(block.rows, block.columns)[side]]
            torch.logaddexp(lines, block.logits.logsumexp(1 - side), out=lines)
            own, first = block.own(block.logits), max(block.rows.start, block.columns.start)
            positives[first : first + len(own)] = own
        return normalisers[batch.ours], positives[batch.ours]

    def prepare(self, gather: Gather) -> None:
        """Fetch what the slopes of other ranks' losses need; all ranks must call it."""
        self._image_normalisers, self._text_normalisers = (gather(normalisers) for normalisers, _ in self._own)

    def slopes(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Of the terms of the block's images, and of those of its texts."""
        by_image = (block.logits - self._image_normalisers[block.rows, None]).exp_()
        by_text = (block.logits - self._text_normalisers[None, block.columns]).exp_()
        for slopes in (by_image, by_text):
            block.own(slopes).sub_(1)
        return by_image, by_text


class _Sigmoid:
    """The number of our rows times the loss, and its slopes. Every term belongs to its image."""

    terms_per_row = 1

    def __init__(self, batch: _Batch) -> None:
        self.total = batch.image.new_zeros(())
        for block in batch.strip(0):
            signed = block.logits.neg_()
            block.own(signed).neg_()
            self.total -= F.logsigmoid(signed).sum()

    def prepare(self, gather: Gather) -> None:
        """Nothing to fetch: no term depends on another."""

    def slopes(self, block: _Block) -> tuple[Tensor, Tensor]:
        by_image = block.logits.sigmoid()
        block.own(by_image).sub_(1)
        return by_image, torch.zeros_like(by_image[:1, :1])


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        keys: Tensor,
        kind: ContrastiveKind,
        gather: Gather,
        first_row: int,
        chunk: int,
        wanted: bool,
    ) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            dtype = torch.promote_types(image.dtype, torch.float32)
            shift = torch.zeros_like(scale) if bias is None or kind == "softmax" else bias
            batch = _Batch(
                gather(image.to(dtype)),
                gather(text.to(dtype)),
                gather(keys),
                scale.to(dtype),
                shift.to(dtype),
                first_row,
                len(image),
                chunk,
            )
            loss = _Softmax(batch) if kind == "softmax" else _Sigmoid(batch)
            num_terms = loss.terms_per_row * len(image)
            if wanted:
                loss.prepare(gather)
                gradients = _gradients(batch, loss)
                ctx.save_for_backward(*(gradient / num_terms for gradient in gradients))
                ctx.dtypes = image.dtype, text.dtype, scale.dtype, None if bias is None else bias.dtype
        return loss.total / num_terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if dtype is None else (saved * gradient).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None, None


def _gradients(batch: _Batch, loss: _Softmax | _Sigmoid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By our images and our texts, of all ranks' losses; by the scale and the bias, of ours."""
    by_image, by_text = torch.zeros_like(batch.image[batch.ours]), torch.zeros_like(batch.text[batch.ours])
    by_scale, by_bias = torch.zeros_like(batch.scale), torch.zeros_like(batch.bias)
    for side in (0, 1):
        for block in batch.strip(side):
            slopes = loss.slopes(block)
            by_scale += (slopes[side] * block.cosines).sum()
            by_bias += slopes[side].sum()
            both = slopes[0].add_(slopes[1])
            if side == 0:
                by_image[_shift(block.rows, batch.first)] += both @ batch.text[block.columns]
            else:
                by_text[_shift(block.columns, batch.first)] += both.T @ batch.image[block.rows]
    if isinstance(loss, _Softmax):
        by_bias.zero_()  # it is so but for rounding
    return by_image * batch.scale, by_text * batch.scale, by_scale, by_bias


def _shift(piece: slice, first: int) -> slice:
    return slice(piece.start - first, piece.stop - first)


def shift_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Decoder inputs and labels of a caption: every place predicts the next one. tokens: [batch, places]."""
    return tokens[:, :-1], tokens[:, 1:]


class CaptionLoss(NamedTuple):
    """Cross-entropy summed over all valid labels, which alone has a gradient, and over those of each row; their number."""

    total: Tensor
    rows: Tensor
    num_labels: Tensor


def caption_loss(hidden: Tensor, projection: Tensor, labels: Tensor, pad_id: int, chunk_values: int = 2**26) -> CaptionLoss:
    """The next-token cross-entropy. Only places whose label is no padding are projected, about `chunk_values` logits at a time.

    hidden: [batch, places, width] before the vocabulary projection [width, vocabulary]; labels: int64 [batch, places]. Matrix
    products are in autocast's dtype where it is on, all else in fp32. Beside the gradients of hidden and projection, which are
    made in the forward, one chunk of logits is the most that is held, 134 MB in bf16. Each chunk adds to the projection's
    gradient, so that smaller ones take longer: 2**24 values 8% (one CPU core, vocabulary 49,408).
    """
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or projection.requires_grad)
    total, rows = _CaptionLoss.apply(hidden, projection, labels, pad_id, chunk_values, wanted)
    return CaptionLoss(total, rows, (labels != pad_id).sum())


class _Projection:
    """Places onto the vocabulary and back, in buffers that every chunk uses again: faulting in fresh ones costs more than sums.

    `low` is the type of the matrix products, `high` that of everything else, which is done in pieces of a chunk.
    """

    def __init__(self, weight: Tensor, num_places: int, low: torch.dtype, with_gradient: bool) -> None:
        self._high = torch.promote_types(low, torch.float32)
        self._weight = weight.to(low)
        self._logits = weight.new_empty(num_filled(num_places), weight.shape[1], dtype=low)
        values = CACHED_VALUES if weight.device.type == "cpu" else LAUNCHED_VALUES
        num_lines = max(1, min(values // weight.shape[1], num_places))
        self._lines = weight.new_empty(num_lines, weight.shape[1], dtype=self._high)
        self._results = torch.empty_like(self._lines)
        self._with_gradient = with_gradient
        self.gradient = weight.new_zeros(weight.shape if with_gradient else 0, dtype=self._high)
        self._product = torch.empty_like(self.gradient, dtype=low) if low != self._high else self.gradient

    def losses(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Of [places, width] and [places, 1]: the loss of each place, and with gradients that of the sum by `hidden`."""
        num_places = len(hidden)
        hidden = fill_up(hidden.to(self._weight.dtype))
        logits = torch.mm(hidden, self._weight, out=self._logits[: len(hidden)])  # zero where filled up, and so are its slopes
        losses = torch.cat([self._loss(logits[piece], target[piece]) for piece in _pieces(0, num_places, len(self._lines))])
        if not self._with_gradient:
            return losses, hidden
        self._add_gradient(hidden, logits)
        return losses, (logits @ self._weight.T)[:num_places]

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """[places]; with gradients the logits turn into its derivatives by them."""
        lines = self._lines[: len(logits)].copy_(logits)
        probabilities = torch.softmax(lines, dim=1, out=self._results[: len(logits)])
        # from the likeliest token, whose probability does not vanish: takes half the time of log_softmax and its exponential
        losses = (lines.amax(1) - lines.gather(1, target)[:, 0]) - probabilities.amax(1).log()
        if self._with_gradient:
            logits.copy_(probabilities.scatter_(1, target, torch.expm1(-losses)[:, None]))
        return losses

    def _add_gradient(self, hidden: Tensor, slopes: Tensor) -> None:
        if self._product is self.gradient:
            self.gradient.addmm_(hidden.T, slopes)
            return
        torch.mm(hidden.T, slopes, out=self._product)
        # torch adds mixed types at a quarter of the speed of one type (57 ms for 15 here, on two CPU cores)
        for piece in _pieces(0, len(self.gradient), len(self._lines)):
            self.gradient[piece].add_(self._lines[: piece.stop - piece.start].copy_(self._product[piece]))


class _CaptionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, projection: Tensor, labels: Tensor, pad_id: int, chunk_values: int, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        low = torch.promote_types(hidden.dtype, torch.float32)
        if torch.is_autocast_enabled(device):
            low = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1, 1)
            places = (targets[:, 0] != pad_id).nonzero()[:, 0]
            losses = flat.new_zeros(len(flat), dtype=torch.promote_types(low, torch.float32))
            hidden_gradient = torch.zeros_like(flat) if wanted else flat
            size = max(1, chunk_values // projection.shape[1])
            project = _Projection(projection, min(size, len(places)), low, wanted)
            for chosen in torch.split(places, size) if len(places) else ():
                losses[chosen], gradient = project.losses(flat[chosen], targets[chosen])
                if wanted:
                    hidden_gradient[chosen] = gradient.to(hidden.dtype)
            if wanted:
                ctx.save_for_backward(hidden_gradient.view(hidden.shape), project.gradient.to(projection.dtype))
        rows = losses.view(labels.shape).sum(1)
        ctx.mark_non_differentiable(rows)
        return rows.sum(), rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, projection_gradient = ctx.saved_tensors
        return hidden_gradient * gradient, projection_gradient * gradient, None, None, None, None
