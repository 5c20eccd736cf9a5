"""Checkpoints on storage: what is not whole is never loaded, and nothing in one is trusted."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "distributed"))  # ranks must be importable in the spawned processes too

from ranks import run_ranks

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.storage import StorageError
from urbanclip_ray.train.checkpoint import fill_weights, find_checkpoint
from urbanclip_ray.train.checkpoint_files import COMMIT, RUN, list_checkpoints

CONFIG = TrainConfig(micro_batch_size=2, contrastive_batch_size=4, global_batch_size=4, precision="fp32")
HISTORY = {"train": [{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("inf")}], "validation": []}
PROGRESS = {"epoch": 1, "rows": "eJwDAAAAAAE="}
FILES = {"tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b"{}"}
RANK_FILES = {f"rank-0000{rank}.{ending}" for rank in (0, 1) for ending in ("json", "safetensors")}
KEEP = 2
SPARE_BYTES = 8 << 20  # that a process may grow by for other reasons


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 5)


def save_in_rank(root: str) -> dict[str, list]:
    """Five steps of a small layer, a checkpoint after each; what is listed, and the state before and after a resume."""
    import torch.distributed as dist

    from urbanclip_ray.train.checkpoint import restore_rank
    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter
    from urbanclip_ray.train.engine import start_engine
    from urbanclip_ray.train.fragments import MOMENTS, fragments

    def state(engine):
        return [
            [f.name, f.start, f.numel, f.weight.tolist(), *(f.moments[m].tolist() for m in MOMENTS)] for f in fragments(engine)
        ]

    engine = start_engine(layer(), CONFIG)
    listed = []
    writer = CheckpointWriter(root, KEEP)
    for step in range(1, 6):
        engine.backward(engine(torch.full((2, 3), float(step + dist.get_rank()))).square().mean())
        engine.step()
        torch.rand(1)  # moves the random state
        writer.save(engine, step, history=HISTORY, progress=PROGRESS, files=FILES)
        writer.close()
        dist.barrier()  # rank 0 has committed
        listed.append([uri.rsplit("-", 2)[-2] for uri in list_checkpoints(root)])
        dist.barrier()
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


@pytest.fixture
def newest(root) -> Path:
    """The folder of the newest of them."""
    return next(root.glob("step-00000005-*"))


def find(root: Path):
    warnings: list[str] = []
    return find_checkpoint(str(root), warnings.append), warnings


def assert_refused(root: Path, name: str, message: str = "damaged") -> None:
    """The file of the newest checkpoint is named, and the one before it is used."""
    found, warnings = find(root)
    assert found.step == 4
    assert len(warnings) == 1
    assert "/step-00000005-" in warnings[0]
    assert name in warnings[0]
    assert message in warnings[0]
    assert "trying the checkpoint before it" in warnings[0]


def unsealed_commit(folder: Path) -> dict[str, Any]:
    """What a commit says, to be written as somebody else would: a seal finds mishaps, not people."""
    commit = json.loads((folder / COMMIT).read_bytes())
    del commit["seal"]
    return commit


def commit_anew(folder: Path) -> None:
    """Write the sizes and checksums of the files as they are now into the indices and the commit, as an attacker would."""

    def entry(name: str) -> dict[str, Any]:
        data = (folder / name).read_bytes()
        return {"path": name, "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for index in folder.glob("rank-*.json"):
        try:
            said = json.loads(index.read_bytes())
        except (ValueError, RecursionError):
            continue  # spoiled on purpose, so nothing can be written into it
        if isinstance(said, dict) and "keeps its sums" not in said:
            said["tensors"] = entry(index.name.replace(".json", ".safetensors"))
        index.write_text(json.dumps(said))
    commit = unsealed_commit(folder)
    commit["files"] = [entry(file["path"]) for file in commit["files"]]
    (folder / COMMIT).write_text(json.dumps(commit))


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


def test_the_newest_one_is_found_with_what_was_known_of_the_run(saved, root, newest):
    found, warnings = find(root)
    assert (found.step, found.num_ranks, found.history, found.progress, warnings) == (5, 2, HISTORY, PROGRESS, [])
    assert type(found.history["train"][0]["step"]) is int
    assert {name: (newest / name).read_bytes() for name in FILES} == FILES
    model = nn.Linear(3, 5)
    fill_weights(model, found)
    expected = [np.array(value, np.float32) for value in saved[1][0]["weights"]]
    for value, other in zip(model.parameters(), expected, strict=True):
        np.testing.assert_array_equal(value.detach().numpy(), other)


def test_without_a_commit_a_checkpoint_does_not_exist(root, newest):
    (newest / COMMIT).unlink()
    assert_refused(root, newest.name, "is not complete")


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert find(tmp_path / "nowhere") == (None, [])
    for name in ("step-5", "step-00000005", "step-00000005-0123abcd.old", "step-00000005-0123ABCD"):  # not names of ours
        (tmp_path / name).mkdir()
    assert find(tmp_path) == (None, [])


@pytest.mark.parametrize("kind", ["flipped", "truncated", "longer", "missing", "emptied", "a folder"])
@pytest.mark.parametrize("name", ["rank-00001.safetensors", "rank-00000.json", RUN, "tokenizer.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(root, newest, kind, name):
    where = newest / name
    data = bytearray(where.read_bytes())
    if kind in ("missing", "a folder"):
        where.unlink()
        if kind == "a folder":
            where.mkdir()
    elif kind == "flipped":
        data[len(data) // 2] ^= 1
        where.write_bytes(data)
    else:
        where.write_bytes({"truncated": data[: len(data) // 2], "longer": data + b" ", "emptied": b""}[kind])
    assert_refused(root, f"{newest.name}/{name} is damaged")


def test_when_all_are_damaged_each_is_named_and_none_is_loaded(root):
    for folder in root.iterdir():
        (folder / "rank-00000.json").write_bytes(b"{}")
    found, warnings = find(root)
    assert found is None
    assert len(warnings) == 2


DEEP = b"[" * 10**6, b'{"a":' * 10**6, b"[" * 200 + b"]" * 200  # recursion that ends a parser, or that it allows


def hostile_commits(commit: dict, secret: Path) -> dict[str, bytes]:
    """Kinds of commit files that nobody of ours wrote, by name."""
    sums = {"num_bytes": secret.stat().st_size, "sha256": hashlib.sha256(secret.read_bytes()).hexdigest()}
    files = commit["files"]

    def changed(**fields) -> bytes:
        return json.dumps(commit | fields).encode()

    def with_file(path: str) -> bytes:
        return changed(files=[*files, {"path": path, **sums}])

    def with_entry(**fields) -> bytes:
        return changed(files=[entry | fields if "tensors" in entry["path"] else entry for entry in files])

    return {
        "no JSON": b"{" * 9,
        "no UTF-8": b"\xff\xfe\x00",
        "nothing": b"",
        "a list": b"[]",
        "a number": b"7",
        "a pickle": pickle.dumps(commit),
        "deep lists": DEEP[0],
        "deep objects": DEEP[1],
        "deep, but whole": DEEP[2],
        "a deep field": json.dumps(commit).encode()[:-1] + b', "more": ' + DEEP[0],
        "no files": changed(files=[]),
        "files as numbers": changed(files=[1, 2]),
        "files by name": changed(files={entry["path"]: entry for entry in files}),
        "a file twice": changed(files=[*files, files[0]]),
        "an unknown field": changed(more=1),
        "climbs out": with_file("../../secret.json"),
        "climbs by a folder": with_file("x/../../../secret.json"),
        "the folder above": with_file(".."),
        "absolute": with_file(str(secret)),
        "another scheme": with_file("s3://bucket/key"),
        "a file's scheme": with_file(f"file://{secret}"),
        "a hidden file": with_file(".secret.json"),
        "a name with a zero": with_file("secret\0.json"),
        "an empty name": with_file(""),
        "the commit itself": with_file(COMMIT),
        "one rank's file more": with_file("rank-00002.json"),
        "a rank too few": changed(files=[entry for entry in files if "rank-00001" not in entry["path"]]),
        "no run": changed(files=[entry for entry in files if entry["path"] != RUN]),
        "more ranks than files": changed(num_ranks=10**9),
        "more ranks than memory": changed(num_ranks=10**30),
        "no ranks": changed(num_ranks=0),
        "ranks below zero": changed(num_ranks=-2),
        "ranks as text": changed(num_ranks="2"),
        "ranks as a fraction": changed(num_ranks=2.5),
        "ranks that are no number": changed(num_ranks=float("nan")),
        "ranks as a truth": changed(num_ranks=True),
        "no step": json.dumps({name: commit[name] for name in commit if name != "step"}).encode(),
        "another step": changed(step=4),
        "a step as text": changed(step="5"),
        "another attempt": changed(attempt="00000000"),
        "a size of a petabyte": with_entry(num_bytes=10**15),
        "a size below zero": with_entry(num_bytes=-1),
        "another checksum": with_entry(sha256="0" * 64),
        "a checksum that is none": with_entry(sha256=7),
    }


NO_COMMIT = {"files": [{"path": ""}], "step": 0, "num_ranks": 0, "attempt": ""}


@pytest.mark.parametrize("kind", hostile_commits(NO_COMMIT, Path(__file__)))
def test_a_hostile_commit_is_refused_and_the_checkpoint_before_is_used(root, newest, kind):
    secret = root.parent / "secret.json"
    secret.write_text("{}")
    commit = unsealed_commit(newest)
    (newest / COMMIT).write_bytes(hostile_commits(commit, secret)[kind])
    assert_refused(root, newest.name)
    assert set(find(root)[0].files) == {*RANK_FILES, *FILES, RUN}


def test_a_commit_of_one_more_plain_file_is_taken(root, newest):
    """So that what is refused above is refused for its name."""
    commit = unsealed_commit(newest)
    (newest / "secret.json").write_bytes(b"{}")
    commit["files"].append({"path": "secret.json", "num_bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()})
    (newest / COMMIT).write_text(json.dumps(commit))
    found, warnings = find(root)
    assert (found.step, warnings) == (5, [])


def hostile_indices(index: dict) -> dict[str, bytes]:
    """What a rank's JSON says that is not so. Its checksum is that of the commit."""
    first, *others = index["fragments"] or [{}]

    def with_first(**fields) -> bytes:
        return json.dumps(index | {"fragments": [first | fields, *others]}).encode()

    return {
        "a start below zero": with_first(start=-1),
        "no values": with_first(numel=0),
        "fewer than none": with_first(numel=-15),
        "a count that is no number": with_first(numel=float("nan")),
        "a count without end": with_first(numel=float("inf")),
        "a fraction": with_first(numel=2.5),
        "a whole fraction": with_first(start=0.0),
        "a count as text": with_first(numel="8"),
        "a count as a truth": with_first(numel=True),
        "one value more": with_first(numel=first.get("numel", 0) + 1),
        "more values than memory": with_first(numel=10**18),
        "a count of many digits": with_first().replace(b'"start": ', b'"start": ' + b"9" * 5000),
        "a name that is none": with_first(name=None),
        "an unknown field": with_first(more=1),
        "one fragment twice": json.dumps(index | {"fragments": [first, first, *others]}).encode(),
        "one fragment less": json.dumps(index | {"fragments": others}).encode(),
        "no list": json.dumps(index | {"fragments": {"0": first}}).encode(),
        "no fragments": json.dumps({"tensors": index["tensors"]}).encode(),
        "another file": json.dumps(index | {"tensors": index["tensors"] | {"path": "x"}, "keeps its sums": 1}).encode(),
        "deep lists": DEEP[0],
        "deep objects": DEEP[1],
        "deep, but whole": DEEP[2],
        "no UTF-8": b'{"fragments": "\xff"}',
    }


@pytest.mark.parametrize("kind", hostile_indices({"fragments": [], "tensors": {}}))
def test_a_hostile_index_is_named_and_the_checkpoint_before_is_used(root, newest, kind):
    where = newest / "rank-00001.json"
    where.write_bytes(hostile_indices(json.loads(where.read_bytes()))[kind])
    commit_anew(newest)
    assert_refused(root, f"{newest.name}/rank-00001.")


def test_fragments_that_overlap_are_refused_between_ranks_too(root, newest):
    """Each rank's files agree; together they hold some values twice, and others not at all."""
    indices = {path: json.loads(path.read_bytes()) for path in sorted(newest.glob("rank-*.json"))}
    mine, theirs = indices.values()
    cut = next(piece for piece in theirs["fragments"] if piece["start"] > 0)  # of a parameter that both hold a part of
    assert any(piece["name"] == cut["name"] for piece in mine["fragments"])
    cut["start"] -= 1
    for path, index in indices.items():
        path.write_text(json.dumps(index))
    commit_anew(newest)
    assert_refused(root, "another fragment holds the same values of 'weight'")


def hostile_runs(run: dict) -> dict[str, bytes]:
    history, record = run["history"], {"step": 1}
    return {
        "history as a list": json.dumps(run | {"history": []}).encode(),
        "history without validation": json.dumps(run | {"history": {"train": []}}).encode(),
        "history of more": json.dumps(run | {"history": history | {"test": []}}).encode(),
        "a record as a list": json.dumps(run | {"history": history | {"train": [[1]]}}).encode(),
        "text as a figure": json.dumps(run | {"history": history | {"train": [record | {"loss": "<script>"}]}}).encode(),
        "progress as a list": json.dumps(run | {"progress": []}).encode(),
        "no progress": json.dumps({"history": history}).encode(),
        "an unknown field": json.dumps(run | {"more": 1}).encode(),
        "deep lists": DEEP[0],
        "deep progress": json.dumps(run).encode()[:-2] + b', "x": ' + DEEP[1],
    }


@pytest.mark.parametrize("kind", hostile_runs({"history": {}, "progress": {}}))
def test_a_hostile_record_of_the_run_is_named_and_the_checkpoint_before_is_used(root, newest, kind):
    where = newest / RUN
    where.write_bytes(hostile_runs(json.loads(where.read_bytes()))[kind])
    commit_anew(newest)
    assert_refused(root, f"{newest.name}/{RUN} is damaged")


def rewrite_header(change: Callable[[dict], Any]) -> Callable[[bytes], bytes]:
    """The same values behind a header that the function changed, or replaced."""

    def rewritten(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]) if length else {"0.weight": {"data_offsets": [0, 0], "shape": [0]}}
        text = json.dumps(change(header) or header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return rewritten


def entry(**fields) -> Callable[[bytes], bytes]:
    return rewrite_header(lambda header: header["0.weight"].update(fields))


def save_again(**tensors: torch.Tensor) -> Callable[[bytes], bytes]:
    return lambda data: safetensors.torch.save(safetensors.torch.load(data) | tensors)


def without(name: str) -> Callable[[bytes], bytes]:
    return lambda data: safetensors.torch.save({k: v for k, v in safetensors.torch.load(data).items() if k != name})


def in_dtype(dtype: torch.dtype) -> Callable[[bytes], bytes]:
    return lambda data: safetensors.torch.save(
        {k: v.to(dtype) if "state" not in k else v for k, v in safetensors.torch.load(data).items()}
    )


HOSTILE_TENSORS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "a header of exabytes": lambda data: struct.pack("<Q", 1 << 62) + data[8:],
    "a header of the largest number": lambda data: b"\xff" * 8 + data[8:],
    "a header longer than the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "a header without length": lambda data: bytes(8) + data[8:],
    "a header that is no JSON": lambda data: struct.pack("<Q", 16) + b"{" * 16 + data[24:],
    "a deep header": lambda data: struct.pack("<Q", len(DEEP[1])) + DEEP[1],
    "a header that is a list": rewrite_header(lambda header: [header]),
    "an entry as a list": rewrite_header(lambda header: header | {"0.weight": [0, 60]}),
    "a pickle": lambda data: pickle.dumps({"0.weight": [1.0]}),
    "a dtype of other size": entry(dtype="F64"),
    "a dtype of the same size": entry(dtype="I32"),
    "a dtype that is none": entry(dtype="object"),
    "values in bf16": in_dtype(torch.bfloat16),
    "values in fp64": in_dtype(torch.float64),
    "a negative shape": entry(shape=[-3]),
    "two dimensions": entry(shape=[1, 3]),
    "no dimension": entry(shape=[]),
    "a shape of exabytes": entry(shape=[1 << 60]),
    "a shape that is no number": entry(shape=[float("nan")]),
    "one value less": entry(shape=[1], data_offsets=[0, 4]),
    "places before the file": entry(data_offsets=[-60, 0]),
    "places behind the file": entry(data_offsets=[1 << 40, (1 << 40) + 60]),
    "places backwards": entry(data_offsets=[60, 0]),
    "places of exabytes": entry(shape=[1 << 58], data_offsets=[0, 1 << 60]),
    "two tensors in one place": rewrite_header(
        lambda header: header["0.exp_avg"].update(data_offsets=header["0.weight"]["data_offsets"])
    ),
    "more values than tensors": lambda data: data + bytes(4),
    "fewer values than tensors": lambda data: data[:-4],
    "a tensor less": without("0.exp_avg_sq"),
    "a tensor more": save_again(extra=torch.zeros(3)),
    "other names": rewrite_header(lambda header: {f"1{name}": value for name, value in header.items()}),
    "a random state of floats": save_again(random_state=torch.zeros(5056)),
    "a random state of megabytes": save_again(random_state=torch.zeros(1 << 20, dtype=torch.uint8)),
}


@pytest.mark.parametrize("kind", HOSTILE_TENSORS)
def test_a_hostile_file_of_tensors_is_named_and_the_checkpoint_before_is_used(root, newest, kind):
    """Its checksum is that of the index and of the commit."""
    where = newest / "rank-00001.safetensors"
    where.write_bytes(HOSTILE_TENSORS[kind](where.read_bytes()))
    commit_anew(newest)
    assert_refused(root, f"{newest.name}/rank-00001.safetensors is damaged")


def test_a_file_that_the_library_wrote_is_read_as_ours(root, newest):
    """So that what is refused above is refused for what was changed."""
    where = newest / "rank-00001.safetensors"
    where.write_bytes(safetensors.torch.save(safetensors.torch.load(where.read_bytes())))
    commit_anew(newest)
    found, warnings = find(root)
    assert (found.step, warnings) == (5, [])


class Growth:
    """How much memory this process took at its peak inside the block, beyond what it had before."""

    def __enter__(self) -> Growth:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        self._before = self._status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.num_bytes = self._status("VmHWM") - self._before

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def find_in_rank(root: str) -> list[Any]:
    find_checkpoint(root, lambda message: None)
    with Growth() as growth:
        found = find_checkpoint(root, lambda message: None)
    return [found.step, growth.num_bytes]


def test_a_size_that_is_only_claimed_is_never_allocated(root, newest):
    where = newest / "rank-00001.safetensors"
    where.write_bytes(HOSTILE_TENSORS["a header longer than the file"](bytes(8) + where.read_bytes()))
    with open(where, "r+b") as file:
        file.truncate(1 << 30)  # a hole that takes no room on disk
        file.seek(0)
        file.write(struct.pack("<Q", 1 << 29))
    commit = unsealed_commit(newest)
    next(entry for entry in commit["files"] if entry["path"] == where.name)["num_bytes"] = 1 << 30
    (newest / COMMIT).write_text(json.dumps(commit))
    ((step, grown_bytes),) = run_ranks(find_in_rank, 1, str(root))
    assert step == 4
    assert grown_bytes < SPARE_BYTES


WIDTH, HEIGHT = 2048, 4096  # 34 MB, and twice that of moments


def save_large_in_rank(root: str) -> None:
    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter
    from urbanclip_ray.train.engine import start_engine

    engine = start_engine(nn.Linear(WIDTH, HEIGHT), CONFIG)
    for _ in range(2):  # forwards of one step
        engine.backward(engine(torch.ones(2, WIDTH)).square().mean())
        engine.step()
    with CheckpointWriter(root, KEEP) as writer:
        writer.save(engine, 1, history=HISTORY, progress={}, files={})


def fill_in_rank(root: str) -> int:
    model = nn.Linear(WIDTH, HEIGHT)
    with torch.no_grad():
        model.weight.zero_()
    with Growth() as growth:
        fill_weights(model, find_checkpoint(root))
    assert float(model.weight.detach().abs().max()) > 0
    return growth.num_bytes


def test_who_resumes_holds_one_fragment_at_a_time_and_not_the_file(tmp_path):
    run_ranks(save_large_in_rank, 1, str(tmp_path))
    (grown_bytes,) = run_ranks(fill_in_rank, 1, str(tmp_path))
    fragment_bytes = 4 * WIDTH * HEIGHT
    assert fragment_bytes <= grown_bytes < 2 * fragment_bytes  # the file has three times as much


def test_nothing_is_unpickled(root, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    found, _ = find(root)
    fill_weights(nn.Linear(3, 5), found)


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


def test_weights_are_fp32_safetensors_and_json_alone(newest):
    assert {path.name for path in newest.iterdir()} == {COMMIT, RUN, *RANK_FILES, *FILES}
    tensors = safetensors.torch.load((newest / "rank-00000.safetensors").read_bytes())
    assert all(value.dtype == torch.float32 for name, value in tensors.items() if name != "random_state")
