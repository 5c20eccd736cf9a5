"""Which training tiles lie near each other."""

from __future__ import annotations

import numpy as np

EARTH_RADIUS_KM = 6371.0088


class Neighbourhood:
    """The nearest tiles of each, within a distance; of a tile without coordinates, or alone, there are none."""

    def __init__(self, lon: np.ndarray, lat: np.ndarray, num_neighbours: int, within_km: float) -> None:
        """lon, lat: degrees [tiles], NaN where unknown."""
        from sklearn.neighbors import BallTree

        self._near: list[np.ndarray] = [np.empty(0, np.int64)] * len(lon)
        self.placed = np.flatnonzero(np.isfinite(lon) & np.isfinite(lat))
        if len(self.placed) < 2:
            return
        points = np.radians(np.stack([lat, lon], axis=1)[self.placed])
        tree = BallTree(points, metric="haversine")  # on the sphere: the date line is no border
        distances, found = tree.query(points, min(num_neighbours + 1, len(points)))
        for own, place in enumerate(self.placed):
            near = (distances[own] * EARTH_RADIUS_KM <= within_km) & (found[own] != own)
            self._near[place] = self.placed[found[own][near][:num_neighbours]]

    @property
    def with_neighbours(self) -> np.ndarray:
        return np.array([place for place, near in enumerate(self._near) if len(near)], np.int64)

    def near(self, place: int) -> np.ndarray:
        return self._near[place]

    def draw(self, batch: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A neighbour of each tile of the batch; the tile itself where it has none."""
        return np.array([random.choice(self._near[at]) if len(self._near[at]) else at for at in batch], np.int64)
