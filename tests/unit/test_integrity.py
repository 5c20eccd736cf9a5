"""jobs/check_storage.py: a flipped byte anywhere in a storage is found by the name of its file, and the fix is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from urbanclip_ray.captioners.base import Origin
from urbanclip_ray.captioners.store import STORE, CaptionStore, StoredCaption
from urbanclip_ray.command_line import run_check_storage
from urbanclip_ray.integrity import CHECKPOINT, DATASET, PART, check_storage
from urbanclip_ray.manifest import FileEntry
from urbanclip_ray.storage import StorageError, open_dataset, publish
from urbanclip_ray.train.checkpoint_files import Commit, Index, Piece, folder_name, index_name, sum_of, tensors_name

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def storage(tmp_path) -> Path:
    """A run with a dataset of two files and a checkpoint, and a caption store."""
    with publish(f"{tmp_path}/run/tiles/d1", "tiles", {}, {}) as publication:
        publication.write_table(pa.table({"tile_id": ["a/1"], "image": [b"pixels"]}))
        publication.write_file("notes.json", b'{"notes": 1}')
        publication.count(unit="tiles", rows_in=1, rows_out=1, rejects={})
    write_checkpoint(tmp_path / "run" / "pretrain" / "d2" / "checkpoints" / folder_name(3, "0123abcd"))
    CaptionStore(f"{tmp_path}/{STORE}", Origin("m", "1", "p", {})).add("j-1", [StoredCaption("a", 0, "A road.")])
    return tmp_path


def write_checkpoint(folder: Path) -> None:
    """The files of one rank as `checkpoint_writer` lays them out; of the tensors only the bytes matter here."""
    folder.mkdir(parents=True)
    tensors = bytes(range(256)) * 40
    index = Index(fragments=(Piece(name="w", start=0, numel=1),), tensors=sum_of(tensors_name(0), tensors))
    run = json.dumps({"history": {"train": [], "validation": []}, "progress": {}}).encode()
    files = {tensors_name(0): tensors, index_name(0): index.model_dump_json().encode(), "run.json": run}
    entries: tuple[FileEntry, ...] = tuple(sum_of(name, data) for name, data in files.items())
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "commit.json").write_bytes(Commit(step=3, attempt="0123abcd", num_ranks=1, files=entries).to_bytes())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_whole_storage_has_no_damage_and_every_file_is_counted(storage):
    findings = check_storage(str(storage))
    assert findings.damages == []
    assert {kind: num_files for kind, (num_files, _) in findings.checked.items()} == {DATASET: 3, CHECKPOINT: 4, PART: 1}
    sizes = [path.stat().st_size for path in storage.rglob("*") if path.is_file()]
    assert sum(num_bytes for _, num_bytes in findings.checked.values()) == sum(sizes)


@pytest.mark.parametrize(
    ("pattern", "kind", "fix"),
    [
        ("run/tiles/d1/data-*/part-00000.parquet", DATASET, "remove {storage}/run/tiles/d1 and run the same command again"),
        ("run/tiles/d1/data-*/notes.json", DATASET, "bring it back from a copy"),
        ("run/tiles/d1/manifest.json", DATASET, "remove {storage}/run/tiles/d1 and run the same command again"),
        ("run/pretrain/d2/checkpoints/*/rank-00000.safetensors", CHECKPOINT, "goes on from the checkpoint before it"),
        ("run/pretrain/d2/checkpoints/*/rank-00000.json", CHECKPOINT, "goes on from the checkpoint before it"),
        ("run/pretrain/d2/checkpoints/*/run.json", CHECKPOINT, "goes on from the checkpoint before it"),
        ("run/pretrain/d2/checkpoints/*/commit.json", CHECKPOINT, "goes on from the checkpoint before it"),
        (f"{STORE}/*/j-1.parquet", PART, "remove it: its captions are generated again"),
    ],
)
def test_a_flipped_byte_is_found_by_name_with_its_fix(storage, pattern, kind, fix):
    (path,) = storage.glob(pattern)
    flip(path)
    (damage,) = check_storage(str(storage)).damages
    assert damage.kind == kind
    assert str(path) in (damage.uri, *damage.what.split())
    assert fix.format(storage=storage) in damage.fix


def test_a_missing_file_is_damage(storage):
    (path,) = storage.glob("run/tiles/d1/data-*/notes.json")
    path.unlink()
    (damage,) = check_storage(str(storage)).damages
    assert (damage.uri, damage.what) == (str(path), "it is not there")


def test_one_run_is_checked_alone_and_one_that_is_not_there_is_said(storage):
    flip(next(storage.glob(f"{STORE}/*/j-1.parquet")))
    findings = check_storage(str(storage), "run")
    assert findings.damages == []
    assert PART not in findings.checked
    with pytest.raises(StorageError, match="no such folder"):
        check_storage(str(storage), "other")


def test_a_flipped_manifest_is_refused_by_every_reader_and_not_made_anew_in_silence(storage):
    flip(storage / "run/tiles/d1/manifest.json")
    with pytest.raises(StorageError, match=r"tiles/d1/manifest\.json is"):
        open_dataset(f"{storage}/run/tiles/d1")


def test_the_job_prints_a_table_and_fails_where_something_is_damaged(storage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_storage.py", "--storage", str(storage)])
    with pytest.raises(SystemExit) as ended:
        run_check_storage("what it does")
    assert ended.value.code == 0
    assert "caption parts" in capsys.readouterr().out
    (path,) = storage.glob("run/tiles/d1/data-*/part-00000.parquet")
    flip(path)
    with pytest.raises(SystemExit) as ended:
        run_check_storage("what it does")
    assert ended.value.code == 1
    assert f"{path}\n  its checksum is not the one that was written down\n" in capsys.readouterr().out
