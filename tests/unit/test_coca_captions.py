"""The caption stage with a CoCa on a real Ray: from a run's weights to captions, and other weights to others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quick_stages import three_tiles

from urbanclip_ray.captioners.caption import caption_tiles
from urbanclip_ray.captioners.plan import plan_captions
from urbanclip_ray.captioners.preview import preview_captions
from urbanclip_ray.captioners.status import progress_of
from urbanclip_ray.config import ModelConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.model.weights import weight_files
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.pipeline import run_stages
from urbanclip_ray.stages import Run, caption_work
from urbanclip_ray.storage import Dataset, open_dataset, publish

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_TILES = 3


def write_run(folder: Path, seed: int) -> Path:
    """A run of which only its pretraining is left."""
    tokenizer = train_bpe(["a river and a road near a park"] * 3, vocab_size=300, context_length=24)
    model = build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size), seed)
    with publish(str(folder / "pretrain" / "0123"), "pretrain", {}, {}) as publication:
        for name, data in weight_files(model, tokenizer).items():
            publication.write_file(name, data)
    (folder / "run.json").write_text(json.dumps({"datasets": {"pretrain": "pretrain/0123"}}))
    return folder


def make_run(config, weights: Path) -> Run:
    keys = {"captioner": "coca", "model": weights, "num_actors": 1, "decoding.max_new_tokens": 8}
    run = Run(apply_overrides(config, [f"caption.{key}={value}" for key, value in keys.items()]))
    run.datasets = run_stages(config, ["tiles"]).datasets
    return run


def caption(run: Run, uri: Path) -> Dataset:
    with publish(str(uri), "captions", {}, {}) as publication:
        caption_tiles(caption_work(run), publication)
    return open_dataset(str(uri))


@pytest.mark.slow
def test_a_run_describes_tiles_once_and_another_run_s_captions_are_not_taken_for_its_own(tmp_path):
    config = three_tiles(tmp_path)
    one, other = (make_run(config, write_run(tmp_path / f"run{seed}", seed)) for seed in (0, 1))
    work = caption_work(one)
    page = Path(preview_captions(work, one.uri)).read_text()
    assert page.count("<img ") == NUM_TILES
    assert one.caption_model.revision[:12] in page
    assert (plan_captions(work).num_captions, plan_captions(work).num_missing) == (NUM_TILES, 0)
    assert progress_of(work)[0].num_to_do == 0

    first = caption(one, tmp_path / "first")
    assert first.manifest.facts["captions"] == {"given": 0, "from_store": NUM_TILES, "generated": 0}
    assert first.manifest.facts["model"] == {"name": "coca", "revision": one.caption_model.revision}
    rows = first.read().to_pylist()
    assert {(row["model"], row["prompt"], row["error"]) for row in rows} == {("coca", "", None)}

    second = caption(other, tmp_path / "second")
    assert second.manifest.facts["captions"] == {"given": 0, "from_store": 0, "generated": NUM_TILES}
    assert second.manifest.facts["model"]["revision"] != one.caption_model.revision
    assert not {row["caption_key"] for row in rows} & set(second.read()["caption_key"].to_pylist())
