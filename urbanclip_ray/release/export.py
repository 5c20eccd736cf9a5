"""tiles + pairs ─export─▶ a folder to share: shards, README.md, and manifest.json, which is written last.

One Ray task writes one shard, with no more than a group of tiles in memory. The same export of the same datasets has the
same shards to the byte.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import ray.data

from urbanclip_ray import dataflow
from urbanclip_ray.config import ConfigError
from urbanclip_ray.libraries import library_versions
from urbanclip_ray.manifest import FileEntry, Manifest
from urbanclip_ray.release.card import Release, check_licence, write_card
from urbanclip_ray.release.plan import ExportPlan, Format, ShardPlan, plan_export
from urbanclip_ray.release.shards import ShardSettings, write_shard
from urbanclip_ray.stages import Run
from urbanclip_ray.storage import (
    MANIFEST,
    Dataset,
    StorageError,
    create_exclusively,
    delete_file,
    exists,
    explain_os_error,
    find_dataset,
    join,
    list_files,
    resolve,
    write_bytes,
)
from urbanclip_ray.train.pack import outer_parts

CARD = "README.md"
STAGE = "export"
HALF_WRITTEN = re.compile(r"(.+)\.[0-9a-f]{8}\.tmp")  # what `storage` leaves on a local disk where a process was killed


class ExportOptions(NamedTuple):
    """What is exported, as what, and where to."""

    kind: Format
    licence: str
    output: str  # a local path or s3://bucket/prefix
    pixels: bool = True  # False: texts and sha256 only, for imagery that may not be shared
    attribution: str = ""  # who has to be named beside the licence
    rows_per_shard: int = 4096


def export_pairs(run: Run, options: ExportOptions) -> Manifest:
    """Write the tiles of a run that have accepted sentences. `run` has the datasets tiles, captions, pairs, maybe splits.

    An export that is there already is kept where it is the same, and otherwise refused, as is a folder with other files.
    Raises ConfigError and StorageError.
    """
    check_licence(options.licence)
    if missing := {"tiles", "captions", "pairs"} - run.datasets.keys():
        raise ConfigError(f"this recipe makes no {', '.join(sorted(missing))}: choose one that describes its tiles")
    datasets: dict[str, Dataset] = {
        name: run.datasets[name] for name in ("tiles", "captions", "pairs", "splits") if name in run.datasets
    }
    made_of = options._asdict() | {
        "source": run.config.source.content(),
        "outer": run.config.split.outer,
        "name": run.config.run,
    }
    del made_of["output"]
    parents = {name: dataset.sha256 for name, dataset in datasets.items()}
    if (found := _find_same(options.output, made_of, parents)) is not None:
        return found
    parts = outer_parts(datasets["splits"], run.config.split.outer) if "splits" in datasets else None
    plan = plan_export(datasets["tiles"], datasets["pairs"], parts, options.kind, options.rows_per_shard)
    _refuse_other_files(options.output, {CARD, *(shard.name for shard in plan.shards)})
    settings = ShardSettings(options.kind, options.pixels, options.output, datasets["tiles"].uri, datasets["pairs"].uri)
    entries = _write_shards(plan.shards, settings)
    release = Release(
        run.config.run,
        options.kind,
        options.licence,
        options.attribution,
        options.pixels,
        run.config.source.content(),
        datasets,
    )
    card = write_card(release, plan).encode()
    write_bytes(join(options.output, CARD), card)
    manifest = _manifest(made_of, parents, plan, [*entries, _entry(CARD, card)])
    if not create_exclusively(join(options.output, MANIFEST), manifest.to_bytes()):
        raise StorageError(f"{options.output}: another export has finished there meanwhile: choose another --output")
    return manifest


def _find_same(output: str, made_of: dict[str, object], parents: dict[str, str]) -> Manifest | None:
    found = find_dataset(output)
    if found is None:
        return None
    if (found.manifest.config, found.manifest.parents) == (made_of, parents):
        return found.manifest
    raise StorageError(f"{output} holds another export or dataset already: choose another --output, or remove that folder")


def _refuse_other_files(output: str, names: set[str]) -> None:
    """What a stopped export of the same things has left is written over; anything else would be published with it."""
    if not exists(output):
        return
    root = resolve(output)[1]
    for info in list_files(output):
        name = str(info.path).removeprefix(root).lstrip("/")
        if (half := HALF_WRITTEN.fullmatch(name)) and half.group(1) in names:
            delete_file(join(output, name))
        elif name not in names:
            raise StorageError(
                f"{output} holds {name}, which is no file of this export: choose an empty --output, or remove that folder"
            )


def _write_shards(shards: Sequence[ShardPlan], settings: ShardSettings) -> list[FileEntry]:
    dataflow.connect()
    plans = ray.data.from_arrow([shard.as_table() for shard in shards])
    written = dataflow.map_tables(plans, partial(_write_batch, settings=settings), batch_size=1)
    try:
        rows = written.take_all()
    except OSError as error:
        cause = getattr(error, "cause", None)
        raise explain_os_error(cause if isinstance(cause, OSError) else error, settings.output) from error
    return [FileEntry(**row) for row in rows]


def _write_batch(batch: pa.Table, settings: ShardSettings) -> pa.Table:
    return pa.Table.from_pylist([write_shard(ShardPlan.from_row(row), settings).model_dump() for row in batch.to_pylist()])


def _entry(name: str, data: bytes) -> FileEntry:
    return FileEntry(path=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _manifest(made_of: dict[str, object], parents: dict[str, str], plan: ExportPlan, files: Sequence[FileEntry]) -> Manifest:
    rejects = {"no accepted sentence": plan.num_without_text, "unreadable tile": plan.num_unreadable}
    return Manifest(
        stage=STAGE,
        config=made_of,
        parents=parents,
        unit="tiles",
        rows_in=plan.num_exported + sum(rejects.values()),
        rows_out=plan.num_exported,
        rejects=rejects,
        files=tuple(files),
        facts={"splits": plan.num_by_split},
        libraries=library_versions(),
    )
