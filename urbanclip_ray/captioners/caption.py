"""tiles ─caption─▶ captions: Ray Data actors hold one captioner each and describe batches of tiles."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from urbanclip_ray import dataflow
from urbanclip_ray.captioners import given as source_captions
from urbanclip_ray.captioners import land_cover, vision_language
from urbanclip_ray.captioners.base import Captioner, Origin, Tile, UnusableCaptionerError
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.captioners.store import CaptionStore, StoredCaptioner
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig
from urbanclip_ray.errors import UserError, one_line
from urbanclip_ray.schema import CAPTIONS
from urbanclip_ray.storage import Dataset, Publication

UNREADABLE = "unreadable tile"
UNUSABLE = "unusable captioner"
TILE_COLUMNS = ["tile_id", "image", "sha256", "error"]


class CaptionError(UserError, RuntimeError):
    """Too many tiles could not be captioned, or the captioner itself cannot be used."""


class CaptionWork(NamedTuple):
    """What captions are made from, and by whom."""

    tiles: Dataset
    config: CaptionConfig
    pixels: PixelsConfig
    given: pa.Table | None = None  # the source's own captions (tile_id, text), for the captioner `given`
    model: ModelReference | None = None  # for `transformers`, and for what `given` has no caption of
    store_uri: str = ""  # of the caption store, which a model uses

    def origins(self) -> list[Origin]:
        """What will make the captions, in the order in which it is asked; no model is loaded for it."""
        made_by = [source_captions.ORIGIN] if self.config.captioner == "given" else []
        if self.model is not None:
            made_by.append(vision_language.origin_of(self.config, self.model))
        elif not made_by:
            made_by.append(land_cover.ORIGIN)
        return [origin._replace(decoding=origin.decoding | self.pixels.content()) for origin in made_by]

    def store(self) -> CaptionStore | None:
        """What the store holds of the model's captions; None for captioners that cost less than a look-up."""
        if self.model is None:
            return None
        store = CaptionStore(self.store_uri, self.origins()[-1])
        store.refresh()
        return store

    def given_tiles(self) -> set[str]:
        """Ids of the tiles that the source describes."""
        return set() if self.given is None else set(self.given["tile_id"].to_pylist())


def caption_tiles(work: CaptionWork, publication: Publication) -> None:
    """One row per description; a tile without one is a row with its `error`.

    Raises ConfigError when the source has no captions to give, and CaptionError when too many tiles have none, when the
    captioner cannot be used at all, or when its actors keep dying. What was generated until then stays in the store.
    """
    store = work.store()
    known = store.keys() if store is not None else set()
    dataflow.connect()
    try:
        rows = dataflow.read(work.tiles, TILE_COLUMNS, for_actors=True)
        dataflow.write(describe_rows(rows, work), publication, from_actors=True)
    except ray.exceptions.RayActorError as error:
        raise CaptionError(
            f"a captioner's process died more than caption.max_retries={work.config.max_retries} times on the same tiles: "
            f"{one_line(error)}. If memory ran out, lower caption.tiles_per_batch or caption.num_actors; "
            "what is described is kept, so run the same command again"
        ) from error
    _count(publication, work)
    if store is not None:
        _count_generated(publication, store.origin, known)


def describe_rows(rows: ray.data.Dataset, work: CaptionWork, actor: type[CaptionBatch] | None = None) -> ray.data.Dataset:
    """Rows of captions from rows of tiles (`TILE_COLUMNS`), described in actors of this class."""
    config = work.config
    if config.captioner == "given" and (work.given is None or work.given.num_rows == 0):
        raise ConfigError(
            "caption.captioner=given, but the source brings no captions: use caption.captioner=land_cover, or transformers "
            "with a caption.model"
        )
    with warnings.catch_warnings():
        # Ray's default is to try for ever, and its only way to bound that is an option without a name of its own, which
        # it warns of in 2.60 and has not replaced.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return rows.map_batches(
            actor or CaptionBatch,
            fn_constructor_kwargs={"work": work._replace(given=None), "given_captions": ray.put(work.given)},
            batch_size=config.tiles_per_batch,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.num_actors),
            **dataflow.actor_options(config.gpus_per_actor),
            max_task_retries=config.max_retries,
        )


class CaptionBatch:
    """A Ray Data actor around the captioners. Follows a batch of tiles to rows of captions."""

    def __init__(self, work: CaptionWork, given_captions: Any) -> None:
        self._pixels = work.pixels
        self._captioners = [(origin, _build_captioner(origin, work, given_captions)) for origin in work.origins()]

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        described = self._describe([Tile(row["tile_id"], row["image"], self._pixels) for row in rows if row["error"] is None])
        last, _ = self._captioners[-1]
        out: list[dict[str, Any]] = []
        for row in rows:
            unreadable = (last, ValueError(f"{UNREADABLE}: {row['error']}"))
            origin, texts = described.get(row["tile_id"], unreadable)
            common = {"tile_id": row["tile_id"], "model": origin.model, "prompt": origin.prompt}
            for sample, text in enumerate([None] if isinstance(texts, Exception) else texts):
                key = origin.key(row["sha256"] or row["tile_id"], sample)
                error = _reason(texts) if isinstance(texts, Exception) else None
                out.append(common | {"caption_key": key, "text": text, "error": error})
        return dataflow.conform({name: [row[name] for row in out] for name in CAPTIONS.names}, CAPTIONS)

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
    store = CaptionStore(work.store_uri, origin)
    return StoredCaptioner(store, config.decoding.num_samples, lambda: vision_language.VisionLanguageCaptioner(config, model))


def _reason(error: Exception) -> str:
    return f"{UNUSABLE}: {error}" if isinstance(error, UnusableCaptionerError) else str(error)


def refuse_unusable(errors: list[str]) -> None:
    """Raise CaptionError where a row's error is the captioner's and not the tile's: more tiles would change nothing."""
    unusable = next((error for error in errors if error.startswith(UNUSABLE)), None)
    if unusable is not None:
        raise CaptionError(unusable.removeprefix(f"{UNUSABLE}: "))


def _count(publication: Publication, work: CaptionWork) -> None:
    config = work.config
    written = publication.read(["tile_id", "error"])
    errors = [error for error in written["error"].to_pylist() if error is not None]
    refuse_unusable(errors)
    rejects = Counter(error.split(":")[0] for error in errors)
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


def _count_generated(publication: Publication, origin: Origin, known: set[str]) -> None:
    """Facts: the model, and how many of the captions were given, or were in the store before this run."""
    written = publication.read(["caption_key", "model", "error"])
    written = written.filter(pc.is_null(written["error"]))
    keys = written.filter(pc.equal(written["model"], origin.model))["caption_key"].to_pylist()
    from_store, num_given = sum(1 for key in keys if key in known), written.num_rows - len(keys)
    publication.facts["captions"] = {"given": num_given, "from_store": from_store, "generated": len(keys) - from_store}
    print(f"captions: {num_given:,} given, {from_store:,} from the store, {len(keys) - from_store:,} generated")
    publication.facts["model"] = {"name": origin.model, "revision": origin.revision}
