"""R², by which everything here is judged: one definition for all."""

from __future__ import annotations

import numpy as np


def r2(y: np.ndarray, predicted: np.ndarray) -> float:
    """The share of the targets' variance [rows] that predictions explain; below 0 they are worse than the targets' mean.

    NaN where the targets are constant: there is nothing to explain. Says nothing across different sets of targets.
    """
    if np.ptp(y) == 0:
        return float("nan")
    return 1 - float(((predicted - y) ** 2).sum() / ((y - y.mean()) ** 2).sum())
