"""Checkpoints on storage: what is not whole is never loaded, and nothing in one is trusted."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "distributed"))  # ranks must be importable in the spawned processes too

from ranks import run_ranks

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.storage import StorageError
from urbanclip_ray.train.checkpoint import COMMIT, fill_weights, find_checkpoint, list_checkpoints

CONFIG = TrainConfig(micro_batch_size=2, contrastive_batch_size=4, global_batch_size=4, precision="fp32")
HISTORY = {"train": [{"step": 1, "loss": 2.5}], "validation": []}
KEEP = 2


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 5)


def save_in_rank(root: str) -> dict[str, list]:
    """Five steps of a small layer, a checkpoint after each; what is listed, and the state before and after a resume."""
    import torch.distributed as dist

    from urbanclip_ray.train.checkpoint import restore_rank, save_checkpoint
    from urbanclip_ray.train.engine import start_engine
    from urbanclip_ray.train.fragments import MOMENTS, fragments

    def state(engine):
        return [
            [f.name, f.start, f.numel, f.weight.tolist(), *(f.moments[m].tolist() for m in MOMENTS)] for f in fragments(engine)
        ]

    engine = start_engine(layer(), CONFIG)
    listed = []
    for step in range(1, 6):
        engine.backward(engine(torch.full((2, 3), float(step + dist.get_rank()))).square().mean())
        engine.step()
        torch.rand(1)  # moves the random state
        save_checkpoint(engine, root, step, HISTORY, KEEP)
        listed.append([uri.rsplit("-", 1)[-1] for uri in list_checkpoints(root)])
    random, weights = torch.get_rng_state(), [value.tolist() for value in engine.module.parameters()]

    fresh = layer()
    checkpoint = find_checkpoint(root)
    fill_weights(fresh, checkpoint)
    torch.manual_seed(77)
    resumed = start_engine(fresh, CONFIG)
    restore_rank(resumed, checkpoint)
    return {
        "listed": listed,
        "weights": weights,
        "resumed_weights": [value.tolist() for value in resumed.module.parameters()],
        "state": state(engine),
        "resumed_state": state(resumed),
        "same_random_state": torch.equal(random, torch.get_rng_state()),
        "optimizer_step": [float(value["step"]) for value in resumed.optimizer.optimizer.state.values()],
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("saved") / "checkpoints")
    return root, run_ranks(save_in_rank, 2, root)


@pytest.fixture
def root(saved, tmp_path):
    """A copy of the two kept checkpoints of two ranks, to be damaged."""
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def find(root: Path):
    warnings: list[str] = []
    return find_checkpoint(str(root), warnings.append), warnings


def test_only_as_many_as_asked_for_are_kept_and_the_newest_come_first(saved):
    for rank in saved[1]:
        assert rank["listed"][-1] == ["00000005", "00000004"]
        assert all(len(names) <= KEEP for names in rank["listed"])


def test_every_rank_gets_back_its_weights_moments_and_random_state(saved):
    owned = set()
    for rank in saved[1]:
        assert rank["resumed_state"] == rank["state"]
        assert rank["resumed_weights"] == rank["weights"]
        assert rank["same_random_state"]
        assert set(rank["optimizer_step"]) == {5.0}
        owned |= {(name, start + at) for name, start, numel, *_ in rank["state"] for at in range(numel)}
    assert len(owned) == 3 * 5 + 5  # the ranks together hold every value


def test_the_newest_one_is_found_with_what_was_known_of_the_run(saved, root):
    found, warnings = find(root)
    assert (found.step, found.num_ranks, found.history, warnings) == (5, 2, HISTORY, [])
    model = nn.Linear(3, 5)
    fill_weights(model, found)
    expected = [np.array(value, np.float32) for value in saved[1][0]["weights"]]
    for value, other in zip(model.parameters(), expected, strict=True):
        np.testing.assert_array_equal(value.detach().numpy(), other)


def test_without_a_commit_a_checkpoint_does_not_exist(root):
    (root / "step-00000005" / COMMIT).unlink()
    found, warnings = find(root)
    assert found.step == 4
    assert "step-00000005 is not complete" in warnings[0]


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert find(tmp_path / "nowhere") == (None, [])
    (tmp_path / "step-5").mkdir()  # not a name of ours
    (tmp_path / "step-00000005.old").mkdir()
    assert find(tmp_path) == (None, [])


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "emptied"])
@pytest.mark.parametrize("name", ["rank-00001.safetensors", "rank-00000.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(root, kind, name):
    where = root / "step-00000005" / name
    data = bytearray(where.read_bytes())
    if kind == "missing":
        where.unlink()
    elif kind == "flipped":
        data[len(data) // 2] ^= 1
        where.write_bytes(data)
    else:
        where.write_bytes(data[: len(data) // 2] if kind == "truncated" else b"")
    found, warnings = find(root)
    assert found.step == 4
    assert len(warnings) == 1
    assert f"step-00000005/{name}" in warnings[0]
    assert "trying the checkpoint before it" in warnings[0]


def test_when_all_are_damaged_each_is_named_and_none_is_loaded(root):
    for step in (4, 5):
        (root / f"step-{step:08d}" / "rank-00000.json").write_bytes(b"{}")
    found, warnings = find(root)
    assert found is None
    assert len(warnings) == 2


def hostile(commit: dict, secret: Path) -> dict[str, bytes]:
    """Kinds of commit files that nobody of ours wrote, by name."""
    entry = [len(secret.read_bytes()), hashlib.sha256(secret.read_bytes()).hexdigest()]

    def changed(**fields) -> bytes:
        return json.dumps(copy.deepcopy(commit) | fields).encode()

    files = commit["files"]
    return {
        "no JSON": b"{" * 9,
        "no UTF-8": b"\xff\xfe\x00",
        "a list": b"[]",
        "a number": b"7",
        "no files": changed(files={}),
        "files as a list": changed(files=[1, 2]),
        "entries as text": changed(files=dict.fromkeys(files, "ab c")),
        "climbs out": changed(files=files | {"../../secret.json": entry}),
        "absolute": changed(files=files | {str(secret): entry}),
        "another scheme": changed(files=files | {"s3://bucket/key": entry}),
        "a rank too few": changed(files={name: files[name] for name in files if "00000" in name}),
        "more ranks than files": changed(num_ranks=10**9),
        "no ranks": changed(num_ranks=0),
        "ranks as text": changed(num_ranks="many"),
        "no step": json.dumps({name: commit[name] for name in commit if name != "step"}).encode(),
        "another step": changed(step=4),
        "history as a list": changed(history=[]),
        "history without validation": changed(history={"train": []}),
    }


KINDS = list(hostile({"files": {}, "step": 0}, Path(__file__)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_commit_is_refused_and_the_checkpoint_before_is_used(root, kind):
    secret = root.parent / "secret.json"
    secret.write_text("{}")
    where = root / "step-00000005" / COMMIT
    where.write_bytes(hostile(json.loads(where.read_bytes()), secret)[kind])
    found, warnings = find(root)
    assert found.step == 4
    assert set(found.files) == {f"rank-0000{rank}.{ending}" for rank in (0, 1) for ending in ("json", "safetensors")}
    assert len(warnings) == 1
    assert "step-00000005" in warnings[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 5)), "has a parameter 'weight' that the model lacks"),
        (nn.Linear(3, 5, bias=False), "has a parameter 'bias' that the model lacks"),
        (nn.Linear(3, 6), "does not hold all of weight, bias"),
    ],
)
def test_a_model_of_another_shape_is_refused(root, model, message):
    found, _ = find(root)
    with pytest.raises(StorageError, match=message):
        fill_weights(model, found)


def test_a_checkpoint_that_lacks_a_parameter_is_refused(root):
    model = nn.Linear(3, 5)
    model.extra = nn.Parameter(torch.zeros(2))
    found, _ = find(root)
    with pytest.raises(StorageError, match="does not hold all of extra"):
        fill_weights(model, found)


def test_weights_are_fp32_safetensors_and_json_alone(root):
    files = sorted(path.name for path in (root / "step-00000005").iterdir())
    assert files == [COMMIT, "rank-00000.json", "rank-00000.safetensors", "rank-00001.json", "rank-00001.safetensors"]
    tensors = safetensors.torch.load((root / "step-00000005" / "rank-00000.safetensors").read_bytes())
    assert all(value.dtype == torch.float32 for name, value in tensors.items() if name != "random_state")
