"""Between finished datasets and Ray Data: connect to Ray, read a dataset, write one in its fixed schema."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import Block, BlockAccessor
from ray.data.datasource.datasink import TaskContext

from urbanclip_ray import metrics
from urbanclip_ray.config import ActorsConfig, ConfigError, TasksConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.filesystems import STORES_VARIABLE, stores_environment
from urbanclip_ray.logs import logs_environment, say
from urbanclip_ray.parquet_files import open_parquet, write_parquet
from urbanclip_ray.storage import Dataset, Publication, explain_os_error, join, resolve

JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray's job server gives the process that it starts
ACCESS_FIX = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file that holds the cluster's token"

CONNECT_TIMEOUT_S = 10.0
# Ray ends idle workers after a second where there are more than CPUs, as there are on a machine of two: the next task then
# waits ten seconds until another one has imported torch.
OWN_RAY = {"_system_config": {"idle_worker_killing_time_threshold_ms": 60_000}}

# An actor with a whole CPU on the last free one leaves none to the tasks that read for it and write what it makes, and all of
# them wait for ever: Ray Data starts actors first. So actors on CPUs leave a little, and such tasks take a little.
ACTOR_CPUS = 0.8
CPUS_BESIDE_ACTORS = 0.1
# Of a cluster that Ray Data keeps for its operators in equal parts; with half of it, its default, two actors, their readers and
# their writers do not fit on two CPUs.
RESERVED_SHARE = 0.2
ROWS_PER_READ = 256  # tiles are some tens of kilobytes
# Ray Data looks for ended tasks every 0.1 s, and a core waits for its next one until then: tasks last some seconds, if there
# are enough of them for every core.
ROWS_PER_TASK = 4096
TASKS_PER_CPU = 3
ANY_ACTOR = ActorsConfig()


class ClusterError(UserError, RuntimeError):
    """A cluster that cannot be joined; the message names its address and the fix."""


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` (set inside a submitted job), else start a Ray of our own on this machine.

    A Ray that happens to run on this machine is left alone unless the address says so. Raises :class:`ClusterError`, and
    ConfigError where this process joined a Ray that knows other `stores`.
    """
    if ray.is_initialized():
        _refuse_other_stores()
    else:
        _join(os.environ.get("RAY_ADDRESS") or "local")
    if not sys.stderr.isatty():
        logging.getLogger("ray.data").setLevel(logging.WARNING)  # bars are for terminals, a log wants no frames
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.print_on_execution_start = False
    context.op_resource_reservation_ratio = RESERVED_SHARE


def _join(address: str) -> None:
    settings = stores_environment() | logs_environment()
    environment = {"env_vars": settings} if settings else None  # without one, workers start quicker
    try:
        _refuse_silence(address)
        joined = ray.init(address=address, runtime_env=environment, **(OWN_RAY if address == "local" else {}))
        say(where_to_look(joined.dashboard_url))
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(f"RAY_ADDRESS={address} asks for a token: {error.message}; {ACCESS_FIX}") from None
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster can be joined at RAY_ADDRESS={address} ({error}): correct the address, or unset it to start a "
            f"Ray on this machine; where the cluster asks for a token, {ACCESS_FIX}"
        ) from None


def _refuse_other_stores() -> None:
    known = ray.get_runtime_context().runtime_env.get("env_vars", {})
    if known.get(STORES_VARIABLE) != stores_environment().get(STORES_VARIABLE):
        raise ConfigError(
            "stores: this process joined Ray with other ones, and Ray's workers would not know these: call ray.shutdown() "
            "before this run, or leave ray.init to it"
        )


def _refuse_silence(address: str) -> None:
    """Raise ConnectionError where nothing listens at `host:port`: Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConnectionError(f"{host}:{port}: {error}") from error


def log_folder() -> str:
    """Where the logs of this node's workers are."""
    node = ray._private.worker._global_node
    return str(node.get_logs_dir_path()) if node else "/tmp/ray/session_latest/logs"  # noqa: S108 Ray's own default


def where_to_look(dashboard: str | None) -> str:
    """Where the cluster that this process joined shows what it does; `dashboard` is `host:port`."""
    node_id = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    submitted = json.loads(os.environ.get(JOB_CONFIG_VARIABLE) or "{}").get("metadata", {}).get("job_submission_id")
    places = {
        "dashboard": f"http://{dashboard}" if dashboard else "none (Ray was started without one)",
        "logs": f"ray job logs --follow {submitted}" if submitted else log_folder(),
        "metrics": f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics",
    }
    return "where to look: " + ", ".join(f"{name} {place}" for name, place in places.items())


def has_dashboard() -> bool:
    """Whether the cluster that this process is connected to has Ray's dashboard, and with it its state API."""
    return bool(ray._private.worker.get_dashboard_url())


def map_files(
    dataset: Dataset,
    columns: list[str],
    function: Callable[[pa.Table], pa.Table],
    *,
    rows_per_batch: int | None = ROWS_PER_READ,
) -> ray.data.Dataset:
    """A function from table to table over the rows of a finished dataset, in order, by stateless tasks.

    Without `rows_per_batch` a file is one table. What is read is used in the same task and not carried to another. Ray's own
    reader packs files into reads of up to 128 MB before it spreads them, which gives all 8,000 tiles of a city to one core.
    """
    num_tasks = max(dataset.manifest.rows_out // ROWS_PER_TASK, TASKS_PER_CPU * _num_cpus())
    return _read(dataset, columns, function, rows_per_batch, num_tasks, {})


def read_for_actors(dataset: Dataset, columns: list[str], num_actors: int) -> ray.data.Dataset:
    """The rows of a finished dataset where actors take them."""
    return _read(dataset, columns, lambda rows: rows, ROWS_PER_READ, None, beside_actors(num_actors))


def beside_actors(num_actors: int) -> dict[str, Any]:
    """For tasks of `map_batches`: they find room beside actors, and are one for each at most, as each takes 230 MB."""
    return {"compute": ray.data.TaskPoolStrategy(size=num_actors), "num_cpus": CPUS_BESIDE_ACTORS}


def _read(
    dataset: Dataset,
    columns: list[str],
    function: Callable[[pa.Table], pa.Table],
    rows_per_batch: int | None,
    num_tasks: int | None,
    options: dict[str, Any],
) -> ray.data.Dataset:
    """Of a file without rows the function sees an empty table, so that what becomes of it has columns too."""
    filesystem, _ = resolve(dataset.uri)

    def read_file(batch: pa.Table) -> Iterator[pa.Table]:
        for path in batch["path"].to_pylist():
            with open_parquet(filesystem, path) as file:
                if rows_per_batch is None or file.num_rows == 0:
                    yield function(file.read(columns))
                    continue
                for rows in file.batches(columns, rows_per_batch):
                    yield function(rows)

    return paths_of(dataset, num_tasks).map_batches(read_file, batch_size=None, batch_format="pyarrow", **options)


def paths_of(dataset: Dataset, most_blocks: int | None = None) -> ray.data.Dataset:
    """Exactly the files that the dataset's manifest names, as rows with a `path`: a block of each, or as many as asked for."""
    paths = dataset.parquet_paths()
    num_blocks = max(1, min(len(paths), most_blocks or len(paths)))
    bounds = [len(paths) * number // num_blocks for number in range(num_blocks + 1)]
    return ray.data.from_arrow([pa.table({"path": paths[first:end]}) for first, end in itertools.pairwise(bounds)])


def actors(num_actors: int, each: ActorsConfig = ANY_ACTOR, *, num_rows: int = 1, rows_per_batch: int = 1) -> dict[str, Any]:
    """At most so many actors for `map_batches`, by default each with a share of a GPU alone or with most of a CPU.

    On CPUs as many of them start at once as there are CPUs and batches: Ray Data adds an actor where its budget has a CPU to
    spare, and the tasks that read for the first one have taken that.
    """
    options: dict[str, Any] = _placed(each.memory_per_actor_bytes, each.node_labels)
    if each.accelerator_type:
        options["accelerator_type"] = each.accelerator_type
    if each.gpus_per_actor:
        compute = ray.data.ActorPoolStrategy(min_size=1, max_size=num_actors)
        return options | {"compute": compute, "num_gpus": each.gpus_per_actor, "num_cpus": each.cpus_per_actor}
    num_cpus = each.cpus_per_actor or ACTOR_CPUS
    at_once = max(1, min(num_actors, -(-num_rows // rows_per_batch), int(_num_cpus() / max(1.0, num_cpus))))
    return options | {"compute": ray.data.ActorPoolStrategy(min_size=at_once, max_size=num_actors), "num_cpus": num_cpus}


def tasks(each: TasksConfig) -> dict[str, Any]:
    """What each task of `map_batches` is given."""
    return {"num_cpus": each.cpus_per_task} | _placed(each.memory_per_task_bytes, each.node_labels)


def _placed(memory_bytes: int, labels: dict[str, str]) -> dict[str, Any]:
    return ({"memory": memory_bytes} if memory_bytes else {}) | ({"label_selector": labels} if labels else {})


def _num_cpus() -> int:
    """Of the cluster as it is now; one that has yet to grow may have none."""
    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def conform(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """A batch as a table in a dataset's schema; a missing or an extra column is a mistake of ours and raises."""
    if set(columns) != set(schema.names):
        raise AssertionError(f"columns {sorted(columns)} are not those of the schema {sorted(schema.names)}")
    return pa.table([pa.array(columns[field.name], type=field.type) for field in schema], schema=schema)


def write(
    rows: ray.data.Dataset,
    publication: Publication,
    *,
    max_rows_per_file: int | None = None,
    num_actors: int | None = None,
) -> None:
    """Run the Ray Data job and write its rows below the publication, in order; `num_actors` where actors make them."""
    options = {"num_cpus": CPUS_BESIDE_ACTORS} if num_actors else None
    try:
        rows.write_datasink(OrderedParquet(publication, max_rows_per_file), ray_remote_args=options, concurrency=num_actors)
    except OSError as error:
        cause = getattr(error, "cause", None)  # Ray's wrapper is an OSError too, but without the number of a full disk
        raise explain_os_error(cause if isinstance(cause, OSError) else error, publication.uri) from error


class OrderedParquet(ray.data.Datasink[None]):
    """Parquet files whose rows lie as they came: Ray's own sink lets threads reorder the rows of a file.

    A task that is run again writes over its own files, whose names are its number.
    """

    def __init__(self, publication: Publication, max_rows_per_file: int | None) -> None:
        self._uri = publication.data_uri
        self._tags = {"run": publication.run, "stage": publication.stage}
        self._max_rows_per_file = max_rows_per_file

    def write(self, blocks: Iterable[Block], ctx: TaskContext) -> None:
        table = pa.concat_tables([BlockAccessor.for_block(block).to_arrow() for block in blocks])
        step = self._max_rows_per_file or max(1, table.num_rows)
        for number, first in enumerate(range(0, table.num_rows, step)):
            filesystem, path = resolve(join(self._uri, f"part-{ctx.task_idx:06d}-{number:04d}.parquet"))
            rows = table.slice(first, step)
            metrics.BYTES_WRITTEN.add(write_parquet(rows, path, filesystem), **self._tags)
            metrics.ROWS_WRITTEN.add(rows.num_rows, **self._tags)


def collect(rows: ray.data.Dataset) -> list[pa.Table]:
    """Run the job and bring its rows into memory, as blocks; empty ones are left out, for they may lack columns."""
    tables: list[pa.Table] = ray.get(rows.to_arrow_refs())
    return [table for table in tables if table.num_rows]


def map_rows(rows: list[dict[str, Any]], function: Callable[[pa.Table], pa.Table], *, rows_per_task: int) -> list[pa.Table]:
    """What a function makes of rows that the driver holds, so many in each stateless task; see :func:`collect`."""
    table = pa.Table.from_pylist(rows)
    blocks = [table.slice(start, rows_per_task) for start in range(0, table.num_rows, rows_per_task)]
    return collect(map_tables(ray.data.from_arrow(blocks), function, batch_size=rows_per_task))


def map_tables(
    rows: ray.data.Dataset, function: Callable[[pa.Table], pa.Table], *, batch_size: int, each: TasksConfig | None = None
) -> ray.data.Dataset:
    """Apply a function from table to table in stateless tasks, of one CPU each where nothing else is said."""
    return rows.map_batches(function, batch_size=batch_size, batch_format="pyarrow", **(tasks(each) if each else {}))
