"""Runs that differ from a base in one thing each: what every part of a recipe is worth. `--recipe BASE/ARM` is one."""

from __future__ import annotations

from typing import Any

from urbanclip_ray.config import NO_WEIGHTS, RefineConfig, RunConfig, Section

FULL = "full"
WITHOUT_TEXT = "without_text"
ASPECTS = ("overview", "buildings", "roads", "vegetation_and_water", "human_activity")  # prompts by name, one in each arm


def ablations(base: RunConfig) -> dict[str, RunConfig]:
    """Every arm by name, `full` (the base itself) first; arms that would not differ from the base are left out.

    without_text trains the image tower by two augmentations of a tile alone, so it has no pretraining but the baseline
    `image_only`. The arms share the base's run, where what they have in common is made once.
    """
    train, caption = base.train, base.caption
    arms: dict[str, dict[str, Any]] = {
        WITHOUT_TEXT: {"embed": {"weights": NO_WEIGHTS}, "baselines": {"names": ("image_only",)}},
        "without_refinement": {"refine": RefineConfig(min_words=1, max_words=10_000, repeats="keep").model_dump()},
        "without_contrastive": {"train": {"contrastive_weight": 0.0}},
        "without_caption": {"train": {"caption_weight": 0.0}},
    }
    other_mode = "paragraph" if train.text_mode == "sentence" else "sentence"
    arms[other_mode] = {"train": {"text_mode": other_mode}}
    if caption.takes_prompt:
        arms |= {f"aspect_{name}": {"caption": {"prompts": (name,)}} for name in ASPECTS}
    if caption.captioner != "land_cover":
        arms["captioner_land_cover"] = {"caption": {"captioner": "land_cover"}}
    weights = {"contrastive_weight": train.contrastive_weight, "caption_weight": train.caption_weight}
    for name, key in (("without_contrastive", "caption_weight"), ("without_caption", "contrastive_weight")):
        if not weights[key]:
            del arms[name]  # the base has only one loss: without it nothing is learned
    changed = {name: change(base, sections) for name, sections in arms.items()}
    return {FULL: base} | {name: config for name, config in changed.items() if config != base}


def change(config: RunConfig, sections: dict[str, dict[str, Any]]) -> RunConfig:
    """The config with some keys of some sections replaced, validated anew."""
    tree = config.model_dump()
    for name, values in sections.items():
        section = getattr(config, name)
        assert isinstance(section, Section)  # noqa: S101  a mistake of ours, never of a user
        tree[name] |= values
    return RunConfig.model_validate(tree)
