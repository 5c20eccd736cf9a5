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

MLP_BATCH_SIZE = 128  # rows; of the follow-up's published command, the paper's code has no figure


class ProbeData(NamedTuple):
    """Features [rows, width] of the three parts, and targets [rows] of all but test, which no probe is ever given."""

    train_x: np.ndarray
    train_y: np.ndarray
    val_x: np.ndarray
    val_y: np.ndarray
    test_x: np.ndarray


class Probe(Protocol):
    """Something that learns from train, selects on validation and predicts test."""

    def fit_predict(self, data: ProbeData, seed: int) -> np.ndarray:
        """Predictions [num_test], float64, in the space of the targets."""
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
    One eigendecomposition of the features' second moments serves every penalty.
    """

    alphas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.alphas or min(self.alphas) <= 0:
            raise ValueError(f"probe.ridge_alphas={self.alphas}: give at least one, all above 0")

    def fit_predict(self, data: ProbeData, seed: int) -> np.ndarray:  # noqa: ARG002  (all probes share one signature)
        """See :class:`Probe`; `seed` changes nothing, ridge is deterministic."""
        _, predicted = self.select(data)
        return predicted

    def select(self, data: ProbeData) -> tuple[float, np.ndarray]:
        """The chosen penalty and the predictions [num_test]."""
        of_x, of_y = standardisers(data)
        x, y = of_x.apply(data.train_x), of_y.apply(data.train_y)
        eigenvalues, directions = np.linalg.eigh(x.T @ x)
        projected = directions.T @ (x.T @ y)
        val, wanted = of_x.apply(data.val_x) @ directions, of_y.apply(data.val_y)
        best_alpha, best_error = 0.0, np.inf
        for alpha in sorted(self.alphas, reverse=True):
            # The lowest squared error is the highest R², and is defined where validation is constant too.
            error = float(np.mean((val @ (projected / (eigenvalues + alpha)) - wanted) ** 2))
            if error < best_error:
                best_alpha, best_error = alpha, error
        weights = directions @ (projected / (eigenvalues + best_alpha))
        return best_alpha, of_y.invert(of_x.apply(data.test_x) @ weights)


@dataclass(frozen=True)
class MlpProbe:
    """The paper's released head: one hidden layer, ReLU, dropout; mean squared error, AdamW, best validation kept."""

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
            return torch.from_numpy(of_y.apply(y).astype(np.float32))

        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # one task per core; and the same order of summation everywhere
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                head = self._train(rows(data.train_x), wanted(data.train_y), rows(data.val_x), wanted(data.val_y))
                with torch.no_grad():
                    predicted = head(rows(data.test_x)).squeeze(1).double().numpy()
        finally:
            torch.set_num_threads(num_threads)
        return of_y.invert(predicted)

    def _train(self, x: torch.Tensor, y: torch.Tensor, val_x: torch.Tensor, val_y: torch.Tensor) -> torch.nn.Module:
        import torch
        import torch.nn.functional as F

        head = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], self.hidden),
            torch.nn.ReLU(),
            torch.nn.Dropout(self.dropout),
            torch.nn.Linear(self.hidden, 1),
        )
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        best_error, best_state, best_epoch = float("inf"), None, 0
        for epoch in range(self.max_epochs):
            head.train()
            for batch in torch.split(torch.randperm(len(x)), MLP_BATCH_SIZE):
                optimizer.zero_grad()
                F.mse_loss(head(x[batch]).squeeze(1), y[batch]).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
            head.eval()
            with torch.no_grad():
                error = float(F.mse_loss(head(val_x).squeeze(1), val_y))
            if error < best_error:
                best_error, best_state, best_epoch = error, copy.deepcopy(head.state_dict()), epoch
            elif epoch - best_epoch >= self.patience:
                break
        if best_state is None:
            raise FloatingPointError(f"no epoch of the MLP probe had a finite error: lower probe.mlp_lr={self.lr}")
        head.load_state_dict(best_state)
        return head
