"""The captioner `vllm` up to its engine and from there on, in Ray's own processor, with a stand-in for the engine."""

from __future__ import annotations

import hashlib
import importlib.util
import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from urbanclip_ray.captioners import vllm_engine
from urbanclip_ray.captioners.base import Tile, UnusableCaptionerError
from urbanclip_ray.captioners.model_files import ModelReference, resolve_model
from urbanclip_ray.captioners.store import CaptionStore, StoredCaption
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig

WHOLE = PixelsConfig()
NOTHING_KNOWN = dict.fromkeys(("width", "west", "south", "east", "north"))
HUB = ModelReference("owner/name", "c0ffee", "owner/name", is_hub=True)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 64, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


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
        pytest.skip("vLLM is installed here")
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
    row = {"sha256": "ab", "asked": "what?", "sample": np.int64(1), "prompt": "<user>", "metrics": None} | row
    answer = vllm_engine.read_answer(row)
    assert set(answer) == {"sha256", "asked", "sample", "text", "error"}
    assert (answer["sha256"], answer["asked"], answer["sample"], answer["text"]) == ("ab", "what?", 1, text)
    assert answer["error"] is None if error is None else answer["error"].startswith(error)
    if error is None:
        assert vllm_engine.read_answer(answer) == answer  # Ray's processor has read it already


def test_questions_are_what_the_store_lacks_and_answers_go_there(tmp_path):
    config = make_config(prompts=("roads", "mine"), templates={"mine": "Trees?"})
    roads, trees = config.asked()
    roads = "Describe the roads and other transport in this satellite image in a few sentences."

    def store_of(prompt: str) -> CaptionStore:
        store = CaptionStore(str(tmp_path), vllm_engine.origin_of(config, HUB, prompt))
        store.refresh()
        return store

    store_of(trees).add([StoredCaption("a", 0, "There are trees.")])
    rows = [{"sha256": name, "image": name.encode(), "error": None, "region": "r", **NOTHING_KNOWN} for name in ("a", "b")]
    rows.append(rows[0] | {"sha256": None, "error": "zero bytes"})
    batch = pa.Table.from_pylist(rows)
    missing = vllm_engine.MissingQuestions(config, WHOLE, store_of)(batch).to_pylist()
    assert [(row["sha256"], row["asked"]) for row in missing] == [("a", roads), ("b", roads), ("b", trees)]

    answers = [row | {"sample": 0, "text": f"{row['sha256']}: {row['asked']}", "error": None} for row in missing]
    answers[1] |= {"text": None, "error": "the model failed: x"}
    failed = vllm_engine.Commit(store_of)(pa.Table.from_pylist(answers)).to_pylist()
    assert failed == [{"sha256": "b", "asked": roads, "error": "the model failed: x"}]
    assert store_of(roads).find("a", 1) == [f"a: {roads}"]
    assert store_of(roads).find("b", 1) is None
    assert store_of(trees).find("b", 1) == ["b: Trees?"]
    assert vllm_engine.MissingQuestions(config, WHOLE, store_of)(batch).num_rows == 1


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
def test_rows_pass_through_ray_s_processor_with_images_errors_and_samples(vision_language_models, tmp_path, monkeypatch):
    model = str(vision_language_models["qwen2_vl"])
    config = make_config(
        model=model,
        cache_folder=str(tmp_path),
        prompts=("what", "fail"),
        templates={"what": "What is it?", "fail": "fail"},
        decoding={"max_new_tokens": 7, "temperature": 1.0, "num_samples": 2, "seed": 3},
        tiles_per_batch=2,
    )
    reference = resolve_model(config)

    def build(config, reference):
        processor = vllm_engine.build_processor(config, reference)
        (stage,) = processor.stages.values()
        stage.fn = stand_in()
        stage.map_batches_kwargs.update(num_gpus=0, num_cpus=0)  # in place: an assignment would ask for a GPU again
        return processor

    monkeypatch.setattr(vllm_engine, "build_engine", build)

    def store_of(prompt: str) -> CaptionStore:
        store = CaptionStore(str(tmp_path / "store"), vllm_engine.origin_of(config, reference, prompt))
        store.refresh()
        return store

    import ray.data

    images = [png(0), png(1), b"no image"]
    hashes = [hashlib.sha256(image).hexdigest() for image in images]
    rows = [
        {"tile_id": str(number), "sha256": sha256, "image": image, "error": None, "region": "r", **NOTHING_KNOWN}
        for number, (sha256, image) in enumerate(zip(hashes, images, strict=True))
    ]
    errors = vllm_engine.fill_store(ray.data.from_arrow(pa.Table.from_pylist(rows)), config, reference, WHOLE, store_of)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    head = f"(64, 60) <|im_start|>user\n{image}What is it?<|im_end|>\n<|im_start|>assistant\n 7 "
    for sha256 in hashes[:2]:
        assert store_of("What is it?").find(sha256, 2) == [head + "3", head + "4"]
    assert set(errors) == {*((sha256, "fail") for sha256 in hashes), (hashes[2], "What is it?")}
    assert errors[hashes[0], "fail"] == "the model failed: ValueError: as told"
    assert errors[hashes[2], "What is it?"].startswith("not an image")
    lost = vllm_engine.FilledCaptioner(errors).describe([Tile("0", images[0], WHOLE, "fail"), Tile("1", images[1], WHOLE, "?")])
    assert [str(error) for error in lost] == ["the model failed: ValueError: as told", "the model failed: no answer came"]


def test_a_model_without_a_chat_template_is_refused(vision_language_models, tmp_path):
    config = make_config(model=str(vision_language_models["blip"]), cache_folder=str(tmp_path))
    with pytest.raises(UnusableCaptionerError, match="has no chat template"):
        vllm_engine.QuestionWriter(config, resolve_model(config), WHOLE)
