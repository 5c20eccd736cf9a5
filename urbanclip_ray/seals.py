"""Files that carry their own checksum: the sha256 of the file with zeros in the place of the digest.

A manifest and a commit hold the checksums of other files, and nothing holds theirs; of a part of the caption store nothing
speaks at all. So these carry a seal. It finds what storage did to a file, not what a person did: who can write a file can seal
it.
"""

from __future__ import annotations

import hashlib
import re

from urbanclip_ray.object_storage import StorageError

BLANK = "sealed:" + "0" * 64  # what a file says before it is sealed
SEAL = re.compile(rb"sealed:([0-9a-f]{64})")


class DamagedError(StorageError):
    """A file that is not what was written."""


def seal(data: bytes) -> bytes:
    """The same with the digest in its last :data:`BLANK`."""
    end = data.rindex(BLANK.encode()) + len(BLANK)
    return data[: end - 64] + hashlib.sha256(data).hexdigest().encode() + data[end:]


def is_intact(data: bytes, is_sealed: bool) -> bool:
    """Whether a file is what was sealed; `is_sealed` is what else it says of that. One that never was is taken as it is."""
    seals = list(SEAL.finditer(data))
    if not seals:
        return not is_sealed
    first, last = seals[-1].span(1)  # what stands before the last may be anybody's text
    return hashlib.sha256(data[:first] + b"0" * 64 + data[last:]).hexdigest().encode() == data[first:last]
