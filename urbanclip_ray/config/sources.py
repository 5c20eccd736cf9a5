"""What a user points a run at."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from urbanclip_ray.config.section import Section, execution
from urbanclip_ray.schema import is_safe_name


class MetadataColumns(Section):
    """Which column of a CSV beside tiles means what."""

    file_column: str = "file"
    lon_column: str = ""  # empty: the first of lon, lng, long, longitude that the CSV has
    lat_column: str = ""  # empty: lat or latitude
    group_column: str = "group"
    caption_column: str = "caption"
    indicators: tuple[str, ...] = ()  # empty: every other column that holds numbers


class FolderSource(MetadataColumns):
    """A folder of JPEG, PNG, WebP or TIFF tiles; the sub-folder is the region; an optional CSV lies beside it."""

    kind: Literal["folder"] = "folder"
    uri: str = execution("")  # what lies there is fingerprinted; where it lies does not change it
    metadata: str = execution("")  # CSV: a path inside `uri`, or an absolute path or URI; one row per file


class SlippySource(MetadataColumns):
    """A folder of web map tiles ZOOM/X/Y.png, below a folder for each region or none; an optional CSV lies beside it."""

    kind: Literal["slippy"] = "slippy"
    uri: str = execution("")
    metadata: str = execution("")  # as that of a folder; its `file_column` holds ZOOM/X/Y, with the region before it if any
    scheme: Literal["xyz", "tms"] = "xyz"  # xyz: y grows to the south, as web maps have it; tms: to the north


class SceneSource(Section):
    """Satellite scenes: GeoTIFFs (cloud-optimised ones too) that are cut into tiles. The sub-folder is the region."""

    kind: Literal["scene"] = "scene"
    uri: str = execution("")  # a GeoTIFF or a folder of them
    tile_px: int = Field(default=256, ge=8)
    stride_px: int = Field(default=0, ge=0)  # 0: tile_px; below it neighbouring tiles overlap
    bands: tuple[int, ...] = ()  # red, green, blue, or one for grey, counted from 1; empty: 1, 2, 3, or the only one
    # Values that become black and white. Empty: bytes stay as they are, other pixels are spread between `percentiles` of each
    # band in each scene, so that scenes of several days are comparable only with values given here.
    value_range: tuple[float, float] | None = None
    percentiles: tuple[float, float] = (2.0, 98.0)
    max_nodata_share: float = Field(default=0.5, ge=0, lt=1)  # tiles with more are rows with an error

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.bands) not in (0, 1, 3) or any(band < 1 for band in self.bands):
            raise ValueError(f"source.bands={list(self.bands)}: name three bands, red, green, blue, or one; the first is 1")
        for key in ("value_range", "percentiles"):
            pair = getattr(self, key)
            if pair is not None and pair[0] >= pair[1]:
                raise ValueError(f"source.{key}={list(pair)} is not a range: give low below high")
        if not (self.percentiles[0] >= 0 and self.percentiles[1] <= 100):
            raise ValueError(f"source.percentiles={list(self.percentiles)} are not between 0 and 100")
        return self


class RsicdSource(Section):
    """RSICD (Lu et al. 2017): `captions.json`, a list of {image, captions, split, land_use}, and its images."""

    kind: Literal["rsicd"] = "rsicd"
    uri: str = execution("")
    captions_file: str = "captions.json"


class WorldSource(Section):
    """The world demo: land tiles of NASA's Blue Marble with the population of their cities (GeoNames)."""

    kind: Literal["world"] = "world"
    tile_px: int = Field(default=54, ge=8, le=600)  # the map has 15 px a degree: 54 px are 3.6 degrees
    stride_px: int = Field(default=54, ge=1, le=600)  # below tile_px neighbouring tiles overlap
    min_land_share: float = Field(default=0.95, gt=0, le=1)
    max_abs_lat: float = Field(default=60.0, gt=0, le=85)
    max_tiles: int = Field(default=0, ge=0)  # 0: all; else as many, spread evenly over all


class UrbanClipSource(Section):
    """UrbanCLIP's released captions and labels (arXiv 2310.18340), with tiles that the user brings: it released none."""

    kind: Literal["urbanclip"] = "urbanclip"
    uri: str = execution("")  # folder of tiles: CITY/ZOOM_X_Y_s.jpg in Baidu's grid, as the release names them
    release: str = execution("")  # folder of CITY_captions.json and CITY_labels.csv; empty: the folder of tiles
    cities: tuple[str, ...] = ("Beijing",)

    @field_validator("cities")
    @classmethod
    def _distinct_folders(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value) or not all(map(is_safe_name, value)):
            raise ValueError("name at least one city, each once, as its folder and files are named: [Beijing, Guangzhou]")
        return value


class PairsSource(Section):
    """Pairs that were exported, here or elsewhere: what the files of one format have in common."""

    uri: str = execution("")
    # A folder of one's own copy of the tiles, for pairs that came without pixels: joined by tile id, checked by sha256.
    pixels: str = execution("")


class WebDatasetSource(PairsSource):
    """A folder of WebDataset shards: tar archives of KEY.jpg (or png, webp, tif), KEY.txt and KEY.json."""

    kind: Literal["webdataset"] = "webdataset"


class HuggingFaceSource(PairsSource):
    """A Hugging Face dataset as a folder of Parquet files; nothing of it is executed."""

    kind: Literal["huggingface"] = "huggingface"
    image_column: str = "image"
    text_column: str = ""  # empty: the first of texts, text, captions, caption that there is
    tile_id_column: str = "tile_id"  # where there is none, the file and the number of the row
    region_column: str = "region"


SOURCE_KINDS: dict[str, type[Section]] = {
    "folder": FolderSource,
    "scene": SceneSource,
    "slippy": SlippySource,
    "rsicd": RsicdSource,
    "world": WorldSource,
    "urbanclip": UrbanClipSource,
    "webdataset": WebDatasetSource,
    "huggingface": HuggingFaceSource,
}
SourceConfig = Annotated[
    FolderSource
    | SceneSource
    | SlippySource
    | RsicdSource
    | WorldSource
    | UrbanClipSource
    | WebDatasetSource
    | HuggingFaceSource,
    Field(discriminator="kind"),
]
