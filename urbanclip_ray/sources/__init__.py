"""What a user points us at: folders, scenes, web map tiles, RSICD, UrbanCLIP's release, exported pairs, the world demo.

Each lists its tiles and reads one at a time.
"""

from __future__ import annotations

from urbanclip_ray.config import (
    FolderSource,
    HuggingFaceSource,
    RsicdSource,
    SceneSource,
    SlippySource,
    SourceConfig,
    UrbanClipSource,
    WebDatasetSource,
)
from urbanclip_ray.sources.base import Source, SourceError, TileRecord
from urbanclip_ray.sources.folder import FolderTiles
from urbanclip_ray.sources.huggingface import HuggingFaceTiles
from urbanclip_ray.sources.rsicd import RsicdTiles
from urbanclip_ray.sources.scene import SceneTiles
from urbanclip_ray.sources.slippy import SlippyTiles
from urbanclip_ray.sources.urbanclip import UrbanClipTiles
from urbanclip_ray.sources.webdataset import WebDatasetTiles
from urbanclip_ray.sources.world import WorldTiles

__all__ = ["Source", "SourceError", "TileRecord", "open_source"]


def open_source(config: SourceConfig) -> Source:
    """The source that a config describes; it reads nothing until it is asked."""
    if isinstance(config, FolderSource):
        return FolderTiles(config)
    if isinstance(config, SceneSource):
        return SceneTiles(config)
    if isinstance(config, SlippySource):
        return SlippyTiles(config)
    if isinstance(config, RsicdSource):
        return RsicdTiles(config)
    if isinstance(config, UrbanClipSource):
        return UrbanClipTiles(config)
    if isinstance(config, WebDatasetSource):
        return WebDatasetTiles(config)
    if isinstance(config, HuggingFaceSource):
        return HuggingFaceTiles(config)
    return WorldTiles(config)
