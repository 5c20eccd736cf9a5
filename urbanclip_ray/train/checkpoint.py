"""Going on from a checkpoint: all ranks take the same one, at any number of ranks and in any stage of ZeRO.

The newest committed one whose files are whole is used; a damaged one is named and the one before it is tried. A fragment says
which values of which parameter it holds, so a rank reads what it needs from whichever ranks wrote it, and no more.
`checkpoint_files` says what lies where, `checkpoint_writer` writes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from urbanclip_ray.storage import StorageError, join
from urbanclip_ray.train.agree import from_all, from_first, rank_and_world
from urbanclip_ray.train.average import WeightAverage
from urbanclip_ray.train.checkpoint_files import (
    AVERAGE,
    CUDA_RANDOM_STATE,
    RANDOM_STATE,
    WEIGHT,
    Checkpoint,
    Piece,
    check_share,
    list_checkpoints,
    read_checkpoint,
    read_commit,
    tensors_name,
)
from urbanclip_ray.train.fragments import MOMENTS, allocate_moments, fragments
from urbanclip_ray.train.tensor_file import DamagedError, open_tensors


def find_checkpoint(root: str, warn: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest whole checkpoint, or None; called by all ranks, which get the same. Rank 0 names damaged ones by `warn`.

    Each rank reads its share of the files to check them. Storage that cannot be read is no damage: that raises StorageError
    on all ranks, as to start anew would be wrong.
    """
    for uri in from_first(list_checkpoints, root):
        commit = from_first(read_commit, uri)
        found, problem = _check(uri, commit) if commit is not None else (None, _Problem(f"{uri} is not complete", True))
        problems = [other for other in from_all(problem) if other is not None]
        if not problems:
            return found
        for other in problems:
            if not other.is_damage:
                raise StorageError(other.message)
        if rank_and_world()[0] == 0:
            warn(f"{problems[0].message}; trying the checkpoint before it")
    return None


class _Problem(NamedTuple):
    message: str
    is_damage: bool


def _check(uri: str, commit: bytes) -> tuple[Checkpoint | None, _Problem | None]:
    """The checkpoint, of whose files this rank has checked its share, or what is wrong with it; nothing is raised."""
    try:
        found = read_checkpoint(uri, commit)
        check_share(found, *rank_and_world())
    except (DamagedError, FileNotFoundError) as damage:
        return None, _Problem(str(damage), True)
    except Exception as error:  # the other ranks wait for this one's answer
        return None, _Problem(f"{uri} cannot be read ({type(error).__name__}: {error})", False)
    return found, None


def fill_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy all ranks' weight fragments into the model; before `deepspeed.initialize`, which copies them on.

    Frozen parameters are in no checkpoint: they stay as they are.
    """
    trained = {name: value.detach().view(-1) for name, value in model.named_parameters() if value.requires_grad}
    parts = {name: _Part(0, value.numel(), {WEIGHT: value}) for name, value in trained.items()}
    for piece in (piece for held in checkpoint.pieces for piece in held):
        if piece.name not in parts:
            raise StorageError(f"{checkpoint.uri} has a parameter {piece.name!r} that the model lacks")
    _fill(parts, (WEIGHT,), checkpoint)


def restore_rank(engine: Any, checkpoint: Checkpoint, seed: int = 0, average: WeightAverage | None = None) -> None:
    """Copy back the moments of what this rank updates, the average of its weights, and its random state.

    Another number of ranks than wrote it, or another torch, has no use for that: then it is a function of seed, step and
    rank.
    """
    allocate_moments(engine, checkpoint.step)
    mine = list(fragments(engine))
    _fill({part.name: _Part(part.start, part.numel, part.moments) for part in mine}, MOMENTS, checkpoint)
    if average is not None:
        averages = {part.name: _Part(part.start, part.numel, {AVERAGE: average.values(part)}) for part in mine}
        _fill(averages, (AVERAGE,), checkpoint)
    rank, num_ranks = rank_and_world()
    if checkpoint.num_ranks != num_ranks or not _restore_random_state(engine, checkpoint, rank):
        digest = hashlib.sha256(f"{seed} {checkpoint.step} {rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8]) >> 1)  # the GPU's too


def _restore_random_state(engine: Any, checkpoint: Checkpoint, rank: int) -> bool:
    """Whether torch took what this rank wrote."""
    with open_tensors(join(checkpoint.uri, tensors_name(rank))) as file:
        states = {name: file.read(name) for name in (RANDOM_STATE, CUDA_RANDOM_STATE) if name in file.entries}
    try:
        torch.set_rng_state(states[RANDOM_STATE])
        if engine.device.type == "cuda":
            torch.cuda.set_rng_state(states[CUDA_RANDOM_STATE])
    except (KeyError, RuntimeError):  # torch checks what it is given
        return False
    return True


class _Part(NamedTuple):
    """What is to be filled of a parameter: `numel` values from `start` on, flat, by kind (weight or a moment)."""

    start: int
    numel: int
    values: Mapping[str, Tensor]


class _Overlap(NamedTuple):
    """Values `first` to `last` of a parameter are in the fragment `number` of a file, which starts at `start`."""

    number: int
    start: int
    first: int
    last: int
    part: _Part

    def copy(self, fragment: Tensor, kind: str) -> None:
        values = self.part.values[kind][self.first - self.part.start : self.last - self.part.start]
        values.copy_(fragment[self.first - self.start : self.last - self.start])


def _fill(parts: dict[str, _Part], kinds: Sequence[str], checkpoint: Checkpoint) -> None:
    """Copy what the parts share with the fragments of all ranks; raises StorageError where values stay unfilled.

    Of each file what overlaps is read, one fragment at a time.
    """
    missing = {name: part.numel for name, part in parts.items()}
    for rank, held in enumerate(checkpoint.pieces):
        overlaps = list(_overlaps(parts, held))
        for overlap in overlaps:
            missing[held[overlap.number].name] -= overlap.last - overlap.first
        if overlaps:
            with open_tensors(join(checkpoint.uri, tensors_name(rank))) as file:
                for kind in kinds:
                    for overlap in overlaps:
                        if f"{overlap.number}.{kind}" not in file.entries:  # what else is missing was found when it was checked
                            raise StorageError(f"{checkpoint.uri} has no {kind} of the weights: was train.ema_decay 0 before?")
                        overlap.copy(file.read(f"{overlap.number}.{kind}"), kind)
    if lacking := [name for name, count in missing.items() if count]:
        raise StorageError(f"{checkpoint.uri} does not hold all of {', '.join(lacking[:3])}")


def _overlaps(parts: dict[str, _Part], held: Sequence[Piece]) -> Iterator[_Overlap]:
    for number, piece in enumerate(held):
        if (part := parts.get(piece.name)) is not None:
            first, last = max(piece.start, part.start), min(piece.start + piece.numel, part.start + part.numel)
            if first < last:
                yield _Overlap(number, piece.start, first, last, part)
