"""safetensors files that are never whole in memory twice: laid out once where they are written from, read piece by piece.

The library reads and writes whole files alone, from memory or a local disk; a checkpoint lies in object storage and has
gigabytes. The format: 8 bytes with the length of the header, a JSON header, the tensors end to end.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from urbanclip_ray.storage import DamagedError as DamagedError
from urbanclip_ray.storage import open_file

DTYPES = {"F32": torch.float32, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
ALIGNMENT_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
BUFFER_BYTES = 16 << 20  # of one request to object storage


class TensorEntry(BaseModel):
    """Where a vector lies, in bytes behind the header."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    dtype: Literal["F32", "U8"]
    shape: tuple[NonNegativeInt]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * DTYPES[self.dtype].itemsize


HEADER = TypeAdapter(dict[str, TensorEntry])


def lay_out(tensors: Mapping[str, Tensor]) -> memoryview:
    """A safetensors file of vectors (fp32 before uint8) of any device: a copy, in host memory."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    begin = LENGTH_BYTES + len(text)
    file = torch.empty(begin + end, dtype=torch.uint8)
    file[:begin] = torch.frombuffer(bytearray(len(text).to_bytes(LENGTH_BYTES, "little") + text), dtype=torch.uint8)
    for name, tensor in tensors.items():
        start, end = header[name]["data_offsets"]
        file[begin + start : begin + end].view(tensor.dtype).copy_(tensor.detach())
    return file.numpy().data


class TensorFile:
    """The header of an open safetensors file, and single tensors of it."""

    def __init__(self, stream: io.BufferedReader, num_bytes: int, uri: str) -> None:
        self._stream = stream
        self._uri = uri
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if length > min(num_bytes - LENGTH_BYTES, MAX_HEADER_BYTES):  # before it is allocated
            raise self._damaged(f"its header has {length} bytes, the file {num_bytes}")
        try:
            self.entries = HEADER.validate_json(stream.read(length))
        except ValidationError as error:
            raise self._damaged(f"its header does not name vectors ({first_error(error)})") from None
        self._begin = LENGTH_BYTES + length
        self._check_places(num_bytes - self._begin)

    def _check_places(self, num_bytes: int) -> None:
        """Every tensor begins where the one before ends, and the last one ends with the file."""
        end = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].data_offsets):
            start, end_before = entry.data_offsets[0], end
            end = entry.data_offsets[1]
            if start != end_before or end - start != entry.num_bytes:
                raise self._damaged(f"its header misplaces {name[:80]!r}")
        if end != num_bytes:
            raise self._damaged(f"its header speaks of {end} bytes of values, the file has {num_bytes}")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. Those that follow one another in the file are cheapest read in that order."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self._stream.seek(self._begin + entry.data_offsets[0])
        if self._stream.readinto(tensor.view(torch.uint8).numpy().data) != entry.num_bytes:
            raise self._damaged("it ends too early")
        return tensor

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"{self._uri} is damaged: {what}")


@contextmanager
def open_tensors(uri: str) -> Iterator[TensorFile]:
    """A safetensors file on any storage; raises DamagedError where its header does not fit it."""
    with open_file(uri) as file:
        yield TensorFile(io.BufferedReader(file, BUFFER_BYTES), file.size(), uri)


def first_error(error: ValidationError) -> str:
    """Where and what, in one line."""
    first = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(str(part)[:40] for part in first['loc'])}: {first['msg']}".removeprefix(": ")
