"""Which sentences of captions are kept."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from urbanclip_ray.config.resources import ActorsConfig
from urbanclip_ray.config.section import Section, execution


class ConsistencyConfig(ActorsConfig):
    """Whether a sentence fits its tile by the cosine of a CLIP-like model; off where `weights` is empty.

    `weights` is a run, a folder of weights, or ARCHITECTURE@FILE of open_clip, and must have a text tower.
    """

    weights: str = execution("")  # what they are takes part in digests, not where they lie
    min_score: float = Field(default=-1.0, ge=-1, le=1)  # scores of one model say nothing of those of another
    top_share: float = Field(default=1.0, gt=0, le=1)  # of every region's sentences, the best
    tiles_per_batch: int = execution(64, ge=1)
    num_actors: int = execution(1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        selects = self.min_score > -1 or self.top_share < 1
        if selects and not self.weights:
            raise ValueError("refine.consistency: a min_score or top_share needs refine.consistency.weights to score by")
        return self


class RefineConfig(Section):
    """Which sentences are kept. By default all but empty, overlong and repeated ones: people's captions need no more.

    What the other keys decide takes part in digests only where it differs from the default.
    """

    min_words: int = Field(default=3, ge=1)
    max_words: int = Field(default=60, ge=1)
    repeats: Literal["reject", "keep"] = "reject"  # a sentence that its tile already has
    rules: tuple[str, ...] = ()  # names of rules, which are the reasons of their rejections; [all] for all of them
    rules_file: str = execution("")  # of the same form as captioners/rules.yaml, which is used where it is empty
    language: str = Field(default="en", pattern="^[a-z]{2,3}$")  # ISO 639-1, for the rule "other language"
    max_tiles_per_sentence: int = Field(default=0, ge=0)  # a sentence that more tiles share says nothing of any; 0: no limit
    near_duplicates: float = Field(
        default=0.0, ge=0, lt=1
    )  # sentences of at least this Jaccard similarity count as one; 0: equal
    consistency: ConsistencyConfig = ConsistencyConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError("refine.min_words is above refine.max_words: lower one or raise the other")
        if self.near_duplicates and not self.max_tiles_per_sentence:
            raise ValueError("refine.near_duplicates counts sentences as one for refine.max_tiles_per_sentence: set that, too")
        return self

    @property
    def needs_tiles(self) -> bool:
        """Whether sentences are held against their tiles."""
        return bool(self.rules or self.consistency.weights)

    def content(self) -> dict[str, Any]:
        content, default = super().content(), RefineConfig.model_construct().model_dump(mode="json")
        content["consistency"] = self.consistency.content() if self.consistency.weights else default["consistency"]
        always = ("min_words", "max_words", "repeats")
        return {key: value for key, value in content.items() if key in always or value != default[key]}
