"""Between finished datasets and Ray Data, on a real Ray."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray.data

from urbanclip_ray import dataflow
from urbanclip_ray.config import ActorsConfig, ConfigError, StoreConfig, TasksConfig
from urbanclip_ray.filesystems import STORES_VARIABLE, use_stores
from urbanclip_ray.storage import open_dataset, publish

SCHEMA = pa.schema([pa.field("a", pa.int32()), pa.field("b", pa.string())])


def test_a_batch_takes_the_order_and_the_types_of_the_schema():
    table = dataflow.conform({"b": ["x"], "a": [1]}, SCHEMA)
    assert table.schema == SCHEMA


@pytest.mark.parametrize("columns", [{"a": [1]}, {"a": [1], "b": ["x"], "c": [1]}, {}])
def test_a_missing_or_an_extra_column_is_a_mistake(columns):
    with pytest.raises(AssertionError, match="are not those of the schema"):
        dataflow.conform(columns, SCHEMA)


def test_rows_keep_their_order_through_read_map_and_write(tmp_path, ray_cluster):
    dataflow.connect()
    with publish(str(tmp_path / "a"), "made", {}, {}) as publication:
        for number in range(3):
            publication.write_table(pa.table({"x": list(range(number * 4, number * 4 + 4))}), f"part-{number}.parquet")
    first = open_dataset(str(tmp_path / "a"))
    (Path(first.parquet_paths()[0]).parent / "leftover.parquet").write_bytes(b"of another writer")

    def double(table: pa.Table) -> pa.Table:
        return pa.table({"y": [2 * x for x in table["x"].to_pylist()]})

    with publish(str(tmp_path / "b"), "made", {}, {"a": first}) as publication:
        dataflow.write(dataflow.map_files(first, ["x"], double, rows_per_batch=3), publication)
        assert publication.read(["y"])["y"].to_pylist() == [2 * x for x in range(12)]
    assert open_dataset(str(tmp_path / "b")).read()["y"].to_pylist() == [2 * x for x in range(12)]


def make_numbers(folder: Path, num_files: int, rows_per_file: int):
    with publish(str(folder), "made", {}, {}) as publication:
        for number in range(num_files):
            rows = list(range(number * rows_per_file, (number + 1) * rows_per_file))
            publication.write_table(pa.table({"x": pa.array(rows, pa.int64())}), f"part-{number:03d}.parquet")
        num_rows = num_files * rows_per_file
        publication.count(unit="rows", rows_in=num_rows, rows_out=num_rows, rejects={})
    return open_dataset(str(folder))


def test_a_few_small_files_are_mapped_by_as_many_tasks_as_keep_every_core_busy(tmp_path, ray_cluster):
    dataflow.connect()
    numbers = make_numbers(tmp_path / "a", num_files=40, rows_per_file=3)
    num_tasks = dataflow.TASKS_PER_CPU * int(ray.cluster_resources()["CPU"])
    blocks = dataflow.collect(dataflow.map_files(numbers, ["x"], lambda rows: rows))
    assert len(blocks) == min(40, num_tasks) > 1
    assert pa.concat_tables(blocks)["x"].to_pylist() == list(range(120))


def test_the_function_sees_an_empty_table_of_a_file_without_rows(tmp_path, ray_cluster):
    dataflow.connect()
    numbers = make_numbers(tmp_path / "a", num_files=1, rows_per_file=0)
    doubled = dataflow.map_files(numbers, ["x"], lambda rows: pa.table({"y": pc.multiply(rows["x"], 2)}))
    assert doubled.schema().names == ["y"]
    assert doubled.count() == 0


@pytest.mark.slow
def test_as_many_actors_as_cpus_start_at_once_beside_their_readers_and_writers(tmp_path, ray_cluster):
    class Slowly:  # workers cannot import this file, so it goes to them by value
        def __call__(self, rows: pa.Table) -> pa.Table:
            time.sleep(0.1)  # so that there is work for others
            return rows.append_column("process", pa.array([os.getpid()] * rows.num_rows))

    dataflow.connect()
    num_cpus = int(ray.cluster_resources()["CPU"])
    numbers = make_numbers(tmp_path / "a", num_files=40, rows_per_file=4)
    rows = dataflow.read_for_actors(numbers, ["x"], num_actors=num_cpus + 3)
    rows = rows.map_batches(
        Slowly, batch_size=4, batch_format="pyarrow", **dataflow.actors(num_cpus + 3, num_rows=160, rows_per_batch=4)
    )
    with publish(str(tmp_path / "b"), "made", {}, {"a": numbers}) as publication:
        dataflow.write(rows, publication, num_actors=num_cpus + 3)
        written = publication.read(["x", "process"])
        publication.count(unit="rows", rows_in=160, rows_out=160, rejects={})
    assert written["x"].to_pylist() == list(range(160))
    assert pc.count_distinct(written["process"]).as_py() >= num_cpus


@pytest.mark.parametrize(("num_actors", "num_rows", "at_once"), [(8, 65, 2), (8, 64, 1), (8, 0, 1), (1, 1000, 1)])
def test_no_more_actors_start_than_there_are_batches_or_cpus(ray_cluster, num_actors, num_rows, at_once):
    dataflow.connect()
    assert ray.cluster_resources()["CPU"] == 2
    pool = dataflow.actors(num_actors, num_rows=num_rows, rows_per_batch=64)["compute"]
    assert (pool.min_size, pool.max_size) == (at_once, num_actors)


def test_actors_on_gpus_take_no_cpu_and_come_one_by_one(ray_cluster):
    dataflow.connect()
    options = dataflow.actors(4, ActorsConfig(gpus_per_actor=0.5), num_rows=100)
    assert (options["num_gpus"], options["num_cpus"]) == (0.5, 0)
    assert (options["compute"].min_size, options["compute"].max_size) == (1, 4)


def test_actors_and_tasks_are_given_what_a_config_asks_for(ray_cluster):
    dataflow.connect()
    labels = {"ray.io/node-group": "caption"}
    each = ActorsConfig(
        gpus_per_actor=1, cpus_per_actor=4, memory_per_actor_bytes=8 << 30, accelerator_type="L4", node_labels=labels
    )
    options = dataflow.actors(4, each)
    assert options.pop("compute").max_size == 4
    asked = {"memory": 8 << 30, "accelerator_type": "L4", "label_selector": labels}
    assert options == asked | {"num_gpus": 1, "num_cpus": 4}
    large = dataflow.actors(8, ActorsConfig(cpus_per_actor=2), num_rows=1000)
    assert (large["num_cpus"], large["compute"].min_size) == (2, 1)  # two CPUs hold one of them
    assert dataflow.tasks(TasksConfig(cpus_per_task=0.5)) == {"num_cpus": 0.5}
    reading = TasksConfig(memory_per_task_bytes=1 << 30, node_labels=labels)
    assert dataflow.tasks(reading) == {"num_cpus": 1, "memory": 1 << 30, "label_selector": labels}


def test_ray_runs_a_task_on_memory_that_there_is_and_its_rows_come_back(ray_cluster):
    dataflow.connect()
    rows = dataflow.map_tables(
        ray.data.from_arrow(pa.table({"x": [1, 2, 3]})),
        lambda table: table.append_column("y", table["x"]),
        batch_size=2,
        each=TasksConfig(cpus_per_task=0.5, memory_per_task_bytes=1 << 20),
    )
    assert pa.concat_tables(dataflow.collect(rows))["y"].to_pylist() == [1, 2, 3]


def test_many_small_blocks_written_to_one_file_keep_their_order(tmp_path, ray_cluster):
    dataflow.connect()
    rows = ray.data.from_arrow([pa.table({"x": [number]}) for number in range(300)]).repartition(3)
    with publish(str(tmp_path / "a"), "made", {}, {}) as publication:
        dataflow.write(rows, publication, max_rows_per_file=40)
        publication.count(unit="rows", rows_in=300, rows_out=300, rejects={})
    written = open_dataset(str(tmp_path / "a"))
    assert written.read()["x"].to_pylist() == list(range(300))
    assert max(pq.read_metadata(path).num_rows for path in written.parquet_paths()) == 40


def test_connecting_twice_stays_in_the_same_ray(ray_cluster):
    before = ray.get_runtime_context().get_node_id()
    dataflow.connect()
    dataflow.connect()
    assert ray.get_runtime_context().get_node_id() == before
    assert ray.data.DataContext.get_current().execution_options.preserve_order


def test_stores_that_the_workers_would_not_know_are_refused(ray_cluster, monkeypatch):
    monkeypatch.setenv(STORES_VARIABLE, "[]")  # what use_stores sets is undone
    use_stores([StoreConfig(anonymous=True)])
    with pytest.raises(ConfigError, match=r"joined Ray with other ones.*call ray\.shutdown\(\) before this run"):
        dataflow.connect()
    use_stores([])
    dataflow.connect()


def test_a_job_says_where_its_dashboard_logs_and_metrics_are(ray_cluster, monkeypatch):
    look = dataflow.where_to_look("127.0.0.1:8265")
    assert look.startswith("where to look: dashboard http://127.0.0.1:8265, logs /")
    with urllib.request.urlopen(look.rpartition("metrics ")[2], timeout=30) as page:
        assert page.headers["Content-Type"].startswith("text/plain; version=")
    submitted = {"metadata": {"job_submission_id": "raysubmit_1"}}
    monkeypatch.setenv(dataflow.JOB_CONFIG_VARIABLE, json.dumps(submitted))
    assert "logs ray job logs --follow raysubmit_1, " in dataflow.where_to_look(None)
