"""A file that carries its own checksum: every flipped bit of it is noticed."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from urbanclip_ray.captioners.base import Origin
from urbanclip_ray.captioners.store import SEAL_KEY, CaptionStore, StoredCaption
from urbanclip_ray.manifest import Manifest
from urbanclip_ray.seals import BLANK, is_intact, seal

MANIFEST = Manifest(
    stage="tiles",
    config={"text": f"a config may say {BLANK} too"},
    parents={},
    unit="tiles",
    rows_in=1,
    rows_out=1,
    rejects={},
    files=(),
    facts={"nothing": None},
    libraries={},
).to_bytes()


def flipped(data: bytes, place: int, bit: int = 0) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def test_a_sealed_manifest_is_intact_and_says_what_it_said():
    assert is_intact(MANIFEST, is_sealed=True)
    manifest = Manifest.model_validate_json(MANIFEST)
    assert (manifest.stage, manifest.config["text"]) == ("tiles", f"a config may say {BLANK} too")
    assert manifest.to_bytes() == MANIFEST


@given(place=st.integers(0, len(MANIFEST) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_manifest_is_noticed(place, bit):
    assert not is_intact(flipped(MANIFEST, place, bit), is_sealed=True)


def test_a_file_that_was_never_sealed_is_taken_as_it_is_unless_it_says_that_it_was():
    assert is_intact(b"{}", is_sealed=False)
    assert not is_intact(b'{"seal": "seoled:0"}', is_sealed=True)


def test_every_byte_of_a_caption_part_is_under_its_seal_and_pyarrow_reads_it(tmp_path):
    store = CaptionStore(str(tmp_path), Origin("model", "1", "prompt", {}))
    store.add("j-1", [StoredCaption("a", 0, f"A text with {BLANK} in it.")])
    (path,) = tmp_path.rglob("*.parquet")
    data = path.read_bytes()
    assert is_intact(data, is_sealed=True)
    assert all(not is_intact(flipped(data, place), is_sealed=SEAL_KEY in data) for place in range(len(data)))
    assert pq.read_table(pa.BufferReader(data))["text"].to_pylist() == [f"A text with {BLANK} in it."]


def test_sealing_changes_the_digest_alone():
    stream = io.BytesIO(b"before " + BLANK.encode() + b" after")
    sealed = seal(stream.getvalue())
    assert len(sealed) == len(stream.getvalue())
    assert sealed.startswith(b"before sealed:")
    assert sealed.endswith(b" after")
