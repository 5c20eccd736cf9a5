"""Samples a second of two ranks with a core each over those of one, a rank's rows being the same."""

from __future__ import annotations

from functools import partial

from figures import Figure, interleaved
from small_recipe import RECIPE, ROWS, train

NUM_RUNS = 3
LEAST = 1.7


def samples_per_s(num_ranks: int) -> float:
    return train(num_ranks)["samples_per_s"]


def measure() -> list[Figure]:
    found = interleaved(NUM_RUNS, two=partial(samples_per_s, 2), one=partial(samples_per_s, 1))
    note = (
        f"two ranks over one, a core and {ROWS} rows each; {RECIPE.model.architecture} in bf16, data prepared by the same cores"
    )
    return [
        Figure("weak_scaling", found["two"], found["one"], found["two"] / found["one"], "samples/s", LEAST, note, at_most=False)
    ]
