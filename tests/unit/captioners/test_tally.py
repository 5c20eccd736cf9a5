"""When a captioning job has gone wrong, and what is said then."""

from __future__ import annotations

import pyarrow as pa
import pytest

from urbanclip_ray.captioners import tally as tally_module
from urbanclip_ray.captioners.tally import CaptionError, Tally, summarise
from urbanclip_ray.schema import CAPTIONS


def rows(first: int, *errors: str | None) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"tile_id": f"r/{number}", "caption_key": "k", "text": None if error else "A road.", "model": "m", "prompt": ""}
            | {"error": error}
            for number, error in enumerate(errors, first)
        ],
        schema=CAPTIONS,
    )


def test_failures_within_the_share_are_counted_by_tile():
    tally = Tally(num_tiles=10, num_stored=4, max_error_share=0.2, kept_in="store")
    tally.add(rows(0, None, "too long: 9"))
    tally.add(rows(2, "no memory"))
    assert tally.errors == {("r/1", ""): "too long: 9", ("r/2", ""): "no memory"}


def test_a_tile_that_is_asked_two_prompts_counts_twice():
    tally = Tally(num_tiles=10, num_stored=0, max_error_share=0.1, kept_in="store", unit="questions about tiles")
    one = rows(0, "no", None)
    other = one.set_column(4, one.schema.field("prompt"), pa.array(["roads?"] * 2))
    with pytest.raises(CaptionError, match="stopped after 4 of 10 questions about tiles: 2 of them"):
        tally.add(pa.concat_tables([one, other]))
    assert set(tally.errors) == {("r/0", ""), ("r/0", "roads?")}


def test_more_failures_than_all_tiles_may_have_stop_the_job_at_once_with_a_summary():
    tally = Tally(num_tiles=10, num_stored=0, max_error_share=0.1, kept_in="s3://b/store")
    with pytest.raises(CaptionError) as caught:
        tally.add(rows(0, "no memory: 3 GB", None, "too long", "no memory: 4 GB"))
    message = str(caught.value)
    assert "stopped after 4 of 10 tiles: 3 of them could not be captioned, more than caption.max_error_share=0.1" in message
    assert "2 × 'no memory' (as r/0: no memory: 3 GB); 1 × 'too long' (as r/2: too long)" in message
    assert "what is described is kept in s3://b/store" in message


def test_of_many_tiles_the_share_so_far_counts_once_enough_are_tried():
    tally = Tally(num_tiles=100_000, num_stored=0, max_error_share=0.05, kept_in="store")
    tally.add(rows(0, *["no"] * 30, *[None] * 100))  # 23%, but of few
    with pytest.raises(CaptionError, match="stopped after 260 of 100,000 tiles: 30 of them"):
        tally.add(rows(200, *[None] * 130))


def test_tiles_that_are_stored_are_tiles_that_went_well():
    tally = Tally(num_tiles=1000, num_stored=900, max_error_share=0.05, kept_in="store")
    tally.add(rows(0, *["no"] * 40))
    assert len(tally.errors) == 40


def test_a_captioner_that_cannot_be_used_stops_the_job_whatever_share_is_allowed():
    tally = Tally(num_tiles=1000, num_stored=0, max_error_share=1.0, kept_in="store")
    with pytest.raises(CaptionError, match=r"^caption\.model=x cannot be loaded$"):
        tally.add(rows(0, "unusable captioner: caption.model=x cannot be loaded"))


def test_a_summary_names_a_few_reasons_and_counts_the_rest():
    text = summarise({(f"r/{number}", ""): f"reason {number}" for number in range(7)})
    assert text.count("1 × 'reason") == 5
    assert text.endswith("; 2 more")


def test_progress_is_said_once_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(tally_module, "REPORT_EVERY_S", 0.0)
    tally = Tally(num_tiles=10, num_stored=4, max_error_share=1.0, kept_in="store")
    tally.add(rows(0, None, "no"))
    tally.report()
    said = capsys.readouterr().out
    assert said.startswith("captions: 6 of 10 tiles, 1 failed, ")
    assert "h left" in said
    monkeypatch.setattr(tally_module, "REPORT_EVERY_S", 60.0)
    tally.report()
    assert capsys.readouterr().out == ""
