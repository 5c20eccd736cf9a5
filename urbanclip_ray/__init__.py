"""urbanclip_ray: a Ray-distributed trainer for text-enhanced urban region profiling (UrbanCLIP, WWW 2024).

Names are loaded when they are first used: importing the package imports neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "RunConfig": "config.run",
    "apply_overrides": "overrides",
    "build_config": "overrides",
    "load_recipe": "recipes",
    "open_source": "sources",
    "ingest_tiles": "sources.ingest",
    "caption_tiles": "captioners.caption",
    "refine_captions": "captioners.refine",
    "pretrain": "train.launch",
    "load_model": "model.weights",
    "embed_tiles": "evaluate.embed",
    "probe": "evaluate.probe",
    "search_tiles": "evaluate.search",
    "write_report": "evaluate.report",
    "compare_runs": "evaluate.compare",
    "run_search": "tune",
    "run_stages": "pipeline",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'urbanclip_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"urbanclip_ray.{_PLACES[name]}"), name)
