"""The page on refinement counts every sentence, and shows hostile ones as text."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from urbanclip_ray.evaluate.caption_quality import (
    MAX_SHOWN_CHARACTERS,
    NUM_EXAMPLES,
    measure_quality,
    render_quality,
    write_quality,
)
from urbanclip_ray.schema import PAIRS, TILES
from urbanclip_ray.storage import open_dataset, publish

HOSTILE = [
    "<script>alert(1)</script> & <img src=x>",
    "a\x00b \x1b[31m",
    "x" * 100_000,
    "left \u202e right \u2066",
    "=1+1",
    "日本 городской",
]
ROWS = [
    {"tile_id": "b/1", "texts": ["A wide river.", "Many trees."], "rejected": [{"text": "Two cars.", "reason": "too small"}]},
    {"tile_id": "a/1", "texts": ["A wide river."], "rejected": [{"text": text, "reason": "strange"} for text in HOSTILE]},
    {"tile_id": "a/2", "texts": [], "rejected": [{"text": "", "reason": "empty"}]},
]
REGIONS = {"b/1": "b", "a/1": "a<b>", "a/2": "a<b>"}


@pytest.fixture
def record():
    return measure_quality(pa.Table.from_pylist(ROWS, schema=PAIRS), REGIONS)


def page_of(record):
    return render_quality(record | {"pairs": {"uri": "u", "sha256": "s"}, "consistency": None})


def test_every_sentence_is_counted_by_reason_and_region(record):
    rows = {row["reason"]: row for row in record["reasons"]}
    assert list(rows) == ["kept", "strange", "empty", "too small"]
    assert rows["kept"]["by_region"] == {"a<b>": 1, "b": 2}
    assert rows["strange"]["sentences"] == len(HOSTILE)
    assert sum(row["share"] for row in record["reasons"]) == pytest.approx(1)
    before, kept = record["before_after"]
    assert (before["sentences"], kept["sentences"]) == (11, 3)
    assert kept["sentences_per_tile"] == 1
    assert kept["distinct_share"] == pytest.approx(2 / 3)
    assert sum(bar["before"] for bar in record["lengths"]) == 11
    assert sum(bar["kept"] for bar in record["lengths"]) == 3
    assert record["repeated"] == [{"sentence": "a wide river", "num_tiles": 2, "kept": True}]


def test_hostile_sentences_are_text_on_the_page(record):
    page = page_of(record)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a&lt;b&gt;" in page
    assert "Content-Security-Policy" in page
    for mark in ("\x00", "\x1b", "\u202e", "\u2066"):
        assert mark not in page
    assert "x" * (MAX_SHOWN_CHARACTERS + 1) not in page
    assert "(100,000 characters)" in page
    assert "日本 городской" in page
    assert "(an empty text)" in page


def test_examples_are_few_and_the_same_ones_every_time():
    rows = [{"tile_id": f"r/{at}", "texts": [f"Sentence number {at}."], "rejected": []} for at in range(500)]
    tables = [pa.Table.from_pylist(order, schema=PAIRS) for order in (rows, rows[::-1])]
    first, second = (measure_quality(table, {})["examples"]["kept"] for table in tables)
    assert first == second
    assert len(first) == NUM_EXAMPLES
    assert any(int(text.split()[-1][:-1]) > 100 for text in first)


def test_a_dataset_without_a_sentence_has_a_page():
    record = measure_quality(PAIRS.empty_table(), {})
    assert "0 tiles with a caption" in page_of(record)


def test_page_json_and_csv_are_written_beside_the_run_s_datasets(tmp_path):
    with publish(str(tmp_path / "tiles"), "tiles", {}, {}) as publication:
        tiles = [{"tile_id": tile_id, "region": region, "scheme": "none"} for tile_id, region in REGIONS.items()]
        publication.write_table(pa.Table.from_pylist(tiles, schema=TILES))
    with publish(str(tmp_path / "pairs"), "pairs", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(ROWS, schema=PAIRS))
    page = write_quality(open_dataset(str(tmp_path / "pairs")), open_dataset(str(tmp_path / "tiles")), str(tmp_path / "run"))
    folder = tmp_path / "run" / "caption_quality"
    assert page == str(folder / "quality.html")
    assert json.loads((folder / "quality.json").read_text())["num_tiles"] == 3
    assert (folder / "reasons.csv").read_text().splitlines()[0] == "reason,sentences,share,a<b>,b"
