"""Tiles that end their captioner's process, on a real Ray: the job goes on, and each culprit is a row with its error."""

from __future__ import annotations

import hashlib
import os

import pyarrow as pa
import pytest

from urbanclip_ray.captioners import caption as caption_module
from urbanclip_ray.captioners.base import UnusableCaptionerError
from urbanclip_ray.captioners.caption import CaptionError, CaptionWork, caption_tiles
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.config import CaptionConfig, PixelsConfig
from urbanclip_ray.schema import TILES
from urbanclip_ray.storage import MissingDatasetError, open_dataset, publish

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_TILES, TILES_PER_BATCH, CULPRIT = 12, 4, 6
MODEL = ModelReference("model", "1", "model", False)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("tiles") / "tiles")
    rows = []
    for number in range(NUM_TILES):
        image = f"tile {number}".encode()  # nobody looks at it
        row = {"tile_id": f"r/{number}", "region": "r", "scheme": "none", "image": image}
        rows.append(row | {"sha256": hashlib.sha256(image).hexdigest()})
    with publish(uri, "tiles", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=TILES))
        publication.count(unit="tiles", rows_in=NUM_TILES, rows_out=NUM_TILES, rejects={})
    return open_dataset(uri)


def make_work(tiles, storage, **keys) -> CaptionWork:
    keys = {"tiles_per_batch": TILES_PER_BATCH, "num_actors": 1, "max_attempts": 2, "max_error_share": 0.2} | keys
    config = CaptionConfig(captioner="transformers", model="model", **keys)
    return CaptionWork(tiles, config, PixelsConfig(), None, MODEL, str(storage / "caption_store"))


def caption(work, uri):
    with publish(str(uri), "captions", {}, {"tiles": work.tiles}) as publication:
        caption_tiles(work, publication)
    return open_dataset(str(uri))


def describe_with(monkeypatch, load) -> None:
    """Put a captioner in the place of the model."""

    class Batch(caption_module.CaptionBatch):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            self._asked.captioner._load = load

    monkeypatch.setattr(caption_module, "CaptionBatch", Batch)


def saying(said, culprit: str):
    """A captioner that notes what it says and whose process ends at one tile."""

    class Saying:
        def describe(self, tiles):
            if any(tile.tile_id == culprit for tile in tiles):
                os._exit(1)
            with said.open("a") as file:
                file.write("".join(f"{tile.tile_id}\n" for tile in tiles))
            return [[f"This is {tile.tile_id}."] for tile in tiles]

    return Saying


def test_one_tile_that_kills_its_process_is_a_row_and_all_others_are_described_once(tiles, tmp_path, monkeypatch):
    said = tmp_path / "said"
    describe_with(monkeypatch, saying(said, f"r/{CULPRIT}"))
    work = make_work(tiles, tmp_path)
    dataset = caption(work, tmp_path / "captions")
    rows = dataset.read().to_pylist()
    assert [row["tile_id"] for row in rows] == [f"r/{number}" for number in range(NUM_TILES)]
    bad = rows.pop(CULPRIT)
    assert (bad["text"], bad["error"]) == (None, "the captioner's process died on it 2 times")
    assert all(row["text"] == f"This is {row['tile_id']}." for row in rows)
    assert sorted(said.read_text().split()) == sorted(row["tile_id"] for row in rows)
    assert dataset.manifest.rejects == {"the captioner's process died on it 2 times": 1}
    assert not list((tmp_path / "caption_store").glob("*/attempts/*"))

    describe_with(monkeypatch, saying(said, "none"))  # the next run asks for that tile alone
    again = caption(work, tmp_path / "again")
    assert again.manifest.facts["captions"] == {"given": 0, "from_store": NUM_TILES - 1, "generated": 1}
    assert said.read_text().split()[-1] == f"r/{CULPRIT}"
    assert len(said.read_text().split()) == NUM_TILES


@pytest.mark.slow
def test_several_prompts_load_a_model_once_in_an_actor_and_a_tile_may_fail_at_one_of_them(tiles, tmp_path, monkeypatch):
    loads, culprit = tmp_path / "loads", f"r/{CULPRIT}"

    class Asked:
        def __init__(self):
            with loads.open("a") as file:
                file.write(f"{os.getpid()}\n")

        def describe(self, tiles):
            if any((tile.tile_id, tile.prompt) == (culprit, "Roads?") for tile in tiles):
                os._exit(1)
            return [[f"{tile.tile_id}: {tile.prompt}"] for tile in tiles]

    describe_with(monkeypatch, Asked)
    keys = {"prompts": ("roads", "trees"), "templates": {"roads": "Roads?", "trees": "Trees in {city}?"}}
    work = make_work(tiles, tmp_path, **keys)
    dataset = caption(work, tmp_path / "captions")
    rows = dataset.read().to_pylist()
    assert [(row["tile_id"], row["prompt"]) for row in rows] == [
        (f"r/{number}", prompt) for number in range(NUM_TILES) for prompt in ("Roads?", "Trees in r?")
    ]
    bad = rows.pop(2 * CULPRIT)
    assert (bad["text"], bad["error"]) == (None, "the captioner's process died on it 2 times")
    assert all(row["text"] == f"{row['tile_id']}: {row['prompt']}" for row in rows)
    pids = loads.read_text().split()
    assert len(pids) == len(set(pids)) == 5  # and a process died four times: on groups of 4 and 2, and twice on the tile alone
    assert not list((tmp_path / "caption_store").glob("*/attempts/*"))

    wider = make_work(tiles, tmp_path, prompts=("trees", "more", "roads"), templates=keys["templates"] | {"more": "More?"})
    again = caption(wider, tmp_path / "again")
    # the tile dies at one prompt once more, and nothing that is stored is asked again
    assert again.manifest.facts["captions"] == {"given": 0, "from_store": 2 * NUM_TILES - 1, "generated": NUM_TILES}


def test_prompts_that_cannot_be_filled_are_rows_or_stop_the_job_before_anything_is_generated(tiles, tmp_path, monkeypatch):
    said = tmp_path / "said"
    describe_with(monkeypatch, saying(said, "none"))
    keys = {"prompts": ("size", "roads"), "templates": {"size": "Is it {width_m} m?", "roads": "Roads?"}}
    with pytest.raises(CaptionError, match=r"12 of 24 questions about tiles cannot be asked.*\{width_m\}, which is not known"):
        caption(make_work(tiles, tmp_path, **keys), tmp_path / "captions")
    assert not said.exists()
    dataset = caption(make_work(tiles, tmp_path, max_error_share=0.5, **keys), tmp_path / "captions")
    first, second = dataset.read().to_pylist()[:2]
    assert (first["prompt"], first["text"]) == ("Is it {width_m} m?", None)
    assert first["error"].startswith("the prompt needs {width_m}")
    assert (second["prompt"], second["text"]) == ("Roads?", "This is r/0.")
    assert list(dataset.manifest.rejects.values()) == [NUM_TILES]


def test_a_captioner_that_fails_at_everything_stops_the_job_before_all_is_tried_and_keeps_what_there_is(
    tiles, tmp_path, monkeypatch
):
    said = tmp_path / "said"

    class Failing:
        def describe(self, tiles):
            with said.open("a") as file:
                file.write("".join(f"{tile.tile_id}\n" for tile in tiles))
            return [[f"This is {tile.tile_id}."] if tile.tile_id == "r/0" else ValueError("too long") for tile in tiles]

    describe_with(monkeypatch, Failing)
    work = make_work(tiles, tmp_path, tiles_per_batch=1)
    with pytest.raises(CaptionError, match=r"stopped after 4 of 12 tiles: 3 .*3 × 'too long' \(as r/1: too long\)"):
        caption(work, tmp_path / "captions")
    with pytest.raises(MissingDatasetError):
        open_dataset(str(tmp_path / "captions"))
    store = work.store_of(work.config.prompt)
    assert [part.num_rows for part in store.folder.read(["sha256"])] == [1]
    assert store.read_failed().num_rows >= 3


def test_a_captioner_that_cannot_be_used_stops_the_job_whatever_share_of_errors_is_allowed(tiles, tmp_path, monkeypatch):
    def load():
        raise UnusableCaptionerError("caption.model=x cannot be loaded")

    describe_with(monkeypatch, load)
    with pytest.raises(CaptionError, match=r"^caption\.model=x cannot be loaded"):
        caption(make_work(tiles, tmp_path, max_error_share=1.0), tmp_path / "captions")
