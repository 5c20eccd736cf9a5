"""Which keys of a config name a place that a run reads or writes, and where the weights behind such a place lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from urbanclip_ray.captioners.model_files import is_directory
from urbanclip_ray.config import NO_WEIGHTS, CaptionConfig, ConfigError, RunConfig
from urbanclip_ray.storage import Dataset, absolute, exists, find_dataset, join, read_bytes


class Parts(NamedTuple):
    """A place, and what stands before and behind it in a value, such as ARCHITECTURE@ and #BASELINE."""

    before: str
    place: str
    after: str


def list_places(config: RunConfig) -> dict[str, str]:
    """The keys that name a place which a run reads or writes, with their paths and URIs."""
    return {".".join(map(str, keys)): place for keys, (_, place, _) in _places(config) if place}


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whose local places do not depend on the folder that a process runs in."""
    tree = config.model_dump(mode="json")
    for (*sections, key), (before, place, after) in _places(config):
        if place:
            section: Any = tree
            for name in sections:
                section = section[name]
            section[key] = f"{before}{absolute(place)}{after}"
    return RunConfig.model_validate(tree)


def _places(config: RunConfig) -> Iterator[tuple[tuple[str | int, ...], Parts]]:
    """The way through the config to every value that may hold a place, and its parts."""
    yield ("storage",), _whole(config.storage)
    for name in ("uri", "release", "pixels"):
        yield ("source", name), _whole(getattr(config.source, name, ""))
    yield ("labels", "csv"), _whole(config.labels.csv)
    for name, raster in config.labels.rasters.items():
        yield ("labels", "rasters", name, "uri"), _whole(raster.uri)
    yield ("caption", "model"), _split_model(config.caption)
    yield ("refine", "rules_file"), _whole(config.refine.rules_file)
    yield ("refine", "consistency", "weights"), _split_place(config.refine.consistency.weights)
    for number, uri in enumerate(config.pack.also):
        yield ("pack", "also", number), _whole(uri)
    if config.model.pretrained_is_file:
        yield ("model", "pretrained"), _whole(config.model.pretrained)
    if config.embed.weights != NO_WEIGHTS:
        yield ("embed", "weights"), _whole(config.embed.weights)
    for name, uri in config.embed.also.items():
        yield ("embed", "also", name), _split_place(uri)
    yield ("baselines", "resnet18_weights"), _whole(config.baselines.resnet18_weights)
    yield ("report", "experiment"), _whole(config.report.experiment)


def _whole(place: str) -> Parts:
    return Parts("", place, "")


def _split_place(uri: str) -> Parts:
    """`local-dir:` or `ARCHITECTURE@`, the place, and `#BASELINE` of an item of `embed.also`; each may be empty."""
    before = ""
    if uri.startswith("local-dir:"):
        before, uri = "local-dir:", uri.removeprefix("local-dir:")
    elif "@" in uri and "/" not in uri.partition("@")[0]:
        architecture, _, uri = uri.partition("@")
        return Parts(f"{architecture}@", uri, "")
    uri, hash_mark, name = uri.partition("#")
    return Parts(before, uri, f"{hash_mark}{name}")


def _split_model(caption: CaptionConfig) -> Parts:
    """The same of `caption.model`, which has no place where it is a name on the hub or of an endpoint."""
    if caption.captioner == "coca":
        return _split_place(caption.model)
    is_place = caption.has_weights and is_directory(caption.model)
    return _whole(caption.model) if is_place else Parts(caption.model, "", "")


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
    try:
        current = {name: str(place) for name, place in json.loads(read_bytes(join(run, "run.json")))["datasets"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{run}/run.json is none of ours ({error!r:.100}): name another run") from None
    if stage not in current:
        raise ConfigError(f"{run}: that run has no {stage}; it has {', '.join(current)}")
    return join(run, current[stage])


def weights_folder(trained: Dataset) -> str:
    """Where the weights of a pretraining, or of a baseline, lie in its dataset."""
    from urbanclip_ray.evaluate.trained.encoder_files import ENCODER_CONFIG_FILE
    from urbanclip_ray.model.weights import WEIGHTS_FILE

    name = ENCODER_CONFIG_FILE if trained.manifest.stage.startswith("trained_") else WEIGHTS_FILE
    return trained.file_uri(name).rsplit("/", 1)[0]
