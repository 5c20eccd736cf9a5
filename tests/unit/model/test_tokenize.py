"""Texts to ids: a row is start, text, end and padding, whichever tokenizer makes it."""

from __future__ import annotations

import json

import pytest
import torch
from open_clip import SimpleTokenizer

from urbanclip_ray.config import ConfigError
from urbanclip_ray.model.tokenize import (
    PAD_ID,
    TOKENIZER_CONFIG_FILE,
    load_tokenizer,
    open_clip_tokenizer,
    tokenizer_files,
    train_bpe,
)

TEXTS = ["a river runs through the city", "dense housing beside a river", "green fields", "the city from above"]
TRICKY = [
    "It's the CITY's 3rd bridge, isn't it?",
    "  many\t blanks \n and   lines ",
    "Zürich — naïve café, São Paulo",
    "cafe\u0301 composed",  # e and its accent as two characters
    "北京市 of 21 million",
    "emoji 🏙️ & symbols #@$%!!",
    "1234567890 km²",
    "don't you'll we've I'm they're he'd",
    "semi-detached_houses/gardens",
    "x",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, vocab_size=300, context_length=12)


@pytest.fixture(scope="module")
def clip():
    return open_clip_tokenizer(76)


def test_rows_are_start_text_end_and_one_column_more_than_the_longest(bpe):
    tokens = bpe.encode(["green fields", "a river"])
    ends = (tokens == bpe.end_id).int().argmax(dim=1)
    assert tokens.dtype == torch.int64
    assert tokens.shape[1] == int(ends.max()) + 2
    assert (tokens[:, 0] == bpe.start_id).all()
    for row, end in zip(tokens, ends, strict=True):
        assert (row[: end + 1] != PAD_ID).all()
        assert (row[end + 1 :] == PAD_ID).all()


@pytest.mark.parametrize("words", [9, 10, 11, 50])
def test_long_texts_are_cut_and_still_end_with_the_end_token(bpe, words):
    tokens = bpe.encode([" ".join(["river"] * words), "a river"])
    assert tokens.shape[1] == min(words + 3, bpe.context_length)  # start, text, end, padding
    assert int(tokens[0].eq(bpe.end_id).sum()) == 1
    if words >= bpe.context_length - 2:
        assert int(tokens[0, -1]) == bpe.end_id


def test_case_does_not_matter_and_no_character_is_unknown(bpe):
    assert torch.equal(bpe.encode(["Green FIELDS"]), bpe.encode(["green fields"]))
    unknown = bpe.backend.token_to_id("<unknown>")
    assert unknown == 3
    for text in TRICKY:
        tokens = bpe.encode([text])
        assert unknown not in tokens
        assert int(tokens.eq(PAD_ID).sum()) <= 1  # padding stands behind the text alone
    assert int(bpe.encode(["北"]).ne(PAD_ID).sum()) == 2 + 4  # start, end, the blank and three bytes


def test_an_empty_text_is_start_and_end(bpe, clip):
    for tokenizer in (bpe, clip):
        assert tokenizer.encode([""]).tolist() == [[tokenizer.start_id, tokenizer.end_id, PAD_ID]]


def test_the_vocabulary_is_bounded_and_the_same_texts_give_the_same_tokenizer(bpe):
    assert bpe.vocab_size <= 300
    assert tokenizer_files(train_bpe(TEXTS, 300, 12)) == tokenizer_files(bpe)
    assert tokenizer_files(train_bpe([*TEXTS, "airport " * 9], 300, 12)) != tokenizer_files(bpe)


def test_clip_texts_become_the_ids_of_open_clip(clip):
    import open_clip

    reference = open_clip.get_tokenizer("coca_ViT-B-32")(TRICKY, context_length=76)
    tokens = clip.encode(TRICKY)
    for text, ours, theirs in zip(TRICKY, tokens, reference, strict=True):
        assert ours.tolist() == theirs[: tokens.shape[1]].tolist(), text
    assert (reference[:, tokens.shape[1] :] == PAD_ID).all()


def test_clip_texts_are_cut_as_open_clip_cuts_them(clip):
    import open_clip

    long = "a satellite image of a dense city " * 20
    assert torch.equal(clip.encode([long]), open_clip.get_tokenizer("coca_ViT-B-32")([long], context_length=76))


@pytest.mark.parametrize("name", ["bpe", "clip"])
def test_saved_and_loaded_tokenizers_are_equal(name, request):
    tokenizer = request.getfixturevalue(name)
    loaded = load_tokenizer(tokenizer_files(tokenizer))
    assert loaded[1:] == tokenizer[1:]
    assert loaded.vocab_size == tokenizer.vocab_size
    assert torch.equal(loaded.encode(TRICKY), tokenizer.encode(TRICKY))


def test_a_foreign_tokenizer_is_refused_by_its_missing_key(bpe):
    files = tokenizer_files(bpe)
    files[TOKENIZER_CONFIG_FILE] = json.dumps({"tokenizer_class": "CLIPTokenizer"}).encode()
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json has no 'start_id'.*not written by urbanclip_ray"):
        load_tokenizer(files)


@pytest.mark.parametrize(
    "text", [*TEXTS, "semi-detached_houses/gardens", "zürich — naïve café, são paulo", "北京市 of 21 million", ""]
)
def test_a_text_of_small_letters_comes_back_from_its_ids(bpe, text):
    wide = bpe._replace(context_length=99)
    assert wide.decode(wide.encode([text])[0].tolist()) == text


def test_clips_ids_come_back_as_words_and_punctuation_with_blanks_between(clip):
    row = clip.encode(["Zürich's semi-detached  houses, 北京."])[0].tolist()
    assert clip.decode(row) == "zürich 's semi - detached houses , 北京 ."
    assert clip.decode(row) == SimpleTokenizer().decode(row[1:-2]).strip()


def test_what_stands_behind_the_end_or_is_no_token_is_not_part_of_a_text(bpe):
    river, city = (bpe.backend.token_to_id(word) for word in ("Ġriver", "Ġcity"))
    assert bpe.decode([river, bpe.end_id, city]) == "river"
    assert bpe.decode([bpe.start_id, river, 10**6, PAD_ID, city]) == "river city"
    assert bpe.decode([]) == ""
    half = bpe.encode(["é"])[0].tolist()[2]  # one byte of a character of two
    assert bpe.decode([half]) == "\ufffd"


def test_special_tokens_but_the_end_are_never_written(bpe, clip):
    assert bpe.never_written() == (PAD_ID, bpe.start_id, 3)
    assert clip.never_written() == (PAD_ID, clip.start_id)
    again = load_tokenizer(tokenizer_files(bpe))
    assert again.never_written() == bpe.never_written()
