"""Small vision-language models of real classes with random weights, as directories that transformers loads; no network.

    python tests/vision_language_models.py FOLDER

writes `FOLDER/blip` (BLIP: the prompt is the caption's beginning) and `FOLDER/qwen2_vl` (Qwen2-VL: a chat template, a prompt
with as many image tokens as the tile has patches). What they say is noise, but for one tile always the same noise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

TEXT = (
    "a an the of in with and near some many dense sparse green grey brown white blue large small road roads river lake "
    "forest trees houses buildings roofs park field fields bridge harbour parking lot industrial residential area water "
    "grass sand rows long wide narrow old new describe this satellite tile image city centre suburb lies along"
)
WORDS = TEXT.split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPREAD = 0.3  # of the random weights: wide enough that different tiles get different words


SMALL_BLIP = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}


def make_blip(folder: Path, seed: int = 0, size: dict[str, int] = SMALL_BLIP, image_px: int = 32) -> Path:
    """A BLIP with a WordPiece tokenizer."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate([*special, *WORDS])})
    tokenizer.add_tokens([AddedToken("[DEC]", special=True)], special_tokens=True)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("sep", "[SEP]"), ("dec", "[DEC]"))}
    text = size | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "bos_token_id": ids["dec"],
        "eos_token_id": ids["sep"],
        "sep_token_id": ids["sep"],
        "pad_token_id": 0,
        "initializer_range": SPREAD,
    }
    vision = size | {"image_size": image_px, "patch_size": 8, "initializer_range": SPREAD}
    torch.manual_seed(seed)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=32))
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": image_px, "width": image_px}), tokenizer).save_pretrained(folder)
    return folder


def make_qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """A Qwen2-VL with a byte-level tokenizer, 28 px per image token, and images of 56 to 112 px a side."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT] * 8, vocab_size=400, show_progress=False)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=bpe.get_vocab(), merges=merges, eos_token="<|im_end|>", model_max_length=4096)
    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks], special_tokens=True)
    ids = {mark.strip("<|>"): tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},  # halves of 16
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": ids["im_end"],
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": SPREAD,
    }
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "initializer_range": SPREAD}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = ids["im_end"]
    model.save_pretrained(folder)
    images = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for make in (make_blip, make_qwen2_vl):
        print(make(target / make.__name__.removeprefix("make_")))
