"""Indicators that do not come with the source: from a CSV, and from rasters."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from urbanclip_ray.config.section import Section, execution


class RasterConfig(Section):
    """A GeoTIFF of amounts (people, tons: `sum`) or of densities, prices and brightness (`mean`)."""

    uri: str = execution("")  # what lies there is fingerprinted
    operation: Literal["sum", "mean"]  # a sum of densities, or a mean of amounts, is a number without a meaning
    band: int = Field(default=1, ge=1)
    nodata: float | None = None  # a value that means unknown, beside the one that the file declares
    # Of a footprint; below it the label is unknown. Lower it where cells without data hold nothing, as those of the sea do in
    # maps of people: sums then lack what is not covered, means are of the covered part.
    min_covered_share: float = Field(default=0.9, gt=0, le=1)

    @field_validator("uri")
    @classmethod
    def _is_given(cls, value: str) -> str:
        if not value:
            raise ValueError("give the path or URI of a GeoTIFF")
        return value


class LabelsConfig(Section):
    """Indicators beside those that the source brings. Two of one name are refused."""

    csv: str = execution("")  # rows join tiles by `id_column` where the CSV has it, else by the place in their coordinates
    id_column: str = "tile_id"
    lon_column: str = ""  # empty: the first of lon, lng, long, longitude that the CSV has
    lat_column: str = ""  # empty: lat or latitude
    indicators: tuple[str, ...] = ()  # empty: every other column that holds numbers
    rows_per_tile: Literal["one", "mean", "sum"] = "one"  # of rows joined by coordinates: one is all there may be, or combine
    rasters: dict[str, RasterConfig] = {}  # noqa: RUF012 pydantic copies it; indicator -> raster
    tile_side_m: float | None = Field(default=None, gt=0)  # on the ground, for tiles of which only the centre is known
    footprints_per_task: int = execution(5000, ge=1)

    @field_validator("rasters")
    @classmethod
    def _are_indicators(cls, value: dict[str, RasterConfig]) -> dict[str, RasterConfig]:
        if "tile_id" in value or "" in value:
            raise ValueError("a raster is named as its indicator, which cannot be 'tile_id' or empty")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "tile_id" in self.indicators:
            raise ValueError("labels.indicators cannot have 'tile_id', the name of the labels' key")
        return self

    @property
    def is_empty(self) -> bool:
        return not self.csv and not self.rasters

    def content(self) -> dict[str, Any]:
        rasters = {name: raster.content() for name, raster in sorted(self.rasters.items())}
        return {} if self.is_empty else super().content() | {"rasters": rasters}
