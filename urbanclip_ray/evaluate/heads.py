"""Several small networks of one shape in one program: the heads of the MLP probe, one for each target."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Heads(nn.Module):
    """Networks of one hidden layer with ReLU on the same features. All of them start from the same weights."""

    def __init__(self, width: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        first, second = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        self.first = nn.Parameter(first.weight.detach().repeat(num_heads, 1, 1))  # [heads, hidden, width]
        self.first_bias = nn.Parameter(first.bias.detach().repeat(num_heads, 1))
        self.second = nn.Parameter(second.weight.detach().repeat(num_heads, 1))  # [heads, hidden]
        self.second_bias = nn.Parameter(second.bias.detach().repeat(num_heads))

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """Predictions [rows, heads] of features [rows, width]; `kept` [rows, hidden] multiplies the hidden units: dropout."""
        num_heads, hidden, _ = self.first.shape
        units = nn.functional.linear(x, self.first.flatten(0, 1), self.first_bias.flatten()).relu()
        units = units.view(len(x), num_heads, hidden)
        if kept is not None:
            units = units * kept[:, None]
        return torch.einsum("bnh,nh->bn", units, self.second) + self.second_bias

    @torch.no_grad()
    def take(self, other: Heads, chosen: Tensor) -> None:
        """Copy the weights of the chosen heads, bool [heads], of another."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine[chosen] = theirs[chosen]
