"""Texts without their padding: the tokens of all rows one after another, so that no product is spent on what nobody reads.

Linear layers, norms and perceptrons see tokens alone. Attention looks at rows, for which its projections are unpacked.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

# Rows of a product that depends on the texts are filled up to a multiple of this. On a CPU oneDNN compiles a kernel for every
# shape that it has not seen, which took up to a quarter of a small model's steps in bf16
ROWS_MULTIPLE = 32


class Packing(NamedTuple):
    """Which places of a batch [rows, places] are kept; `kept` are their numbers in the flattened batch, int64 [tokens].

    Packed values are filled up (:func:`num_filled`) with copies of the batch's first place, which are left out when they are
    unpacked.
    """

    kept: Tensor
    rows: int
    places: int

    @staticmethod
    def of(is_kept: Tensor) -> Packing:
        """is_kept: bool [rows, places]."""
        return Packing(is_kept.flatten().nonzero()[:, 0], *is_kept.shape)

    def pack(self, values: Tensor) -> Tensor:
        """[rows, places, width] -> [tokens filled up, width]"""
        return values.flatten(0, 1).index_select(0, fill_up(self.kept))

    def unpack(self, values: Tensor) -> Tensor:
        """[tokens filled up, width] -> [rows, places, width], zero where nothing is kept."""
        nothing = values.new_zeros(self.rows * self.places, values.shape[1])
        return nothing.index_copy(0, self.kept, values[: len(self.kept)]).view(self.rows, self.places, -1)


def num_filled(num_rows: int) -> int:
    """So many rows, filled up to the next multiple."""
    return -(-num_rows // ROWS_MULTIPLE) * ROWS_MULTIPLE


def fill_up(values: Tensor) -> Tensor:
    """[rows, ...] -> [rows filled up, ...], with zeros."""
    return F.pad(values, (0, 0) * (values.ndim - 1) + (0, num_filled(len(values)) - len(values)))
