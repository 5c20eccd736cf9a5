"""Between finished datasets and Ray Data: connect to Ray, read a dataset, write one in its fixed schema."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray
import ray.data

from urbanclip_ray.config import ConfigError
from urbanclip_ray.filesystems import STORES_VARIABLE, stores_environment
from urbanclip_ray.storage import Dataset, Publication, explain_os_error, resolve


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` (set inside a submitted job), else start a Ray of our own on this machine.

    A Ray that happens to run on this machine is left alone unless the address says so. Raises ConfigError where this
    process joined a Ray that knows other `stores`.
    """
    if ray.is_initialized():
        _refuse_other_stores()
    else:
        settings = stores_environment()
        environment = {"env_vars": settings} if settings else None  # without one, workers start quicker
        ray.init(address=os.environ.get("RAY_ADDRESS") or "local", runtime_env=environment)
    if not sys.stderr.isatty():
        logging.getLogger("ray.data").setLevel(logging.WARNING)  # bars are for terminals, a log wants no frames
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # blocks in order; rows inside a written file may still move
    context.print_on_execution_start = False


def _refuse_other_stores() -> None:
    known = ray.get_runtime_context().runtime_env.get("env_vars", {})
    if known.get(STORES_VARIABLE) != stores_environment().get(STORES_VARIABLE):
        raise ConfigError(
            "stores: this process joined Ray with other ones, and Ray's workers would not know these: call ray.shutdown() "
            "before this run, or leave ray.init to it"
        )


def read(dataset: Dataset, columns: list[str] | None = None) -> ray.data.Dataset:
    """The rows of a finished dataset, exactly the files that its manifest names."""
    filesystem, _ = resolve(dataset.uri)
    return ray.data.read_parquet(dataset.parquet_paths(), filesystem=filesystem, columns=columns, partitioning=None)


def conform(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """A batch as a table in a dataset's schema; a missing or an extra column is a mistake of ours and raises."""
    if set(columns) != set(schema.names):
        raise AssertionError(f"columns {sorted(columns)} are not those of the schema {sorted(schema.names)}")
    return pa.table([pa.array(columns[field.name], type=field.type) for field in schema], schema=schema)


def write(rows: ray.data.Dataset, publication: Publication, *, max_rows_per_file: int | None = None) -> None:
    """Run the Ray Data job and write its rows below the publication."""
    filesystem, path = resolve(publication.data_uri)
    try:
        rows.write_parquet(path, filesystem=filesystem, max_rows_per_file=max_rows_per_file)
    except OSError as error:
        cause = getattr(error, "cause", None)  # Ray's wrapper is an OSError too, but without the number of a full disk
        raise explain_os_error(cause if isinstance(cause, OSError) else error, publication.uri) from error


def map_tables(rows: ray.data.Dataset, function: Callable[[pa.Table], pa.Table], *, batch_size: int) -> ray.data.Dataset:
    """Apply a function from table to table in stateless tasks."""
    return rows.map_batches(function, batch_size=batch_size, batch_format="pyarrow")
