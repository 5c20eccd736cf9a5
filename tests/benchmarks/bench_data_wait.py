"""The share of a step's time that the small recipe's two ranks wait for their data."""

from __future__ import annotations

from figures import Figure, interleaved
from small_recipe import IMAGE_PX, RECIPE, ROWS, train

NUM_RUNS = 3
MOST = 0.03


def measure() -> list[Figure]:
    share = interleaved(NUM_RUNS, share=lambda: train(2)["data_wait_share"])["share"]
    note = f"two ranks with a core and {ROWS} rows each, JPEGs of {IMAGE_PX} px, {RECIPE.model.architecture} in bf16"
    return [Figure("data_wait", share, 1.0, share, "of a step", MOST, note)]
