"""shards ─pretrain─▶ checkpoints, weights: Ray Train starts the ranks and restarts them after a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray
import ray.train
from ray.train import LoggingConfig
from ray.train.torch import TorchConfig
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

from urbanclip_ray import dataflow
from urbanclip_ray.cluster import scaling_config
from urbanclip_ray.config import ConfigError, RunConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.pretrained import download_start, file_sha256, identify_start, start_file
from urbanclip_ray.model.texts import shown_texts
from urbanclip_ray.model.tokenize import TextTokenizer, open_clip_tokenizer, tokenizer_files, train_bpe
from urbanclip_ray.model.weights import WEIGHTS_FILE
from urbanclip_ray.storage import Dataset, Publication, delete_folder, exists, join, list_files, resolve, write_bytes
from urbanclip_ray.train.guards import TrainError
from urbanclip_ray.train.policies import PretrainTrainer, user_error
from urbanclip_ray.train.spec import AfterStep, TrainSpec
from urbanclip_ray.train.worker import train_loop, train_loop_config

WORKER_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch prints every line twice
    "PYTHONWARNINGS": "ignore::FutureWarning",  # DeepSpeed's own calls of collectives that torch renames
}
CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",  # DeepSpeed else warns of the CUDA that torch was built for
    # glibc else gives every large tensor back to the system and faults it in again, a tenth of a step's time
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
INIT_LOGIT_BIAS = -10.0  # SigLIP's: nearly all pairs are negatives, and at first most losses are near zero (arXiv 2303.15343)
START_FOLDER = "start"  # beside the checkpoints, removed when training is done


def pretrain(
    config: RunConfig,
    shards: Dataset,
    publication: Publication,
    after_step: AfterStep | None = None,
    callbacks: Sequence[Any] = (),
) -> None:
    """Train on `config.resources.num_workers` ranks; the same call, with any number, resumes from the newest checkpoint.

    Publishes the folder of weights (see `model.weights`) and `history.json`. `after_step` is called by every rank after
    every step, `callbacks` are Ray Train's.
    """
    parts = shards.manifest.facts["parts"]
    if not parts["train"]:
        raise ConfigError(f"{shards.uri} has no training rows: raise the training share of the split")
    texts = training_texts(config, shards)
    tokenizer = make_tokenizer(config, texts)
    num_cut = tokenizer.count_cut(texts)
    print(f"{num_cut} of {len(texts)} training texts are longer than the model's {tokenizer.context_length} tokens and are cut")
    vocab_size = tokenizer.vocab_size if config.model.tokenizer == "bpe" else None
    logit_bias = INIT_LOGIT_BIAS if config.train.contrastive_loss == "sigmoid" else None
    spec = TrainSpec(
        config=config,
        shards_uri=shards.uri,
        open_clip_config=open_clip_config(config.model, vocab_size, logit_bias=logit_bias),
        tokenizer_files=tokenizer_files(tokenizer),
        start_uri=_place_start(config, publication),
        checkpoints_uri=join(publication.uri, "checkpoints"),
        tensorboard_uri=join(publication.uri, "tensorboard"),
        failures_uri=join(publication.uri, "failures"),
        results_uri=publication.data_uri,
        after_step=after_step,
    )
    dataflow.connect()
    _run_workers(spec, config, publication, callbacks)
    if spec.start_uri:
        publication.facts["start"] = {"weights": identify_start(config.model), "sha256": file_sha256(spec.start_uri)}
        delete_folder(join(publication.uri, START_FOLDER))
    files = [str(info.base_name) for info in list_files(publication.data_uri)]
    publication.facts |= {"weights": sorted(files), "texts_cut": num_cut}
    publication.count(unit="training rows", rows_in=parts["train"], rows_out=parts["train"], rejects={})


def _place_start(config: RunConfig, publication: Publication) -> str:
    """The file that every rank starts from. Published weights are copied into storage: workers then need no hub."""
    if not config.model.pretrained:
        return ""
    if config.model.pretrained_is_file:
        return start_file(config.model)
    uri = join(publication.uri, START_FOLDER, WEIGHTS_FILE)
    if not exists(uri):
        write_bytes(uri, Path(download_start(config.model)).read_bytes())
    return uri


def training_texts(config: RunConfig, shards: Dataset) -> list[str]:
    """What the training rows can show the model: every sentence, or every whole description."""
    rows = shards.read(["row_id", "texts"], filters=pc.field("part") == "train").sort_by("row_id")["texts"].to_pylist()
    return [text for texts in rows for text in shown_texts(texts, config.train.text_mode)]


def make_tokenizer(config: RunConfig, texts: list[str]) -> TextTokenizer:
    """The run's tokenizer: CLIP's, or a BPE trained on the texts of the training rows alone."""
    context_length = open_clip_config(config.model, vocab_size=0)["text_cfg"]["context_length"]
    if config.model.tokenizer == "open_clip":
        return open_clip_tokenizer(context_length)
    return train_bpe(texts, config.model.vocab_size, context_length)


def _run_workers(spec: TrainSpec, config: RunConfig, publication: Publication, callbacks: Sequence[Any]) -> None:
    state_uri = join(publication.uri, "ray_train", publication.attempt)
    filesystem, path = resolve(join(publication.uri, "ray_train"))
    resources = config.resources
    counts = config.worker_counts()
    trainer = PretrainTrainer(
        train_loop,
        worker_counts=counts,
        train_loop_config=train_loop_config(spec),
        torch_config=TorchConfig(timeout_s=config.train.collective_timeout_s),
        scaling_config=scaling_config(resources, counts[0] if len(counts) == 1 else (counts[0], counts[-1])),
        run_config=ray.train.RunConfig(
            name=publication.attempt,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT | ({} if resources.use_gpu else CPU_ENVIRONMENT)},
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=list(callbacks),
        ),
    )
    try:
        with _own_cluster_named():
            trainer.fit()
    except ray.train.WorkerGroupError as failure:
        if (reason := user_error(failure)) is not None:
            raise TrainError(str(reason)) from failure
        raise
    delete_folder(state_uri)  # Ray's own state of a finished run; our checkpoints lie elsewhere


@contextmanager
def _own_cluster_named() -> Iterator[None]:
    """Ray Train's processes know their cluster's address.

    Its watchdog asks whether the run is still alive by an address that it looks up. Without one in its environment that is
    the Ray which this machine started last, whoever it belongs to; that one knows nothing of the run, and the watchdog
    then takes the workers' places away.
    """
    name = "RAY_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add(name)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
