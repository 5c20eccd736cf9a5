"""Exported pairs, read by the libraries that others read them with, and by our own sources."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from PIL import Image
from released_run import BROKEN, NUM_TILES, SILENT, encoded, make_released_run, part_of, texts_of, tile_rows

from urbanclip_ray import storage
from urbanclip_ray.config import ConfigError, HuggingFaceSource, WebDatasetSource
from urbanclip_ray.release.export import ExportOptions, export_pairs
from urbanclip_ray.sources import open_source
from urbanclip_ray.sources.sample_names import key_of
from urbanclip_ray.storage import StorageError

EXPORTED = [seed for seed in range(NUM_TILES) if seed not in (BROKEN, SILENT)]
ROWS_PER_SHARD = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_released_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory, ray_cluster) -> dict[str, Path]:
    """One export of each format."""
    folder = tmp_path_factory.mktemp("exports")
    for kind in ("webdataset", "huggingface"):
        export_pairs(run, options(kind, folder / kind))
    return {kind: folder / kind for kind in ("webdataset", "huggingface")}


def options(kind, output, **more) -> ExportOptions:
    return ExportOptions(kind, "CC-BY-4.0", str(output), rows_per_shard=ROWS_PER_SHARD, **more)


def expected() -> dict[str, dict]:
    """What must come out, by tile id."""
    rows = tile_rows()
    return {rows[seed]["tile_id"]: rows[seed] | {"texts": texts_of(seed), "part": part_of(seed)} for seed in EXPORTED}


def split_names() -> dict[str, str]:
    names = {"train": "train", "val": "validation", "test": "test", None: "unassigned"}
    return {tile_id: names[row["part"]] for tile_id, row in expected().items()}


def test_webdataset_reads_every_pair(exported):
    import webdataset

    files = sorted(str(path) for path in exported["webdataset"].glob("data/*.tar"))
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    found = {}
    for sample in samples:
        facts = json.loads(sample["json"])
        (extension,) = sample.keys() & {"jpg", "png", "webp", "tif"}
        found[facts["tile_id"]] = facts | {"image": sample[extension]}
        assert sample["__key__"] == key_of(facts["tile_id"])
        assert sample["txt"].decode().split("\n") == facts["texts"]
        split = Path(sample["__url__"]).name.split("-")[0]
        assert split == split_names()[facts["tile_id"]]
    assert len(samples) == len(EXPORTED)
    assert found == {
        tile_id: {name: value for name, value in row.items() if value is not None} for tile_id, row in expected().items()
    }


def test_datasets_reads_every_pair_from_the_folder_alone(exported, tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(exported["huggingface"]), cache_dir=str(tmp_path))
    assert isinstance(loaded["train"].features["image"], datasets.Image)
    rows = expected()
    found = {}
    for split, part in loaded.items():
        for row in part.cast_column("image", datasets.Image(decode=False)):
            assert split_names()[row["tile_id"]] == split
            image = row.pop("image")
            assert image["path"].partition(".")[0] == key_of(row["tile_id"])
            found[row["tile_id"]] = row | {"image": image["bytes"]}
    names = ["texts", "region", "lon", "lat", "west", "scheme", "sha256", "width", "part", "image"]
    assert {tile_id: [row[name] for name in names] for tile_id, row in found.items()} == {
        tile_id: [row.get(name) for name in names] for tile_id, row in rows.items()
    }
    assert all(isinstance(row["image"], Image.Image) for row in loaded["train"])


@pytest.mark.parametrize("config", [WebDatasetSource, HuggingFaceSource])
def test_what_went_out_comes_in_again(exported, config):
    source = open_source(config(uri=str(exported[config().kind])))
    tiles = source.tiles()
    rows = expected()
    assert {tile.tile_id: source.read(tile.location) for tile in tiles} == {name: row["image"] for name, row in rows.items()}
    for tile in tiles:
        row = rows[tile.tile_id]
        assert [tile.region, tile.lon, tile.south, tile.scheme] == [
            row["region"],
            row.get("lon"),
            row.get("south"),
            row["scheme"],
        ]
    texts: dict[str, list[str]] = {}
    for caption in source.captions().to_pylist():
        texts.setdefault(caption["tile_id"], []).append(caption["text"])
    assert texts == {name: row["texts"] for name, row in rows.items()}
    parts = {row["tile_id"]: row["part"] for row in source.parts().to_pylist()}
    assert parts == {name: row["part"] for name, row in rows.items() if row["part"]}
    assert source.ignored() == {}


def test_the_manifest_lists_every_file_and_counts_every_tile(exported, run):
    for kind, folder in exported.items():
        manifest = storage.open_dataset(str(folder)).manifest
        assert (manifest.rows_in, manifest.rows_out) == (NUM_TILES, len(EXPORTED))
        assert manifest.rejects == {"no accepted sentence": 1, "unreadable tile": 1}
        assert manifest.parents == {name: dataset.sha256 for name, dataset in run.datasets.items()}
        listed = {entry.path: (entry.num_bytes, entry.sha256) for entry in manifest.files}
        lying = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        del lying["manifest.json"]
        assert listed == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in lying.items()}
        assert manifest.facts["splits"] == {"test": 2, "train": 4, "validation": 3, "unassigned": 1}, kind


def test_the_same_export_has_the_same_bytes(exported, run, tmp_path):
    for kind, folder in exported.items():
        again = export_pairs(run, options(kind, tmp_path / kind))
        assert again.files == storage.open_dataset(str(folder)).manifest.files


def test_an_export_is_kept_where_it_is_the_same_and_refused_where_it_is_not(exported, run):
    folder = exported["webdataset"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    export_pairs(run, options("webdataset", folder))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(StorageError, match="holds another export or dataset already: choose another --output"):
        export_pairs(run, options("webdataset", folder, pixels=False))


def test_a_stopped_export_goes_on_but_a_folder_with_other_files_is_refused(exported, run, tmp_path):
    half = tmp_path / "half"
    (half / "data").mkdir(parents=True)
    (half / "data/train-00000-of-00002.tar").write_bytes(b"half")
    (half / "data/train-00001-of-00002.tar.0123abcd.tmp").write_bytes(b"killed")
    assert export_pairs(run, options("webdataset", half)).files
    assert not list(half.rglob("*.tmp"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds notes.txt, which is no file of this export"):
        export_pairs(run, options("webdataset", tmp_path / "mine"))


def test_without_pixels_no_image_leaves_and_ones_own_copy_is_joined(run, tmp_path, ray_cluster):
    own = tmp_path / "own"
    for row in tile_rows():
        path = own / f"{row['tile_id']}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"])
    other = next(iter(expected()))
    (own / f"{other}.jpg").write_bytes(b"\xff\xd8 another tile")
    for kind, config in (("webdataset", WebDatasetSource), ("huggingface", HuggingFaceSource)):
        folder = tmp_path / kind
        export_pairs(run, options(kind, folder, pixels=False))
        for path in folder.rglob("*"):
            assert path.is_dir() or not any(encoded(seed)[20:60] in path.read_bytes() for seed in EXPORTED)
        with pytest.raises(ValueError, match=r"has texts without pixels: set source.pixels to a folder with your own copy"):
            open_source(config(uri=str(folder))).tiles()
        source = open_source(config(uri=str(folder), pixels=str(own)))
        locations = {tile.tile_id: tile.location for tile in source.tiles()}
        assert locations.keys() == expected().keys()
        with pytest.raises(ValueError, match=r"other pixels: .* its sha256 differs"):
            source.read(locations.pop(other))
        assert {name: source.read(place) for name, place in locations.items()} == {
            name: row["image"] for name, row in expected().items() if name != other
        }


def test_without_splits_everything_is_train(tmp_path, ray_cluster):
    import datasets

    run = make_released_run(tmp_path / "run", splits=False)
    export_pairs(run, ExportOptions("huggingface", "CC0-1.0", str(tmp_path / "out")))
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: part.num_rows for name, part in loaded.items()} == {"train": len(EXPORTED)}
    assert set(loaded["train"]["part"]) == {None}


def test_the_card_says_licence_source_captions_and_refinement(exported):
    card = (exported["huggingface"] / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    known = yaml.safe_load(header)
    assert known["license"] == "cc-by-4.0"
    assert known["configs"][0]["data_files"][0] == {"split": "test", "path": "data/test-*.parquet"}
    for words in ("10 tiles (test 2, train 4", '"revision": "abc"', '"too short": 1', '"kind": "folder"', '"rome/north": 6'):
        assert words in body
    assert "Say `what` is there.\\n~~~\\nNow." in body  # inside its block
    assert str(exported["huggingface"].parent) not in card


def test_members_have_neither_time_nor_owner(exported):
    for path in exported["webdataset"].glob("data/*.tar"):
        with tarfile.open(path) as archive:
            assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}
            assert all(member.isfile() for member in archive)


@pytest.mark.parametrize("licence", ["", "all mine", "cc by", "x\ny"])
def test_a_licence_that_is_no_id_is_refused(run, tmp_path, licence):
    with pytest.raises(ConfigError, match=r"is no SPDX id: give one such as CC-BY-4.0"):
        export_pairs(run, ExportOptions("webdataset", licence, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_ingest_counts_the_texts_that_have_no_pixels(exported, tmp_path):
    """A tile whose image member is missing keeps its texts, which the caption stage counts as of an unknown tile."""
    folder = tmp_path / "cut"
    folder.mkdir()
    for path in exported["webdataset"].glob("data/*.tar"):
        with tarfile.open(path) as archive, tarfile.open(folder / path.name, "w") as target:
            for member in archive:
                if not member.name.endswith("jpg"):
                    target.addfile(member, io.BytesIO(archive.extractfile(member).read()))
    source = open_source(WebDatasetSource(uri=str(folder)))
    tiles = pa.array([tile.tile_id for tile in source.tiles()])
    jpegs = [seed for seed in EXPORTED if seed % 4 == 0]
    assert len(tiles) == len(EXPORTED) - len(jpegs)
    assert set(source.captions()["tile_id"].to_pylist()) == expected().keys()
