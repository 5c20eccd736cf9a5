"""A pretraining that lost a rank goes on from its checkpoint and ends where the uninterrupted one does."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
from PIL import Image

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import RankError, run_ranks

from urbanclip_ray.config import AugmentConfig, ModelConfig, PackConfig, ResourcesConfig, RunConfig, TrainConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.tokenize import tokenizer_files, train_bpe
from urbanclip_ray.model.weights import WEIGHTS_FILE, load_model
from urbanclip_ray.schema import PAIRS, SPLITS, TILES
from urbanclip_ray.storage import Dataset, open_dataset, publish
from urbanclip_ray.train.loop import TrainSpec
from urbanclip_ray.train.pack import pack_shards

NUM_TILES, NUM_VAL = 42, 6
NUM_STEPS = 9  # 36 rows, 2 epochs, 8 rows a step: the second epoch opens with rows left over from the first
KILLED_IN_STEP = 6  # so that two checkpoints stand, of step 3 and 6, and steps 4 to 6 were taken once or twice
ATOL = 1e-6
STAGES_ATOL = 1e-4  # between stages of ZeRO, which add up in another order
CONFIG = RunConfig(
    model=ModelConfig(architecture="coca_test_16", vocab_size=300, patch_dropout=0.5),  # the random state matters
    train=TrainConfig(
        epochs=2,
        micro_batch_size=4,
        contrastive_batch_size=8,
        global_batch_size=8,
        lr=3e-3,
        eps=1e-4,  # a gradient that is zero but for rounding must not become a step of AdamW
        precision="fp32",
        validations=3,
        checkpoint_every_steps=3,
        augment=AugmentConfig(min_area_share=0.5, brightness=0.2),
    ),
    resources=ResourcesConfig(num_workers=2),
)


def store(uri: str, stage: str, table: pa.Table) -> Dataset:
    with publish(uri, stage, {}, {}) as publication:
        publication.write_table(table)
        publication.count(unit="tiles", rows_in=table.num_rows, rows_out=table.num_rows, rejects={})
    return open_dataset(uri)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory, ray_cluster) -> Dataset:
    """Packed from tiles with two sentences each, in several files."""
    root = str(tmp_path_factory.mktemp("packed"))
    ids = [f"r/{tile:02d}" for tile in range(NUM_TILES)]
    tiles = [{"tile_id": tile_id, "region": "r", "image": png(at), "scheme": "none"} for at, tile_id in enumerate(ids)]
    words = ["river", "houses", "fields", "roads", "forest", "harbour", "lake"]
    texts = [
        [f"{words[at % 7]} beside {words[at % 5]}", f"many {words[at // 7]} and {words[at % 7]}"] for at in range(NUM_TILES)
    ]
    parts = ["val" if at < NUM_VAL else "train" for at in range(NUM_TILES)]
    datasets = (
        store(f"{root}/tiles", "tiles", pa.Table.from_pylist(tiles, schema=TILES)),
        store(f"{root}/pairs", "pairs", pa.table([ids, texts, [[]] * NUM_TILES], schema=PAIRS)),
        store(
            f"{root}/splits",
            "splits",
            pa.table([ids, ["random"] * NUM_TILES, [0] * NUM_TILES, [0] * NUM_TILES, parts], schema=SPLITS),
        ),
    )
    with publish(f"{root}/shards", "shards", {}, {}) as publication:
        pack_shards(*datasets, "random", PackConfig(rows_per_file=10), publication)
    return open_dataset(f"{root}/shards")


def make_spec(shards: Dataset, folder: Path, config: RunConfig = CONFIG) -> TrainSpec:
    texts = [text for row in shards.read(["texts"]).to_pylist() for text in row["texts"]]
    tokenizer = train_bpe(texts, config.model.vocab_size, 24)
    return TrainSpec(
        config=config,
        shards_uri=shards.uri,
        open_clip_config=open_clip_config(config.model, tokenizer.vocab_size),
        tokenizer_files=tokenizer_files(tokenizer),
        checkpoints_uri=str(folder / "checkpoints"),
        tensorboard_uri=str(folder / "tensorboard"),
        results_uri=str(folder / "results"),
    )


def saved(root: str, step: int) -> Path | None:
    """The folder of the committed checkpoint of a step."""
    return next((path.parent for path in Path(root).glob(f"step-{step:08d}-*/commit.json")), None)


def train_and_die(spec: TrainSpec) -> None:
    """`train_rank`, but rank 1 is killed without warning on its way into a step; the checkpoint before it is whole."""
    import os
    import time

    import torch.distributed as dist

    from urbanclip_ray.train import loop

    take_step = loop.take_step

    def take_step_or_die(engine, step, num_steps, config):
        if dist.get_rank() == 1 and step.step == KILLED_IN_STEP:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not saved(spec.checkpoints_uri, KILLED_IN_STEP):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(engine, step, num_steps, config)

    loop.take_step = take_step_or_die
    loop.train_rank(spec)


def train(spec: TrainSpec) -> None:
    from urbanclip_ray.train.loop import train_rank

    train_rank(spec)


class Result:
    """History without the speed, and weights, of a finished pretraining."""

    def __init__(self, folder: Path) -> None:
        history = json.loads((folder / "history.json").read_bytes())
        self.validation = history["validation"]
        self.train = [{name: value for name, value in record.items() if name != "samples_per_s"} for record in history["train"]]
        self.weights = safetensors.torch.load((folder / WEIGHTS_FILE).read_bytes())


def assert_equal(found: Result, expected: Result, atol: float = ATOL) -> None:
    for kind in ("train", "validation"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        for record, other in zip(ours, theirs, strict=True):
            assert record == pytest.approx(other, abs=atol), kind
    for name, value in expected.weights.items():
        assert float((found.weights[name] - value).abs().max()) <= atol, name


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(train, 2, make_spec(shards, folder))
    return folder


@pytest.fixture(scope="module")
def killed(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(RankError) as caught:
        run_ranks(train_and_die, 2, make_spec(shards, folder))
    assert caught.value.exit_codes[1] == -signal.SIGKILL
    assert all(saved(str(folder / "checkpoints"), step) for step in (3, 6))
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert not (folder / "results").exists()
    return folder


def test_the_run_is_whole_and_its_weights_load(uninterrupted):
    found = Result(uninterrupted / "results")
    assert [record["step"] for record in found.train] == list(range(1, NUM_STEPS + 1))
    assert [record["step"] for record in found.validation] == [3, 6, 9]
    assert found.validation[0]["num_images"] == NUM_VAL
    assert found.validation[0]["num_texts"] == 2 * NUM_VAL
    assert {record["epoch"] for record in found.train} == {0, 1}
    assert load_model(str(uninterrupted / "results")).model.embedding_width == 64


def test_a_killed_run_ends_as_the_uninterrupted_one(shards, uninterrupted, killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "resumed")
    run_ranks(train, 2, make_spec(shards, folder))
    assert_equal(Result(folder / "results"), Result(uninterrupted / "results"))


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(shards, uninterrupted, killed, tmp_path, capfd):
    folder = shutil.copytree(killed, tmp_path / "resumed")
    damaged = saved(str(folder / "checkpoints"), 6) / "rank-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run_ranks(train, 2, make_spec(shards, folder))
    assert_equal(Result(folder / "results"), Result(uninterrupted / "results"))
    assert capfd.readouterr().out.count(f"{damaged} is damaged") == 1


def test_another_number_of_ranks_goes_on_to_the_end(shards, uninterrupted, killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "resumed")
    train_config = CONFIG.train.model_copy(update={"micro_batch_size": 8})
    config = CONFIG.model_copy(update={"train": train_config, "resources": ResourcesConfig(num_workers=1)})
    run_ranks(train, 1, make_spec(shards, folder, config))
    found, expected = Result(folder / "results"), Result(uninterrupted / "results")
    assert [record["step"] for record in found.train] == list(range(1, NUM_STEPS + 1))
    assert [record["step"] for record in found.validation] == [3, 6, 9]
    assert found.train[:KILLED_IN_STEP] == expected.train[:KILLED_IN_STEP]
    assert [record["lr"] for record in found.train] == [record["lr"] for record in expected.train]
    assert found.train[KILLED_IN_STEP:] != expected.train[KILLED_IN_STEP:]  # other patches are hidden: it did train on


def in_stage(stage: int) -> RunConfig:
    return CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"zero_stage": stage})})


@pytest.mark.slow
@pytest.mark.parametrize(("killed_in", "resumed_in"), [(0, 0), (2, 2), (3, 3), (3, 1)])
def test_in_every_stage_a_killed_run_ends_as_the_uninterrupted_one(shards, uninterrupted, tmp_path, killed_in, resumed_in):
    with pytest.raises(RankError):
        run_ranks(train_and_die, 2, make_spec(shards, tmp_path, in_stage(killed_in)))
    assert not (tmp_path / "results").exists()
    run_ranks(train, 2, make_spec(shards, tmp_path, in_stage(resumed_in)))
    assert_equal(Result(tmp_path / "results"), Result(uninterrupted / "results"), STAGES_ATOL)


@pytest.mark.slow
def test_ray_train_runs_every_stage_to_the_same_end(shards, tmp_path):
    from urbanclip_ray.train.launch import pretrain  # here, as ranks import this file too

    ends = []
    for stage in (0, 1, 2, 3):
        with publish(str(tmp_path / str(stage)), "pretrain", {}, {}) as publication:
            pretrain(in_stage(stage), shards, publication)
        ends.append(Result(Path(publication.data_uri)))
    for end in ends[1:]:
        assert_equal(end, ends[0], STAGES_ATOL)
