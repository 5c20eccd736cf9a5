"""Checkpoints written while training goes on: a copy in host memory, uploaded by a thread, made whole by a commit."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from urbanclip_ray import metrics
from urbanclip_ray.manifest import FileEntry
from urbanclip_ray.storage import (
    StorageError,
    create_exclusively,
    delete_file,
    delete_folder,
    exists,
    join,
    list_files,
    read_bytes,
    write_bytes,
)
from urbanclip_ray.train.agree import from_first, rank_and_world
from urbanclip_ray.train.average import WeightAverage
from urbanclip_ray.train.checkpoint_files import (
    AVERAGE,
    COMMIT,
    CUDA_RANDOM_STATE,
    RANDOM_STATE,
    RUN,
    WEIGHT,
    Commit,
    Index,
    Piece,
    folder_name,
    index_name,
    list_checkpoints,
    parse,
    parse_folder,
    sum_of,
    tensors_name,
)
from urbanclip_ray.train.fragments import MOMENTS, written_fragments
from urbanclip_ray.train.tensor_file import lay_out

FIRST_LOOK_S, SLOWEST_LOOK_S = 0.05, 2.0  # between looks for the other ranks' files
RANKS_TIMEOUT_S = 1800.0  # as gloo's for a collective


class Snapshot(NamedTuple):
    """What one rank holds after a step, copied: nothing of it changes while it is written."""

    step: int
    pieces: tuple[Piece, ...]
    tensors: memoryview  # a safetensors file
    files: dict[str, bytes]  # of rank 0: the run's, by name


class CheckpointWriter:
    """Saves checkpoints below `root`, of which the newest `keep` stay. Made and called by all ranks alike.
    `run` is their name in the metrics.

    A context manager: at the end of its block the last checkpoint is waited for, unless an error is on its way.
    """

    def __init__(self, root: str, keep: int, ranks_timeout_s: float = RANKS_TIMEOUT_S, run: str = "") -> None:
        self._root, self._keep, self._ranks_timeout_s, self._run_name = root, keep, ranks_timeout_s, run
        self._rank, self._num_ranks = rank_and_world()
        self._attempt = from_first(secrets.token_hex, 4)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._given_up = threading.Event()

    def save(
        self,
        engine: Any,
        step: int,
        *,
        history: Mapping[str, Any],
        progress: Mapping[str, Any],
        files: Mapping[str, bytes],
        average: WeightAverage | None = None,
    ) -> None:
        """Called by all ranks after `step` optimizer steps; returns when this rank's state is copied.

        `history`, `progress` (JSON: which rows were consumed) and further small `files` are written by rank 0. A save
        before it that is still being written is waited for. Raises what went wrong with that one.
        """
        start = time.monotonic()
        self._finish()
        pieces, tensors = _copy_state(engine, average)
        run = {RUN: json.dumps({"history": history, "progress": progress}).encode(), **files} if self._rank == 0 else {}
        snapshot = Snapshot(step, pieces, tensors, run)
        # a daemon, so that waiting for the files of a rank that died does not keep this process alive
        self._thread = threading.Thread(target=self._run, args=(snapshot,), daemon=True, name="checkpoint")
        self._thread.start()
        metrics.CHECKPOINT_STALL_SECONDS.add(time.monotonic() - start, run=self._run_name, rank=self._rank)

    def close(self, wait: bool = True) -> None:
        """Wait for the last save, and raise what went wrong with it; or give it up, at the latest when the process ends."""
        if wait:
            self._finish()
        else:
            self._given_up.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(wait=error is None)

    def _finish(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, snapshot: Snapshot) -> None:
        try:
            start = time.monotonic()
            self._write(snapshot)
            metrics.CHECKPOINT_WRITE_SECONDS.add(time.monotonic() - start, run=self._run_name, rank=self._rank)
            metrics.CHECKPOINT_BYTES.add(len(snapshot.tensors), run=self._run_name, rank=self._rank)
            if self._rank == 0 and (entries := self._wait_for_ranks(snapshot)):
                self._commit(snapshot, entries)
                metrics.CHECKPOINTS.add(1, run=self._run_name)
                self._prune(snapshot.step)
        except BaseException as error:  # of a thread: raised by the next save, or by close
            self._error = error

    def _uri(self, step: int) -> str:
        return join(self._root, folder_name(step, self._attempt))

    def _write(self, snapshot: Snapshot) -> None:
        """Write this rank's files, the index after the tensors: where the index is, they are too."""
        uri = self._uri(snapshot.step)
        tensors = tensors_name(self._rank)
        write_bytes(join(uri, tensors), snapshot.tensors)
        index = Index(fragments=snapshot.pieces, tensors=sum_of(tensors, snapshot.tensors))
        for name, data in snapshot.files.items():
            write_bytes(join(uri, name), data)
        write_bytes(join(uri, index_name(self._rank)), index.model_dump_json().encode())

    def _wait_for_ranks(self, snapshot: Snapshot) -> list[FileEntry]:
        """Entries of all ranks' files once they are there; none where the wait was given up.

        Storage is asked, not the ranks: a collective in a thread would meet those of the training.
        """
        uri = self._uri(snapshot.step)
        entries: dict[int, list[FileEntry]] = {}
        pause_s, deadline = FIRST_LOOK_S, time.monotonic() + self._ranks_timeout_s
        while True:
            if not exists(uri):  # this rank has written its own files
                raise StorageError(f"{uri} was removed while it was written: does the same training run twice?")
            sizes = {str(info.base_name): info.size for info in list_files(uri, recursive=False)}
            for rank in range(self._num_ranks):
                if rank not in entries and index_name(rank) in sizes:
                    entries[rank] = self._entries_of(uri, rank, sizes)
            if len(entries) == self._num_ranks:
                return [entry for rank in sorted(entries) for entry in entries[rank]]
            if time.monotonic() > deadline:
                missing = [rank for rank in range(self._num_ranks) if rank not in entries]
                raise StorageError(
                    f"{uri} has no files of rank {missing[0]} after {self._ranks_timeout_s:.0f} s: see that rank's own error, "
                    "or whether its node reaches the storage"
                )
            if self._given_up.wait(pause_s):
                return []
            pause_s = min(2 * pause_s, SLOWEST_LOOK_S)

    def _entries_of(self, uri: str, rank: int, sizes: Mapping[str, int]) -> list[FileEntry]:
        name, where = index_name(rank), join(uri, index_name(rank))
        data = read_bytes(where)
        tensors = parse(Index, data, where).tensors
        if sizes.get(tensors.path) != tensors.num_bytes:
            raise StorageError(f"{uri}/{tensors.path} is not there as rank {rank} wrote it: is something else writing there?")
        return [tensors, sum_of(name, data)]

    def _commit(self, snapshot: Snapshot, entries: list[FileEntry]) -> None:
        files = [*entries, *(sum_of(name, data) for name, data in snapshot.files.items())]
        commit = Commit(step=snapshot.step, attempt=self._attempt, num_ranks=self._num_ranks, files=tuple(files))
        uri = self._uri(snapshot.step)
        if not create_exclusively(join(uri, COMMIT), commit.to_bytes()):
            raise StorageError(f"{uri} was committed by somebody else: does the same training run twice?")

    def _prune(self, step: int) -> None:
        """Of what is not newer than this step, the newest `keep` committed ones stay, and nothing that was never finished.

        What is newer another attempt is writing, or has left damaged; it goes when this one has come that far.
        """
        committed = []
        for uri in list_checkpoints(self._root):
            other_step, attempt = parse_folder(uri) or (0, "")
            if other_step > step:
                continue
            if exists(join(uri, COMMIT)):
                committed.append((other_step, attempt == self._attempt, uri))
            elif attempt != self._attempt:
                delete_folder(uri)
        for _, _, uri in sorted(committed, reverse=True)[self._keep :]:
            delete_file(join(uri, COMMIT))  # first: what is half removed is not taken for a damaged one
            delete_folder(uri)


def _copy_state(engine: Any, average: WeightAverage | None) -> tuple[tuple[Piece, ...], memoryview]:
    """Which fragments this rank writes, and a safetensors file of them and of its random state."""
    held = list(written_fragments(engine))
    tensors = {f"{number}.{WEIGHT}": fragment.weight for number, fragment in enumerate(held)}
    for moment in MOMENTS:  # kind by kind: who resumes reads all weights first, then all moments
        tensors |= {f"{number}.{moment}": fragment.moments[moment] for number, fragment in enumerate(held)}
    if average is not None:
        tensors |= {f"{number}.{AVERAGE}": average.values(fragment) for number, fragment in enumerate(held)}
    tensors[RANDOM_STATE] = torch.get_rng_state()
    if engine.device.type == "cuda":
        tensors[CUDA_RANDOM_STATE] = torch.cuda.get_rng_state()
    pieces = tuple(Piece(name=fragment.name, start=fragment.start, numel=fragment.numel) for fragment in held)
    return pieces, lay_out(tensors)
