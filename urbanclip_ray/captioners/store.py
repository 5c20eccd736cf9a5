"""The caption store: every generated text, kept beside the runs and shared by all of them.

`<storage>/caption_store/<digest of an origin>/<digest of the texts>.parquet`: one small file per described batch, written
whole and never changed, so what is committed is never generated again and a stopped job goes on from there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from urbanclip_ray.captioners.base import Captioner, Origin, Tile, UnusableCaptionerError
from urbanclip_ray.schema import STORED_CAPTIONS
from urbanclip_ray.storage import StorageError, digest, exists, join, list_files, read_bytes, write_bytes

STORE = "caption_store"  # the folder below the storage
NUM_READERS = 16  # a small file costs a round trip, not bandwidth


class StoredCaption(NamedTuple):
    """One text of one tile."""

    sha256: str
    sample: int
    text: str


class CaptionStore:
    """The texts of one origin. `uri` is the store's; what other writers commit is seen after :meth:`refresh`."""

    def __init__(self, uri: str, origin: Origin) -> None:
        self.origin = origin
        self._folder = join(uri, digest(origin._asdict())[:16])
        self._texts: dict[str, str] = {}
        self._read: set[str] = set()

    def refresh(self) -> None:
        """Read the files that were committed since."""
        if not exists(self._folder):
            return
        names = {str(info.path).rsplit("/", 1)[-1] for info in list_files(self._folder, recursive=False)}
        new = sorted(name for name in names - self._read if name.endswith(".parquet"))
        with ThreadPoolExecutor(NUM_READERS) as readers:
            for texts in readers.map(self._read_file, new):
                for key, text in texts.items():
                    self._texts.setdefault(key, text)
        self._read.update(new)

    def _read_file(self, name: str) -> dict[str, str]:
        uri = join(self._folder, name)
        try:
            table = pq.read_table(io.BytesIO(read_bytes(uri)), columns=["caption_key", "text"])
        except pa.ArrowInvalid as error:
            raise StorageError(f"{uri} is damaged ({error}): delete it, and its captions are generated again") from None
        return dict(zip(table["caption_key"].to_pylist(), table["text"].to_pylist(), strict=True))

    def keys(self) -> set[str]:
        return set(self._texts)

    def find(self, sha256: str, num_samples: int) -> list[str] | None:
        """All samples of a tile, or None where one of them is missing."""
        keys = [self.origin.key(sha256, sample) for sample in range(num_samples)]
        return [self._texts[key] for key in keys] if all(key in self._texts for key in keys) else None

    def add(self, captions: Iterable[StoredCaption]) -> None:
        """Commit texts in one file; a text that is there already stays as it is."""
        rows = []
        for caption in captions:
            key = self.origin.key(caption.sha256, caption.sample)
            if key not in self._texts:
                rows.append(caption._asdict() | {"caption_key": key})
                self._texts[key] = caption.text
        if not rows:
            return
        model, revision, prompt, decoding = self.origin
        common = {"model": model, "revision": revision, "prompt": prompt, "decoding": json.dumps(decoding, sort_keys=True)}
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([row | common for row in rows], schema=STORED_CAPTIONS), stream)
        name = f"{digest([[row['caption_key'], row['text']] for row in rows])[:32]}.parquet"
        write_bytes(join(self._folder, name), stream.getvalue())
        self._read.add(name)


class StoredCaptioner:
    """Asks a captioner only for what the store lacks, and commits what it says. The captioner is loaded at first need."""

    def __init__(self, store: CaptionStore, num_samples: int, load: Callable[[], Captioner]) -> None:
        self._store = store
        self._num_samples = num_samples
        self._load = load
        self._captioner: Captioner | UnusableCaptionerError | None = None

    @property
    def origin(self) -> Origin:
        return self._store.origin

    def describe(self, tiles: Sequence[Tile]) -> list[list[str] | Exception]:
        hashes = [tile.sha256 for tile in tiles]
        errors: dict[str, Exception] = {}
        if self._missing(hashes):
            self._store.refresh()
            by_hash = dict(zip(hashes, tiles, strict=True))  # equal tiles are described once
            errors = self._generate({sha256: by_hash[sha256] for sha256 in self._missing(hashes)})
        return [errors[sha256] if sha256 in errors else self._found(sha256) for sha256 in hashes]

    def _missing(self, hashes: list[str]) -> list[str]:
        return [sha256 for sha256 in hashes if self._store.find(sha256, self._num_samples) is None]

    def _found(self, sha256: str) -> list[str]:
        texts = self._store.find(sha256, self._num_samples)
        if texts is None:
            raise AssertionError(f"the captioner gave fewer than {self._num_samples} texts for a tile")
        return texts

    def _generate(self, tiles: dict[str, Tile]) -> dict[str, Exception]:
        """Describe and commit; returns the errors, which are not kept: the next run tries again."""
        if not tiles:
            return {}
        captioner = self._loaded()
        if isinstance(captioner, UnusableCaptionerError):
            return dict.fromkeys(tiles, captioner)
        described = dict(zip(tiles, captioner.describe(list(tiles.values())), strict=True))
        self._store.add(
            StoredCaption(sha256, sample, text)
            for sha256, texts in described.items()
            if not isinstance(texts, Exception)
            for sample, text in enumerate(texts)
        )
        return {sha256: texts for sha256, texts in described.items() if isinstance(texts, Exception)}

    def _loaded(self) -> Captioner | UnusableCaptionerError:
        if self._captioner is None:
            try:
                self._captioner = self._load()
            except UnusableCaptionerError as error:
                self._captioner = error
        return self._captioner
