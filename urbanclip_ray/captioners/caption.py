"""tiles ─caption─▶ captions: Ray Data actors hold one captioner each and describe batches of tiles.

What a model says goes to the caption store, and the dataset is read off it: see `missing` for which tiles the actors see and
what they ask, `attempts` for what happens when one of them dies, and `projection` for the rows.
"""

from __future__ import annotations

import secrets
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from urbanclip_ray import dataflow
from urbanclip_ray.captioners import given as source_captions
from urbanclip_ray.captioners import land_cover, vllm_engine
from urbanclip_ray.captioners.attempts import LoadedCaptioner, StoredCaptioner
from urbanclip_ray.captioners.back_ends import load_captioner, origin_of
from urbanclip_ray.captioners.base import Captioner, Origin, Tile
from urbanclip_ray.captioners.missing import Asked, Questions, Wanted, find_missing, read_index
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.captioners.projection import Described, as_captions, project, rows_of
from urbanclip_ray.captioners.prompts import METADATA_COLUMNS, fill_prompts
from urbanclip_ray.captioners.store import CaptionStore
from urbanclip_ray.captioners.tally import UNREADABLE, Tally, kind_of, reason_of
from urbanclip_ray.captioners.tally import CaptionError as CaptionError  # exported again: what captioning raises
from urbanclip_ray.captioners.tally import refuse_unusable as refuse_unusable
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig
from urbanclip_ray.errors import one_line
from urbanclip_ray.parquet_files import open_parquet
from urbanclip_ray.storage import Dataset, Publication, resolve

TILE_COLUMNS = ["tile_id", "image", "sha256", "error"]


class Job(NamedTuple):
    """One run of actors: a name for what they write, and the store where they note what they are at beside its tiles."""

    name: str
    notes: CaptionStore


class CaptionWork(NamedTuple):
    """What captions are made from, and by whom."""

    tiles: Dataset
    config: CaptionConfig
    pixels: PixelsConfig
    given: pa.Table | None = None  # the source's own captions (tile_id, text), for the captioner `given`
    model: ModelReference | None = None  # who is asked, also for what `given` has no caption of
    store_uri: str = ""  # of the caption store, which a model uses
    job: Job | None = None  # whose actors ask a model
    run: str = ""  # its name in the metrics

    def origins(self) -> list[Origin]:
        """What will make the captions, in the order in which it is asked; no model is loaded for it."""
        made_by = [source_captions.ORIGIN] if self.config.captioner == "given" else []
        if self.model is not None:
            made_by.append(origin_of(self.config, self.model, "\n".join(self.config.asked())))
        elif not made_by:
            made_by.append(land_cover.ORIGIN)
        return [self._of_pixels(origin) for origin in made_by]

    def _of_pixels(self, origin: Origin) -> Origin:
        return origin._replace(decoding=origin.decoding | self.pixels.content())

    def store_of(self, prompt: str) -> CaptionStore:
        """The store of captions of tiles that are asked this."""
        if self.model is None:
            raise AssertionError("a captioner without a model is asked nothing")
        return CaptionStore(self.store_uri, self._of_pixels(origin_of(self.config, self.model, prompt)))

    def given_texts(self) -> dict[str, list[str]]:
        """The source's captions by tile id; a tile with one that is too long counts as not described."""
        return {tile_id: texts for tile_id, texts in source_captions.by_tile(self.given).items() if isinstance(texts, list)}

    def read_index(self) -> pa.Table:
        """What must be known of every tile to look for its captions; no pixels."""
        return read_index(self.tiles, METADATA_COLUMNS if self.config.prompts else ())

    def look_up(self, index: pa.Table) -> Questions:
        """What a model is asked about the tiles of an index that the source does not describe, and what is stored of it."""
        num_samples = self.config.decoding.num_samples
        prompts, places = fill_prompts(index, self.config, self.pixels)
        is_left = np.logical_not(pc.is_in(index["tile_id"], value_set=pa.array(list(self.given_texts()), pa.string())))
        asked = []
        for place, prompt in enumerate(prompts):
            store = self.store_of(prompt.text)
            tiles = index.filter(pa.array((places == place).any(axis=1) & is_left))
            known = find_missing(store if prompt.reason is None else None, tiles, num_samples)
            asked.append(Asked(prompt.text, store, known, prompt.reason))
        return Questions(index, asked, places)


def caption_tiles(work: CaptionWork, publication: Publication) -> None:
    """One row per description; a tile without one is a row with its `error`.

    Raises ConfigError when the source has no captions to give, and CaptionError when too many tiles have none, when the
    captioner cannot be used at all, or when its actors keep dying. What was generated until then stays in the store.
    """
    refuse_no_captions(work)
    if work.model is not None:
        questions = work.look_up(work.read_index())
        described = describe_missing(questions, work)
        for number, rows in enumerate(project(questions.index, described, work.given_texts(), questions.places)):
            publication.write_table(rows, f"part-{number:05d}.parquet")
        _count_generated(publication, work.model, questions)
    else:
        dataflow.connect()
        with _deaths_explained(work.config):
            rows = dataflow.read_for_actors(work.tiles, TILE_COLUMNS, work.config.num_actors)
            dataflow.write(describe_rows(rows, work), publication, num_actors=work.config.num_actors)
    _count(publication, work)


def describe_missing(questions: Questions, work: CaptionWork) -> list[Described]:
    """Describe what the stores lack, into them, in one job for all prompts; raises CaptionError as soon as it has gone wrong.

    Returns what is described by then of every prompt that is asked.
    """
    _refuse_unfilled(questions, work.config.max_error_share)
    errors: dict[str, dict[str, str]] = {}
    if to_do := questions.to_do():
        dataflow.connect()
        askable = [each.known for each in questions.asked if each.reason is None]
        num_tiles, num_missing = (sum(len(known.hashes) for known in askable), sum(known.num_missing for known in askable))
        unit = "tiles" if len(work.config.asked()) == 1 else "questions about tiles"
        tally = Tally(num_tiles, num_tiles - num_missing, work.config.max_error_share, work.store_uri, unit)
        rows = missing_rows(work.tiles, questions.wanted(), work.config)
        with job_in([each.store for each in to_do], work) as named, _deaths_explained(work.config):
            for batch in generate(rows, named).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                if batch.num_rows:  # an empty one may have no columns
                    tally.add(batch)
                    tally.report()
        errors = _by_hash(tally, questions.index)
    num_samples = work.config.decoding.num_samples
    return [Described(each.store, num_samples, each.refusals() | errors.get(each.prompt, {})) for each in questions.asked]


def _refuse_unfilled(questions: Questions, max_error_share: float) -> None:
    """Raise CaptionError, before anything is generated, where too many tiles lack what their prompts need."""
    num_asked = sum(len(each.known.hashes) for each in questions.asked)
    refused = [each for each in questions.asked if each.reason is not None]
    num_refused = sum(len(each.known.hashes) for each in refused)
    if num_refused > max_error_share * num_asked:
        most = max(refused, key=lambda each: len(each.known.hashes))
        raise CaptionError(
            f"{num_refused:,} of {num_asked:,} questions about tiles cannot be asked, more than "
            f"caption.max_error_share={max_error_share}: {most.reason} ({most.prompt!r}), or raise that share"
        )


def generate(rows: ray.data.Dataset, work: CaptionWork) -> ray.data.Dataset:
    """What a model says of rows of tiles (`TILE_COLUMNS`, `prompts`) goes to the stores; returns the `tile_id`, `prompt` and
    `error` of what was asked, at least.
    """
    if work.config.captioner == "vllm":
        return vllm_engine.fill_store(rows, work)
    return describe_rows(rows, work)


def _by_hash(tally: Tally, index: pa.Table) -> dict[str, dict[str, str]]:
    """Errors by prompt and sha256."""
    failed = pa.array({tile_id for tile_id, _ in tally.errors}, pa.string())
    tiles = index.filter(pc.is_in(index["tile_id"], value_set=failed))
    hash_of = dict(zip(tiles["tile_id"].to_pylist(), tiles["sha256"].to_pylist(), strict=True))
    errors: dict[str, dict[str, str]] = {}
    for (tile_id, prompt), error in tally.errors.items():
        errors.setdefault(prompt, {})[hash_of[tile_id]] = error
    return errors


def missing_rows(tiles: Dataset, wanted: Wanted, config: CaptionConfig) -> ray.data.Dataset:
    """`TILE_COLUMNS` and `prompts` of tiles that lack texts.

    They come in small blocks: all actors have some, and with one of them one block is lost.
    """
    filesystem, _ = resolve(tiles.uri)
    shared = ray.put(wanted)

    def read_file(batch: pa.Table) -> Iterator[pa.Table]:
        wanted = ray.get(shared)
        for path in batch["path"].to_pylist():
            with open_parquet(filesystem, path) as file:
                if not pc.any(pc.is_in(file.read(["tile_id"])["tile_id"], value_set=wanted.tile_ids)).as_py():
                    continue  # no pixels are read for it
                for rows in file.batches(TILE_COLUMNS, config.tiles_per_batch):
                    yield wanted.choose(rows)

    rows = dataflow.paths_of(tiles).map_batches(
        read_file, batch_size=None, batch_format="pyarrow", **dataflow.beside_actors(config.num_actors)
    )
    blocks = rows.repartition(target_num_rows_per_block=config.tiles_per_batch)
    # a repartition takes no resources in Ray 2.60, and with a whole CPU it would wait for ever beside actors
    blocks._logical_plan.dag.ray_remote_args["num_cpus"] = dataflow.CPUS_BESIDE_ACTORS
    return blocks


def describe_rows(rows: ray.data.Dataset, work: CaptionWork, actor: type[CaptionBatch] | None = None) -> ray.data.Dataset:
    """Rows of captions from rows of tiles (`TILE_COLUMNS`, and `prompts` for a model), described in actors of this class."""
    config = work.config
    with warnings.catch_warnings():
        # an option of actors without a name of its own in Ray Data, which warns of it in 2.60 and has no other
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return rows.map_batches(
            actor or CaptionBatch,
            fn_constructor_kwargs={"work": work._replace(given=None), "given_captions": ray.put(work.given)},
            batch_size=config.tiles_per_batch,
            batch_format="pyarrow",
            **dataflow.actors(
                config.num_actors,
                config if work.model is not None else config.without_gpus(),
                num_rows=work.tiles.manifest.rows_out,
                rows_per_batch=config.tiles_per_batch,
            ),
            # Without bound where deaths are counted in the store, tile by tile: Ray counts them for every batch that waits at
            # the actor, those without fault too.
            max_task_retries=-1 if work.model is not None else config.max_attempts - 1,
        )


@contextmanager
def job_in(stores: Sequence[CaptionStore], work: CaptionWork) -> Iterator[CaptionWork]:
    """The work with a job that writes to these stores; notes of its attempts are removed at the end."""
    job = Job(secrets.token_hex(4), stores[0])
    try:
        yield work._replace(job=job)
    finally:
        for store in stores:
            store.forget_attempts(job.name)


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
    """A Ray Data actor around a captioner. Follows a batch of tiles to rows of captions."""

    def __init__(self, work: CaptionWork, given_captions: Any) -> None:
        self._pixels = work.pixels
        self._origin = work.origins()[-1]
        self._asked = AskedModel(work, work.job) if work.job is not None else None
        self._unasked: Captioner = land_cover.LandCoverCaptioner()
        if self._origin.model == source_captions.ORIGIN.model:
            self._unasked = source_captions.GivenCaptioner(ray.get(given_captions))

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        return as_captions(self._asked.rows(rows) if self._asked is not None else self._rows(rows))

    def _rows(self, tiles: list[dict[str, Any]]) -> list[dict[str, Any]]:
        readable = [Tile(row["tile_id"], row["image"], self._pixels) for row in tiles if row["error"] is None]
        described = iter(self._unasked.describe(readable))
        out: list[dict[str, Any]] = []
        for tile in tiles:
            texts = next(described) if tile["error"] is None else ValueError(f"{UNREADABLE}: {tile['error']}")
            out += rows_of(tile, self._origin, reason_of(texts) if isinstance(texts, Exception) else texts)
        return out


class AskedModel:
    """A model that is asked every tile's `prompts`, tiles with one prompt together; what it says is committed."""

    def __init__(self, work: CaptionWork, job: Job) -> None:
        model, config = work.model, work.config
        if model is None:
            raise AssertionError("a captioner without a model is asked nothing")
        worker = ray.get_runtime_context().get_actor_id() or "driver"  # the same after a restart
        self._work = work
        self._job = job
        self.captioner = LoadedCaptioner(
            lambda: load_captioner(config, model), job.notes, job.name, worker, config.max_attempts
        )
        self._by_prompt: dict[str, StoredCaptioner] = {}

    def rows(self, tiles: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of captions of readable tiles."""
        out: list[dict[str, Any]] = []
        for prompt in dict.fromkeys(prompt for tile in tiles for prompt in tile["prompts"]):
            asked = [tile for tile in tiles if prompt in tile["prompts"]]
            captioner = self._captioner_of(prompt)
            described = captioner.describe([Tile(tile["tile_id"], tile["image"], self._work.pixels, prompt) for tile in asked])
            for tile, texts in zip(asked, described, strict=True):
                out += rows_of(tile, captioner.origin, reason_of(texts) if isinstance(texts, Exception) else texts)
        return out

    def _captioner_of(self, prompt: str) -> StoredCaptioner:
        if prompt not in self._by_prompt:
            config, store = self._work.config, self._work.store_of(prompt)
            num_samples, attempts = config.decoding.num_samples, config.max_attempts
            self._by_prompt[prompt] = StoredCaptioner(
                store, num_samples, self.captioner, self._job.name, attempts, self._work.run
            )
        return self._by_prompt[prompt]


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
    num_asked = num_tiles * (len(config.asked()) if work.model is not None else 1)
    if failed > config.max_error_share * num_asked:
        first = next(error for error in errors if not error.startswith(UNREADABLE))
        what = "readable tiles" if num_asked == num_tiles else "questions about readable tiles"
        raise CaptionError(
            f"{failed} of {num_asked} {what} could not be captioned (the first: {first}), more than "
            f"caption.max_error_share={config.max_error_share}: mend the captions, or raise that share to go on"
        )


def _count_generated(publication: Publication, model: ModelReference, questions: Questions) -> None:
    """Facts: the model, and how many of the captions were given, or were in the store before this run."""
    written = publication.read(["model", "error"])
    models = written["model"].filter(pc.is_null(written["error"]))
    num_given = pc.sum(pc.equal(models, source_captions.ORIGIN.model)).as_py() or 0
    from_store = sum(each.known.num_stored_captions for each in questions.asked)
    generated = len(models) - num_given - from_store
    publication.facts["captions"] = {"given": num_given, "from_store": from_store, "generated": generated}
    print(f"captions: {num_given:,} given, {from_store:,} from the store, {generated:,} generated")
    publication.facts["model"] = {"name": model.name, "revision": model.revision}
