"""The captioner `vllm`: an image-text-to-text model with a chat template, run by vLLM through `ray.data.llm`.

UNRUN: there was no GPU to run it on. What stands before the engine and behind it is tested with Ray's own processor and a
stand-in for the engine; vLLM itself has never been started by this code.

Ray's processor keeps several batches in each engine and shares a large model out to `gpus_per_actor` GPUs, so it is no
captioner that answers one batch after another: it generates what the caption store lacks, and the captions are read from there
as ever. Ray's stages for chat templates and images are left out. They take the model of a hub at no certain commit, and
parse images with a module that newer vLLMs have elsewhere; `QuestionWriter` gives the engine both ready made.

Follow one row: sha256, image, asked ─QuestionWriter─▶ + sample, prompt, multimodal_data, sampling_params ─engine─▶ sha256,
asked, sample, text, error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from urbanclip_ray.captioners.base import Origin, Tile, UnusableCaptionerError
from urbanclip_ray.captioners.chat_endpoint import drawn_decoding
from urbanclip_ray.captioners.model_files import ModelReference, fetch_model
from urbanclip_ray.captioners.prompts import prompts_of
from urbanclip_ray.captioners.store import CaptionStore, StoredCaption
from urbanclip_ray.captioners.texts import TooLongError, clean_text
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig
from urbanclip_ray.errors import one_line
from urbanclip_ray.imagery import TileImageError

QUESTIONS = pa.schema([pa.field("sha256", pa.string()), pa.field("image", pa.binary()), pa.field("asked", pa.string())])
FAILED = pa.schema([pa.field(name, pa.string()) for name in ("sha256", "asked", "error")])
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

    return llm.build_processor(llm.vLLMEngineProcessorConfig(**engine_settings(config, reference)), postprocess=read_answer)


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
            for sha256, image, asked in zip(batch["sha256"], batch["image"], batch["asked"], strict=True)
            for row in self._write(sha256, image, asked)
        ]
        return {name: _objects([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def _write(self, sha256: str, image: bytes, asked: str) -> list[dict[str, Any]]:
        samples = range(self._config.decoding.num_samples)
        common: dict[str, Any] = {"sha256": sha256, "asked": asked}
        try:
            pixels = Tile("", image, self._pixels).rgb()
        except TileImageError as error:
            nothing = {"prompt": "", "multimodal_data": None, "sampling_params": None}
            return [common | nothing | {"sample": sample, "unreadable": str(error), ERROR: str(error)} for sample in samples]
        content = [{"type": "image"}, {"type": "text", "text": asked}]
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
    answer = {name: row[name] for name in ("sha256", "asked")} | {"sample": int(row["sample"]), "text": None, "error": None}
    if failure := row.get(ERROR):
        return answer | {"error": row.get("unreadable") or f"the model failed: {failure[:300]}"}
    if row.get("text") is not None:
        return dict(row)  # read before
    try:
        return answer | {"text": clean_text(row["generated_text"])}
    except TooLongError as error:
        return answer | {"error": str(error)}


def fill_store(
    rows: Any, config: CaptionConfig, reference: ModelReference, pixels: PixelsConfig, store_of: Callable[[str], CaptionStore]
) -> dict[tuple[str, str], str]:
    """Have the engines describe the tiles of a Ray dataset whose texts are not in the store; the errors by sha256 and prompt.

    Every batch of answers is committed when it is there. `store_of` gives the store of a prompt, in workers.
    """
    import ray.data

    questions = rows.map_batches(
        MissingQuestions(config, pixels, store_of), batch_size=config.tiles_per_batch, batch_format="pyarrow"
    ).map_batches(
        QuestionWriter,
        fn_constructor_kwargs={"config": config, "reference": reference, "pixels": pixels},
        batch_size=config.tiles_per_batch,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.num_actors),
    )
    answers = build_engine(config, reference)(questions).map(read_answer)
    failed = answers.map_batches(Commit(store_of), batch_size=config.tiles_per_batch, batch_format="pyarrow").take_all()
    return {(row["sha256"], row["asked"]): row["error"] for row in failed}


class MissingQuestions:
    """From tiles to what is asked about them and not in the store yet: sha256, image, asked."""

    def __init__(self, config: CaptionConfig, pixels: PixelsConfig, store_of: Callable[[str], CaptionStore]) -> None:
        self._config, self._pixels, self._store_of = config, pixels, store_of

    def __call__(self, batch: pa.Table) -> pa.Table:
        asked = [
            {"sha256": row["sha256"], "image": row["image"], "asked": prompt}
            for row in batch.to_pylist()
            if row["error"] is None
            for prompt in prompts_of(row, self._config, self._pixels)
            if isinstance(prompt, str)
        ]
        stores = {prompt: self._store_of(prompt) for prompt in {row["asked"] for row in asked}}
        missing = [row for row in asked if stores[row["asked"]].find(row["sha256"], self._config.decoding.num_samples) is None]
        return pa.Table.from_pylist(missing, schema=QUESTIONS)


class Commit:
    """Answers go to the store, each batch in one file for every prompt; what is handed on are the failed ones."""

    def __init__(self, store_of: Callable[[str], CaptionStore]) -> None:
        self._store_of = store_of

    def __call__(self, batch: pa.Table) -> pa.Table:
        by_prompt: dict[str, list[StoredCaption]] = {}
        failed = []
        for row in batch.to_pylist():
            if row["error"] is None:
                by_prompt.setdefault(row["asked"], []).append(StoredCaption(row["sha256"], row["sample"], row["text"]))
            else:
                failed.append({name: row[name] for name in FAILED.names})
        for prompt, captions in by_prompt.items():
            self._store_of(prompt).add(captions)
        return pa.Table.from_pylist(failed, schema=FAILED)


class FilledCaptioner:
    """What stands behind the store once the engines are through: it knows why a text is not there."""

    def __init__(self, errors: Mapping[tuple[str, str], str]) -> None:
        self._errors = errors

    def describe(self, tiles: Sequence[Tile]) -> list[list[str] | Exception]:
        lost = "the model failed: no answer came"
        return [RuntimeError(self._errors.get((tile.sha256, tile.prompt), lost)) for tile in tiles]


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
