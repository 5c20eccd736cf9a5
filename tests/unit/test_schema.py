"""Names and keys that datasets are known by."""

from __future__ import annotations

import pyarrow as pa
import pytest

from urbanclip_ray.schema import caption_key, embeddings_schema, is_safe_name, labels_schema

MADE_OF = {
    "sha256": "ab",
    "model": "m",
    "revision": "1",
    "prompt": "p",
    "decoding": {"top_p": 0.9, "max": 3},
    "sample": 0,
}


@pytest.mark.parametrize(
    "change",
    [{"sha256": "ac"}, {"model": "n"}, {"revision": "2"}, {"prompt": "q"}, {"decoding": {"top_p": 0.8}}, {"sample": 1}],
    ids=lambda change: next(iter(change)),
)
def test_a_caption_key_changes_with_everything_that_makes_the_caption(change):
    assert caption_key(**(MADE_OF | change)) != caption_key(**MADE_OF)


def test_a_caption_key_is_the_same_in_every_process():
    key = "5bfd603e5bad6c01"
    assert caption_key(**MADE_OF)[:16] == key
    assert caption_key(**(MADE_OF | {"decoding": {"max": 3, "top_p": 0.9}}))[:16] == key  # the order of options is nothing


def test_fields_do_not_run_into_each_other():
    assert caption_key("a", "bc", "", "", {}, 0) != caption_key("ab", "c", "", "", {}, 0)


@pytest.mark.parametrize("name", ["run", "2024-01_a.b", "_x", "a" * 128])
def test_names_of_folders(name):
    assert is_safe_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a b", "a\n", "é", "-x", "a" * 129, "a\0"])
def test_what_may_not_become_a_folder(name):
    assert not is_safe_name(name)


def test_labels_and_embeddings_state_their_columns():
    assert labels_schema(["gdp"]).types == [pa.string(), pa.float64()]
    assert labels_schema(["gdp"]).field("gdp").nullable
    assert embeddings_schema(3).field("embedding").type == pa.list_(pa.float32(), 3)
