"""How far captioning is: of one run's tiles, and of everything that a store holds."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from urbanclip_ray.captioners.missing import Asked
from urbanclip_ray.captioners.store import FAILED, PartsFolder
from urbanclip_ray.captioners.tally import kind_of
from urbanclip_ray.config import ConfigError
from urbanclip_ray.storage import join, list_folders, open_file

if TYPE_CHECKING:
    from urbanclip_ray.captioners.caption import CaptionWork  # whose module imports Ray, which nothing here needs

RATE_WINDOW_S = 900.0  # before the newest file
SILENT_AFTER_S = 300.0  # a job that writes nothing for so long is called stopped


class Progress(NamedTuple):
    """Of one origin and one run's tiles, those with the same bytes counted once."""

    model: str
    num_tiles: int
    num_done: int
    failed: dict[str, int]  # tiles that are not done, by reason
    captions_per_minute: float | None  # of all jobs that write for this origin; None where too few files tell
    silent_s: float | None  # since the newest file; None where there is none
    samples_per_tile: int

    @property
    def num_to_do(self) -> int:
        """With the failed ones: the next job tries them again."""
        return self.num_tiles - self.num_done

    def __str__(self) -> str:
        share = self.num_done / max(1, self.num_tiles)
        failed = sum(self.failed.values())
        lines = [
            f"captions of {self.model}",
            f"  tiles: {self.num_tiles:,}; done: {self.num_done:,} ({share:.1%}); to do: {self.num_to_do:,}, "
            f"of which {failed:,} failed so far and will be tried again",
            *(f"    {count:,} × {reason}" for reason, count in Counter(self.failed).most_common()),
        ]
        if self.silent_s is None:
            return "\n".join([*lines, "  nothing is written yet"])
        if self.silent_s > SILENT_AFTER_S:
            state = f"  stopped: the last caption was written {_duration(self.silent_s)} ago"
            return "\n".join([*lines, state])
        if self.captions_per_minute:
            left_s = self.num_to_do * self.samples_per_tile / self.captions_per_minute * 60
            lines.append(f"  rate: {self.captions_per_minute:,.0f} captions a minute; time left: {_duration(left_s)}")
        return "\n".join([*lines, f"  the last caption was written {_duration(self.silent_s)} ago"])


def progress_of(work: CaptionWork) -> list[Progress]:
    """How far each origin of a run is, whether its job runs or not; raises ConfigError where nothing is kept in a store."""
    if work.model is None:
        raise ConfigError(
            f"caption.captioner={work.config.captioner} keeps nothing in the caption store, so there is no progress to show"
        )
    return [_progress(each) for each in work.look_up(work.read_index()).asked]


def show_progress(work: CaptionWork, limit: int | None) -> None:
    """Print it."""
    if limit is not None:
        raise ConfigError("--limit does not go with --status, which counts every tile: leave it out")
    print("\n".join(str(progress) for progress in progress_of(work)))


def _progress(asked: Asked) -> Progress:
    store, known = asked.store, asked.known
    failed = store.read_failed()
    failed = failed.filter(pc.is_in(failed["sha256"], value_set=known.hashes.filter(pa.array(known.is_missing))))
    rate, silent_s = _rate(store.folder)
    return Progress(
        model=f"{store.origin.model}, prompt {store.origin.prompt[:60]!r}",
        num_tiles=len(known.hashes),
        num_done=len(known.hashes) - known.num_missing,
        failed=dict(Counter(kind_of(reason) for reason in asked.refusals().values() or failed["reason"].to_pylist())),
        captions_per_minute=rate,
        silent_s=silent_s,
        samples_per_tile=known.are_stored.shape[1],
    )


def _rate(folder: PartsFolder) -> tuple[float | None, float | None]:
    """Captions a minute by the newest files that a job wrote, and seconds since the last of them."""
    parts = [part for part in folder.parts() if not part.is_compacted]
    if not parts:
        return None, None
    newest_s = parts[-1].written_at_s
    recent = [part for part in parts if newest_s - part.written_at_s <= RATE_WINDOW_S]
    span_s = newest_s - recent[0].written_at_s
    silent_s = max(0.0, time.time() - newest_s)
    if not span_s:
        return None, silent_s
    num_captions = sum(_num_rows(folder, part.name) for part in recent[1:])  # those of the first were made before it
    return num_captions / span_s * 60, silent_s


def _num_rows(folder: PartsFolder, name: str) -> int:
    try:
        with open_file(join(folder.uri, name)) as file:
            return int(pq.read_metadata(file).num_rows)
    except FileNotFoundError:  # compacted meanwhile
        return 0


class Holding(NamedTuple):
    """What a store holds of one origin."""

    folder: str
    origin: dict[str, str]
    num_tiles: int
    num_captions: int
    num_parts: int
    num_bytes: int
    failed: dict[str, int]  # tiles that were never described, by reason
    written_ago_s: float | None

    def __str__(self) -> str:
        decoding = json.loads(self.origin["decoding"])
        lines = [
            f"{self.folder}: {self.origin['model']} ({self.origin['revision'][:12]}), prompt {self.origin['prompt'][:60]!r}, "
            f"{', '.join(f'{key}={value}' for key, value in decoding.items())}",
            f"  {self.num_captions:,} captions of {self.num_tiles:,} tiles in {self.num_parts:,} files, "
            f"{self.num_bytes / 1e6:,.1f} MB, {sum(self.failed.values()):,} tiles failed",
            *(f"    {count:,} × {reason}" for reason, count in Counter(self.failed).most_common()),
        ]
        if self.written_ago_s is not None:
            lines.append(f"  last written {_duration(self.written_ago_s)} ago")
        return "\n".join(lines)


def holdings(store_uri: str) -> Iterator[Holding]:
    """What a store holds, one origin after another; raises StorageError where there is no store, or a damaged file."""
    for name in list_folders(store_uri):
        folder = PartsFolder(join(store_uri, name))
        failed_folder = PartsFolder(join(folder.uri, FAILED))
        parts, failed_parts = folder.parts(), failed_folder.parts()
        if not parts and not failed_parts:
            continue  # a job has only just begun
        hashes, num_captions = _distinct(folder)
        columns = ["model", "revision", "prompt", "decoding"]
        first = folder.read_part(parts[0].name, columns) if parts else failed_folder.read_part(failed_parts[0].name, columns)
        yield Holding(
            folder=name,
            origin=first.slice(0, 1).to_pylist()[0],
            num_tiles=len(hashes),
            num_captions=num_captions,
            num_parts=len(parts),
            num_bytes=sum(part.num_bytes for part in parts),
            failed=_failed_by_reason(failed_folder, hashes),
            written_ago_s=time.time() - max(part.written_at_s for part in parts) if parts else None,
        )


def _distinct(folder: PartsFolder) -> tuple[pa.Array, int]:
    """The tiles that have a text, and the number of texts, none counted twice."""
    tables = list(folder.read(["sha256", "sample"]))
    if not tables:
        return pa.array([], pa.string()), 0
    counted = pa.concat_tables(tables).group_by("sha256").aggregate([("sample", "count_distinct")])
    return counted["sha256"].combine_chunks(), int(np.sum(counted["sample_count_distinct"].to_numpy()))


def _failed_by_reason(folder: PartsFolder, described: pa.Array) -> dict[str, int]:
    reasons: dict[str, str] = {}
    for table in folder.read(["sha256", "reason"]):
        left = table.filter(pc.invert(pc.is_in(table["sha256"], value_set=described)))
        reasons |= dict(zip(left["sha256"].to_pylist(), left["reason"].to_pylist(), strict=True))
    return dict(Counter(kind_of(reason) for reason in reasons.values()))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
