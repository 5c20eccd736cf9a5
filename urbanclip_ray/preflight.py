"""Refusals at the start of a run, before any work: what cannot end well is said at once, with the fix."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from urbanclip_ray import dataflow
from urbanclip_ray.cluster import ACCELERATOR_PREFIX, Cluster, Wanted, read_cluster, wanted_actor, wanted_worker
from urbanclip_ray.config import RunConfig, Section
from urbanclip_ray.errors import UserError
from urbanclip_ray.places import list_places
from urbanclip_ray.plan import survey
from urbanclip_ray.stages import Run
from urbanclip_ray.storage import StorageError, delete_folder, join, open_dataset, publish
from urbanclip_ray.terminal import counted

EMBEDDED_PREFIXES = ("pretrained_", "baseline_", "also_")  # of stages that a config adds


class PreflightError(UserError, RuntimeError):
    """A run that cannot end well here; the message says what to change."""


class Demand(NamedTuple):
    """`num_workers` workers that a run needs at the same time."""

    what: str
    num_workers: int
    wanted: Wanted
    fix: str


def refuse_unfit_run(given: RunConfig, run: Run, only: Sequence[str] | None) -> None:
    """Raise :class:`PreflightError` where a run cannot end well. `given`: the config before its paths were made absolute.

    A run with nothing left to make needs no cluster and is let through.
    """
    refuse_uploaded_paths(given)
    to_make = [planned.stage.name for planned in survey(run, only) if planned.is_made]
    if not to_make:
        return
    probe_storage(run.config.storage)
    demands = list_demands(run.config, to_make)
    if not demands and not os.environ.get("RAY_ADDRESS"):
        return  # a Ray of our own on this machine, started when a stage needs it
    dataflow.connect()
    cluster = read_cluster()
    refuse_paths_of_one_host(run.config, cluster)
    for demand in demands:
        refuse_impossible(demand, cluster)
        if cluster.places_now(demand.wanted) < demand.num_workers:
            print(f"more nodes must come: {describe_places(demand, cluster)}", flush=True)


def local_places(config: RunConfig) -> dict[str, str]:
    """The keys that name a local path which workers read or write, with their values."""
    places = list_places(config).items()
    return {key: value for key, value in places if "://" not in value or value.startswith("file://")}


def uploaded_directory() -> str | None:
    """The working directory where this process drives a submitted job and runs in an uploaded copy, else None."""
    job = json.loads(os.environ.get(dataflow.JOB_CONFIG_VARIABLE) or "{}")
    return os.getcwd() if (job.get("runtime_env") or {}).get("working_dir") else None


def refuse_uploaded_paths(config: RunConfig) -> None:
    """Relative paths, and any below the directory that was uploaded with a job: every node has a copy of its own."""
    directory = uploaded_directory()
    if directory is None:
        return
    _refuse_below(directory, local_places(config))


def _refuse_below(directory: str, places: dict[str, str]) -> None:
    for key, value in places.items():
        path = os.path.expanduser(value.removeprefix("file://"))
        if not os.path.isabs(path) or os.path.commonpath([os.path.realpath(path), directory]) == directory:
            option = f"--{key} " if key in ("storage", "output") else f"--set {key}="
            raise PreflightError(
                f"{key}={value} lies in the working directory that was uploaded with this job: every node has its own "
                f"copy, and all go with the job. Give {option}s3://bucket/prefix, or an absolute path on a mount that every "
                "node has"
            )


def refuse_paths_of_one_host(config: RunConfig, cluster: Cluster) -> None:
    """Local paths where work may run on several hosts, unless they are declared shared."""
    if not config.resources.shared_filesystem:
        _refuse_several_hosts(local_places(config), cluster)


def refuse_place_of_one_host(key: str, value: str, config: RunConfig) -> None:
    """The same two refusals for one place more, the option `--key`, and for the run's own; it joins the cluster."""
    places = {key: value} if "://" not in value or value.startswith("file://") else {}
    if (directory := uploaded_directory()) is not None:
        _refuse_below(directory, local_places(config) | places)
    dataflow.connect()
    if not config.resources.shared_filesystem:
        _refuse_several_hosts(local_places(config) | places, read_cluster())


def _refuse_several_hosts(places: dict[str, str], cluster: Cluster) -> None:
    if not places or not (len(cluster.hosts) > 1 or cluster.can_add_hosts):
        return
    named = ", ".join(f"{key}={value}" for key, value in places.items())
    hosts = f"{len(cluster.hosts)} hosts: {', '.join(cluster.hosts[:5])}"
    if len(cluster.hosts) == 1:
        hosts = "an autoscaler that adds hosts"
    raise PreflightError(
        f"{named}: local paths, but the cluster has {hosts}. Use s3://bucket/prefix, or, where these paths are "
        "on a mount that every host has, --set resources.shared_filesystem=true"
    )


def list_demands(config: RunConfig, to_make: Sequence[str]) -> list[Demand]:
    """What the stages to make need at the least."""
    demands = []
    if {"pretrain", "search"} & set(to_make):
        demands.append(
            Demand(
                "training worker",
                config.worker_counts()[0],
                wanted_worker(config.resources),
                "lower resources.num_workers, resources.cpus_per_worker or resources.use_gpu"
                + _change(config.resources, "resources", ("memory_per_worker_bytes", "accelerator_type", "node_labels"))
                + (", or set resources.placement=PACK" if config.resources.placement.startswith("STRICT") else ""),
            )
        )
    baselines = config.baselines
    if any(name.startswith("trained_") for name in to_make):
        each = {"CPU": float(baselines.cpus_per_task)} | ({"GPU": baselines.gpus_per_task} if baselines.gpus_per_task else {})
        fix = "lower baselines.cpus_per_task or baselines.gpus_per_task"
        demands.append(Demand("task of a baseline", 1, Wanted(each), fix))
    demands += _demands_of_actors(config, to_make)
    reading = config.ingest
    if "tiles" in to_make and (reading.memory_per_task_bytes or reading.node_labels or reading.cpus_per_task > 1):
        held = {"CPU": reading.cpus_per_task, "memory": float(reading.memory_per_task_bytes)}
        fix = "lower ingest.cpus_per_task" + _change(reading, "ingest", ("memory_per_task_bytes", "node_labels"))
        demands.append(Demand("reading task", 1, Wanted(held, reading.node_labels), fix))
    return demands


def _demands_of_actors(config: RunConfig, to_make: Sequence[str]) -> list[Demand]:
    """One actor of each stage that has some, where its config asks for more than a share of a CPU."""
    embeds = any(name in ("embeddings", "untrained") or name.startswith(EMBEDDED_PREFIXES) for name in to_make)
    caption = config.caption if config.caption.uses_model else config.caption.without_gpus()
    scores = "pairs" in to_make and bool(config.refine.consistency.weights)
    stages = (
        ("captions" in to_make, "captioning actor", "caption", caption),
        (scores, "scoring actor", "refine.consistency", config.refine.consistency),
        (embeds, "embedding actor", "embed", config.embed),
    )
    demands = []
    for is_made, what, section, each in stages:
        wanted = wanted_actor(each)
        if is_made and (wanted.resources or wanted.labels):
            names = ("cpus_per_actor", "memory_per_actor_bytes", "accelerator_type", "node_labels")
            fix = (f"lower {section}.gpus_per_actor" if each.gpus_per_actor else "") + _change(each, section, names)
            demands.append(Demand(what, 1, wanted, fix.removeprefix(", or ")))
    return demands


def _change(section: Section, name: str, keys: Sequence[str]) -> str:
    """Those of the keys that a config sets, as the end of a fix."""
    changed = [key for key in keys if getattr(section, key)]
    return f", or change {' or '.join(f'{name}.{key}' for key in changed)}" if changed else ""


def refuse_impossible(demand: Demand, cluster: Cluster) -> None:
    """More workers than the cluster and its autoscaler can ever hold: Ray would wait for them for ever."""
    ever = cluster.places_ever(demand.wanted)
    if ever is None or ever >= demand.num_workers:
        return
    raise PreflightError(f"{describe_places(demand, cluster)}: {demand.fix}, or add nodes")


def describe_places(demand: Demand, cluster: Cluster) -> str:
    """How many of the workers fit, now and ever, with the numbers behind it."""
    wanted, now, ever = demand.wanted, cluster.places_now(demand.wanted), cluster.places_ever(demand.wanted)
    each = " + ".join(_amount(name, amount) for name, amount in wanted.resources.items()) or "any size"
    each += "".join(f", on nodes with {name}={value}" for name, value in wanted.labels.items())
    counted_names = [name for name in wanted.resources if not name.startswith(ACCELERATOR_PREFIX)]
    have = ", ".join(_amount(name, cluster.total(name)) for name in counted_names)
    if len(counted_names) < len(wanted.resources):
        have += f"; types that there are, or can be started: {', '.join(cluster.accelerators()) or 'none'}"
    later = {None: ", an autoscaler with limits unknown to us", now: ""}.get(
        ever, f", {ever} with all that the autoscaler can start"
    )
    asked = counted(demand.num_workers, demand.what)
    strictly = {"STRICT_PACK": " on one node", "STRICT_SPREAD": " on a node of its own"}.get(wanted.placement, "")
    nodes = counted(len(cluster.nodes), "node")
    return f"{asked} of {each} each{strictly}: {now} fit on {nodes}{f' ({have})' if have else ''}{later}"


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount / 2**30:.3g} GiB of memory"
    return f"type {name.removeprefix(ACCELERATOR_PREFIX)}" if name.startswith(ACCELERATOR_PREFIX) else f"{amount:g} {name}"


def probe_storage(storage: str) -> None:
    """Write, read back, list and conditionally put below `storage` as a stage does; nothing is left behind.

    Raises StorageError or OSError with the place and the fix.
    """
    uri = join(storage, f".probe-{secrets.token_hex(4)}")
    try:
        for attempt in ("first", "second"):  # the second must find the first one's manifest and give way
            with publish(uri, "probe", {}, {}) as publication:
                publication.write_file("probe.txt", attempt.encode())
                publication.facts["attempt"] = attempt
        if open_dataset(uri).manifest.facts != {"attempt": "first"}:
            raise StorageError(f"{storage} ignores conditional writes (If-None-Match), so two runs could overwrite each other")
    finally:
        delete_folder(uri)
