"""The history of a run: figures of every step and validation, as TensorBoard events and as JSON for the report."""

from __future__ import annotations

import tempfile
from typing import Any

import pyarrow.fs as pafs

from urbanclip_ray.storage import explained, resolve

UPLOAD_EVERY_STEPS = 50


class Curves:
    """Collects figures; with a `tensorboard_uri` (rank 0) they are also written as events there.

    Events are written to a local folder and copied up, so that object storage works like a disk.
    """

    def __init__(
        self, tensorboard_uri: str | None, history: dict[str, list[dict[str, float]]] | None, first_step: int = 0
    ) -> None:
        self.history: dict[str, list[dict[str, float]]] = history or {"train": [], "validation": []}
        self._uri = tensorboard_uri
        self._writer: Any = None
        if tensorboard_uri is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._folder = tempfile.TemporaryDirectory(prefix="urbanclip_ray_events_")
            self._writer = SummaryWriter(self._folder.name, purge_step=first_step + 1)  # a resumed run rewrites later steps

    def train(self, record: dict[str, float]) -> None:
        self._add("train", record)
        if int(record["step"]) % UPLOAD_EVERY_STEPS == 0:
            self._upload()

    def validation(self, record: dict[str, float]) -> None:
        self._add("validation", record)
        self._upload()

    def close(self) -> None:
        self._upload()
        if self._writer is not None:
            self._writer.close()
            self._folder.cleanup()

    def _add(self, kind: str, record: dict[str, float]) -> None:
        self.history[kind].append(record)
        if self._writer is not None:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(f"{kind}/{name}", value, int(record["step"]))

    def _upload(self) -> None:
        if self._writer is not None and self._uri is not None:
            self._writer.flush()
            filesystem, path = resolve(self._uri)
            with explained(self._uri):
                filesystem.create_dir(path, recursive=True)
                pafs.copy_files(
                    self._folder.name,
                    path,
                    source_filesystem=pafs.LocalFileSystem(),
                    destination_filesystem=filesystem,
                    use_threads=False,  # uploads from several threads can wait for each other for ever (arrow #32372)
                )
