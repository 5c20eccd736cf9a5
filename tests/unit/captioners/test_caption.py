"""The caption stage on a real Ray: every readable tile is described, every other one says why not."""

from __future__ import annotations

import hashlib
import os

import pyarrow as pa
import pytest
from images import noise_png

from urbanclip_ray.captioners import caption as caption_module
from urbanclip_ray.captioners.caption import CaptionError, CaptionWork, caption_tiles
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig
from urbanclip_ray.schema import CAPTIONS, TILES
from urbanclip_ray.storage import MissingDatasetError, open_dataset, publish

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_TILES = 7
BROKEN = 3  # this one cannot be read


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("tiles")
    rows = []
    for index in range(NUM_TILES):
        is_broken = index == BROKEN
        image = b"" if is_broken else noise_png(index)
        sha256 = None if is_broken else hashlib.sha256(image).hexdigest()
        row = {"tile_id": f"r/{index}", "region": "r", "scheme": "none", "image": image, "sha256": sha256}
        rows.append(row | {"error": "zero bytes" if is_broken else None})
    table = pa.Table.from_pylist(rows, schema=TILES)
    with publish(str(tmp_path / "tiles"), "tiles", {}, {}) as publication:
        publication.write_table(table.slice(0, 4), "part-0.parquet")
        publication.write_table(table.slice(4), "part-1.parquet")
        publication.count(unit="tiles", rows_in=NUM_TILES, rows_out=NUM_TILES - 1, rejects={"zero bytes": 1})
    return open_dataset(str(tmp_path / "tiles"))


def caption(tiles, uri, config, given=None):
    with publish(str(uri), "captions", config.content(), {"tiles": tiles}) as publication:
        caption_tiles(CaptionWork(tiles, config, PixelsConfig(), given), publication)
    return open_dataset(str(uri))


def given_captions(*tile_ids):
    return pa.table({"tile_id": list(tile_ids), "text": [f"Caption {n} of it." for n in range(len(tile_ids))]})


@pytest.fixture(scope="module")
def described(tiles, tmp_path_factory):
    return caption(tiles, tmp_path_factory.mktemp("described") / "c", CaptionConfig(tiles_per_batch=2))


def test_every_tile_is_a_row_and_the_unreadable_one_says_why(described):
    table = described.read()
    assert table.schema.equals(CAPTIONS)
    rows = {row["tile_id"]: row for row in table.to_pylist()}
    assert list(rows) == [f"r/{index}" for index in range(NUM_TILES)]  # in the order of the tiles
    broken = rows.pop(f"r/{BROKEN}")
    assert (broken["text"], broken["error"]) == (None, "unreadable tile: zero bytes")
    assert all(row["text"].endswith(".") and row["error"] is None for row in rows.values())
    assert all("baseline" in row["model"] for row in rows.values())
    manifest = described.manifest
    assert (manifest.unit, manifest.rows_in, manifest.rows_out) == ("captions", NUM_TILES, NUM_TILES - 1)
    assert manifest.rejects == {"unreadable tile": 1}


def test_rows_and_keys_do_not_depend_on_batching(tiles, described, tmp_path):
    again = caption(tiles, tmp_path / "c", CaptionConfig(tiles_per_batch=64, num_actors=1)).read()
    assert again.equals(described.read())
    assert len(set(again["caption_key"].to_pylist())) == NUM_TILES


def test_a_margin_cut_off_makes_other_keys(tiles, described):
    config = CaptionConfig()
    uncut = CaptionWork(tiles, config, PixelsConfig()).origins()[-1]
    cut = CaptionWork(tiles, config, PixelsConfig(crop_bottom_px=2)).origins()[-1]
    assert described.read()["caption_key"][0].as_py() == uncut.key(hashlib.sha256(noise_png(0)).hexdigest(), 0)
    assert cut.key("ab", 0) != uncut.key("ab", 0)


def test_given_captions_keep_their_order_and_those_of_unknown_tiles_are_counted(tiles, described, tmp_path):
    known = [f"r/{index}" for index in range(NUM_TILES) if index != BROKEN]
    given = given_captions(*known, "q/9", "r/0", "r/1", "q/9", "r/0")
    dataset = caption(tiles, tmp_path / "c", CaptionConfig(captioner="given", tiles_per_batch=2), given)
    rows = dataset.read().to_pylist()
    assert [row["text"] for row in rows if row["tile_id"] == "r/0"] == [f"Caption {n} of it." for n in (0, 7, 10)]
    keys = {row["caption_key"] for row in rows}
    assert len(keys) == len(rows)  # several captions of one tile have keys of their own
    assert not keys & set(described.read()["caption_key"].to_pylist())  # and another captioner others
    manifest = dataset.manifest
    assert manifest.rejects == {"caption of an unknown tile": 2, "unreadable tile": 1}
    assert manifest.rows_out == len(known) + 3
    assert manifest.rows_in == manifest.rows_out + 3
    assert manifest.facts["unknown_tiles"] == ["q/9"]


def test_too_many_tiles_without_caption_stop_the_stage_and_leave_nothing(tiles, tmp_path):
    given = given_captions("r/0", "r/1", "r/2", "r/4")  # two of six readable tiles have none
    with pytest.raises(CaptionError) as caught:
        caption(tiles, tmp_path / "c", CaptionConfig(captioner="given", max_error_share=0.3), given)
    message = str(caught.value)
    assert "2 of 6 readable tiles could not be captioned (the first: the source gives no caption)" in message
    assert "caption.max_error_share=0.3" in message
    with pytest.raises(MissingDatasetError):
        open_dataset(str(tmp_path / "c"))
    dataset = caption(tiles, tmp_path / "c", CaptionConfig(captioner="given", max_error_share=0.34), given)
    assert dataset.manifest.rejects == {"the source gives no caption": 2, "unreadable tile": 1}


def test_a_captioner_whose_process_keeps_dying_stops_the_stage(tiles, tmp_path, monkeypatch):
    lives = tmp_path / "lives"

    class Dying(caption_module.CaptionBatch):
        def __call__(self, batch):
            with lives.open("a") as file:
                file.write("x")
            os._exit(1)

    monkeypatch.setattr(caption_module, "CaptionBatch", Dying)
    config = CaptionConfig(num_actors=1, max_attempts=2)
    with pytest.raises(CaptionError, match=r"process died, caption\.max_attempts=2 times.*run the same command again"):
        caption(tiles, tmp_path / "c", config)
    assert len(lives.read_text()) <= 4  # two files, each tried twice: not for ever
    with pytest.raises(MissingDatasetError):
        open_dataset(str(tmp_path / "c"))


@pytest.mark.parametrize("given", [None, given_captions()])
def test_a_source_without_captions_cannot_give_them(tiles, tmp_path, given):
    with pytest.raises(ConfigError, match=r"use caption\.captioner=land_cover"):
        caption(tiles, tmp_path / "c", CaptionConfig(captioner="given"), given)
