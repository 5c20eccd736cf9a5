"""The stages that a run's config adds to the walk: baselines that are trained, and encoders that are judged beside ours.

`trained_NAME` is a baseline's weights, `baseline_NAME` its embeddings; `also_NAME` the embeddings of weights from elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from urbanclip_ray.config import BaselineName, RunConfig
from urbanclip_ray.places import weights_folder
from urbanclip_ray.stages import STAGES, Run, Stage, adapt, embed_content, pretrained_content
from urbanclip_ray.storage import Publication, dataset_uri, find_dataset

TRAIN_KEYS = (
    *("epochs", "global_batch_size", "lr", "warmup_share", "weight_decay", "beta1", "beta2", "eps", "clip_norm"),
    *("precision", "augment"),
)  # of the pretraining, which every baseline with gradients follows
OWN_KEYS: dict[BaselineName, tuple[str, ...]] = {
    "pca": ("pca_side_px",),
    "autoencoder": (),
    "resnet18": (),
    "tile2vec": ("neighbour_km", "num_neighbours", "tile2vec_margin", "tile2vec_norm_weight"),
    "simclr": ("neighbour_km", "num_neighbours", "simclr_temperature", "simclr_projection"),
    "image_only": (),
}


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The walk of a run: what every run has, with the representations of its config before retrieval and probe."""
    embedded: list[Stage] = []
    if config.embed.features != "embedding":
        parents: tuple[str, ...] = ("tiles", "pretrain")
        embedded.append(Stage("pretrained_features", "embed", parents, pretrained_content, _features, _is_probed))
    for name in config.baselines.names:
        parents, make = ("tiles", f"trained_{name}"), partial(_embed_baseline, name=name)
        embedded.append(Stage(f"baseline_{name}", "embed", parents, embed_content, make, lambda run: run.has_labels))
    for other in config.embed.also:
        content, make = partial(_also_content, name=other), partial(_embed_also, name=other)
        embedded.append(Stage(f"also_{other}", "embed", ("tiles",), content, make, lambda run: run.has_labels))
    names = tuple(stage.name for stage in embedded)
    stages: list[Stage] = []
    for stage in STAGES:
        if stage.name == "retrieval":
            stages += embedded
        stages.append(stage._replace(parents=stage.parents + names) if stage.name == "probe" else adapt(stage, config))
        if stage.name == "pretrain":
            stages += [_trained(name) for name in config.baselines.names]
    return tuple(stages)


def _trained(name: BaselineName) -> Stage:
    parents = ("tiles", "splits", "labels") if name == "resnet18" else ("tiles", "splits")
    content, make = partial(_trained_content, name=name), partial(_train, name=name)
    return Stage(f"trained_{name}", "baselines", parents, content, make, lambda _: True)


def _is_probed(run: Run) -> bool:
    return run.has_pretrained and run.has_labels


def _features(run: Run, publication: Publication) -> None:
    _embed(run, run.weights_uri(), publication)


def _embed_baseline(run: Run, publication: Publication, name: str) -> None:
    _embed(run, weights_folder(run.datasets[f"trained_{name}"]), publication)


def _embed_also(run: Run, publication: Publication, name: str) -> None:
    _embed(run, run.encoder_uri(name), publication)


def _embed(run: Run, uri: str, publication: Publication) -> None:
    from urbanclip_ray.evaluate.embed import embed_tiles

    config = run.config
    embed_tiles(run.datasets["tiles"], uri, config.embed, config.pixels, publication, features=config.embed.features)


def _also_content(run: Run, name: str) -> dict[str, Any]:
    return embed_content(run) | {"weights_digest": run.also_digests[name]}


def _train(run: Run, publication: Publication, name: BaselineName) -> None:
    """Wait for this baseline; the first that is waited for starts all that are missing, so that they train side by side."""
    from urbanclip_ray.evaluate.trained.train import BaselineWork, publish_baseline, start_baseline

    work = BaselineWork(run.config, run.datasets["tiles"], run.datasets["splits"], run.datasets.get("labels"))
    for other in run.config.baselines.names:
        if other not in run.baseline_tasks and (other == name or not _is_made(run, _trained(other))):
            run.baseline_tasks[other] = start_baseline(other, work)
    publish_baseline(run.baseline_tasks[name], publication)


def _is_made(run: Run, stage: Stage) -> bool:
    parents = {parent: run.datasets[parent] for parent in stage.parents if parent in run.datasets}
    return find_dataset(dataset_uri(run.config.storage, run.config.run, stage.name, stage.content(run), parents)) is not None


def _trained_content(run: Run, name: BaselineName) -> dict[str, Any]:
    """What decides a baseline's weights, beside the tiles and the split: nothing of captions or of the probe's heads."""
    config = run.config
    own, train, model = config.baselines.content(), config.train.content(), config.model.content()
    content: dict[str, Any] = {"name": name, "seed": own["seed"], "outer": config.split.outer}
    content["transductive"] = config.split.transductive
    content |= {"pixels": config.pixels.content(), **{key: own[key] for key in OWN_KEYS[name]}}
    if name == "pca":
        return content
    content |= {"train": {key: train[key] for key in TRAIN_KEYS} | {"lr": own["lr"] or train["lr"]}}
    content |= {key: model[key] for key in ("architecture", "patch_dropout")}
    if name == "image_only":
        content |= {"init_temperature": model["init_temperature"], "max_logit_scale": train["max_logit_scale"]}
    if name == "resnet18":
        start = config.baselines.resnet18_weights
        content |= {"indicators": config.probe.indicators, "target": config.probe.target, "targets": config.probe.targets}
        content |= {"weights": _sha256(start)} if start else {}
    return content


def _sha256(uri: str) -> str:
    from urbanclip_ray.model.pretrained import file_sha256

    return file_sha256(uri, "baselines.resnet18_weights")
