"""Samples a second of our optimizer step over those of the released code's loop, and over open_clip under autocast."""

from __future__ import annotations

from figures import Figure, interleaved
from large_steps import BATCH, run_child

NUM_RUNS = 3
LEAST_OVER_RELEASED, LEAST_OVER_AUTOCAST = 4.0, 2.0
LARGEST_DIFFERENCE = {"fp32": 1e-4, "bf16": 2e-2}  # of the first loss from the released loop's


def measure() -> list[Figure]:
    losses: dict[str, float] = {}

    def samples_per_s(who: str, precision: str) -> float:
        found = run_child(who, precision)
        losses[f"{who} {precision}"] = found["loss"]
        return found["samples_per_s"]

    found = interleaved(
        NUM_RUNS,
        ours=lambda: samples_per_s("ours", "bf16"),
        released=lambda: samples_per_s("theirs", "fp32"),
        autocast=lambda: samples_per_s("theirs", "bf16"),
    )
    samples_per_s("ours", "fp32")  # for its loss
    for precision, most in LARGEST_DIFFERENCE.items():
        difference = abs(losses[f"ours {precision}"] - losses["theirs fp32"])
        if difference > most:
            raise AssertionError(f"the loss in {precision} is {difference:.2g} from the released loop's: {losses}")
    note = f"coca_ViT-B-32, batch {BATCH}, released captions; ours in bf16 over {{}}, with the same weights and batch"
    return [
        Figure(
            name, found["ours"], found[peer], found["ours"] / found[peer], "samples/s", least, note.format(what), at_most=False
        )
        for name, peer, least, what in (
            ("pretrain_step", "released", LEAST_OVER_RELEASED, "the released loop (fp32, 76 tokens, AdamW)"),
            ("pretrain_step_autocast", "autocast", LEAST_OVER_AUTOCAST, "that loop under bf16 autocast"),
        )
    ]
