"""One tree of frozen, validated configs for every stage of the walk.

A run is described by one :class:`RunConfig`. Unknown keys and bad values fail when the config is built, and the error
names the key and the fix. Fields that only say *how* the work is done (number of workers, batching of actors) are marked
with :func:`execution`; every other field says *what* is made and takes part in the digest of what it makes.
"""

from __future__ import annotations

from urbanclip_ray.config.captions import CaptionConfig, DecodingConfig
from urbanclip_ray.config.data import (
    IngestConfig,
    PackConfig,
    PixelsConfig,
    SplitConfig,
    SplitKind,
)
from urbanclip_ray.config.evaluation import (
    NO_WEIGHTS,
    BaselineName,
    BaselinesConfig,
    EmbedConfig,
    Features,
    ProbeConfig,
    Target,
)
from urbanclip_ray.config.labels import LabelsConfig, RasterConfig
from urbanclip_ray.config.refinement import ConsistencyConfig, RefineConfig
from urbanclip_ray.config.report import PromptsConfig, ReportConfig
from urbanclip_ray.config.resources import ActorsConfig, Placement, ResourcesConfig, TasksConfig
from urbanclip_ray.config.run import RunConfig
from urbanclip_ray.config.search import Domain, TuneConfig
from urbanclip_ray.config.section import ConfigError, Section
from urbanclip_ray.config.sources import (
    SOURCE_KINDS,
    FolderSource,
    HuggingFaceSource,
    MetadataColumns,
    PairsSource,
    RsicdSource,
    SceneSource,
    SlippySource,
    SourceConfig,
    UrbanClipSource,
    WebDatasetSource,
    WorldSource,
)
from urbanclip_ray.config.stores import StoreConfig
from urbanclip_ray.config.tracking import TrackingConfig
from urbanclip_ray.config.training import HUB, AugmentConfig, ModelConfig, ModelPart, Precision, StepCut, TrainConfig

__all__ = [
    "HUB",
    "NO_WEIGHTS",
    "SOURCE_KINDS",
    "ActorsConfig",
    "AugmentConfig",
    "BaselineName",
    "BaselinesConfig",
    "CaptionConfig",
    "ConfigError",
    "ConsistencyConfig",
    "DecodingConfig",
    "Domain",
    "EmbedConfig",
    "Features",
    "FolderSource",
    "HuggingFaceSource",
    "IngestConfig",
    "LabelsConfig",
    "MetadataColumns",
    "ModelConfig",
    "ModelPart",
    "PackConfig",
    "PairsSource",
    "PixelsConfig",
    "Placement",
    "Precision",
    "ProbeConfig",
    "PromptsConfig",
    "RasterConfig",
    "RefineConfig",
    "ReportConfig",
    "ResourcesConfig",
    "RsicdSource",
    "RunConfig",
    "SceneSource",
    "Section",
    "SlippySource",
    "SourceConfig",
    "SplitConfig",
    "SplitKind",
    "StepCut",
    "StoreConfig",
    "Target",
    "TasksConfig",
    "TrackingConfig",
    "TrainConfig",
    "TuneConfig",
    "UrbanClipSource",
    "WebDatasetSource",
    "WorldSource",
]
