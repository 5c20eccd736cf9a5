"""The captioner `vllm` up to its engine and from there on, in Ray's own processor, with a stand-in for the engine."""

from __future__ import annotations

import hashlib
import importlib.util

import numpy as np
import pyarrow as pa
import pytest
from images import noise_png

from urbanclip_ray.captioners import vllm_engine
from urbanclip_ray.captioners.base import UnusableCaptionerError
from urbanclip_ray.captioners.caption import CaptionWork, caption_tiles
from urbanclip_ray.captioners.model_files import ModelReference, resolve_model
from urbanclip_ray.captioners.plan import plan_captions
from urbanclip_ray.captioners.store import CaptionStore
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig
from urbanclip_ray.schema import TILES
from urbanclip_ray.storage import Dataset, open_dataset, publish

WHOLE = PixelsConfig()
HUB = ModelReference("owner/name", "c0ffee", "owner/name", is_hub=True)


def make_config(**keys) -> CaptionConfig:
    return CaptionConfig(captioner="vllm", **({"model": "m", "gpus_per_actor": 1, "num_actors": 1} | keys))


def test_the_engine_s_settings_are_accepted_by_ray_and_pin_the_model():
    from ray.data.llm import vLLMEngineProcessorConfig

    made = vLLMEngineProcessorConfig(**vllm_engine.engine_settings(make_config(gpus_per_actor=2, dtype="bfloat16"), HUB))
    assert made.model_source == "owner/name"
    assert made.should_continue_on_error
    engine = made.engine_kwargs
    assert (engine["revision"], engine["tokenizer_revision"]) == ("c0ffee", "c0ffee")
    assert (engine["tensor_parallel_size"], engine["dtype"]) == (2, "bfloat16")
    assert (engine["load_format"], engine["trust_remote_code"]) == ("safetensors", False)


@pytest.mark.parametrize("gpus", [0, 0.5, 1.5])
def test_an_engine_without_whole_gpus_is_refused(gpus):
    with pytest.raises(ConfigError, match=r"caption\.gpus_per_actor=.* set 1"):
        vllm_engine.engine_settings(make_config(gpus_per_actor=gpus), HUB)


def test_a_model_that_nodes_cannot_open_is_refused():
    with pytest.raises(ConfigError, match=r"s3://b/m: caption\.captioner=vllm takes a model of the hub, or a directory"):
        vllm_engine.engine_settings(make_config(), ModelReference("m", "1", "s3://b/m", is_hub=False))


def test_without_vllm_the_extra_is_named():
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here: what is refused without it cannot be seen")
    with pytest.raises(UnusableCaptionerError, match=r"urbanclip_ray\[vllm\]'?, without constraints.txt"):
        vllm_engine.build_engine(make_config(), HUB)


@pytest.mark.parametrize(
    ("row", "text", "error"),
    [
        ({"generated_text": " A road.\x00\n"}, "A road.", None),
        ({"generated_text": "A road.", "__inference_error__": ""}, "A road.", None),
        ({"generated_text": "", "__inference_error__": "ValueError: too many pixels"}, None, "the model failed: ValueError"),
        ({"unreadable": "zero bytes", "__inference_error__": "zero bytes"}, None, "zero bytes"),
        ({"generated_text": "x" * 100_000}, None, "text too long: 100,000 characters"),
    ],
)
def test_a_row_of_the_engine_is_read(row, text, error):
    row = {"tile_id": "r/a", "sha256": "ab", "asked": "what?", "sample": np.int64(1), "prompt": "<user>", "metrics": None} | row
    answer = vllm_engine.read_answer(row)
    assert set(answer) == {"tile_id", "sha256", "asked", "sample", "text", "error"}
    assert (answer["sha256"], answer["asked"], answer["sample"], answer["text"]) == ("ab", "what?", 1, text)
    assert answer["error"] is None if error is None else answer["error"].startswith(error)
    if error is None:
        assert vllm_engine.read_answer(answer) == answer  # Ray's processor has read it already


def test_answers_go_to_the_store_of_their_prompt_and_what_failed_is_an_outcome_with_its_reason(tmp_path):
    config = make_config()

    def store_of(prompt: str) -> CaptionStore:
        return CaptionStore(str(tmp_path), vllm_engine.origin_of(config, HUB, prompt))

    commit = vllm_engine.Commit(store_of, "job")

    def answer(name: str, asked: str, sample: int, error: str | None = None) -> dict:
        text = None if error else f"{name}: {asked} {sample}"
        return {"tile_id": f"r/{name}", "sha256": name, "asked": asked, "sample": sample, "text": text, "error": error}

    batch = [answer(name, "roads?", sample) for name, sample in (("a", 0), ("a", 1), ("b", 0))]
    batch += [answer("b", "roads?", 1, "failed: x")]
    batch += [answer("a", "trees?", 0), answer("c", "trees?", 1)]  # its first sample is in another batch
    outcomes = commit(pa.Table.from_pylist(batch))
    assert outcomes.schema == vllm_engine.OUTCOMES
    assert {(row["tile_id"], row["prompt"]): row["error"] for row in outcomes.to_pylist()} == {
        ("r/a", "roads?"): None,
        ("r/b", "roads?"): "failed: x",
        ("r/a", "trees?"): None,
    }
    assert commit(pa.Table.from_pylist(batch)).equals(outcomes)  # a task that is run again
    texts = store_of("roads?").texts_of(pa.array(["a", "b"]), 2).to_pylist()
    assert texts == ["a: roads? 0", "a: roads? 1", "b: roads? 0", None]
    assert store_of("trees?").texts_of(pa.array(["a", "c"]), 2).to_pylist() == ["a: trees? 0", None, None, "c: trees? 1"]
    (failed,) = store_of("roads?").read_failed().to_pylist()
    assert (failed["tile_id"], failed["reason"], failed["num_attempts"]) == ("r/b", "failed: x", 1)
    assert [len(store_of(prompt).folder.parts()) for prompt in ("roads?", "trees?")] == [1, 1]


def stand_in():
    """Stands in for Ray's vLLM stage: the same rows in and out, and the text says what it was given."""
    from ray.llm._internal.batch.stages.base import StatefulStageUDF

    class StandIn(StatefulStageUDF):
        def __init__(self, data_column, expected_input_keys, **settings):
            super().__init__(data_column, expected_input_keys)

        async def udf(self, batch):
            for row in batch:
                image, prompt = row.pop("multimodal_data")["image"], row.pop("prompt")
                out = {"prompt": prompt, "__idx_in_batch": row["__idx_in_batch"], "__inference_error__": ""}
                if row["asked"] == "fail":
                    yield out | {"generated_text": "", "__inference_error__": "ValueError: as told"}
                else:
                    params = row.pop("sampling_params")
                    yield out | {"generated_text": f"{image.size} {prompt} {params['max_tokens']} {params.get('seed')}"}

    return StandIn


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_rows_pass_through_ray_s_processor_with_images_errors_and_samples(vision_language_models, tmp_path, monkeypatch):
    model = str(vision_language_models["qwen2_vl"])
    config = make_config(
        model=model,
        cache_folder=str(tmp_path),
        prompts=("what", "fail"),
        templates={"what": "What is it?", "fail": "fail"},
        decoding={"max_new_tokens": 7, "temperature": 1.0, "num_samples": 2, "seed": 3},
        tiles_per_batch=2,
        max_error_share=1.0,
    )
    reference = resolve_model(config)

    def build(config, reference):
        processor = vllm_engine.build_processor(config, reference)
        (stage,) = processor.stages.values()
        stage.fn = stand_in()
        stage.map_batches_kwargs.update(num_gpus=0, num_cpus=0)  # in place: an assignment would ask for a GPU again
        return processor

    monkeypatch.setattr(vllm_engine, "build_engine", build)

    rows = [
        {"tile_id": f"r/{n}", "region": "r", "scheme": "none", "sha256": hashlib.sha256(image).hexdigest(), "image": image}
        for n, image in enumerate([noise_png(0, 64, 60), noise_png(1, 64, 60), b"no image", noise_png(0, 64, 60)])
    ]
    with publish(str(tmp_path / "tiles"), "tiles", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=TILES))
        publication.count(unit="tiles", rows_in=4, rows_out=4, rejects={})
    tiles = open_dataset(str(tmp_path / "tiles"))
    work = CaptionWork(tiles, config, WHOLE, None, reference, str(tmp_path / "store"))

    def caption(name: str) -> Dataset:
        with publish(str(tmp_path / name), "captions", {}, {"tiles": tiles}) as publication:
            caption_tiles(work, publication)
        return open_dataset(str(tmp_path / name))

    image = "<|vision_start|><|image_pad|><|vision_end|>"
    head = f"(64, 60) <|im_start|>user\n{image}What is it?<|im_end|>\n<|im_start|>assistant\n 7 "
    told = "the model failed: ValueError: as told"
    first = caption("first")
    found: dict[str, list[str]] = {}
    for row in first.read().to_pylist():
        found.setdefault(row["tile_id"], []).append(row["text"] or row["error"])
    assert list(found) == ["r/0", "r/1", "r/2", "r/3"]
    assert found["r/0"] == found["r/1"] == found["r/3"] == [head + "3", head + "4", told]
    assert all(error.startswith("not an image") for error in found["r/2"])
    assert first.manifest.facts["captions"] == {"given": 0, "from_store": 0, "generated": 6}
    again = caption("again")
    assert again.manifest.facts["captions"] == {"given": 0, "from_store": 6, "generated": 0}
    assert again.read() == first.read()
    plan = plan_captions(work)
    assert (plan.num_captions, plan.num_stored, plan.seconds_per_caption) == (12, 4, None)


def test_a_model_without_a_chat_template_is_refused(vision_language_models, tmp_path):
    config = make_config(model=str(vision_language_models["blip"]), cache_folder=str(tmp_path))
    with pytest.raises(UnusableCaptionerError, match="has no chat template"):
        vllm_engine.QuestionWriter(config, resolve_model(config), WHOLE)
