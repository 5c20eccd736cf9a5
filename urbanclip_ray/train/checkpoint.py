"""Checkpoints that are safe to read: safetensors and JSON of every rank, made whole by a commit marker.

    checkpoints/step-00000100/rank-00000.safetensors   fp32 weight and moment fragments of a rank, its random state
                              rank-00000.json          which fragment is which
                              commit.json              written last by rank 0: names, sizes and checksums of all files

A folder without the marker does not exist. The newest marker whose files are whole is resumed from; a damaged one is named
and the one before it is used. A fragment says which values of which parameter it holds, so what one stage of ZeRO wrote is
read by every other.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NamedTuple

import pyarrow.fs as pafs
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from urbanclip_ray.storage import StorageError, delete_folder, join, read_bytes, resolve, write_bytes
from urbanclip_ray.train.fragments import MOMENTS, allocate_moments, fragments, written_fragments

COMMIT = "commit.json"
RANDOM_STATE, CUDA_RANDOM_STATE = "random_state", "cuda_random_state"


class Checkpoint(NamedTuple):
    """A committed checkpoint: its place, steps taken, number of ranks, and what rank 0 knew of the run (its history)."""

    uri: str
    step: int
    num_ranks: int
    history: dict[str, list[dict[str, float]]]
    files: dict[str, bytes]


def save_checkpoint(engine: Any, root: str, step: int, history: dict[str, Any], keep: int) -> None:
    """Called by all ranks after `step` optimizer steps. Returns when the checkpoint is committed."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    uri = join(root, f"step-{step:08d}")
    tensors: dict[str, Tensor] = {RANDOM_STATE: torch.get_rng_state()}
    if engine.device.type == "cuda":
        tensors[CUDA_RANDOM_STATE] = torch.cuda.get_rng_state()
    index = []
    for number, fragment in enumerate(written_fragments(engine)):
        index.append({"key": str(number), "name": fragment.name, "start": fragment.start, "numel": fragment.numel})
        tensors[f"{number}.weight"] = fragment.weight.detach().cpu().contiguous()
        for moment in MOMENTS:
            tensors[f"{number}.{moment}"] = fragment.moments[moment].detach().cpu().contiguous()
    files = {
        f"rank-{rank:05d}.safetensors": safetensors.torch.save(tensors),
        f"rank-{rank:05d}.json": json.dumps({"step": step, "fragments": index}).encode(),
    }
    for name, data in files.items():
        write_bytes(join(uri, name), data)
    sums: list[Any] = [None] * num_ranks
    dist.all_gather_object(sums, {name: [len(data), _sha256(data)] for name, data in files.items()})
    if rank == 0:
        named = {name: entry for entries in sums for name, entry in entries.items()}
        commit = {"step": step, "num_ranks": num_ranks, "history": history, "files": named}
        write_bytes(join(uri, COMMIT), json.dumps(commit).encode())
        for old in list_checkpoints(root)[keep:]:
            delete_folder(old)
    dist.barrier()


def list_checkpoints(root: str) -> list[str]:
    """URIs of folders of checkpoints, newest step first, committed or not."""
    filesystem, path = resolve(root)
    if filesystem.get_file_info(path).type == pafs.FileType.NotFound:
        return []
    names = [str(info.base_name) for info in filesystem.get_file_info(pafs.FileSelector(path))]
    return [join(root, name) for name in sorted(names, reverse=True) if re.fullmatch(r"step-\d{8}", name)]


def find_checkpoint(root: str, warn: Any = print) -> Checkpoint | None:
    """The newest whole checkpoint, or None. Unfinished ones are passed over, damaged ones are named through `warn`."""
    for uri in list_checkpoints(root):
        try:
            return _read(uri)
        except FileNotFoundError as missing:
            warn(f"{uri} is not complete ({missing}); trying the checkpoint before it")
        except StorageError as damage:
            warn(f"{damage}; trying the checkpoint before it")
    return None


def _read(uri: str) -> Checkpoint:
    try:
        commit = json.loads(read_bytes(join(uri, COMMIT)))
        entries = {str(name): (int(size), str(checksum)) for name, (size, checksum) in commit["files"].items()}
        history = {kind: list(commit["history"][kind]) for kind in ("train", "validation")}
        found = Checkpoint(uri, int(commit["step"]), int(commit["num_ranks"]), history, {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{uri}/{COMMIT} is damaged ({type(error).__name__}: {error})") from None
    ranks = [f"rank-{rank:05d}" for rank in range(len(entries) // 2)]
    names = {f"{rank}.{ending}" for rank in ranks for ending in ("json", "safetensors")}
    if not names or set(entries) != names or found.num_ranks != len(ranks):
        raise StorageError(f"{uri}/{COMMIT} is damaged: it does not name the files of its {found.num_ranks} ranks")
    if not uri.endswith(f"/step-{found.step:08d}"):
        raise StorageError(f"{uri}/{COMMIT} is damaged: it is of step {found.step}")
    for name, (size, checksum) in entries.items():
        data = read_bytes(join(uri, name))
        if len(data) != size or _sha256(data) != checksum:
            raise StorageError(f"{uri}/{name} is damaged: its checksum is not the committed one")
        found.files[name] = data
    return found


def fill_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy all ranks' weight fragments into the model; before `deepspeed.initialize`, which copies them on."""
    parts = {name: _Part(0, value.numel(), {"weight": value.detach().view(-1)}) for name, value in model.named_parameters()}
    for entry in (entry for rank in range(checkpoint.num_ranks) for entry in _index(checkpoint, rank)):
        if entry["name"] not in parts:
            raise StorageError(f"{checkpoint.uri} has a parameter {entry['name']!r} that the model lacks")
    _fill(parts, checkpoint)


def restore_rank(engine: Any, checkpoint: Checkpoint) -> None:
    """Copy this rank's moments and random state back; the number of ranks is the one that wrote them."""
    if checkpoint.num_ranks != dist.get_world_size():
        raise StorageError(
            f"{checkpoint.uri} was written by {checkpoint.num_ranks} ranks and is resumed by {dist.get_world_size()}: "
            f"set resources.num_workers={checkpoint.num_ranks} (and the batch sizes that go with it)"
        )
    allocate_moments(engine, checkpoint.step)
    _fill({mine.name: _Part(mine.start, mine.numel, mine.moments) for mine in fragments(engine)}, checkpoint)
    tensors = _tensors(checkpoint, dist.get_rank())
    torch.set_rng_state(tensors[RANDOM_STATE])
    if CUDA_RANDOM_STATE in tensors and engine.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[CUDA_RANDOM_STATE])


class _Part(NamedTuple):
    """What is to be filled of a parameter: `numel` values from `start` on, flat, by kind (weight or a moment)."""

    start: int
    numel: int
    values: dict[str, Tensor]


def _fill(parts: dict[str, _Part], checkpoint: Checkpoint) -> None:
    """Copy what the parts share with the fragments of all ranks; raises StorageError where values stay unfilled."""
    missing = {name: part.numel for name, part in parts.items()}
    for rank in range(checkpoint.num_ranks):
        tensors = _tensors(checkpoint, rank)
        for entry in _index(checkpoint, rank):
            if (part := parts.get(entry["name"])) is None:
                continue
            start, end = entry["start"], entry["start"] + entry["numel"]
            first, last = max(start, part.start), min(end, part.start + part.numel)
            if first >= last:
                continue
            for kind, values in part.values.items():
                source = tensors[f"{entry['key']}.{kind}"]
                values[first - part.start : last - part.start] = source[first - start : last - start]
            missing[entry["name"]] -= last - first
    if lacking := [name for name, count in missing.items() if count]:
        raise StorageError(f"{checkpoint.uri} does not hold all of {', '.join(lacking[:3])}")


def _tensors(checkpoint: Checkpoint, rank: int) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = safetensors.torch.load(checkpoint.files[f"rank-{rank:05d}.safetensors"])
    return loaded


def _index(checkpoint: Checkpoint, rank: int) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(checkpoint.files[f"rank-{rank:05d}.json"])["fragments"]
    return entries


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
