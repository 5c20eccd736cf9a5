"""The caption store: what is committed is found again by every run, and only the rest is generated."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from urbanclip_ray.captioners.base import Origin, Tile, UnusableCaptionerError
from urbanclip_ray.captioners.store import CaptionStore, StoredCaption, StoredCaptioner
from urbanclip_ray.config import PixelsConfig
from urbanclip_ray.schema import STORED_CAPTIONS
from urbanclip_ray.storage import StorageError

ORIGIN = Origin("model", "1", "prompt", {"max_new_tokens": 8})


class Counting:
    """A captioner that says what it sees and remembers whom it was asked about; `broken` tiles cannot be described."""

    def __init__(self, num_samples: int = 1, broken: tuple[str, ...] = ()) -> None:
        self.num_samples = num_samples
        self.broken = broken
        self.asked: list[list[str]] = []
        self.loads = 0

    def load(self) -> Counting:
        self.loads += 1
        return self

    def describe(self, tiles):
        self.asked.append([tile.tile_id for tile in tiles])
        return [
            ValueError("no") if tile.tile_id in self.broken else [f"{tile.image!r} {n}" for n in range(self.num_samples)]
            for tile in tiles
        ]


def tiles(*names: str) -> list[Tile]:
    return [Tile(name, name.rstrip("'").encode(), PixelsConfig()) for name in names]  # a and a' have the same bytes


def stored(uri, captioner: Counting, origin: Origin = ORIGIN) -> StoredCaptioner:
    return StoredCaptioner(CaptionStore(str(uri), origin), captioner.num_samples, captioner.load)


def test_what_was_described_is_found_and_the_captioner_is_not_even_loaded(tmp_path):
    first = Counting()
    texts = stored(tmp_path, first).describe(tiles("a", "b", "c"))
    assert texts == [["b'a' 0"], ["b'b' 0"], ["b'c' 0"]]
    second = Counting()
    assert stored(tmp_path, second).describe(tiles("c", "a")) == [texts[2], texts[0]]
    assert second.loads == 0


def test_only_the_missing_are_described_and_each_batch_is_one_file(tmp_path):
    captioner = Counting()
    describe = stored(tmp_path, captioner).describe
    describe(tiles("a", "b"))
    describe(tiles("b", "c", "d"))
    describe(tiles("a", "d"))
    assert captioner.asked == [["a", "b"], ["c", "d"]]
    assert captioner.loads == 1
    files = list(tmp_path.rglob("*"))
    assert sum(path.is_file() for path in files) == 2
    assert {path.suffix for path in files if path.is_file()} == {".parquet"}


def test_tiles_of_the_same_bytes_are_described_once(tmp_path):
    captioner = Counting()
    first, second, other = stored(tmp_path, captioner).describe(tiles("a", "a'", "b"))
    assert first == second != other
    assert [len(asked) for asked in captioner.asked] == [2]


def test_another_writer_s_captions_are_seen_before_anything_is_generated(tmp_path):
    ours, theirs = Counting(), Counting()
    late = stored(tmp_path, ours)
    late.describe(tiles("a"))
    stored(tmp_path, theirs).describe(tiles("b"))
    late.describe(tiles("b"))
    assert ours.asked == [["a"]]


def test_errors_are_reasons_and_are_tried_again_by_the_next_run(tmp_path):
    good, bad = stored(tmp_path, Counting(broken=("b",))).describe(tiles("a", "b"))
    assert good == ["b'a' 0"]
    assert str(bad) == "no"
    healed = Counting()
    assert stored(tmp_path, healed).describe(tiles("a", "b"))[1] == ["b'b' 0"]
    assert healed.asked == [["b"]]


def test_more_samples_keep_the_ones_there_are(tmp_path):
    stored(tmp_path, Counting()).describe(tiles("a"))
    three = Counting(num_samples=3)
    assert stored(tmp_path, three).describe(tiles("a")) == [["b'a' 0", "b'a' 1", "b'a' 2"]]
    assert len(three.asked) == 1
    store = CaptionStore(str(tmp_path), ORIGIN)
    store.refresh()
    assert len(store.keys()) == 3


@pytest.mark.parametrize(
    "change", [{"model": "m"}, {"revision": "2"}, {"prompt": "p"}, {"decoding": {"max_new_tokens": 9}}], ids=str
)
def test_another_origin_has_captions_of_its_own(tmp_path, change):
    stored(tmp_path, Counting()).describe(tiles("a"))
    other = Counting()
    stored(tmp_path, other, ORIGIN._replace(**change)).describe(tiles("a"))
    assert other.asked == [["a"]]


def test_rows_say_what_made_them(tmp_path):
    store = CaptionStore(str(tmp_path), ORIGIN)
    store.add([StoredCaption("ab", 0, "A road."), StoredCaption("ab", 1, "A lake.")])
    store.add([StoredCaption("ab", 0, "Another text.")])  # the first stays
    (path,) = tmp_path.rglob("*.parquet")
    table = pq.read_table(path)
    assert table.schema.equals(STORED_CAPTIONS)
    row = table.to_pylist()[0]
    assert row == {
        "caption_key": ORIGIN.key("ab", 0),
        "text": "A road.",
        "sha256": "ab",
        "sample": 0,
        "model": "model",
        "revision": "1",
        "prompt": "prompt",
        "decoding": '{"max_new_tokens": 8}',
    }


def test_leftovers_of_a_killed_writer_are_not_read_and_a_damaged_file_is_named(tmp_path):
    stored(tmp_path, Counting()).describe(tiles("a"))
    (path,) = tmp_path.rglob("*.parquet")
    Path(f"{path}.0123.tmp").write_bytes(b"half")
    store = CaptionStore(str(tmp_path), ORIGIN)
    store.refresh()
    assert len(store.keys()) == 1
    path.write_bytes(b"half")
    with pytest.raises(StorageError, match=f"{path.name} is damaged .*: delete it"):
        CaptionStore(str(tmp_path), ORIGIN).refresh()


def test_a_captioner_that_cannot_be_loaded_is_tried_once_and_says_so_for_every_tile(tmp_path):
    loads = []

    def load():
        loads.append(1)
        raise UnusableCaptionerError("caption.model=x cannot be loaded")

    captioner = StoredCaptioner(CaptionStore(str(tmp_path), ORIGIN), 1, load)
    for error in [*captioner.describe(tiles("a", "b")), *captioner.describe(tiles("c"))]:
        assert isinstance(error, UnusableCaptionerError)
    assert len(loads) == 1
    assert not list(tmp_path.rglob("*.parquet"))
