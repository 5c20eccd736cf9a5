"""The files of a checkpoint: their names, what they say, and the check before any of it is believed.

    checkpoints/step-00000100-5f0c9a31/rank-00000.safetensors   fp32 weight and moment fragments of a rank (averages of
                                       weights too, where the training keeps them), its random state
                                       rank-00000.json          which fragment is which
                                       run.json                 curves, and which rows were consumed
                                       tokenizer.json, ...      what else the weights need to be of use
                                       commit.json              written last: names, sizes and checksums of all the others

A folder without the commit does not exist. Behind the step stands the attempt at the training that writes it: what a killed
one left behind is never mixed into what the next one writes at the same step.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from urbanclip_ray.manifest import FileEntry
from urbanclip_ray.seals import BLANK, is_intact, seal
from urbanclip_ray.storage import exists, join, list_folders, open_file
from urbanclip_ray.train.fragments import MOMENTS
from urbanclip_ray.train.tensor_file import BUFFER_BYTES, DamagedError, first_error, open_tensors

COMMIT, RUN = "commit.json", "run.json"
RANDOM_STATE, CUDA_RANDOM_STATE = "random_state", "cuda_random_state"
WEIGHT = "weight"
AVERAGE = "average"  # of the weight, where the training keeps one
FOLDER = re.compile(r"step-(\d{8})-([0-9a-f]{8})")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
MAX_JSON_BYTES = 256 << 20
MAX_RANDOM_STATE_BYTES = 64 << 10  # torch's has 5056

M = TypeVar("M", bound=BaseModel)


class Piece(BaseModel):
    """Values of a parameter in a rank's file: `numel` from `start` on, flat."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    name: str
    start: NonNegativeInt
    numel: PositiveInt


class Index(BaseModel):
    """`rank-*.json`: the fragments in a rank's file, in its order, and the file itself."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    fragments: tuple[Piece, ...]
    tensors: FileEntry


class Run(BaseModel):
    """`run.json`: what rank 0 knew of the run."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    history: dict[str, list[dict[str, int | float]]]
    progress: dict[str, Any]


class Commit(BaseModel):
    """`commit.json`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    step: NonNegativeInt
    attempt: str
    num_ranks: PositiveInt
    files: tuple[FileEntry, ...]
    seal: str = ""  # of the file itself, see `seals`; older commits have none

    def to_bytes(self) -> bytes:
        """The sealed file."""
        return seal(self.model_copy(update={"seal": BLANK}).model_dump_json(indent=1).encode())


class Checkpoint(NamedTuple):
    """A committed checkpoint: its place, steps taken, number of ranks, what rank 0 knew of the run, and what lies where."""

    uri: str
    step: int
    num_ranks: int
    history: dict[str, list[dict[str, float]]]
    progress: dict[str, Any]
    pieces: tuple[tuple[Piece, ...], ...]  # of each rank's file
    files: dict[str, FileEntry]


def folder_name(step: int, attempt: str) -> str:
    return f"step-{step:08d}-{attempt}"


def tensors_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def index_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def parse_folder(uri: str) -> tuple[int, str] | None:
    """Step and attempt of a checkpoint's folder; None where the name is not one of ours."""
    match = FOLDER.fullmatch(uri.rsplit("/", 1)[-1])
    return (int(match[1]), match[2]) if match else None


def list_checkpoints(root: str) -> list[str]:
    """URIs of folders of checkpoints, newest step first, committed or not."""
    names = list_folders(root) if exists(root) else []
    return [join(root, name) for name in reversed(names) if FOLDER.fullmatch(name)]


def read_commit(uri: str) -> bytes | None:
    """The commit of a folder as it stands there, or None where it was never written."""
    try:
        with open_file(join(uri, COMMIT)) as file:
            return bytes(file.read(MAX_JSON_BYTES))
    except FileNotFoundError:
        return None


def read_checkpoint(uri: str, commit: bytes) -> Checkpoint:
    """All that a commit and the JSON files of its folder say. Raises DamagedError naming the file that cannot be true."""
    where = join(uri, COMMIT)
    said = parse(Commit, commit, where)
    if not is_intact(commit, bool(said.seal)):
        raise DamagedError(f"{where} is damaged: it is not what was sealed")
    if (said.step, said.attempt) != parse_folder(uri):
        raise DamagedError(f"{where} is damaged: it is of step {said.step}, attempt {said.attempt[:20]!r}")
    files = {entry.path: entry for entry in said.files}
    if len(files) < len(said.files) or not all(FILE.fullmatch(name) for name in files) or COMMIT in files:
        raise DamagedError(f"{where} is damaged: it names files that are not of this folder, or one twice")
    named = {name for name in files if name.startswith("rank-")}
    ranks = range(min(said.num_ranks, len(files)))  # whatever number is claimed
    if said.num_ranks > len(files) or named != {name(rank) for rank in ranks for name in (tensors_name, index_name)}:
        raise DamagedError(f"{where} is damaged: it does not name the files of its {said.num_ranks} ranks")
    if RUN not in files:
        raise DamagedError(f"{where} is damaged: it does not name {RUN}")
    run = parse(Run, _read_json(uri, files[RUN]), join(uri, RUN))
    if set(run.history) != {"train", "validation"}:
        raise DamagedError(f"{uri}/{RUN} is damaged: its history is not of training and validation")
    pieces = tuple(_read_index(uri, files, rank) for rank in ranks)
    _refuse_overlaps(uri, pieces)
    history: dict[str, list[dict[str, float]]] = {kind: [{**record} for record in run.history[kind]] for kind in run.history}
    return Checkpoint(uri, said.step, said.num_ranks, history, run.progress, pieces, files)


def check_share(checkpoint: Checkpoint, rank: int, num_ranks: int) -> None:
    """Check the sizes, checksums and headers of a rank's share of the files; raises DamagedError naming the first bad one."""
    read_already = {RUN, *(index_name(number) for number in range(checkpoint.num_ranks))}
    names = sorted(set(checkpoint.files) - read_already)
    for name in names[rank::num_ranks]:
        _check_sum(checkpoint.uri, checkpoint.files[name])
    for number in range(checkpoint.num_ranks):
        if tensors_name(number) in names[rank::num_ranks]:
            _check_tensors(checkpoint, number)


def parse(kind: type[M], data: bytes, uri: str) -> M:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise DamagedError(f"{uri} is damaged: {first_error(error)}") from None


def sum_of(name: str, data: bytes | memoryview) -> FileEntry:
    return FileEntry(path=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _read_index(uri: str, files: dict[str, FileEntry], rank: int) -> tuple[Piece, ...]:
    where = join(uri, index_name(rank))
    index = parse(Index, _read_json(uri, files[index_name(rank)]), where)
    if index.tensors != files[tensors_name(rank)]:
        raise DamagedError(f"{where} is damaged: it is of another {tensors_name(rank)}")
    return index.fragments


def _read_json(uri: str, entry: FileEntry) -> bytes:
    if entry.num_bytes > MAX_JSON_BYTES:
        raise DamagedError(f"{uri}/{entry.path} is damaged: JSON of {entry.num_bytes} bytes is none of ours")
    return b"".join(_checked_chunks(uri, entry))


def _check_sum(uri: str, entry: FileEntry) -> None:
    for _ in _checked_chunks(uri, entry):
        pass


def _checked_chunks(uri: str, entry: FileEntry) -> Iterator[bytes]:
    """A file's content; raises DamagedError at its end, or before anything is read, where it is not the committed one."""
    where = join(uri, entry.path)
    hasher = hashlib.sha256()
    try:
        with open_file(where) as file:
            if file.size() != entry.num_bytes:
                raise DamagedError(f"{where} is damaged: it has {file.size()} bytes, {entry.num_bytes} were committed")
            while chunk := file.read(BUFFER_BYTES):
                hasher.update(chunk)
                yield chunk
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{where} is damaged: it is not there") from None
    if hasher.hexdigest() != entry.sha256:
        raise DamagedError(f"{where} is damaged: its checksum is not the committed one")


def _check_tensors(checkpoint: Checkpoint, rank: int) -> None:
    """A rank's file has the tensors that its index speaks of, and random states, and nothing else."""
    where = join(checkpoint.uri, tensors_name(rank))
    with open_tensors(where) as file:
        found = {name: (entry.dtype, entry.shape[0]) for name, entry in file.entries.items()}
    for name in (RANDOM_STATE, CUDA_RANDOM_STATE):
        dtype, numel = found.pop(name, ("U8", 0))
        if dtype != "U8" or numel > MAX_RANDOM_STATE_BYTES:
            raise DamagedError(f"{where} is damaged: its {name} is none")
    kinds = (WEIGHT, *MOMENTS, *((AVERAGE,) if f"0.{AVERAGE}" in found else ()))
    pieces = checkpoint.pieces[rank]
    expected = {f"{number}.{kind}": ("F32", piece.numel) for number, piece in enumerate(pieces) for kind in kinds}
    if found != expected:
        differing = sorted(found.items() ^ expected.items())[0][0]
        raise DamagedError(f"{where} is damaged: its {differing[:80]!r} is not what {index_name(rank)} says")


def _refuse_overlaps(uri: str, pieces: tuple[tuple[Piece, ...], ...]) -> None:
    """No value is there twice: that would hide one that is not there at all."""
    ordered = sorted(
        (piece.name, piece.start, piece.start + piece.numel, rank) for rank, held in enumerate(pieces) for piece in held
    )
    for (name, _, end, _), (other, start, _, rank) in pairwise(ordered):
        if name == other and start < end:
            raise DamagedError(f"{uri}/{index_name(rank)} is damaged: another fragment holds the same values of {name[:80]!r}")
