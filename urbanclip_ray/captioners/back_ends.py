"""Which back end of a config is asked, and what makes its captions. Nothing here loads a model before it is told to."""

from __future__ import annotations

from urbanclip_ray.captioners import chat_endpoint, coca, vision_language, vllm_engine
from urbanclip_ray.captioners.base import Captioner, Origin
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.captioners.texts import Cleaned
from urbanclip_ray.config import CaptionConfig

ORIGINS = {"coca": coca.origin_of, "openai": chat_endpoint.origin_of, "vllm": vllm_engine.origin_of}


def origin_of(config: CaptionConfig, reference: ModelReference, prompt: str) -> Origin:
    """What makes the captions of tiles that are asked this, apart from the margins that are cut off them."""
    return ORIGINS.get(config.captioner, vision_language.origin_of)(config, reference, prompt)


def load_captioner(config: CaptionConfig, reference: ModelReference) -> Captioner:
    """The captioner in this process, its texts clean; raises UnusableCaptionerError when it cannot be had."""
    if config.captioner == "coca":
        return Cleaned(coca.CocaCaptioner(config, reference))
    if config.captioner == "openai":
        return Cleaned(chat_endpoint.ChatEndpointCaptioner(config, reference))
    return Cleaned(vision_language.VisionLanguageCaptioner(config, reference))
