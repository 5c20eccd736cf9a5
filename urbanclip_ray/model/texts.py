"""What a model is shown of a tile's sentences."""

from __future__ import annotations

from typing import Literal

TextMode = Literal["sentence", "paragraph"]


def shown_texts(sentences: list[str], mode: TextMode) -> list[str]:
    """Each sentence by itself, or the whole description as one text (the paper's way)."""
    return [" ".join(sentences)] if mode == "paragraph" else sentences
