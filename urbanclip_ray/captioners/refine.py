"""captions ─refine─▶ pairs: sentences are kept or rejected, each rejection with its reason."""

from __future__ import annotations

import re
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from urbanclip_ray import dataflow
from urbanclip_ray.config import RefineConfig
from urbanclip_ray.schema import PAIRS
from urbanclip_ray.storage import Dataset, Publication, resolve

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def split_sentences(text: str) -> list[str]:
    """Sentences of a description, blanks folded; an empty text is one empty sentence, so that it is counted."""
    folded = " ".join(text.split())
    return SENTENCE_END.split(folded)


def refine_sentences(sentences: list[str], config: RefineConfig) -> tuple[list[str], list[tuple[str, str]]]:
    """Accepted sentences of one tile, in order, and the rejected ones with their reasons."""
    kept: list[str] = []
    rejected: list[tuple[str, str]] = []
    seen: set[str] = set()
    for sentence in sentences:
        words = WORD.findall(sentence)
        folded = " ".join(words).lower()
        if not words:
            rejected.append((sentence, "empty"))
        elif len(words) < config.min_words:
            rejected.append((sentence, "too short"))
        elif len(words) > config.max_words:
            rejected.append((sentence, "too long"))
        elif folded in seen and config.repeats == "reject":
            rejected.append((sentence, "repeated"))
        else:
            seen.add(folded)
            kept.append(sentence)
    return kept, rejected


def refine_captions(captions: Dataset, config: RefineConfig, publication: Publication) -> None:
    """One row per tile with a caption: its accepted sentences in order, and the rejected ones.

    All captions of a tile lie in one file of the captions (one call of a captioner wrote them), so files are refined
    independently; that no tile came out twice is checked at the end.
    """
    dataflow.connect()
    filesystem, _ = resolve(captions.uri)

    def refine_file(batch: pa.Table) -> pa.Table:
        import pyarrow.parquet as pq

        columns = ["tile_id", "text", "error"]
        return pa.concat_tables(
            _refine_table(pq.read_table(path, columns=columns, filesystem=filesystem), config)
            for path in batch["path"].to_pylist()
        )

    files = ray.data.from_arrow(pa.table({"path": captions.parquet_paths()}))
    rows = files.repartition(len(captions.parquet_paths())).map_batches(refine_file, batch_size=1, batch_format="pyarrow")
    dataflow.write(rows, publication)
    _count(publication)


def _refine_table(captions: pa.Table, config: RefineConfig) -> pa.Table:
    by_tile: dict[str, list[str]] = {}
    for row in captions.to_pylist():
        if row["error"] is None:
            by_tile.setdefault(row["tile_id"], []).extend(split_sentences(row["text"] or ""))
    refined = [refine_sentences(sentences, config) for sentences in by_tile.values()]
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
