"""Texts without their padding: the tokens of all rows one after another, so that no product is spent on what nobody reads.

Linear layers, norms and perceptrons see tokens alone. Attention looks at rows, for which its projections are unpacked.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Packing(NamedTuple):
    """Which places of a batch [rows, places] are kept; `kept` are their numbers in the flattened batch, int64 [tokens]."""

    kept: Tensor
    rows: int
    places: int

    @staticmethod
    def of(is_kept: Tensor) -> Packing:
        """is_kept: bool [rows, places]."""
        return Packing(is_kept.flatten().nonzero()[:, 0], *is_kept.shape)

    def pack(self, values: Tensor) -> Tensor:
        """[rows, places, width] -> [tokens, width]"""
        return values.flatten(0, 1).index_select(0, self.kept)

    def unpack(self, values: Tensor) -> Tensor:
        """[tokens, width] -> [rows, places, width], zero where nothing is kept."""
        nothing = values.new_zeros(self.rows * self.places, values.shape[1])
        return nothing.index_copy(0, self.kept, values).view(self.rows, self.places, -1)
