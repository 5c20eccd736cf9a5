"""tiles ─caption─▶ captions: Ray Data actors hold one captioner each and describe batches of tiles."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from urbanclip_ray import dataflow
from urbanclip_ray.captioners import given as source_captions
from urbanclip_ray.captioners import land_cover, vllm_engine
from urbanclip_ray.captioners.back_ends import load_captioner, origin_of
from urbanclip_ray.captioners.base import Captioner, Origin, Tile, UnusableCaptionerError
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.captioners.prompts import METADATA_COLUMNS, prompts_of
from urbanclip_ray.captioners.store import CaptionStore, StoredCaptioner
from urbanclip_ray.captioners.texts import Cleaned
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig
from urbanclip_ray.errors import UserError, one_line
from urbanclip_ray.schema import CAPTIONS
from urbanclip_ray.storage import Dataset, Publication

UNREADABLE = "unreadable tile"
UNUSABLE = "unusable captioner"
TILE_COLUMNS = ["tile_id", "image", "sha256", "error", *METADATA_COLUMNS]


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
            made_by.append(self.model_origin("\n".join(self.config.asked())))
        elif not made_by:
            made_by.append(land_cover.ORIGIN)
        return [origin._replace(decoding=origin.decoding | self.pixels.content()) for origin in made_by]

    def model_origin(self, prompt: str) -> Origin:
        """What makes the model's captions of tiles that are asked this."""
        if self.model is None:
            raise AssertionError("a captioner without a model is asked nothing")
        origin = origin_of(self.config, self.model, prompt)
        return origin._replace(decoding=origin.decoding | self.pixels.content())

    def prompts_of(self, tile: Mapping[str, Any]) -> list[str | LookupError]:
        """What the model is asked about a tile (`METADATA_COLUMNS`), in order."""
        return list(prompts_of(tile, self.config, self.pixels))

    def store_of(self, prompt: str) -> CaptionStore:
        """The store of captions of tiles that are asked this, as it is now."""
        store = CaptionStore(self.store_uri, self.model_origin(prompt))
        store.refresh()
        return store

    def stored_keys(self) -> set[str]:
        """Keys of all captions that the store holds of prompts that these tiles are asked; none without a model."""
        if self.model is None:
            return set()
        rows = self.tiles.read(METADATA_COLUMNS).to_pylist() if self.config.prompts else [{}]
        prompts = {prompt for row in rows for prompt in self.prompts_of(row) if isinstance(prompt, str)}
        return {key for prompt in prompts for key in self.store_of(prompt).keys()}  # noqa: SIM118  it is no dictionary

    def given_tiles(self) -> set[str]:
        """Ids of the tiles that the source describes."""
        return set() if self.given is None else set(self.given["tile_id"].to_pylist())


def caption_tiles(work: CaptionWork, publication: Publication) -> None:
    """One row per description; a tile without one is a row with its `error`.

    Raises ConfigError when the source has no captions to give, and CaptionError when too many tiles have none, when the
    captioner cannot be used at all, or when its actors keep dying. What was generated until then stays in the store.
    """
    known = work.stored_keys()
    dataflow.connect()
    try:
        dataflow.write(describe_rows(dataflow.read(work.tiles, TILE_COLUMNS), work), publication)
    except ray.exceptions.RayActorError as error:
        raise CaptionError(
            f"a captioner's process died more than caption.max_retries={work.config.max_retries} times on the same tiles: "
            f"{one_line(error)}. If memory ran out, lower caption.tiles_per_batch or caption.num_actors; "
            "what is described is kept, so run the same command again"
        ) from error
    _count(publication, work)
    if work.model is not None:
        _count_generated(publication, work.origins()[-1], known)


def describe_rows(rows: ray.data.Dataset, work: CaptionWork, actor: type[CaptionBatch] | None = None) -> ray.data.Dataset:
    """Rows of captions from rows of tiles (`TILE_COLUMNS`), described in actors of this class."""
    config = work.config
    if config.captioner == "given" and (work.given is None or work.given.num_rows == 0):
        raise ConfigError(
            "caption.captioner=given, but the source brings no captions: use caption.captioner=land_cover, or transformers "
            "with a caption.model"
        )
    failed: dict[tuple[str, str], str] = {}
    if config.captioner == "vllm" and work.model is not None:
        failed = vllm_engine.fill_store(rows, config, work.model, work.pixels, work.store_of)
    with warnings.catch_warnings():
        # Ray's default is to try for ever, and its only way to bound that is an option without a name of its own, which
        # it warns of in 2.60 and has not replaced.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return rows.map_batches(
            actor or CaptionBatch,
            fn_constructor_kwargs={"work": work._replace(given=None), "given_captions": ray.put(work.given), "failed": failed},
            batch_size=config.tiles_per_batch,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.num_actors),
            num_gpus=config.gpus_per_actor or None,
            max_task_retries=config.max_retries,
        )


class Description(NamedTuple):
    """What one captioner made of one tile, and of one prompt."""

    origin: Origin
    texts: list[str] | Exception


class CaptionBatch:
    """A Ray Data actor around the captioners. Follows a batch of tiles to rows of captions."""

    def __init__(self, work: CaptionWork, given_captions: Any, failed: Mapping[tuple[str, str], str] | None = None) -> None:
        self._work = work
        self._origins = work.origins()
        self._first = _unasked_captioner(self._origins[0], work, given_captions)
        self._load_model = cache(_model_loader(work, failed or {}))
        self._asked: dict[str, StoredCaptioner] = {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        described = self._describe([row for row in rows if row["error"] is None])
        out: list[dict[str, Any]] = []
        for row in rows:
            unreadable = [Description(self._origins[-1], ValueError(f"{UNREADABLE}: {row['error']}"))]
            for origin, texts in described.get(row["tile_id"], unreadable):
                common = {"tile_id": row["tile_id"], "model": origin.model, "prompt": origin.prompt}
                for sample, text in enumerate([None] if isinstance(texts, Exception) else texts):
                    key = origin.key(row["sha256"] or row["tile_id"], sample)
                    error = _reason(texts) if isinstance(texts, Exception) else None
                    out.append(common | {"caption_key": key, "text": text, "error": error})
        return dataflow.conform({name: [row[name] for row in out] for name in CAPTIONS.names}, CAPTIONS)

    def _describe(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[Description]]:
        """Texts or errors by tile id, one description for each prompt; a model is asked what the source could not say."""
        described: dict[str, list[Description]] = {}
        if self._first is not None:
            tiles = [Tile(row["tile_id"], row["image"], self._work.pixels) for row in rows]
            for tile, texts in zip(tiles, self._first.describe(tiles), strict=True):
                described[tile.tile_id] = [Description(self._origins[0], texts)]
        if self._work.model is None:
            return described
        left = [row for row in rows if self._first is None or isinstance(described[row["tile_id"]][0].texts, Exception)]
        return described | self._ask(left)

    def _ask(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[Description]]:
        """What the model says to every prompt, tiles with one prompt together."""
        described: dict[str, list[Description]] = {row["tile_id"]: [] for row in rows}
        asked = [self._work.prompts_of(row) for row in rows]
        for number, template in enumerate(self._work.config.asked()):
            by_prompt: dict[str, list[Tile]] = {}
            for row, prompts in zip(rows, asked, strict=True):
                prompt = prompts[number]
                if isinstance(prompt, str):
                    tile = Tile(row["tile_id"], row["image"], self._work.pixels, prompt)
                    by_prompt.setdefault(prompt, []).append(tile)
                else:
                    described[row["tile_id"]].append(Description(self._work.model_origin(template), prompt))
            for prompt, tiles in by_prompt.items():
                captioner = self._captioner_of(prompt)
                for tile, texts in zip(tiles, captioner.describe(tiles), strict=True):
                    described[tile.tile_id].append(Description(captioner.origin, texts))
        return described

    def _captioner_of(self, prompt: str) -> StoredCaptioner:
        if prompt not in self._asked:
            store = CaptionStore(self._work.store_uri, self._work.model_origin(prompt))
            self._asked[prompt] = StoredCaptioner(store, self._work.config.decoding.num_samples, self._load_model)
        return self._asked[prompt]


def _unasked_captioner(origin: Origin, work: CaptionWork, given_captions: Any) -> Captioner | None:
    if origin.model == source_captions.ORIGIN.model:
        return Cleaned(source_captions.GivenCaptioner(ray.get(given_captions)))
    return land_cover.LandCoverCaptioner() if work.model is None else None


def _model_loader(work: CaptionWork, failed: Mapping[tuple[str, str], str]) -> Callable[[], Captioner]:
    """One model for all prompts, loaded at the first tile that the store does not know."""

    def load() -> Captioner:
        if work.model is None:
            raise AssertionError("a captioner without a model is asked nothing")
        if work.config.captioner == "vllm":
            return vllm_engine.FilledCaptioner(failed)
        return load_captioner(work.config, work.model)

    return load


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
    num_asked = num_tiles * (len(config.asked()) if work.model is not None else 1)
    if failed > config.max_error_share * num_asked:
        first = next(error for error in errors if not error.startswith(UNREADABLE))
        what = "readable tiles" if num_asked == num_tiles else "questions about readable tiles"
        raise CaptionError(
            f"{failed} of {num_asked} {what} could not be captioned (the first: {first}), more than "
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
