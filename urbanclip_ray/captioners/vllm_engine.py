"""The captioner `vllm`: an image-text-to-text model with a chat template, run by vLLM through `ray.data.llm`.

UNRUN: there was no GPU to run it on. What stands before the engine and behind it is tested with Ray's own processor and a
stand-in for the engine; vLLM itself has never been started by this code.

Ray's processor keeps several batches in each engine and shares a large model out to `gpus_per_actor` GPUs, so it is no
captioner that answers one batch after another: it writes to the caption store by itself, and the captions are read from there
as ever. Ray's stages for chat templates and images are left out. They take the model of a hub at no certain commit, and
parse images with a module that newer vLLMs have elsewhere; `QuestionWriter` gives the engine both ready made.

Follow one row: tile_id, sha256, image, prompts ─QuestionWriter─▶ tile_id, sha256, asked, sample, prompt, multimodal_data,
sampling_params ─engine─▶ tile_id, sha256, asked, sample, text, error ─Commit─▶ tile_id, prompt, error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from urbanclip_ray import metrics
from urbanclip_ray.captioners.base import Origin, Tile, UnusableCaptionerError
from urbanclip_ray.captioners.chat_endpoint import drawn_decoding
from urbanclip_ray.captioners.model_files import ModelReference, fetch_model
from urbanclip_ray.captioners.store import CaptionStore, FailedTile, StoredCaption
from urbanclip_ray.captioners.texts import TooLongError, clean_text
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig
from urbanclip_ray.errors import one_line
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.storage import digest

if TYPE_CHECKING:
    from ray.data import Dataset

    from urbanclip_ray.captioners.caption import CaptionWork  # whose module imports this one

OUTCOMES = pa.schema([pa.field(name, pa.string()) for name in ("tile_id", "prompt", "error")])
TILE_FIELDS = ("tile_id", "sha256", "image", "prompts")
ASKED = ("tile_id", "sha256", "asked")  # what an answer is of
ERROR = "__inference_error__"  # Ray's name; rows that have one pass the engine by


def origin_of(config: CaptionConfig, reference: ModelReference, prompt: str) -> Origin:
    """What decides the texts. The engine rounds otherwise than the transformers library, so it is named."""
    decoding = drawn_decoding(config.decoding) | {"dtype": config.dtype, "back_end": "vllm"}
    return Origin(reference.name, reference.revision, prompt, decoding)


def engine_settings(config: CaptionConfig, reference: ModelReference) -> dict[str, Any]:
    """Arguments of `ray.data.llm.vLLMEngineProcessorConfig`; raises ConfigError for a model that engines cannot be given."""
    if "://" in reference.place:
        raise ConfigError(
            f"caption.model={reference.place}: caption.captioner=vllm takes a model of the hub, or a directory that every node "
            "sees under the same path, not a URI: copy it to one, or take caption.captioner=transformers"
        )
    if not float(config.gpus_per_actor).is_integer() or config.gpus_per_actor < 1:
        raise ConfigError(
            f"caption.gpus_per_actor={config.gpus_per_actor}: an engine of caption.captioner=vllm has whole GPUs: set 1, or "
            "as many as the model needs"
        )
    pinned = {"revision": reference.revision, "tokenizer_revision": reference.revision} if reference.is_hub else {}
    engine = {
        "dtype": config.dtype,
        "tensor_parallel_size": int(config.gpus_per_actor),
        "limit_mm_per_prompt": {"image": 1},
        "load_format": "safetensors",  # never pickles
        "trust_remote_code": False,
        **pinned,
    }
    return {
        "model_source": reference.place,
        "engine_kwargs": engine,
        "batch_size": config.tiles_per_batch,
        "concurrency": config.num_actors,
        "accelerator_type": config.accelerator_type or None,
        "should_continue_on_error": True,
        "log_engine_metrics": False,
        "chat_template_stage": False,
        "tokenize_stage": False,
        "detokenize_stage": False,
    }


def build_engine(config: CaptionConfig, reference: ModelReference) -> Any:
    """Ray's processor, from rows of questions to rows of answers; raises UnusableCaptionerError without vLLM."""
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise UnusableCaptionerError(
            "caption.captioner=vllm needs vLLM, which pins its own torch and transformers: make an environment with "
            "pip install 'urbanclip_ray[vllm]', without constraints.txt, on every node"
        )
    return build_processor(config, reference)


def build_processor(config: CaptionConfig, reference: ModelReference) -> Any:
    """The processor itself, which Ray can build where vLLM is missing."""
    from ray.data import llm

    from urbanclip_ray.dataflow import CPUS_BESIDE_ACTORS

    beside = {"num_cpus": CPUS_BESIDE_ACTORS}
    settings = llm.vLLMEngineProcessorConfig(**engine_settings(config, reference))
    return llm.build_processor(
        settings, postprocess=read_answer, preprocess_map_kwargs=beside, postprocess_map_kwargs=dict(beside)
    )


class QuestionWriter:
    """A Ray Data actor: for every tile and sample what the engine takes, the model's chat template filled in.

    A tile that cannot be decoded is a row with its error. Raises UnusableCaptionerError for a model without a chat template.
    """

    def __init__(self, config: CaptionConfig, reference: ModelReference, pixels: PixelsConfig) -> None:
        self._config = config
        self._pixels = pixels
        self._processor = _load_processor(fetch_model(reference, config.cache_folder), reference)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [
            row
            for tile_id, sha256, image, prompts in zip(*(batch[name] for name in TILE_FIELDS), strict=True)
            for asked in prompts
            for row in self._write({"tile_id": tile_id, "sha256": sha256, "asked": asked}, image)
        ]
        return {name: _objects([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def _write(self, common: dict[str, Any], image: bytes) -> list[dict[str, Any]]:
        samples = range(self._config.decoding.num_samples)
        try:
            pixels = Tile("", image, self._pixels).rgb()
        except TileImageError as error:
            nothing = {"prompt": "", "multimodal_data": None, "sampling_params": None}
            return [common | nothing | {"sample": sample, "unreadable": str(error), ERROR: str(error)} for sample in samples]
        content = [{"type": "image"}, {"type": "text", "text": common["asked"]}]
        prompt = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ready = common | {"prompt": prompt, "multimodal_data": {"image": pixels}, "unreadable": None, ERROR: ""}
        return [ready | {"sample": sample, "sampling_params": self._sampling(sample)} for sample in samples]

    def _sampling(self, sample: int) -> dict[str, Any]:
        """Keys of `vllm.SamplingParams`. Every sample has a seed of its own, so it does not depend on its batch."""
        decoding = self._config.decoding
        sampling: dict[str, Any] = {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
        if decoding.temperature > 0:
            sampling |= {"top_p": decoding.top_p, "seed": decoding.seed + sample}
        return sampling


def read_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """The answer in a row of the engine, or its error; Ray's processor hands rows with errors back unread."""
    answer = {name: row[name] for name in ASKED} | {"sample": int(row["sample"]), "text": None, "error": None}
    if failure := row.get(ERROR):
        return answer | {"error": row.get("unreadable") or f"the model failed: {failure[:300]}"}
    if row.get("text") is not None:
        return dict(row)  # read before
    try:
        return answer | {"text": clean_text(row["generated_text"])}
    except TooLongError as error:
        return answer | {"error": str(error)}


def fill_store(rows: Dataset, work: CaptionWork) -> Dataset:
    """Have the engines describe rows of tiles (`TILE_COLUMNS`, `prompts`) into the store; returns `OUTCOMES`.

    Every batch of answers is committed when it is there.
    """
    from urbanclip_ray import dataflow

    config, model = work.config, work.model
    if model is None or work.job is None:
        raise AssertionError("engines need a model and a job")
    engine = build_engine(config, model)
    questions = rows.map_batches(
        QuestionWriter,
        fn_constructor_kwargs={"config": config, "reference": model, "pixels": work.pixels},
        batch_size=config.tiles_per_batch,
        batch_format="numpy",
        **dataflow.actors(config.num_actors),
    )
    beside = dataflow.beside_actors(config.num_actors)
    answers = engine(questions).map(read_answer, **beside)
    return answers.map_batches(
        Commit(work.store_of, work.job.name, work.run),
        batch_size=config.tiles_per_batch * config.decoding.num_samples,
        batch_format="pyarrow",
        **beside,
    )


class Commit:
    """Answers go to the store, each batch in one file for every prompt; what is handed on are `OUTCOMES`.

    A tile with several samples is one outcome, or one more where some of them failed in another batch.
    """

    def __init__(self, store_of: Callable[[str], CaptionStore], job: str, run: str = "") -> None:
        self._store_of = store_of
        self._job = job
        self._run = run  # its name in the metrics

    def __call__(self, batch: pa.Table) -> pa.Table:
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for row in batch.to_pylist():
            by_prompt.setdefault(row["asked"], []).append(row)
        outcomes: dict[tuple[str, str], str | None] = {}
        for prompt, rows in by_prompt.items():
            name = f"{self._job}-{digest([[row['sha256'], row['sample']] for row in rows])[:24]}"
            failed = {row["sha256"]: FailedTile(row["sha256"], row["tile_id"], row["error"], 1) for row in rows if row["error"]}
            texts = [StoredCaption(row["sha256"], row["sample"], row["text"]) for row in rows if row["error"] is None]
            self._store_of(prompt).add_failed(name, failed.values())
            self._store_of(prompt).add(name, texts)
            metrics.CAPTIONS.add(len(texts), run=self._run)
            for tile in failed.values():
                metrics.CAPTION_FAILURES.add(1, run=self._run, reason=metrics.bounded(tile.reason))
            first_samples = [row["tile_id"] for row in rows if row["sample"] == 0]
            outcomes |= {(tile_id, prompt): None for tile_id in first_samples}
            outcomes |= {(tile.tile_id, prompt): tile.reason for tile in failed.values()}
        rows = [{"tile_id": tile_id, "prompt": prompt, "error": error} for (tile_id, prompt), error in outcomes.items()]
        return pa.Table.from_pylist(rows, schema=OUTCOMES)


def _objects(values: list[Any]) -> Any:
    """A column of Python objects, as Ray hands them on; numpy would make one array of dictionaries and images."""
    import numpy as np

    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _load_processor(folder: str, reference: ModelReference) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # foreign files: the library raises whatever it stumbles over
        raise UnusableCaptionerError(
            f"caption.model={reference.place}: its processor cannot be loaded: {one_line(error)}. Choose a model with one"
        ) from None
    if getattr(processor, "chat_template", None) is None:
        raise UnusableCaptionerError(
            f"caption.model={reference.place} has no chat template: caption.captioner=vllm asks chat models; take another one, "
            "or caption.captioner=transformers"
        )
    return processor
