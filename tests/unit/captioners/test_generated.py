"""The caption stage, its preview and its plan with real vision-language classes on a real Ray, and the store below them."""

from __future__ import annotations

import hashlib
import html
import re
from pathlib import Path

import pyarrow as pa
import pytest
from images import noise_png

from urbanclip_ray.captioners.caption import CaptionError, CaptionWork, caption_tiles
from urbanclip_ray.captioners.model_files import resolve_model
from urbanclip_ray.captioners.plan import plan_captions
from urbanclip_ray.captioners.preview import preview_captions
from urbanclip_ray.config import CaptionConfig, PixelsConfig
from urbanclip_ray.schema import TILES
from urbanclip_ray.storage import MissingDatasetError, open_dataset, publish

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_TILES = 12
BROKEN = 3  # this one cannot be read
DOUBLE = 7  # this one has the bytes of the one before it


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("tiles") / "tiles")
    rows = []
    for index in range(NUM_TILES):
        seed = index - 1 if index == DOUBLE else index
        image = b"" if index == BROKEN else noise_png(seed, 64, 56 + 14 * (seed % 3))
        row = {"tile_id": f"<b>/{index:02}", "region": "r", "scheme": "none", "image": image}
        row |= {"sha256": hashlib.sha256(image).hexdigest() if image else None, "error": None if image else "zero bytes"}
        rows.append(row)
    table = pa.Table.from_pylist(rows, schema=TILES)
    with publish(uri, "tiles", {}, {}) as publication:
        publication.write_table(table.slice(0, 5), "part-0.parquet")
        publication.write_table(table.slice(5), "part-1.parquet")
        publication.count(unit="tiles", rows_in=NUM_TILES, rows_out=NUM_TILES - 1, rejects={"zero bytes": 1})
    return open_dataset(uri)


def make_work(tiles, model: str, storage: Path, **keys) -> CaptionWork:
    decoding = {"max_new_tokens": 6}
    keys = {"prompt": "", "decoding": decoding, "tiles_per_batch": 4, "num_actors": 1} | keys
    config = CaptionConfig(captioner="transformers", model=model, cache_folder=str(storage / "cache"), **keys)
    return CaptionWork(tiles, config, PixelsConfig(), None, resolve_model(config), str(storage / "caption_store"))


def caption(work: CaptionWork, uri: Path):
    with publish(str(uri), "captions", {}, {"tiles": work.tiles}) as publication:
        caption_tiles(work, publication)
    return open_dataset(str(uri))


def test_blip_previews_then_captions_what_is_missing_and_then_nothing(tiles, vision_language_models, tmp_path):
    work = make_work(tiles, str(vision_language_models["blip"]), tmp_path)
    uri = preview_captions(work, str(tmp_path / "run"), 5)
    assert uri == str(tmp_path / "run" / "caption_preview.html")
    page = Path(uri).read_text()
    assert "Captions of 5 of 11 tiles" in page
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', page)) == 5
    assert "&lt;b&gt;/" in page
    assert "<b>" not in page

    first = caption(work, tmp_path / "first")
    manifest = first.manifest
    assert manifest.rejects == {"unreadable tile": 1}
    assert manifest.rows_out == NUM_TILES - 1
    facts = manifest.facts["captions"]
    assert facts["from_store"] + facts["generated"] == NUM_TILES - 1
    assert 5 <= facts["from_store"] <= 6  # the fifth may be one of the two that are equal
    assert manifest.facts["model"] == {"name": "blip", "revision": work.model.revision}

    again = caption(work._replace(config=work.config.model_copy(update={"tiles_per_batch": 5})), tmp_path / "again")
    assert again.manifest.facts["captions"] == {"given": 0, "from_store": NUM_TILES - 1, "generated": 0}
    rows = {row["tile_id"]: row for row in first.read().to_pylist()}
    assert again.read().to_pylist() == first.read().to_pylist()
    assert rows["<b>/06"]["text"] == rows["<b>/07"]["text"]
    shown = [row for tile_id, row in rows.items() if html.escape(tile_id) in page]
    assert len(shown) == 5
    assert all(row["text"] in page for row in shown)
    assert "to be generated" in str(plan_captions(work))
    assert plan_captions(work).num_missing == 0


@pytest.mark.slow
def test_a_chat_model_from_a_uri_is_planned_and_captioned_with_several_samples(tiles, vision_language_models, tmp_path):
    decoding = {"max_new_tokens": 6, "temperature": 1.0, "num_samples": 2}
    model = f"file://{vision_language_models['qwen2_vl']}"
    work = make_work(tiles, model, tmp_path, prompt="describe this", decoding=decoding)
    plan = plan_captions(work, 4)
    assert (plan.num_tiles, plan.num_unreadable, plan.num_captions) == (11, 1, 20)  # two tiles are equal
    assert (plan.num_stored, plan.num_missing, plan.num_timed) == (8, 12, 3)  # the first waits for the model, untimed
    assert plan.seconds_per_caption > 0
    assert re.search(r"cost: \S+ CPU-hours, \S+ hours on 1 actors, at \S+ s a caption", str(plan))

    dataset = caption(work, tmp_path / "captions")
    facts = dataset.manifest.facts["captions"]
    assert facts["from_store"] in (8, 10)  # 10 where one of the equal tiles was timed
    assert facts["from_store"] + facts["generated"] == 22
    rows = [row for row in dataset.read().to_pylist() if row["error"] is None]
    assert len(rows) == 22
    assert len({row["caption_key"] for row in rows}) == 20
    assert {row["model"] for row in rows} == {"qwen2_vl"}
    assert list((tmp_path / "cache" / "models").glob("*/model.safetensors"))


@pytest.mark.slow
def test_a_model_describes_what_the_source_gives_no_caption_of(tiles, vision_language_models, tmp_path):
    work = make_work(tiles, str(vision_language_models["blip"]), tmp_path)
    alone = {row["tile_id"]: row for row in caption(work, tmp_path / "alone").read().to_pylist()}
    described = [tile_id for tile_id, row in alone.items() if row["error"] is None][:8]
    given = pa.table({"tile_id": [*described, described[0]], "text": [f"Caption {n}." for n in range(9)]})
    config = work.config.model_copy(update={"captioner": "given"})
    mixed = work._replace(config=config, given=given, store_uri=str(tmp_path / "another_store"))
    assert plan_captions(mixed, 2).num_tiles == NUM_TILES - 1 - 8

    dataset = caption(mixed, tmp_path / "mixed")
    rows = dataset.read().to_pylist()
    by_source = {"given": [], "blip": []}
    for row in rows:
        by_source[row["model"]].append(row)
    assert [(row["tile_id"], row["text"]) for row in by_source["given"]] == sorted(
        zip(given["tile_id"].to_pylist(), given["text"].to_pylist(), strict=True), key=lambda pair: pair[0]
    )
    assert by_source["blip"] == [alone[row["tile_id"]] for row in by_source["blip"]]  # keys as well
    assert {row["tile_id"] for row in rows} == set(alone)
    facts = dataset.manifest.facts["captions"]
    assert (facts["given"], facts["from_store"] + facts["generated"]) == (9, 3)
    assert dataset.manifest.rejects == {"unreadable tile": 1}

    page = Path(preview_captions(mixed, str(tmp_path / "run"), 11)).read_text()
    assert page.count(", given</div>") == 8
    assert page.count(", blip</div>") == 3


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_stops_the_stage_whatever_share_of_errors_is_allowed(tiles, tmp_path):
    folder = tmp_path / "unknown"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    (folder / "model.safetensors").write_bytes(b"")
    work = make_work(tiles, str(folder), tmp_path, max_error_share=1.0)
    with pytest.raises(CaptionError, match=rf"caption\.model={folder} cannot be loaded as an image-text-to-text model"):
        caption(work, tmp_path / "captions")
    with pytest.raises(MissingDatasetError):
        open_dataset(str(tmp_path / "captions"))


def test_the_plan_of_a_captioner_without_a_store(tiles):
    plan = plan_captions(CaptionWork(tiles, CaptionConfig(num_actors=1), PixelsConfig()), 4)
    assert (plan.num_captions, plan.num_stored, plan.num_timed) == (10, 0, 3)


@pytest.mark.slow
def test_every_prompt_gives_a_caption_in_order_and_keeps_its_store_when_others_come(tiles, vision_language_models, tmp_path):
    own = {"river": "a wide river", "trees": "forest", "where": "near {city}"}
    model = str(vision_language_models["blip"])
    one = make_work(tiles, model, tmp_path, prompts=("river",), templates=own)
    two = make_work(tiles, model, tmp_path, prompts=("trees", "river"), templates=own)
    first = caption(one, tmp_path / "one")
    dataset = caption(two, tmp_path / "two")
    assert dataset.manifest.facts["captions"]["from_store"] == NUM_TILES - 1
    rows = dataset.read().to_pylist()
    by_tile: dict[str, list[dict]] = {}
    for row in rows:
        by_tile.setdefault(row["tile_id"], []).append(row)
    assert [row["error"] for row in by_tile.pop(f"<b>/{BROKEN:02}")] == ["unreadable tile: zero bytes"]
    assert {tuple(row["prompt"] for row in each) for each in by_tile.values()} == {("forest", "a wide river")}
    assert all(
        each[0]["text"].startswith("forest ") and each[1]["text"].startswith("a wide river") for each in by_tile.values()
    )
    old = {row["tile_id"]: row for row in first.read().to_pylist()}
    assert all(each[1] == old[tile_id] for tile_id, each in by_tile.items())

    # A plain prompt that says the same has the same keys; a template's city is part of what is asked.
    plain = make_work(tiles, model, tmp_path, prompt="a wide river")
    assert caption(plain, tmp_path / "plain").read() == first.read()
    city = make_work(tiles, model, tmp_path, prompts=("where",), templates=own)
    (where,) = city.look_up(city.read_index()).asked
    assert (where.prompt, where.known.num_missing) == ("near r", NUM_TILES - 2)
    assert plan_captions(two).num_missing == 0
