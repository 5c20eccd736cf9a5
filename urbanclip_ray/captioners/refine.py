"""captions ─refine─▶ pairs: sentences are kept or rejected, each rejection with its reason.

Three passes, of which the first and the last are made only where they are asked for: sentences are counted over all tiles, each
is held against the rules, and what is left is scored by a model against its tile.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray

from urbanclip_ray import dataflow
from urbanclip_ray.captioners.duplicates import count_sentences, fold, frequent_keys, sentence_key
from urbanclip_ray.captioners.rules import CUT_OFF, Rules
from urbanclip_ray.captioners.sentence_checks import NOWHERE, WORD, Place, ends_whole
from urbanclip_ray.captioners.sentences import split_sentences
from urbanclip_ray.config import PixelsConfig, RefineConfig
from urbanclip_ray.geo.earth import ground_resolution_m
from urbanclip_ray.schema import PAIRS
from urbanclip_ray.storage import Dataset, Publication

TOO_FREQUENT = "in too many tiles"
CAPTION_COLUMNS = ["tile_id", "text", "error"]
PLACE_COLUMNS = ["tile_id", "region", "lon", "lat", "west", "east", "width"]


class Standard(NamedTuple):
    """What sentences are held against, beside the config."""

    rules: Rules | None = None
    frequent: frozenset[int] = frozenset()  # keys of sentences that too many tiles share


LENIENT = Standard()


def refine_sentences(
    sentences: list[str], config: RefineConfig, standard: Standard = LENIENT, place: Place = NOWHERE
) -> tuple[list[str], list[tuple[str, str]]]:
    """Accepted sentences of one tile, in order, and the rejected ones with their reasons."""
    kept: list[str] = []
    rejected: list[tuple[str, str]] = []
    seen: set[str] = set()
    cut_off = _find_cut_off(sentences) if standard.rules and CUT_OFF in standard.rules.names else None
    for at, sentence in enumerate(sentences):
        words = WORD.findall(sentence)
        folded = fold(sentence)
        reason = None
        if not words:
            reason = "empty"
        elif len(words) < config.min_words:
            reason = "too short"
        elif len(words) > config.max_words:
            reason = "too long"
        elif folded in seen and config.repeats == "reject":
            reason = "repeated"
        elif at == cut_off:
            reason = CUT_OFF
        elif standard.rules is not None:
            reason = standard.rules.reason(sentence, place)
        if reason is None and standard.frequent and sentence_key(folded) in standard.frequent:
            reason = TOO_FREQUENT
        if reason is None:
            seen.add(folded)
            kept.append(sentence)
        else:
            rejected.append((sentence, reason))
    return kept, rejected


def _find_cut_off(sentences: list[str]) -> int | None:
    """The last sentence where it alone has no closing mark: captions without any are of somebody who writes none."""
    whole = [ends_whole(sentence) for sentence in sentences]
    return len(whole) - 1 if whole and not whole[-1] and any(whole) else None


class RefineWork(NamedTuple):
    """What captions are refined with, beside the config."""

    tiles: Dataset | None = None  # where RefineConfig.needs_tiles
    rules: Rules | None = None
    weights_uri: str = ""  # of the model that scores
    pixels: PixelsConfig = PixelsConfig()


CONFIG_ALONE = RefineWork()


def refine_captions(captions: Dataset, config: RefineConfig, publication: Publication, work: RefineWork = CONFIG_ALONE) -> None:
    """One row per tile with a caption: its accepted sentences in order, and the rejected ones.

    All captions of a tile lie in one file of the captions (one call of a captioner wrote them), so files are refined
    independently; that no tile came out twice is checked at the end.
    """
    dataflow.connect()
    frequent = _find_frequent(captions, config) if config.max_tiles_per_sentence else frozenset()
    places = ray.put(work.tiles.read(PLACE_COLUMNS) if work.tiles is not None else None)
    standard = Standard(work.rules, frequent)

    def refine_table(table: pa.Table) -> pa.Table:
        by_tile = _by_tile(table)
        return _refined(by_tile, _find_places(ray.get(places), list(by_tile)), config, standard)

    rows = dataflow.map_files(captions, CAPTION_COLUMNS, refine_table, rows_per_batch=None)
    if config.consistency.weights and work.tiles is not None:
        from urbanclip_ray.captioners.consistency import reject_inconsistent

        rows, publication.facts["consistency"] = reject_inconsistent(
            rows, work.tiles, work.weights_uri, config.consistency, work.pixels
        )
    dataflow.write(rows, publication)
    _count(publication)
    if frequent:
        publication.facts["sentences_in_too_many_tiles"] = len(frequent)


def _find_frequent(captions: Dataset, config: RefineConfig) -> frozenset[int]:
    similarity = config.near_duplicates

    def count(table: pa.Table) -> pa.Table:
        return count_sentences(_by_tile(table).values(), with_signatures=similarity > 0)

    counts = dataflow.collect(dataflow.map_files(captions, CAPTION_COLUMNS, count, rows_per_batch=None))
    return frozenset(frequent_keys(counts, config.max_tiles_per_sentence, similarity).to_pylist()) if counts else frozenset()


def _by_tile(captions: pa.Table) -> dict[str, list[str]]:
    by_tile: dict[str, list[str]] = {}
    for row in captions.to_pylist():
        if row["error"] is None:
            by_tile.setdefault(row["tile_id"], []).extend(split_sentences(row["text"] or ""))
    return by_tile


def _find_places(tiles: pa.Table | None, tile_ids: list[str]) -> dict[str, Place]:
    """What is known of each of these tiles."""
    if tiles is None:
        return {}
    chosen = tiles.filter(pc.is_in(tiles["tile_id"], value_set=pa.array(tile_ids, pa.string())))
    return {row["tile_id"]: place_of(row) for row in chosen.to_pylist()}


def place_of(tile: dict[str, Any]) -> Place:
    """A tile's place from `PLACE_COLUMNS`; its scale from its footprint, where that is known."""
    lon, lat, west, east, width = (tile[name] for name in PLACE_COLUMNS[2:])
    if None in (lat, west, east) or not width:
        return Place(tile["region"], lon, lat)
    m_per_px = ground_resolution_m(lat, west, east, width)
    return Place(tile["region"], lon, lat, m_per_px, m_per_px * width)


def _refined(by_tile: dict[str, list[str]], places: dict[str, Place], config: RefineConfig, standard: Standard) -> pa.Table:
    refined = [
        refine_sentences(sentences, config, standard, places.get(tile_id, NOWHERE)) for tile_id, sentences in by_tile.items()
    ]
    columns = {
        "tile_id": list(by_tile),
        "texts": [kept for kept, _ in refined],
        "rejected": [[{"text": text, "reason": reason} for text, reason in rejected] for _, rejected in refined],
    }
    return dataflow.conform(columns, PAIRS)


def _count(publication: Publication) -> None:
    tile_ids = publication.read(["tile_id"])["tile_id"]
    if pc.count_distinct(tile_ids).as_py() != len(tile_ids):
        raise AssertionError(f"{publication.uri}: captions of one tile were spread over several files")
    num_kept = num_silent = 0
    reasons: Counter[str] = Counter()
    for batch in publication.read_batches(["texts", "rejected"]):  # sentences are too many to be held at once
        lengths = pc.list_value_length(batch["texts"])
        num_kept += pc.sum(lengths).as_py() or 0
        num_silent += pc.sum(pc.equal(lengths, 0)).as_py() or 0
        reasons.update(pc.struct_field(pc.list_flatten(batch["rejected"]), "reason").to_pylist())
    publication.count(unit="sentences", rows_in=num_kept + sum(reasons.values()), rows_out=num_kept, rejects=dict(reasons))
    publication.facts["tiles"] = len(tile_ids)
    publication.facts["tiles_without_text"] = num_silent
