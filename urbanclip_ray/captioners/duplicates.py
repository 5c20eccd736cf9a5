"""Sentences that many tiles share: counted file by file, and summed up, by keys alone, so that memory is bounded.

Sentences that say the same but for case and marks have one key. Near duplicates are told by MinHash (Broder, 1997) over
pairs of words: 200,000 tiles of four sentences are 800,000 keys and signatures, 210 MB. Nothing depends on the order of files
or tiles.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from urbanclip_ray.captioners.sentence_checks import WORD

NUM_HASHES = 64  # of a signature: Jaccard similarities are known to about 0.06
SEED = 1
HASH_SCHEME = "affine32"  # of datasketch: named, so that a new default of it changes nothing here


def fold(sentence: str) -> str:
    """A sentence's words, lower case, with single blanks: what makes two sentences equal."""
    return " ".join(WORD.findall(sentence)).lower()


def sentence_key(folded: str) -> int:
    """64 bits of a folded sentence; two of 800,000 differing ones share theirs once in 60 million times."""
    return int.from_bytes(hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def count_sentences(tiles: Iterable[Sequence[str]], with_signatures: bool) -> pa.Table:
    """`key` (uint64), `num_tiles` and, where asked for, `signature` of every sentence that these tiles have, a row each."""
    counts = Counter(folded for sentences in tiles for folded in {fold(sentence) for sentence in sentences} if folded)
    folded = list(counts)
    columns = {
        "key": pa.array([sentence_key(text) for text in folded], pa.uint64()),
        "num_tiles": pa.array(list(counts.values()), pa.int64()),
    }
    if with_signatures:
        rows = np.ascontiguousarray(_signatures(folded))
        columns["signature"] = pa.array([row.tobytes() for row in rows], pa.binary(NUM_HASHES * 4))
    return pa.table(columns)


def _signatures(folded: list[str]) -> np.ndarray:
    """MinHash of the pairs of words of each text, uint32 [texts, NUM_HASHES]."""
    from datasketch import MinHash

    if not folded:
        return np.zeros((0, NUM_HASHES), np.uint32)
    shingles = [[text.encode("utf-8", "surrogatepass") for text in _pairs_of_words(text)] for text in folded]
    hashes = MinHash.bulk(shingles, num_perm=NUM_HASHES, seed=SEED, scheme=HASH_SCHEME)
    return np.array([minhash.hashvalues for minhash in hashes], np.uint32)


def _pairs_of_words(folded: str) -> set[str]:
    words = folded.split()
    return {f"{first} {second}" for first, second in pairwise(words)} or set(words)


def frequent_keys(counts: Sequence[pa.Table], max_tiles: int, similarity: float) -> pa.Array:
    """Keys (uint64, sorted) of sentences that more than `max_tiles` tiles share.

    Above 0, `similarity` is the Jaccard similarity from which sentences count as one; a tile that has two such sentences
    counts twice then. Similar ones are found by way of the first of those that share a band, and chains of them are one.
    """
    table = pa.concat_tables(counts)
    totals = table.group_by("key").aggregate([("num_tiles", "sum")]).sort_by("key")
    keys, num_tiles = totals["key"].to_numpy(), totals["num_tiles_sum"].to_numpy()
    if similarity > 0 and len(keys):
        _, first = np.unique(table["key"].to_numpy(), return_index=True)  # in the order of the keys
        packed = table["signature"].take(pa.array(first)).to_pylist()
        groups = _group(np.frombuffer(b"".join(packed), np.uint32).reshape(-1, NUM_HASHES), similarity)
        num_tiles = np.bincount(groups, weights=num_tiles)[groups]
    return pa.array(keys[num_tiles > max_tiles], pa.uint64())


def _group(signatures: np.ndarray, similarity: float) -> np.ndarray:
    """The group of every signature, int [signatures]: near duplicates share one."""
    from datasketch import MinHashLSH
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # for its choice of bands and rows alone; those that only seem alike are told apart by their whole signatures below
    bands = MinHashLSH(threshold=similarity, num_perm=NUM_HASHES, weights=(0.1, 0.9))
    ones, others = [], []
    for band in range(bands.b):
        rows = np.ascontiguousarray(signatures[:, band * bands.r : (band + 1) * bands.r])
        _, first, group = np.unique(rows.view(f"V{rows.shape[1] * 4}").ravel(), return_index=True, return_inverse=True)
        leader = first[group]
        alike = np.flatnonzero(leader != np.arange(len(leader)))
        agree = (signatures[alike] == signatures[leader[alike]]).mean(axis=1)
        ones.append(alike[agree >= similarity])
        others.append(leader[alike[agree >= similarity]])
    one, other = np.concatenate(ones), np.concatenate(others)
    size = len(signatures)
    groups: np.ndarray = connected_components(coo_array((np.ones(len(one)), (one, other)), (size, size)), directed=False)[1]
    return groups
