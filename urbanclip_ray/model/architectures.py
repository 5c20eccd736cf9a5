"""Model configs in open_clip's own format: ours by name, and any open_clip config that is a CoCa."""

from __future__ import annotations

import copy
from typing import Any

from urbanclip_ray.config import ConfigError, ModelConfig


def _small_coca(*, image_px: int, patch_px: int, width: int, layers: int, text_layers: int, context: int) -> dict[str, Any]:
    """A CoCa for two CPU cores: mean pooling instead of 256 pooler queries, one decoder layer, one width throughout.

    The decoder reads the patch tokens directly, so both towers share `width`. Heads are 64 wide.
    """
    text = {"context_length": context, "vocab_size": 0, "width": width, "heads": width // 64, "layers": text_layers}
    return {
        "embed_dim": width,
        "custom_text": True,
        "vision_cfg": {
            "image_size": image_px,
            "patch_size": patch_px,
            "width": width,
            "head_width": 64,
            "layers": layers,
            "pool_type": "avg",
            "output_tokens": True,
        },
        "text_cfg": text | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {
            "context_length": context,
            "vocab_size": 0,
            "width": width,
            "heads": width // 64,
            "layers": 1,
        },
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    # 64 patches of 12 px; 4.9 million of its 9 million parameters see the image
    "coca_tiny_96": _small_coca(image_px=96, patch_px=12, width=256, layers=6, text_layers=2, context=40),
    # 81 patches of 3 px, for tiles of the world demo at their own resolution; texts are whole descriptions
    "coca_tiny_27": _small_coca(image_px=27, patch_px=3, width=128, layers=4, text_layers=2, context=96),
    # for tests: seconds on one core
    "coca_test_16": _small_coca(image_px=16, patch_px=8, width=64, layers=1, text_layers=1, context=24),
}


def open_clip_config(config: ModelConfig, vocab_size: int | None, *, logit_bias: float | None = None) -> dict[str, Any]:
    """The open_clip model config of a run. `vocab_size` replaces the architecture's where the tokenizer is our own.

    `logit_bias` is where the bias of the sigmoid loss starts; a model of the softmax loss has none.
    Raises ConfigError for a name that is neither ours nor open_clip's, or whose model is not a CoCa.
    """
    if config.architecture in ARCHITECTURES:
        found = copy.deepcopy(ARCHITECTURES[config.architecture])
        if vocab_size is None:
            raise ConfigError(f"model.architecture={config.architecture} needs model.tokenizer=bpe")
    else:
        found = _from_open_clip(config.architecture)
    if vocab_size is not None:
        found["text_cfg"] |= {"vocab_size": vocab_size, "hf_tokenizer_name": "tokenizer.json"}
        found["multimodal_cfg"] |= {"vocab_size": vocab_size}
    if config.patch_dropout:
        found["vision_cfg"] |= {"patch_dropout": config.patch_dropout}
    if logit_bias is not None:
        found["init_logit_bias"] = logit_bias
    return found


def _from_open_clip(name: str) -> dict[str, Any]:
    from open_clip.factory import get_model_config, list_models

    found: dict[str, Any] | None = get_model_config(name)
    if found is None or "multimodal_cfg" not in found:
        known = [*ARCHITECTURES, *(other for other in list_models() if "coca" in other)]
        problem = "is not known" if found is None else "is not a CoCa: it has no text decoder"
        raise ConfigError(f"model.architecture={name!r} {problem}; choose one of {', '.join(known)}")
    if found["text_cfg"].get("hf_model_name"):
        raise ConfigError(f"model.architecture={name!r} takes its text tower from a model hub, which is not supported")
    return copy.deepcopy(found)
