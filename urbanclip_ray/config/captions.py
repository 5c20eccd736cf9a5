"""Who describes the tiles, and what they are asked."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from urbanclip_ray.config.prompts import find_prompts
from urbanclip_ray.config.resources import ActorsConfig
from urbanclip_ray.config.section import Section, VariableName, execution


class DecodingConfig(Section):
    """How a captioning model picks its words."""

    max_new_tokens: int = Field(default=128, ge=1)
    num_beams: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0)  # 0: always the likeliest words, so top_p and seed mean nothing
    top_p: float = Field(default=1.0, gt=0, le=1)
    num_samples: int = Field(default=1, ge=1)  # descriptions of one tile
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"caption.decoding.num_samples={self.num_samples} with temperature 0 would repeat one description: "
                "set caption.decoding.temperature above 0, or caption.decoding.num_samples=1"
            )
        return self


class CaptionConfig(ActorsConfig):
    """Who describes the tiles.

    `given`: the source itself, and a `model` of the transformers library, where one is named, for tiles that the source
    describes with no word; `land_cover`: the rule-based baseline; `coca`: a CoCa that was pretrained here, or published in
    open_clip's files; `transformers`: an image-text-to-text model of that library; `vllm`: one that vLLM runs on GPUs;
    `openai`: a model behind an OpenAI-compatible endpoint. The keys from `model` on are of such a model.
    """

    captioner: Literal["given", "land_cover", "coca", "transformers", "openai", "vllm"] = "land_cover"
    max_error_share: float = Field(default=0.05, ge=0, le=1)
    # A model id of the Hugging Face hub with a revision, or a directory (a path or a URI), whose revision is its content.
    # What they stand for takes part in digests, not where it lies. For `openai`: the endpoint's name for the model. For
    # `coca`, without a revision: a run, a pretraining, a folder of weights, or ARCHITECTURE@FILE.
    model: str = execution("")
    revision: str = execution("")  # of a hub model: a commit, tag or branch; for `openai`: any name for the weights behind it
    # `coca` takes none. Models without a chat template take it as it stands: BLIP continues it, and is often best with none.
    prompt: str = "Describe the land use, buildings, roads, water and green areas of this satellite image in a few sentences."
    prompts: tuple[str, ...] = ()  # names of templates, one description for each, in this order; in the place of `prompt`
    templates: dict[str, str] = Field(default={})  # of your own, by name; what a text may hold is said in config/prompts.yaml
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: what the weights were saved in; `coca`: fp32
    decoding: DecodingConfig = DecodingConfig()
    device_map: str = execution("")  # empty: the whole model on the actor's one device; auto spreads it (needs accelerate)
    max_attempts: int = execution(3, ge=1)  # at a tile whose failure may pass, or which ends the captioner's process
    cache_folder: str = execution("~/.cache/urbanclip_ray")  # of every node, for directories that are URIs
    tiles_per_batch: int = execution(64, ge=1)
    num_actors: int = execution(2, ge=1)
    # The rest is of `openai`.
    endpoint: str = execution("")  # https://host/v1: where the images are sent
    api_key_variable: VariableName = execution("OPENAI_API_KEY")  # set on every node; empty: the endpoint wants none
    concurrent_requests: int = execution(8, ge=1)  # of one actor
    requests_per_minute: int = execution(0, ge=0)  # of all actors together, each its share; 0: as many as it answers
    request_retries: int = execution(6, ge=0)  # of one request that is refused for the moment, or not answered
    request_timeout_s: float = execution(120.0, ge=0.1)

    @field_validator("endpoint")
    @classmethod
    def _is_endpoint(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^/@?#\s\\]+(/[^@?#\s\\]*)?", value):
            raise ValueError("write it as https://host/v1 or http://host:port/v1, without keys, user names and queries")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _check(self) -> Self:
        needs_model = self.captioner in ("transformers", "vllm")
        if needs_model and not self.model:
            raise ValueError(
                f"caption.captioner={self.captioner} needs caption.model: a directory of a model, or a model id of the "
                "Hugging Face hub with caption.revision"
            )
        if self.captioner == "openai" and not (self.endpoint and self.model and self.revision):
            raise ValueError(
                "caption.captioner=openai needs caption.endpoint (https://host/v1), caption.model (the endpoint's name for it) "
                "and caption.revision: an endpoint does not tell its weights, so name them, and otherwise when they change"
            )
        if self.captioner in ("openai", "vllm") and self.decoding.num_beams > 1:
            raise ValueError(f"caption.captioner={self.captioner} has no beam search: set caption.decoding.num_beams=1")
        if self.captioner == "vllm" and (self.cpus_per_actor or self.memory_per_actor_bytes or self.node_labels):
            raise ValueError(
                "caption.captioner=vllm places its engines by caption.gpus_per_actor and caption.accelerator_type alone: leave "
                "out cpus_per_actor, memory_per_actor_bytes and node_labels"
            )
        if self.captioner == "coca":
            self._check_coca()
        self.asked()
        return self

    def _check_coca(self) -> None:
        if not self.model:
            raise ValueError(
                "caption.captioner=coca needs caption.model: a run, a pretraining, or a folder of a CoCa's weights"
            )
        if self.revision:
            raise ValueError(f"caption.revision={self.revision}: weights of a CoCa are known by their content; leave it out")
        if self.prompts or self.prompt not in ("", type(self).model_fields["prompt"].default):
            raise ValueError(
                "caption.captioner=coca is asked nothing, it goes on from the image alone: leave out caption.prompts and "
                "caption.prompt"
            )
        if self.device_map:
            raise ValueError("caption.captioner=coca runs on the actor's one device: leave out caption.device_map")
        if self.decoding.num_beams > 1 and self.decoding.temperature > 0:
            raise ValueError(
                f"caption.captioner=coca with caption.decoding.num_beams={self.decoding.num_beams} draws nothing: set "
                "caption.decoding.temperature=0, or num_beams=1 to draw"
            )

    @property
    def uses_model(self) -> bool:
        return self.captioner in ("coca", "transformers", "openai", "vllm") or (self.captioner == "given" and bool(self.model))

    @property
    def has_weights(self) -> bool:
        """Whether `model` names weights that this run loads, and not a name on somebody else's machine."""
        return self.uses_model and self.captioner != "openai"

    @property
    def takes_prompt(self) -> bool:
        return self.uses_model and self.captioner != "coca"

    def asked(self) -> tuple[str, ...]:
        """What a model is asked about a tile, one description for each: templates where there are `prompts`."""
        if self.captioner == "coca":
            return ("",)
        return find_prompts(self.prompts, self.templates) if self.prompts else (self.prompt,)

    def content(self) -> dict[str, Any]:
        """Prompts by what they say, not by their names: digests of runs with one plain prompt are what they always were."""
        content = super().content()
        if not self.uses_model:
            return {name: content[name] for name in ("captioner", "max_error_share")}
        del content["prompts"], content["templates"]
        if not self.takes_prompt:
            return content | {"prompt": ""}
        return content | {"prompt": None, "prompts": list(self.asked())} if self.prompts else content
