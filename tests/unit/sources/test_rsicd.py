"""RSICD's list of images and captions, on made-up entries."""

from __future__ import annotations

import json
import pickle

import pytest

from urbanclip_ray.config import RsicdSource
from urbanclip_ray.sources import SourceError, open_source

ENTRY = {"image": "images/1.jpg", "captions": ["a park .", "trees ."], "split": "train", "land_use": "park"}
OTHER = {"image": "./images/2.jpg", "captions": ["a road ."], "split": "test", "land_use": None}


def source_of(root, entries):
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (root / "captions.json").write_text(text)
    return open_source(RsicdSource(uri=str(root)))


def test_land_use_is_the_region_and_captions_keep_their_order(tmp_path):
    source = source_of(tmp_path, [ENTRY, OTHER])
    tiles = [(tile.tile_id, tile.region, tile.location) for tile in source.tiles()]
    assert tiles == [("other/2", "other", "images/2.jpg"), ("park/1", "park", "images/1.jpg")]
    assert [tuple(row.values()) for row in source.captions().to_pylist()] == [
        ("park/1", "a park ."),
        ("park/1", "trees ."),
        ("other/2", "a road ."),
    ]
    assert [tuple(row.values()) for row in source.parts().to_pylist()] == [("park/1", "train"), ("other/2", "test")]
    assert source.labels() is None


def test_images_are_read_after_pickling_and_a_missing_one_says_so(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.jpg").write_bytes(b"pixels")
    source = pickle.loads(pickle.dumps(source_of(tmp_path, [ENTRY, OTHER])))
    assert source.read("images/1.jpg") == b"pixels"
    with pytest.raises(FileNotFoundError):
        source.read("images/2.jpg")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", r"captions.json is not JSON"),
        ({"images": []}, r"must be a list"),
        ([], r"at least one entry"),
        ([ENTRY, "x"], r"entry 1 is not an object"),
        ([{**ENTRY, "image": None}], r"entry 0: image must be a path"),
        ([{**ENTRY, "image": "../1.jpg"}], r"entry 0: image '\.\./1\.jpg'"),
        ([{**ENTRY, "image": "/etc/passwd"}], r"entry 0: image '/etc/passwd'"),
        ([{**ENTRY, "image": "images/../../1.jpg"}], r"entry 0: image"),
        ([{**ENTRY, "captions": "a park ."}], r"entry 0 \(images/1.jpg\): captions must be a list"),
        ([{**ENTRY, "captions": [1]}], r"entry 0 .* list of sentences"),
        ([{**ENTRY, "split": "dev"}], r"split must be one of train, val, test, not 'dev'"),
        ([{**ENTRY, "land_use": 3}], r"land_use must be text"),
        ([ENTRY, OTHER, ENTRY], r"entries 0 \(images/1.jpg\) and 2 .*'park/1'"),
    ],
)
def test_a_bad_list_names_the_entry(tmp_path, entries, message):
    with pytest.raises(SourceError, match=message):
        source_of(tmp_path, entries).tiles()


def test_no_list_or_no_folder_names_the_fix(tmp_path):
    with pytest.raises(SourceError, match=r"source\.captions_file"):
        open_source(RsicdSource(uri=str(tmp_path))).tiles()
    with pytest.raises(SourceError, match=r"source\.uri=FOLDER"):
        open_source(RsicdSource())


def test_the_fingerprint_follows_the_list(tmp_path):
    first = source_of(tmp_path, [ENTRY]).fingerprint()
    assert source_of(tmp_path, [ENTRY, OTHER]).fingerprint() != first
