"""The libraries whose versions shape results, as every manifest records them."""

from __future__ import annotations

import importlib.metadata

RECORDED_LIBRARIES = (
    "urbanclip_ray",
    "ray",
    "torch",
    "open_clip_torch",
    "deepspeed",
    "transformers",
    "pyarrow",
    "numpy",
    "scikit-learn",
    "rasterio",
    "pyproj",
    "exactextract",
    "py3langid",
    "datasketch",
)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape results, as installed."""
    found = {}
    for name in RECORDED_LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # our own code, too, may be uploaded with a job instead
            found[name] = "not installed"
    return found
