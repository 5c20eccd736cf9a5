"""`jobs/caption.py` with a model, as a user runs it: plan, preview, captions, and a second run that generates nothing."""

from __future__ import annotations

import json

import pytest
import ray
from small_run import NUM_COLUMNS, NUM_ROWS, city_options, run_job, set_options, stdout_of, write_city

NUM_TILES = NUM_COLUMNS * NUM_ROWS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blip", "qwen2_vl"])
def test_plan_preview_captions_and_a_second_run(kind, vision_language_models, tmp_path, ray_cluster):
    address = ray.get_runtime_context().gcs_address
    options = city_options(write_city(tmp_path / "city"), tmp_path / "storage")
    keys = {
        "captioner": "transformers",
        "model": vision_language_models[kind],
        "cache_folder": tmp_path / "cache",
        "prompt": "describe this",
        "decoding.max_new_tokens": 6,
        "tiles_per_batch": 8,
    }
    model = set_options(*(f"caption.{key}={value}" for key, value in keys.items()))

    def job(name: str, *more: str) -> str:
        return stdout_of(name, *options, *model, *more, ray_address=address)

    def facts(run: str) -> dict:
        (manifest,) = (tmp_path / "storage" / run / "captions").glob("*/manifest.json")
        return json.loads(manifest.read_text())["facts"]["captions"]

    early = run_job("caption", *options, *model, "--plan", ray_address=address)
    assert "run jobs/ingest.py with the same options first" in early.stderr
    job("ingest")
    plan = job("caption", "--plan", "--limit", "4")
    assert f"captions: {NUM_TILES}, of which 4 are in the store and {NUM_TILES - 4} are to be generated" in plan
    assert "CPU-hours" in plan
    page = tmp_path / "storage" / "tiny_test" / "caption_preview.html"
    assert f"preview: {page}" in job("caption", "--preview", "--limit", "6")
    assert page.read_text().count("<img ") == 6
    assert not (tmp_path / "storage" / "tiny_test" / "captions").exists()
    job("caption")
    made = facts("tiny_test")
    assert made["from_store"] + made["generated"] == NUM_TILES
    assert 6 <= made["from_store"] <= 10
    job("ingest", "--set", "run=second")
    job("caption", "--set", "run=second")
    assert facts("second") == {"given": 0, "from_store": NUM_TILES, "generated": 0}
    assert "0 are to be generated" in job("caption", "--plan")
