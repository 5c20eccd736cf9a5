"""tiles ─caption─▶ captions: Ray Data actors hold one captioner each and describe batches of tiles."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from urbanclip_ray import dataflow
from urbanclip_ray.captioners.base import Captioner, Tile
from urbanclip_ray.captioners.given import GivenCaptioner
from urbanclip_ray.captioners.land_cover import LandCoverCaptioner
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.schema import CAPTIONS, caption_key
from urbanclip_ray.storage import Dataset, Publication

UNREADABLE = "unreadable tile"


class CaptionError(UserError, RuntimeError):
    """Too many tiles could not be captioned."""


def caption_tiles(
    tiles: Dataset, config: CaptionConfig, pixels: PixelsConfig, given: pa.Table | None, publication: Publication
) -> None:
    """One row per generated description; a tile without one is a row with its `error`.

    `given` is the source's own captions (tile_id, text), needed by the captioner of that name.
    """
    if config.captioner == "given" and (given is None or given.num_rows == 0):
        raise ConfigError("caption.captioner=given, but the source brings no captions: use caption.captioner=land_cover")
    dataflow.connect()
    rows = dataflow.read(tiles, ["tile_id", "image", "sha256", "error"]).map_batches(
        CaptionBatch,
        fn_constructor_kwargs={"config": config, "pixels": pixels, "given": ray.put(given)},
        batch_size=config.tiles_per_batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.num_actors),
    )
    dataflow.write(rows, publication)
    _count(publication, tiles, config, given)


class CaptionBatch:
    """A Ray Data actor around one captioner. Follows a batch of tiles to rows of captions."""

    def __init__(self, config: CaptionConfig, pixels: PixelsConfig, given: Any) -> None:
        self._pixels = pixels
        self._captioner: Captioner = GivenCaptioner(ray.get(given)) if config.captioner == "given" else LandCoverCaptioner()

    def __call__(self, batch: pa.Table) -> pa.Table:
        captioner = self._captioner
        rows = batch.to_pylist()
        readable = [row for row in rows if row["error"] is None]
        described = dict(
            zip(
                (row["tile_id"] for row in readable),
                captioner.describe([Tile(row["tile_id"], row["image"], self._pixels) for row in readable]),
                strict=True,
            )
        )
        out: list[dict[str, Any]] = []
        for row in rows:
            texts = described.get(row["tile_id"], ValueError(f"{UNREADABLE}: {row['error']}"))
            common = {"tile_id": row["tile_id"], "model": captioner.model, "prompt": captioner.prompt}
            for sample, text in enumerate([None] if isinstance(texts, Exception) else texts):
                key = caption_key(
                    row["sha256"] or row["tile_id"],
                    captioner.model,
                    captioner.revision,
                    captioner.prompt,
                    captioner.decoding,
                    sample,
                )
                error = str(texts) if isinstance(texts, Exception) else None
                out.append(common | {"caption_key": key, "text": text, "error": error})
        return dataflow.conform({name: [row[name] for row in out] for name in CAPTIONS.names}, CAPTIONS)


def _count(publication: Publication, tiles: Dataset, config: CaptionConfig, given: pa.Table | None) -> None:
    written = publication.read(["tile_id", "error"])
    errors = [error for error in written["error"].to_pylist() if error is not None]
    rejects = Counter(error.split(":")[0] for error in errors)
    if config.captioner == "given" and given is not None:
        unknown = given.filter(pc.invert(pc.is_in(given["tile_id"], value_set=written["tile_id"])))
        if unknown.num_rows:
            rejects["caption of an unknown tile"] = unknown.num_rows
            publication.facts["unknown_tiles"] = pc.unique(unknown["tile_id"]).to_pylist()[:20]
    rows_out = written.num_rows - len(errors)
    publication.count(unit="captions", rows_in=rows_out + sum(rejects.values()), rows_out=rows_out, rejects=dict(rejects))
    failed = sum(1 for error in errors if not error.startswith(UNREADABLE))
    num_tiles = max(1, tiles.manifest.rows_out)
    if failed > config.max_error_share * num_tiles:
        first = next(error for error in errors if not error.startswith(UNREADABLE))
        raise CaptionError(
            f"{failed} of {num_tiles} readable tiles could not be captioned (the first: {first}), more than "
            f"caption.max_error_share={config.max_error_share}: mend the captions, or raise that share to go on"
        )
