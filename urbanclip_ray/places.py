"""Which keys of a config name a place that a run reads or writes, and where the weights behind such a place lie."""

from __future__ import annotations

import json
from typing import Any

from urbanclip_ray.captioners.model_files import is_directory
from urbanclip_ray.config import NO_WEIGHTS, CaptionConfig, ConfigError, PairsSource, RunConfig, UrbanClipSource, WorldSource
from urbanclip_ray.storage import Dataset, absolute, exists, find_dataset, join, read_bytes


def list_places(config: RunConfig) -> dict[str, str]:
    """The keys that name a place which a run reads or writes, with their paths and URIs."""
    values = {
        "storage": config.storage,
        "source.uri": getattr(config.source, "uri", ""),
        "source.release": getattr(config.source, "release", ""),
        "source.pixels": getattr(config.source, "pixels", ""),
        "labels.csv": config.labels.csv,
        **{f"labels.rasters.{name}": raster.uri for name, raster in config.labels.rasters.items()},
        "caption.model": _split_model(config.caption)[1],
        "refine.rules_file": config.refine.rules_file,
        "refine.consistency.weights": _split_place(config.refine.consistency.weights)[1],
        **{f"pack.also[{number}]": uri for number, uri in enumerate(config.pack.also)},
        "model.pretrained": config.model.pretrained if config.model.pretrained_is_file else "",
        "embed.weights": "" if config.embed.weights == NO_WEIGHTS else config.embed.weights,
        "baselines.resnet18_weights": config.baselines.resnet18_weights,
        **{f"embed.also.{name}": _split_place(uri)[1] for name, uri in config.embed.also.items()},
        "report.experiment": config.report.experiment,
    }
    return {key: value for key, value in values.items() if value}


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whose local places do not depend on the folder that a process runs in."""
    source, model = config.source, config.model
    if not isinstance(source, WorldSource):
        source = source.model_copy(update={"uri": absolute(source.uri)})
    if isinstance(source, UrbanClipSource):
        source = source.model_copy(update={"release": absolute(source.release)})
    if isinstance(source, PairsSource):
        source = source.model_copy(update={"pixels": absolute(source.pixels)})
    if model.pretrained_is_file:
        model = model.model_copy(update={"pretrained": absolute(model.pretrained)})
    weights = config.embed.weights
    also = {name: _make_absolute(_split_place(uri)) for name, uri in config.embed.also.items()}
    embed = config.embed.model_copy(update={"weights": weights if weights == NO_WEIGHTS else absolute(weights), "also": also})
    start = config.baselines.resnet18_weights
    baselines = config.baselines.model_copy(update={"resnet18_weights": absolute(start)})
    caption = config.caption.model_copy(update={"model": _make_absolute(_split_model(config.caption))})
    scored_by = _make_absolute(_split_place(config.refine.consistency.weights))
    consistency = config.refine.consistency.model_copy(update={"weights": scored_by})
    refine = config.refine.model_copy(update={"rules_file": absolute(config.refine.rules_file), "consistency": consistency})
    pack = config.pack.model_copy(update={"also": tuple(absolute(uri) for uri in config.pack.also)})
    report = config.report.model_copy(update={"experiment": absolute(config.report.experiment)})
    rasters = {name: raster.model_copy(update={"uri": absolute(raster.uri)}) for name, raster in config.labels.rasters.items()}
    labels = config.labels.model_copy(update={"csv": absolute(config.labels.csv), "rasters": rasters})
    changed: dict[str, Any] = {"storage": absolute(config.storage), "source": source, "labels": labels, "model": model}
    changed |= {"caption": caption, "refine": refine, "embed": embed, "baselines": baselines}
    changed |= {"report": report, "pack": pack}
    return config.model_copy(update=changed)


def _split_place(uri: str) -> tuple[str, str, str]:
    """`local-dir:` or `ARCHITECTURE@`, the place, and `#BASELINE` of an item of `embed.also`; each may be empty."""
    before = ""
    if uri.startswith("local-dir:"):
        before, uri = "local-dir:", uri.removeprefix("local-dir:")
    elif "@" in uri and "/" not in uri.partition("@")[0]:
        architecture, _, uri = uri.partition("@")
        return f"{architecture}@", uri, ""
    uri, hash_mark, name = uri.partition("#")
    return before, uri, f"{hash_mark}{name}"


def _split_model(caption: CaptionConfig) -> tuple[str, str, str]:
    """The same of `caption.model`, which has no place where it is a name on the hub or of an endpoint."""
    if caption.captioner == "coca":
        return _split_place(caption.model)
    is_place = caption.has_weights and is_directory(caption.model)
    return ("", caption.model, "") if is_place else (caption.model, "", "")


def _make_absolute(parts: tuple[str, str, str]) -> str:
    before, place, after = parts
    return "".join((before, absolute(place), after))


def find_weights(uri: str) -> str:
    """The folder of weights behind a URI: a run stands for its pretraining, RUN#NAME for one of its baselines, a dataset for
    the weights in it; anything else, such as ARCHITECTURE@FILE, for itself.
    """
    before, place, after = _split_place(uri)
    baseline = after.removeprefix("#")
    if before:
        return uri
    if _is_run(place):
        place = _place_in_run(place, f"trained_{baseline}" if baseline else "pretrain")
    elif baseline:
        raise ConfigError(f"{uri}: {place} is no run with a run.json, so it has no baseline {baseline!r}")
    dataset = find_dataset(place)
    return weights_folder(dataset) if dataset else place


def find_shards(uri: str) -> Dataset:
    """The packed shards behind a URI: a run stands for its own."""
    dataset = find_dataset(_place_in_run(uri, "shards") if _is_run(uri) else uri)
    if dataset is None or dataset.manifest.stage != "shards":
        raise ConfigError(f"pack.also: {uri} is neither a run nor its packed shards: name RUN, a folder with a run.json")
    return dataset


def _is_run(uri: str) -> bool:
    return exists(join(uri, "run.json"))


def _place_in_run(run: str, stage: str) -> str:
    current = json.loads(read_bytes(join(run, "run.json")))["datasets"]
    if stage not in current:
        raise ConfigError(f"{run}: that run has no {stage}; it has {', '.join(current)}")
    return join(run, current[stage])


def weights_folder(trained: Dataset) -> str:
    """Where the weights of a pretraining, or of a baseline, lie in its dataset."""
    from urbanclip_ray.evaluate.trained.encoder_files import ENCODER_CONFIG_FILE
    from urbanclip_ray.model.weights import WEIGHTS_FILE

    name = ENCODER_CONFIG_FILE if trained.manifest.stage.startswith("trained_") else WEIGHTS_FILE
    return trained.file_uri(name).rsplit("/", 1)[0]
