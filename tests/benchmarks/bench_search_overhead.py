"""What Ray Tune adds to a search: 8 equal short trials one after another under it, over the same 8 trainings without it.

Both ways train with two ranks and judge and record their weights alike; what differs is Tune, its trials' drivers and its
files. The trials differ in their seed alone, and none is stopped early. Half of the trainings run before the search and half
after it, as a machine that others use is not as quick at all times.
"""

from __future__ import annotations

import tempfile
import time

from figures import Figure

from urbanclip_ray import dataflow
from urbanclip_ray.config import Domain, RunConfig, TuneConfig, WorldSource
from urbanclip_ray.pipeline import run_stages
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.search_results import read_record
from urbanclip_ray.search_space import plan_trials
from urbanclip_ray.storage import Dataset, find_dataset, join, publish
from urbanclip_ray.tune import JobMaker, run_search, train_job

NUM_TRIALS = 8
NUM_TILES = 800
EPOCHS = 6
LIMIT = 1.1


def search_config(storage: str) -> RunConfig:
    base = load_recipe("world_demo")
    tune = TuneConfig(
        space={"train.seed": Domain(choice=tuple(range(NUM_TRIALS)))},
        sampler="grid",
        num_trials=NUM_TRIALS,
        scheduler="none",
        samples_per_report=1024,
        max_train_tiles=256,
        max_val_tiles=128,
        max_concurrent=1,
    )
    return base.model_copy(
        update={
            "storage": storage,
            "source": WorldSource(tile_px=27, stride_px=27, max_tiles=NUM_TILES),
            "train": base.train.model_copy(update={"epochs": EPOCHS, "validations": 1}),
            "tune": tune,
        }
    )


def time_search(config: RunConfig, shards: Dataset, labels: Dataset) -> float:
    start = time.perf_counter()
    with publish(join(config.storage, "search"), "search", {}, {}) as publication:
        run_search(config, [shards], labels, publication)
    return time.perf_counter() - start


def time_trainings(config: RunConfig, shards: Dataset, labels: Dataset, chosen: slice) -> float:
    start = time.perf_counter()
    maker = JobMaker(config, [shards], labels)
    for trial in plan_trials(config)[chosen]:
        train_job(maker.job(trial))
    return time.perf_counter() - start


def check_trials(config: RunConfig, shards: Dataset, labels: Dataset) -> None:
    """Every trial came to its end, and was judged as often as the others."""
    jobs = [JobMaker(config, [shards], labels).job(trial) for trial in plan_trials(config)]
    assert len(jobs) == NUM_TRIALS
    assert all(find_dataset(job.uri) is not None for job in jobs)
    assert len({len(read_record(job.uri).reports) for job in jobs}) == 1


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="urbanclip_ray_bench_") as folder:
        made = run_stages(search_config(f"{folder}/tiles"), ["ingest", "caption", "refine", "split", "pack"]).datasets
        inputs = made["shards"], made["labels"]
        dataflow.connect()
        searched, alone = search_config(f"{folder}/searched"), search_config(f"{folder}/alone")
        before = time_trainings(alone, *inputs, slice(None, NUM_TRIALS // 2))
        ours = time_search(searched, *inputs)
        peer = before + time_trainings(alone, *inputs, slice(NUM_TRIALS // 2, None))
        for config in (searched, alone):
            check_trials(config, *inputs)
    note = f"{NUM_TRIALS} trainings of {peer / NUM_TRIALS:.0f} s with two ranks, half before the search, half after it"
    return [Figure("search_overhead", ours, peer, ours / peer, "s", LIMIT, note)]
