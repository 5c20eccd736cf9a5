"""Small GeoTIFFs that several tests write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio

UTM_50N = "EPSG:32650"  # Beijing's
LEFT, TOP = 448_000.0, 4_420_000.0  # near Beijing, in UTM_50N


def write_geotiff(
    path: Path,
    pixels: np.ndarray,
    crs: str | None = UTM_50N,
    left: float = LEFT,
    top: float = TOP,
    cell: float = 10.0,
    transform: rasterio.Affine | None = None,
    **options: Any,
) -> str:
    """Write pixels [bands, height, width]; returns the path. North is up unless `transform` says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    transform = transform or rasterio.Affine(cell, 0, left, 0, -cell, top)
    shape = {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=transform, **shape, **options) as dataset:
        dataset.write(pixels)
    return str(path)
