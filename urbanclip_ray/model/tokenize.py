"""Texts to token ids: open_clip's CLIP tokenizer, or a byte-pair encoding trained on the run's own texts.

A row is start, text, end, then padding with 0. Rows are cut to the longest text of the batch (captions fill about 23 of 76
places); `model.coca` keeps results what they are at full length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from urbanclip_ray.config import ConfigError

PAD_ID = 0
SPECIAL_TOKENS = ("<pad>", "<start>", "<end>", "<unknown>")  # their places are their ids
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
WORD_END = "</w>"  # CLIP's own mark, in the place of the blank between two words


class TextTokenizer(NamedTuple):
    """A tokenizer with its special ids and `context_length`, the most places a text may fill, start and end included."""

    backend: Tokenizer
    start_id: int
    end_id: int
    context_length: int

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size())

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """int64 [texts, places], places = min(longest + 1, context_length).

        The extra column of padding is needed by open_clip's class mask, see `model.coca.encode_text`.
        """
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        rows = [[self.start_id, *text.ids[: self.context_length - 2], self.end_id] for text in encoded]
        places = min(max(len(row) for row in rows) + 1, self.context_length)
        tokens = torch.full((len(rows), places), PAD_ID, dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        return tokens

    def decode(self, row: Sequence[int]) -> str:
        """The text of a row of ids, with or without its start; what stands behind its end is not part of it.

        Where a word of CLIP's tokenizer ends is known, and not whether a blank stood there: punctuation has one before it.
        """
        ids = list(row[: row.index(self.end_id)] if self.end_id in row else row)
        words = [self.backend.id_to_token(each) for each in ids if each not in (self.start_id, PAD_ID)]
        text: str = decoders.ByteLevel().decode([word for word in words if word is not None])
        return text.replace(WORD_END, " ").strip()

    def never_written(self) -> tuple[int, ...]:
        """Ids that no text holds behind its start: padding, the start, and special tokens but the end."""
        special = {index for index, token in self.backend.get_added_tokens_decoder().items() if token.special}
        return tuple(sorted(({PAD_ID, self.start_id} | special) - {self.end_id}))

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many texts do not fit into the context and lose their end."""
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return sum(len(text.ids) > self.context_length - 2 for text in encoded)


def train_bpe(texts: Iterable[str], vocab_size: int, context_length: int) -> TextTokenizer:
    """A lower-case byte-level BPE of at most `vocab_size` tokens, trained on the given texts alone."""
    backend = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[3]))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    start, end = SPECIAL_TOKENS[1], SPECIAL_TOKENS[2]
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=[(start, 1), (end, 2)])
    return TextTokenizer(backend, start_id=1, end_id=2, context_length=context_length)


def open_clip_tokenizer(context_length: int) -> TextTokenizer:
    """CLIP's tokenizer, rebuilt from the vocabulary that open_clip ships, so that it is saved and loaded like ours."""
    from open_clip.tokenizer import SimpleTokenizer

    simple = SimpleTokenizer()
    merges = list(simple.bpe_ranks)
    backend = Tokenizer(
        models.BPE(vocab=simple.encoder, merges=merges, end_of_word_suffix=WORD_END, unk_token="<end_of_text>")  # noqa: S106 a token, no password
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own words
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return TextTokenizer(backend, simple.sot_token_id, simple.eot_token_id, context_length)


def tokenizer_files(tokenizer: TextTokenizer) -> dict[str, bytes]:
    """The files that bring a tokenizer back, here and in `transformers.AutoTokenizer` (which open_clip uses)."""
    vocabulary = {index: token for token, index in tokenizer.backend.get_vocab().items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary[tokenizer.start_id],
        "eos_token": vocabulary[tokenizer.end_id],
        "pad_token": vocabulary[PAD_ID],
        "start_id": tokenizer.start_id,
        "end_id": tokenizer.end_id,
        "model_max_length": tokenizer.context_length,
    }
    return {
        TOKENIZER_FILE: tokenizer.backend.to_str(pretty=False).encode(),
        TOKENIZER_CONFIG_FILE: json.dumps(settings, indent=1).encode(),
    }


def load_tokenizer(files: dict[str, bytes]) -> TextTokenizer:
    """The tokenizer of :func:`tokenizer_files`."""
    try:
        settings = json.loads(files[TOKENIZER_CONFIG_FILE])
        start_id, end_id = int(settings["start_id"]), int(settings["end_id"])
        context_length = int(settings["model_max_length"])
    except KeyError as missing:
        raise ConfigError(
            f"{TOKENIZER_CONFIG_FILE} has no {missing}: these weights were not written by urbanclip_ray"
        ) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{TOKENIZER_CONFIG_FILE} is damaged ({error}): copy the folder of weights again") from None
    try:
        backend = Tokenizer.from_str(files[TOKENIZER_FILE].decode())
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(f"{TOKENIZER_FILE} is damaged ({error}): copy the folder of weights again") from None
    return TextTokenizer(backend, start_id, end_id, context_length)
