"""The two heads that judge frozen features: ridge regression, and the small network of the paper's released code.

Both standardise features and target by the training rows alone, and look at validation rows only to choose.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np

if TYPE_CHECKING:
    import torch

    from urbanclip_ray.evaluate.heads import Heads

MLP = "_mlp"  # what the name of a method with the network for a head ends with
MLP_BATCH_SIZE = 128  # rows; of the follow-up's published command, the paper's code has no figure


class ProbeData(NamedTuple):
    """Features [rows, width] of the three parts, and targets [rows] of all but test, which no probe is ever given.

    Targets may be several at once, [rows, targets]: each is learned as if it were alone.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    val_x: np.ndarray
    val_y: np.ndarray
    test_x: np.ndarray


class Probe(Protocol):
    """Something that learns from train, selects on validation and predicts test."""

    def fit_predict(self, data: ProbeData, seed: int) -> np.ndarray:
        """Predictions [num_test] or [num_test, targets], float64, in the space of the targets.

        A row is predicted without regard to the others of `test_x`.
        """
        ...


MAX_DEVIATIONS = 6.0


@dataclass(frozen=True)
class Standardiser:
    """Mean and standard deviation of the training rows; a constant column keeps its scale.

    Values are cut off `limit` deviations out, which is :data:`MAX_DEVIATIONS` for features: a column that hardly varies in
    training otherwise throws a test tile hundreds of deviations out, and one such tile decides R².
    """

    mean: np.ndarray
    scale: np.ndarray
    limit: float

    @classmethod
    def fit(cls, values: np.ndarray, limit: float = math.inf) -> Self:
        scale = values.std(axis=0)
        return cls(values.mean(axis=0), np.where(scale > 0, scale, 1.0), limit)

    def apply(self, values: np.ndarray) -> np.ndarray:
        standardised: np.ndarray = (values.astype(np.float64) - self.mean) / self.scale
        return standardised.clip(-self.limit, self.limit)

    def invert(self, values: np.ndarray) -> np.ndarray:
        restored: np.ndarray = values * self.scale + self.mean
        return restored


def standardisers(data: ProbeData) -> tuple[Standardiser, Standardiser]:
    """Of the features, cut off, and of the target; both from the training rows alone."""
    return Standardiser.fit(data.train_x.astype(np.float64), MAX_DEVIATIONS), Standardiser.fit(data.train_y)


@dataclass(frozen=True)
class RidgeProbe:
    """Ridge regression; the penalty is the one with the best validation R², the largest among equals.

    The penalty multiplies the squared norm of the weights, beside the sum of squared errors, as in sklearn's `Ridge`.
    One eigendecomposition of the features' second moments serves every penalty and every target.
    """

    alphas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.alphas or min(self.alphas) <= 0:
            raise ValueError(f"probe.ridge_alphas={self.alphas}: give at least one, all above 0")

    def fit_predict(self, data: ProbeData, seed: int) -> np.ndarray:  # noqa: ARG002  (all probes share one signature)
        """See :class:`Probe`; `seed` changes nothing, ridge is deterministic."""
        _, predicted = self.select(data)
        return predicted

    def select(self, data: ProbeData) -> tuple[np.ndarray, np.ndarray]:
        """The chosen penalties, [] or [targets], and the predictions."""
        of_x, of_y = standardisers(data)
        x, y = of_x.apply(data.train_x), _columns(of_y.apply(data.train_y))
        eigenvalues, directions = np.linalg.eigh(x.T @ x)
        projected = directions.T @ (x.T @ y)  # [width, targets]
        val, wanted = of_x.apply(data.val_x) @ directions, _columns(of_y.apply(data.val_y))
        best_alphas, best_errors = np.zeros(y.shape[1]), np.full(y.shape[1], np.inf)
        for alpha in sorted(self.alphas, reverse=True):
            # The lowest squared error is the highest R², and is defined where validation is constant too.
            errors = np.mean((val @ (projected / (eigenvalues + alpha)[:, None]) - wanted) ** 2, axis=0)
            better = errors < best_errors
            best_alphas[better], best_errors[better] = alpha, errors[better]
        weights = directions @ (projected / (eigenvalues[:, None] + best_alphas))
        predicted = of_x.apply(data.test_x) @ weights
        shape = data.train_y.shape[1:]
        return best_alphas.reshape(shape), of_y.invert(predicted.reshape(len(predicted), *shape))


@dataclass(frozen=True)
class MlpProbe:
    """The paper's released head: one hidden layer, ReLU, dropout; mean squared error, AdamW, best validation kept.

    Heads of several targets are trained side by side in one program: with the same initial weights, order of rows and dropped
    units as each would have alone, and AdamW works on every weight by itself, so they differ from it by rounding only.
    """

    hidden: int
    dropout: float
    lr: float
    weight_decay: float
    max_epochs: int
    patience: int

    def fit_predict(self, data: ProbeData, seed: int) -> np.ndarray:
        """See :class:`Probe`. The same seed gives the same predictions; raises when no epoch has a finite error."""
        import torch

        of_x, of_y = standardisers(data)

        def rows(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(of_x.apply(x).astype(np.float32))

        def wanted(y: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(_columns(of_y.apply(y)).astype(np.float32))

        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # one task per core; and the same order of summation everywhere
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                heads = self._train(rows(data.train_x), wanted(data.train_y), rows(data.val_x), wanted(data.val_y))
                with torch.no_grad():
                    predicted = heads(rows(data.test_x), None).double().numpy()
        finally:
            torch.set_num_threads(num_threads)
        restored: np.ndarray = of_y.invert(predicted.reshape(len(predicted), *data.train_y.shape[1:]))
        return restored

    def _train(self, x: torch.Tensor, y: torch.Tensor, val_x: torch.Tensor, val_y: torch.Tensor) -> Heads:
        import torch

        from urbanclip_ray.evaluate.heads import Heads

        heads = Heads(x.shape[1], self.hidden, y.shape[1])
        best = copy.deepcopy(heads)
        optimizer = torch.optim.AdamW(heads.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        best_errors, best_epochs = torch.full((y.shape[1],), math.inf), torch.zeros(y.shape[1], dtype=torch.int64)
        for epoch in range(self.max_epochs):
            for batch in torch.split(torch.randperm(len(x)), MLP_BATCH_SIZE):
                optimizer.zero_grad()
                kept = torch.nn.functional.dropout(torch.ones(len(batch), self.hidden), self.dropout)
                # The sum over targets: none has a part in another's gradient.
                ((heads(x[batch], kept) - y[batch]) ** 2).mean(dim=0).sum().backward()
                optimizer.step()
            with torch.no_grad():
                errors = ((heads(val_x, None) - val_y) ** 2).mean(dim=0)
            waiting = epoch - best_epochs <= self.patience  # a head that has waited longer has stopped
            better = waiting & (errors < best_errors)
            best.take(heads, better)
            best_errors, best_epochs[better] = torch.where(better, errors, best_errors), epoch
            if not (epoch - best_epochs < self.patience).any():
                break
        if not torch.isfinite(best_errors).all():
            raise FloatingPointError(f"no epoch of the MLP probe had a finite error: lower probe.mlp_lr={self.lr}")
        return best


def _columns(y: np.ndarray) -> np.ndarray:
    return y.reshape(len(y), -1)
