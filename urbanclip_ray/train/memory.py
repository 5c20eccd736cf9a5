"""What a rank will hold, in bytes, before anything is allocated."""

from __future__ import annotations

from typing import NamedTuple

from urbanclip_ray.config import TrainConfig

FP32_BYTES = 4
MOMENTS_PER_PARAMETER = 2  # of AdamW


class RankMemory(NamedTuple):
    """Bytes by what they are for. What a forward keeps for its backward is not in it: that grows with the model's inside."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's moments, and DeepSpeed's own copy of the weights that this rank updates
    average: int  # of the weights that this rank updates, where one is kept
    embeddings: int  # of the contrastive batch: all ranks' rows, this rank's with their gradients
    pixels: int  # of one forward, as floats
    spooled_pixels: int  # of three steps, on the local disk: one in use, one ready, one being made

    @property
    def held(self) -> int:
        """In memory."""
        return sum(self) - self.spooled_pixels


def plan_memory(num_parameters: int, embedding_width: int, image_px: int, config: TrainConfig, num_ranks: int) -> RankMemory:
    """What each of so many ranks holds between forwards, by the rules of ZeRO's stages (arXiv 1910.02054, figure 1)."""
    cut, stage = config.cut_step(num_ranks), config.zero_stage
    whole = FP32_BYTES * num_parameters
    share = -(-whole // num_ranks)
    values_per_image = 3 * image_px**2
    own_rows = cut.rows_per_contrastive * (4 if cut.num_forwards > 1 else 2)  # image and text, and the gradients of a cache
    return RankMemory(
        weights=share if stage == 3 else whole,
        gradients=share if stage >= 2 else whole,
        optimizer=MOMENTS_PER_PARAMETER * whole if stage == 0 else (MOMENTS_PER_PARAMETER + 1) * share,
        average=(whole if stage == 0 else share) if config.ema_decay else 0,
        embeddings=FP32_BYTES * embedding_width * (2 * config.contrastive_batch_size + own_rows),
        pixels=FP32_BYTES * values_per_image * cut.rows_per_forward,
        spooled_pixels=3 * values_per_image * cut.rows_per_step if cut.num_forwards * cut.num_contrastive > 1 else 0,
    )


def describe_memory(memory: RankMemory) -> str:
    """One line."""
    shown = [
        f"{name.replace('_', ' ')} {show_bytes(size)}"
        for name, size in memory._asdict().items()
        if size and name != "spooled_pixels"
    ]
    disk = f"; {show_bytes(memory.spooled_pixels)} of pixels on its disk" if memory.spooled_pixels else ""
    return f"{show_bytes(memory.held)} and what a forward keeps for its backward ({', '.join(shown)}){disk}"


def show_bytes(size: float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
