"""`--check`: whether this cluster can do a run, tried out in under a minute; every row says what to mend."""

from __future__ import annotations

import hashlib
import platform
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.train
from rich.table import Table
from rich.text import Text

from urbanclip_ray import dataflow
from urbanclip_ray.cluster import Cluster, on_node, read_cluster, scaling_config, worker_resources
from urbanclip_ray.config import RunConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.libraries import library_versions
from urbanclip_ray.plan import is_asked_for, walk
from urbanclip_ray.preflight import (
    PreflightError,
    describe_places,
    list_demands,
    probe_storage,
    refuse_impossible,
    refuse_paths_of_one_host,
    refuse_uploaded_paths,
)
from urbanclip_ray.remote_errors import explain_error
from urbanclip_ray.stages import Run
from urbanclip_ray.storage import delete_folder, exists, join, list_files, resolve, write_bytes
from urbanclip_ray.terminal import counted, open_console

NODE_TIMEOUT_S = 20.0
COUNT_TIMEOUT_S = 5.0
ALL_REDUCE_TIMEOUT_S = 120.0  # two processes that import torch, from a cold disk or beside other work
STORAGE_FIX = "mend what the error names, or set --storage to a place that every node can write"


class NodeReport(NamedTuple):
    """What one node found; empty errors where all is well."""

    versions: dict[str, str]
    storage_error: str
    source_error: str


class Finding(NamedTuple):
    """One row: `passed` is None where the check was not needed or not possible."""

    name: str
    passed: bool | None
    found: str
    fix: str = ""


def check_run(given: RunConfig, only: Sequence[str] | None) -> bool:
    """Try out what the job's stages need, print a table, and say whether nothing failed."""
    findings: list[Finding] = []
    table = Table(title=f"check of run {given.run}", title_justify="left", show_lines=True)
    for name in ("check", "", "found"):
        table.add_column(name, overflow="fold")
    for finding in _findings(given, only):
        findings.append(finding)
        text = finding.found + (f"\nfix: {finding.fix}" if finding.fix else "")
        table.add_row(finding.name, {True: "passed", False: "FAILED", None: "-"}[finding.passed], Text(text))  # no markup
    open_console().print(table)
    return all(finding.passed is not False for finding in findings)


def _findings(given: RunConfig, only: Sequence[str] | None) -> list[Finding]:
    findings = [attempt("paths", partial(refuse_uploaded_paths, given), "none lies in an uploaded working directory")]
    config = Run(given).config
    try:
        dataflow.connect()
    except UserError as error:
        return [*findings, Finding("Ray", False, str(error))]
    cluster = read_cluster()
    hosts = f"{counted(len(cluster.nodes), 'node')} on {counted(len(cluster.hosts), 'host')}, Ray {ray.__version__}"
    findings += [
        Finding("Ray", True, hosts),
        attempt("hosts", partial(refuse_paths_of_one_host, config, cluster), "every host sees the paths of the run"),
        *check_nodes(config, cluster),
    ]
    names = [stage.name for stage in walk(config, only) if is_asked_for(stage, only)]
    for demand in list_demands(config, names):
        places = describe_places(demand, cluster)
        findings.append(attempt("resources", partial(refuse_impossible, demand, cluster), places))
    if not {"pretrain", "search"} & set(names):
        findings.append(Finding("all-reduce", None, "this job does not train"))
    elif any(finding.passed is False for finding in findings):
        findings.append(Finding("all-reduce", None, "not tried: mend the above first"))
    else:
        findings.append(check_all_reduce(config))
    return findings


def attempt(name: str, refuse: Callable[[], None], found: str) -> Finding:
    """A refusal of :mod:`urbanclip_ray.preflight` as a row."""
    try:
        refuse()
    except PreflightError as error:
        return Finding(name, False, str(error))
    return Finding(name, True, found)


def check_nodes(config: RunConfig, cluster: Cluster) -> list[Finding]:
    """Storage, source and versions, seen from every node at once."""
    uri = join(config.storage, f".check-{secrets.token_hex(4)}")
    source = getattr(config.source, "uri", "")
    tasks = {node.node_id: on_node(report_node, node.node_id).remote(uri, node.node_id, source) for node in cluster.nodes}
    deadline = time.monotonic() + NODE_TIMEOUT_S
    reports: dict[str, NodeReport] = {}
    silent: dict[str, str] = {}
    for node in cluster.nodes:
        try:
            reports[node.node_id] = ray.get(tasks[node.node_id], timeout=max(0.1, deadline - time.monotonic()))
        except Exception as error:  # whatever stops a task on a node is a finding
            silent[node.node_id] = _last_line(error)
            ray.cancel(tasks[node.node_id], force=True)
    return [
        _nodes_finding(cluster, silent),
        _storage_finding(config, cluster, uri, reports),
        *([_source_finding(source, reports)] if source else []),
        _versions_finding(reports),
    ]


def report_node(uri: str, node_id: str, source: str) -> NodeReport:
    """On one node: try the storage, leave a file for the others, look at the source, name the versions."""
    storage_error = source_error = ""
    try:
        probe_storage(uri)
        write_bytes(join(uri, node_id), b"")
    except Exception as error:  # a row of the table, not a failed task
        storage_error = _last_line(error)
    try:
        if source and not exists(source):
            source_error = f"{source} is not there"
    except Exception as error:  # the same: every error is what this node found
        source_error = _last_line(error)
    return NodeReport(installed_versions(), storage_error, source_error)


def count_marks(uri: str) -> int:
    """How many nodes' files are seen from here; they are removed."""
    try:
        return len(list_files(uri, recursive=False))
    finally:
        delete_folder(uri)


def installed_versions() -> dict[str, str]:
    """What must be equal on all nodes; our own code is compared by its text, since it travels without a version."""
    package = Path(__file__).parent
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()[:12]
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python} | library_versions() | {"urbanclip_ray code": code}


def _nodes_finding(cluster: Cluster, silent: Mapping[str, str]) -> Finding:
    if not silent:
        return Finding("nodes", True, f"all {len(cluster.nodes)} answer")
    node = next(node for node in cluster.nodes if node.node_id in silent)
    return Finding(
        "nodes",
        False,
        f"{len(silent)} of {len(cluster.nodes)} do not answer; {node.host}: {silent[node.node_id]}",
        "install urbanclip_ray there, or submit the job with --working-dir; look at `ray status`",
    )


def _storage_finding(config: RunConfig, cluster: Cluster, uri: str, reports: Mapping[str, NodeReport]) -> Finding:
    name, here = "storage", ray.get_runtime_context().get_node_id()
    counting = on_node(count_marks, here).remote(uri)
    for node in cluster.nodes:
        if node.node_id in reports and reports[node.node_id].storage_error:
            return Finding(name, False, f"from {node.host}: {reports[node.node_id].storage_error}", STORAGE_FIX)
    try:
        seen = ray.get(counting, timeout=COUNT_TIMEOUT_S)
    except Exception as error:  # of the task or of waiting for it: a finding either way
        return Finding(name, False, _last_line(error), STORAGE_FIX)
    if seen != len(reports):
        fix = "use s3://bucket/prefix, or a mount that every host has"
        return Finding(name, False, f"{config.storage} is not one place: {seen} of {len(reports)} nodes' files are there", fix)
    return Finding(name, True, f"{config.storage}: read, written and conditionally put from {counted(len(reports), 'node')}")


def _source_finding(source: str, reports: Mapping[str, NodeReport]) -> Finding:
    errors = [report.source_error for report in reports.values() if report.source_error]
    if errors:
        fix = "correct source.uri, or put the tiles where every node can read them"
        return Finding("source", False, f"from {len(errors)} of {len(reports)} nodes: {errors[0]}", fix)
    return Finding("source", True, f"{source} is seen from {counted(len(reports), 'node')}")


def _versions_finding(reports: Mapping[str, NodeReport]) -> Finding:
    ours = installed_versions()
    others: defaultdict[str, set[str]] = defaultdict(set)
    for report in reports.values():
        for name in ours.keys() | report.versions.keys():
            if report.versions.get(name) != ours.get(name):
                others[name].add(str(report.versions.get(name)))
    if others:
        shown = [f"{name} {ours.get(name)} here, {' and '.join(sorted(found))} there" for name, found in others.items()]
        return Finding("versions", False, "; ".join(shown), "install the same constraints.txt, or the same image, everywhere")
    return Finding("versions", True, ", ".join(f"{name} {version}" for name, version in ours.items()))


def check_all_reduce(config: RunConfig) -> Finding:
    """A Ray Train run of the run's own workers that adds up their ranks."""
    name, uri = "all-reduce", join(config.storage, f".check-{secrets.token_hex(4)}")
    here = ray.get_runtime_context().get_node_id()
    task = on_node(all_reduce, here).remote(config, uri)
    start = time.monotonic()
    try:
        backend = ray.get(task, timeout=ALL_REDUCE_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(task, force=True)  # ends the workers with it
        available = ray.available_resources()
        free = ", ".join(f"{available.get(name, 0):g} {name}" for name in worker_resources(config.resources))
        return Finding(
            name,
            False,
            f"not done within {ALL_REDUCE_TIMEOUT_S:.0f} s; free now: {free}",
            "wait for other jobs or for nodes that are starting and check again; else see whether nodes reach each other",
        )
    except Exception as error:  # whatever stops Ray Train is a finding
        return Finding(name, False, _last_line(error), "see whether the nodes reach each other on all ports")
    finally:
        delete_folder(uri)
    num_workers = config.worker_counts()[0]
    seconds = time.monotonic() - start
    return Finding(name, True, f"{counted(num_workers, 'worker')} over {backend} in {seconds:.0f} s")


def all_reduce(config: RunConfig, uri: str) -> str:
    """Run the workers and return the backend that they spoke; raises where the sum is wrong."""
    from ray.train.torch import TorchConfig, TorchTrainer

    filesystem, path = resolve(uri)
    trainer = TorchTrainer(
        add_up_ranks,
        torch_config=TorchConfig(timeout_s=int(ALL_REDUCE_TIMEOUT_S)),
        scaling_config=scaling_config(config.resources, config.worker_counts()[0]),
        run_config=ray.train.RunConfig(
            name="check",
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    found: dict[str, Any] = trainer.fit().return_value
    expected = sum(range(config.worker_counts()[0]))
    if found["sum"] != expected:
        raise AssertionError(f"the ranks add up to {found['sum']}, not {expected}")
    return str(found["backend"])


def add_up_ranks() -> dict[str, Any]:
    """One rank's part."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    total = torch.tensor([float(dist.get_rank())], device=get_device())
    dist.all_reduce(total)
    return {"sum": total.item(), "backend": dist.get_backend()}


def _last_line(error: BaseException) -> str:
    """What went wrong in one line: a user's error in our own words, else the last line of the text."""
    message = explain_error(error) or str(error).strip() or type(error).__name__
    return message.splitlines()[-1].strip()
