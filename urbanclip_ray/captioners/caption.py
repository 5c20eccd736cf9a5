"""tiles ─caption─▶ captions: Ray Data actors hold one captioner each and describe batches of tiles.

What a model says goes to the caption store, and the dataset is read off it: see `missing` for which tiles the actors see,
`attempts` for what happens when one of them dies, and `projection` for the rows.
"""

from __future__ import annotations

import secrets
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from urbanclip_ray import dataflow
from urbanclip_ray.captioners import given as source_captions
from urbanclip_ray.captioners import land_cover, missing, vision_language
from urbanclip_ray.captioners.attempts import StoredCaptioner
from urbanclip_ray.captioners.base import Captioner, Origin, Tile
from urbanclip_ray.captioners.missing import Missing
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.captioners.projection import Described, as_captions, project, rows_of
from urbanclip_ray.captioners.store import CaptionStore
from urbanclip_ray.captioners.tally import UNREADABLE, Tally, kind_of, reason_of
from urbanclip_ray.captioners.tally import CaptionError as CaptionError  # exported again: what captioning raises
from urbanclip_ray.captioners.tally import refuse_unusable as refuse_unusable
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig
from urbanclip_ray.errors import one_line
from urbanclip_ray.storage import Dataset, Publication, resolve

TILE_COLUMNS = ["tile_id", "image", "sha256", "error"]


class CaptionWork(NamedTuple):
    """What captions are made from, and by whom."""

    tiles: Dataset
    config: CaptionConfig
    pixels: PixelsConfig
    given: pa.Table | None = None  # the source's own captions (tile_id, text), for the captioner `given`
    model: ModelReference | None = None  # for `transformers`, and for what `given` has no caption of
    store_uri: str = ""  # of the caption store, which a model uses
    job: str = ""  # a name for what one run of actors writes to the store

    def origins(self) -> list[Origin]:
        """What will make the captions, in the order in which it is asked; no model is loaded for it."""
        made_by = [source_captions.ORIGIN] if self.config.captioner == "given" else []
        if self.model is not None:
            made_by.append(vision_language.origin_of(self.config, self.model))
        elif not made_by:
            made_by.append(land_cover.ORIGIN)
        return [origin._replace(decoding=origin.decoding | self.pixels.content()) for origin in made_by]

    def stores(self) -> list[CaptionStore]:
        """Where the model's captions are kept; none for captioners that cost less than a look-up."""
        if self.model is None:
            return []
        own = source_captions.ORIGIN.model
        return [CaptionStore(self.store_uri, origin) for origin in self.origins() if origin.model != own]

    def given_tiles(self) -> set[str]:
        """Ids of the tiles that the source describes."""
        return set() if self.given is None else set(self.given["tile_id"].to_pylist())

    def find_missing(self, index: pa.Table) -> list[Missing]:
        """What each store has of the tiles of an index that the source does not describe; without stores, that all is to do."""
        num_samples, stores = self.config.decoding.num_samples, self.stores()
        if not stores:
            return [missing.find_missing(None, index, num_samples)]
        return [missing.find_missing(store, index, num_samples, self.given_tiles()) for store in stores]


def caption_tiles(work: CaptionWork, publication: Publication) -> None:
    """One row per description; a tile without one is a row with its `error`.

    Raises ConfigError when the source has no captions to give, and CaptionError when too many tiles have none, when the
    captioner cannot be used at all, or when its actors keep dying. What was generated until then stays in the store.
    """
    refuse_no_captions(work)
    if stores := work.stores():
        index = missing.read_index(work.tiles)
        found = work.find_missing(index)
        described = [describe_missing(store, index, known, work) for store, known in zip(stores, found, strict=True)]
        for number, rows in enumerate(project(index, described, source_captions.by_tile(work.given))):
            publication.write_table(rows, f"part-{number:05d}.parquet")
        _count_generated(publication, stores[-1].origin, found)
    else:
        dataflow.connect()
        with _deaths_explained(work.config):
            rows = dataflow.read_for_actors(work.tiles, TILE_COLUMNS)
            dataflow.write(describe_rows(rows, work), publication, from_actors=True)
    _count(publication, work)


def describe_missing(store: CaptionStore, index: pa.Table, known: Missing, work: CaptionWork) -> Described:
    """Describe what a store lacks of an index's tiles, into the store; raises CaptionError as soon as it has gone wrong."""
    errors: dict[str, str] = {}
    if known.num_missing:
        dataflow.connect()
        tally = Tally(len(known.hashes), len(known.hashes) - known.num_missing, work.config.max_error_share, store.folder.uri)
        rows = missing_rows(work.tiles, known.missing_tile_ids(), work.config.tiles_per_batch)
        with job_in([store], work) as named, _deaths_explained(work.config):
            described = describe_rows(rows, named, origins=[store.origin])
            for batch in described.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                if batch.num_rows:  # an empty one may have no columns
                    tally.add(batch)
                    tally.report()
        failed = index.filter(pc.is_in(index["tile_id"], value_set=pa.array(tally.errors, pa.string())))
        errors = {row["sha256"]: tally.errors[row["tile_id"]] for row in failed.to_pylist()}
    return Described(store, work.config.decoding.num_samples, errors)


def missing_rows(tiles: Dataset, tile_ids: pa.Array, tiles_per_block: int) -> ray.data.Dataset:
    """`TILE_COLUMNS` of these tiles, in small blocks: all actors have some, and with one of them one block is lost."""
    filesystem, _ = resolve(tiles.uri)
    wanted = ray.put(tile_ids)

    def read_file(batch: pa.Table) -> Iterator[pa.Table]:
        value_set = ray.get(wanted)
        for path in batch["path"].to_pylist():
            with filesystem.open_input_file(path) as stream:
                file = pq.ParquetFile(stream)
                if not pc.any(pc.is_in(file.read(["tile_id"])["tile_id"], value_set=value_set)).as_py():
                    continue  # no pixels are read for it
                for rows in file.iter_batches(batch_size=tiles_per_block, columns=TILE_COLUMNS):
                    yield pa.Table.from_batches([rows]).filter(pc.is_in(rows["tile_id"], value_set=value_set))

    files = ray.data.from_arrow([pa.table({"path": [path]}) for path in tiles.parquet_paths()])
    rows = files.map_batches(read_file, batch_size=1, batch_format="pyarrow", num_cpus=dataflow.CPUS_BESIDE_ACTORS)
    blocks = rows.repartition(target_num_rows_per_block=tiles_per_block)
    # a repartition takes no resources in Ray 2.60, and with a whole CPU it would wait for ever beside actors
    blocks._logical_plan.dag.ray_remote_args["num_cpus"] = dataflow.CPUS_BESIDE_ACTORS
    return blocks


def describe_rows(
    rows: ray.data.Dataset,
    work: CaptionWork,
    actor: type[CaptionBatch] | None = None,
    origins: Sequence[Origin] | None = None,
) -> ray.data.Dataset:
    """Rows of captions from rows of tiles (`TILE_COLUMNS`), described in actors of this class by these origins."""
    config = work.config
    with warnings.catch_warnings():
        # an option of actors without a name of its own in Ray Data, which warns of it in 2.60 and has no other
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return rows.map_batches(
            actor or CaptionBatch,
            fn_constructor_kwargs={
                "work": work._replace(given=None),
                "given_captions": ray.put(work.given),
                "origins": list(origins or work.origins()),
            },
            batch_size=config.tiles_per_batch,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.num_actors),
            **dataflow.actor_options(config.gpus_per_actor),
            # Without bound where deaths are counted in the store, tile by tile: Ray counts them for every batch that waits at
            # the actor, those without fault too.
            max_task_retries=-1 if work.model is not None else config.max_attempts - 1,
        )


@contextmanager
def job_in(stores: Sequence[CaptionStore], work: CaptionWork) -> Iterator[CaptionWork]:
    """The work with a name for what its actors write; notes of their attempts are removed at the end."""
    job = secrets.token_hex(4)
    try:
        yield work._replace(job=job)
    finally:
        for store in stores:
            store.forget_attempts(job)


@contextmanager
def _deaths_explained(config: CaptionConfig) -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayActorError as error:
        raise CaptionError(
            f"a captioner's process died, caption.max_attempts={config.max_attempts} times where it had described tiles: "
            f"{one_line(error)}. If memory ran out, lower caption.tiles_per_batch or caption.num_actors; "
            "what is described is kept, so run the same command again"
        ) from error


class CaptionBatch:
    """A Ray Data actor around the captioners. Follows a batch of tiles to rows of captions."""

    def __init__(self, work: CaptionWork, given_captions: Any, origins: Sequence[Origin]) -> None:
        self._pixels = work.pixels
        self._captioners = [(origin, _build_captioner(origin, work, given_captions)) for origin in origins]

    def __call__(self, batch: pa.Table) -> pa.Table:
        tiles = batch.to_pylist()
        described = self._describe([Tile(row["tile_id"], row["image"], self._pixels) for row in tiles if row["error"] is None])
        last, _ = self._captioners[-1]
        out: list[dict[str, Any]] = []
        for tile in tiles:
            unreadable = (last, ValueError(f"{UNREADABLE}: {tile['error']}"))
            origin, texts = described.get(tile["tile_id"], unreadable)
            out += rows_of(tile, origin, reason_of(texts) if isinstance(texts, Exception) else texts)
        return as_captions(out)

    def _describe(self, tiles: list[Tile]) -> dict[str, tuple[Origin, list[str] | Exception]]:
        """Texts or errors by tile id, and who made them; a captioner is asked what the one before it could not say."""
        described: dict[str, tuple[Origin, list[str] | Exception]] = {}
        left = tiles
        for origin, captioner in self._captioners:
            for tile, texts in zip(left, captioner.describe(left), strict=True):
                described[tile.tile_id] = origin, texts
            left = [tile for tile in left if isinstance(described[tile.tile_id][1], Exception)]
        return described


def _build_captioner(origin: Origin, work: CaptionWork, given_captions: Any) -> Captioner:
    model, config = work.model, work.config
    if origin.model == source_captions.ORIGIN.model:
        return source_captions.GivenCaptioner(ray.get(given_captions))
    if model is None:
        return land_cover.LandCoverCaptioner()
    return StoredCaptioner(
        CaptionStore(work.store_uri, origin),
        config.decoding.num_samples,
        lambda: vision_language.VisionLanguageCaptioner(config, model),
        job=work.job,
        worker=ray.get_runtime_context().get_actor_id() or "driver",  # the same after a restart
        max_attempts=config.max_attempts,
    )


def refuse_no_captions(work: CaptionWork) -> None:
    """Raise ConfigError where the source is to give captions and has none."""
    if work.config.captioner == "given" and (work.given is None or work.given.num_rows == 0):
        raise ConfigError(
            "caption.captioner=given, but the source brings no captions: use caption.captioner=land_cover, or transformers "
            "with a caption.model"
        )


def _count(publication: Publication, work: CaptionWork) -> None:
    config = work.config
    written = publication.read(["tile_id", "error"])
    errors = [error for error in written["error"].to_pylist() if error is not None]
    refuse_unusable(errors)
    rejects = Counter(kind_of(error) for error in errors)
    if config.captioner == "given" and work.given is not None:
        unknown = work.given.filter(pc.invert(pc.is_in(work.given["tile_id"], value_set=written["tile_id"])))
        if unknown.num_rows:
            rejects["caption of an unknown tile"] = unknown.num_rows
            publication.facts["unknown_tiles"] = pc.unique(unknown["tile_id"]).to_pylist()[:20]
    rows_out = written.num_rows - len(errors)
    publication.count(unit="captions", rows_in=rows_out + sum(rejects.values()), rows_out=rows_out, rejects=dict(rejects))
    failed = sum(1 for error in errors if not error.startswith(UNREADABLE))
    num_tiles = max(1, work.tiles.manifest.rows_out)
    if failed > config.max_error_share * num_tiles:
        first = next(error for error in errors if not error.startswith(UNREADABLE))
        raise CaptionError(
            f"{failed} of {num_tiles} readable tiles could not be captioned (the first: {first}), more than "
            f"caption.max_error_share={config.max_error_share}: mend the captions, or raise that share to go on"
        )


def _count_generated(publication: Publication, origin: Origin, found: Sequence[Missing]) -> None:
    """Facts: the model, and how many of the captions were given, or were in the store before this run."""
    written = publication.read(["model", "error"])
    models = written["model"].filter(pc.is_null(written["error"]))
    num_given = pc.sum(pc.equal(models, source_captions.ORIGIN.model)).as_py() or 0
    from_store = sum(known.num_stored_captions for known in found)
    generated = len(models) - num_given - from_store
    publication.facts["captions"] = {"given": num_given, "from_store": from_store, "generated": generated}
    print(f"captions: {num_given:,} given, {from_store:,} from the store, {generated:,} generated")
    publication.facts["model"] = {"name": origin.model, "revision": origin.revision}
