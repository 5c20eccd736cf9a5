"""What texts are asked of the tiles, and what the report shows beside the run's own scores."""

from __future__ import annotations

from pydantic import Field, field_validator

from urbanclip_ray.config.section import Section, execution

URBAN_PROMPTS = (
    "dense residential buildings",
    "scattered houses with gardens",
    "tall buildings of a city centre",
    "an industrial area with factories",
    "a commercial area with large flat roofs",
    "a port with ships and containers",
    "an airport with runways",
    "a railway station with tracks",
    "a wide road with many cars",
    "a bridge over a river",
    "a parking lot",
    "a school with a sports field",
    "a stadium",
    "a park with trees",
    "farmland with rectangular fields",
    "dense green forest",
    "bare soil and construction sites",
    "a river, a lake or the sea",
    "mountains without buildings",
    "desert sand",
)


class PromptsConfig(Section):
    """Zero-shot features: how near every tile is to each of these texts."""

    texts: tuple[str, ...] = Field(default=URBAN_PROMPTS, min_length=1)

    @field_validator("texts")
    @classmethod
    def _different_and_not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text.strip() for text in value) or len(set(value)) < len(value):
            raise ValueError("prompts.texts must be different and not empty: take out the empty or repeated ones")
        return value


class ReportConfig(Section):
    """What the report's page holds."""

    experiment: str = execution("")  # path or URI of the JSON with the scores of several runs, see evaluate.arms
    max_thumbnails: int = execution(20_000, ge=0)  # tiles shown under the pointer; a seeded choice where there are more
    max_thumbnail_mb: float = execution(12.0, ge=0.1)  # of all of them; they get smaller until they fit
