"""The manifest of a dataset: what it is, what it was made of, and which files belong to it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from urbanclip_ray.seals import BLANK, seal


class FileEntry(BaseModel):
    """One file of a dataset; `path` is relative to the dataset's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    num_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a finished dataset is and what it was made of. What came in = what went out + rejects, in `unit`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    config: dict[str, Any]
    parents: dict[str, str]  # stage -> sha256 of its manifest
    unit: str
    rows_in: int
    rows_out: int
    rejects: dict[str, int]  # reason -> count
    files: tuple[FileEntry, ...]
    facts: dict[str, Any]  # what else the stage says of itself
    libraries: dict[str, str]
    seal: str = ""  # of the file itself, see `seals`; older manifests have none

    def to_bytes(self) -> bytes:
        """The sealed file."""
        return seal(self.model_copy(update={"seal": BLANK}).model_dump_json(indent=1).encode())
