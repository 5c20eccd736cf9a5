"""Sentences are counted over tiles whatever the order of files, and near duplicates count as one where asked for."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from urbanclip_ray.captioners.duplicates import count_sentences, fold, frequent_keys, sentence_key

COMMON = "The image shows a large city with many residential and commercial buildings along a wide river."
NEARLY = "The image shows a large city with many residential and commercial buildings along the wide river."
OTHER = "Rows of greenhouses stand beside a small pond."


def keys_of(*sentences):
    return {sentence_key(fold(sentence)) for sentence in sentences}


def found(files, max_tiles, similarity=0.0):
    tables = [count_sentences(tiles, with_signatures=similarity > 0) for tiles in files]
    return set(frequent_keys(tables, max_tiles, similarity).to_pylist())


def test_a_sentence_counts_once_a_tile_and_over_all_files():
    files = [[[COMMON, COMMON], [COMMON, OTHER]], [[COMMON.upper()], [OTHER]]]
    assert found(files, 2) == keys_of(COMMON)
    assert found(files, 3) == set()
    assert found(files, 1) == keys_of(COMMON, OTHER)


def test_near_duplicates_count_as_one_where_asked_for():
    files = [[[COMMON], [NEARLY]], [[NEARLY], [OTHER]]]
    assert found(files, 2) == set()
    assert found(files, 2, similarity=0.6) == keys_of(COMMON, NEARLY)


def test_the_order_of_files_and_tiles_does_not_matter():
    generator = np.random.default_rng(0)
    words = sorted(set(f"{COMMON} {NEARLY} {OTHER}".split()))
    tiles = [[" ".join(generator.choice(words, 8)) for _ in range(3)] + [COMMON, NEARLY][: at % 3] for at in range(60)]
    first = found([tiles[:20], tiles[20:]], 3, 0.5)
    assert first
    shuffled = [tiles[at] for at in generator.permutation(60)]
    assert found([shuffled[:45], shuffled[45:50], shuffled[50:]], 3, 0.5) == first


@pytest.mark.parametrize("similarity", [0.0, 0.7])
def test_empty_short_and_strange_sentences_are_counted_too(similarity):
    files = [[[""], ["Lake"], ["lake", "\ud800 is no character"], []]]
    assert found(files, 1, similarity) == keys_of("lake")


def test_counts_stay_small(tmp_path):
    table = count_sentences(([f"A sentence of the tile number {at}."] for at in range(2_000)), with_signatures=True)
    assert table.num_rows == 2_000
    assert table.nbytes / table.num_rows < 300
    assert table.schema.field("key").type == pa.uint64()
