"""What refinement did to captions: counts by rule and city, lengths, repeats and examples, as one page, JSON and CSV.

Sentences are hostile input: the page escapes them, shows no control or direction marks, and cuts long ones.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from urbanclip_ray.captioners.duplicates import fold
from urbanclip_ray.evaluate.page import Json, as_csv, render_page
from urbanclip_ray.storage import Dataset, join, write_bytes

FOLDER = "caption_quality"
NUM_EXAMPLES = 8  # of every reason
NUM_REPEATED = 20
SAMPLE_SEED = 0
MAX_SHOWN_CHARACTERS = 300
WORDS_PER_BAR = 5
MAX_BAR_WORDS = 60
KEPT = "kept"


def write_quality(pairs: Dataset, tiles: Dataset, run_uri: str) -> str:
    """Write `quality.html`, `quality.json` and `reasons.csv` below `<run>/caption_quality`; returns the page's URI."""
    ids = tiles.read(["tile_id", "region"])
    regions = dict(zip(ids["tile_id"].to_pylist(), ids["region"].to_pylist(), strict=True))
    record = measure_quality(pairs.read(["tile_id", "texts", "rejected"]), regions)
    record["pairs"] = {"uri": pairs.uri, "sha256": pairs.sha256, "config": pairs.manifest.config}
    record["consistency"] = pairs.manifest.facts.get("consistency")
    folder = join(run_uri, FOLDER)
    write_bytes(join(folder, "quality.json"), json.dumps(record, indent=1).encode())
    write_bytes(join(folder, "reasons.csv"), as_csv([_flat(row) for row in record["reasons"]]))
    page = join(folder, "quality.html")
    write_bytes(page, render_quality(record).encode())
    return page


def measure_quality(pairs: pa.Table, regions: dict[str, str]) -> Json:
    """Figures and examples of a table of pairs (tile_id, texts, rejected) whose tiles lie in these regions."""
    by_reason: dict[str, Counter[str]] = {}
    examples: dict[str, list[str]] = {}
    lengths = {"before": Counter[int](), KEPT: Counter[int]()}
    tiles_of, was_kept = Counter[str](), set[str]()
    words = {"before": Counter[str](), KEPT: Counter[str]()}
    folds = {"before": set[str](), KEPT: set[str]()}
    generator = random.Random(SAMPLE_SEED)  # noqa: S311 a sample, no secret
    for row in sorted(pairs.to_pylist(), key=lambda row: str(row["tile_id"])):
        region = regions.get(row["tile_id"], "")
        judged = [(text, KEPT) for text in row["texts"]] + [(item["text"], item["reason"]) for item in row["rejected"]]
        for text, reason in judged:
            by_reason.setdefault(reason, Counter())[region] += 1
            _draw(examples.setdefault(reason, []), text, by_reason[reason].total(), generator)
            folded = fold(text)
            for when in ("before", KEPT) if reason == KEPT else ("before",):
                lengths[when][len(folded.split())] += 1
                words[when].update(folded.split())
                folds[when].add(folded)
        tiles_of.update({fold(text) for text, _ in judged})
        was_kept.update(fold(text) for text in row["texts"])
    num_tiles = max(1, pairs.num_rows)
    return {
        "num_tiles": pairs.num_rows,
        "regions": sorted({regions.get(tile_id, "") for tile_id in pairs["tile_id"].to_pylist()}),
        "reasons": _reasons(by_reason),
        "before_after": [_summary(when, lengths[when], words[when], len(folds[when]), num_tiles) for when in ("before", KEPT)],
        "lengths": _bars(lengths),
        "repeated": [
            {"sentence": _shown(text), "num_tiles": count, "kept": text in was_kept}
            for text, count in sorted(tiles_of.items(), key=lambda item: (-item[1], item[0]))[:NUM_REPEATED]
            if count > 1
        ],
        "examples": {reason: [_shown(text) for text in found] for reason, found in sorted(examples.items())},
    }


def render_quality(record: Json) -> str:
    """The page of a record that :func:`write_quality` made."""
    return render_page("caption_quality.html", record=record, kept=KEPT)


def _draw(found: list[str], text: str, count: int, generator: random.Random) -> None:
    """Keep `text`, the count-th of its reason, in a sample of equal chances."""
    if len(found) < NUM_EXAMPLES:
        found.append(text)
    elif (at := generator.randrange(count)) < NUM_EXAMPLES:
        found[at] = text


def _reasons(by_reason: dict[str, Counter[str]]) -> list[Json]:
    total = sum(counts.total() for counts in by_reason.values())
    rows = [
        {
            "reason": reason,
            "sentences": counts.total(),
            "share": counts.total() / total,
            "by_region": dict(sorted(counts.items())),
        }
        for reason, counts in by_reason.items()
    ]
    return sorted(rows, key=lambda row: (row["reason"] != KEPT, -row["sentences"], row["reason"]))


def _flat(row: Json) -> Json:
    return {name: row[name] for name in ("reason", "sentences", "share")} | row["by_region"]


def _summary(when: str, lengths: Counter[int], words: Counter[str], num_distinct: int, num_tiles: int) -> Json:
    num_sentences, num_words = lengths.total(), words.total()
    return {
        "when": when,
        "sentences": num_sentences,
        "sentences_per_tile": num_sentences / num_tiles,
        "words_per_sentence": num_words / max(1, num_sentences),
        "distinct_share": num_distinct / max(1, num_sentences),
        "different_words": len(words),
    }


def _bars(lengths: dict[str, Counter[int]]) -> list[Json]:
    """Sentences by their number of words, before and kept; the last bar holds all longer ones."""
    bars: dict[int, dict[str, int]] = {}
    for when, counts in lengths.items():
        for length, count in counts.items():
            least = min(length, MAX_BAR_WORDS) // WORDS_PER_BAR * WORDS_PER_BAR
            bars.setdefault(least, dict.fromkeys(lengths, 0))[when] += count
    last = f"{MAX_BAR_WORDS} or more"
    named = [
        (last if least == MAX_BAR_WORDS else f"{least} to {least + WORDS_PER_BAR - 1}", bars[least]) for least in sorted(bars)
    ]
    return [{"words": name, **bar} for name, bar in named]


def _shown(text: str) -> str:
    """A sentence without marks that cannot be seen, which may turn the text around them, and not too long."""
    cut = text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}… ({len(text):,} characters)"
    return "".join(_visible(cut)) or "(an empty text)"


def _visible(text: str) -> Iterable[str]:
    return (mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in text)


def show_quality(run: Any) -> None:
    """Print where the page of a run was written whose pairs are made (`stages.Run`)."""
    print(f"quality: {write_quality(run.datasets['pairs'], run.datasets['tiles'], run.uri)}")
