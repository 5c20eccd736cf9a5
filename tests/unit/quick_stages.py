"""A run of three tiles whose stages write a word instead of data: for tests of what is kept and what is made anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from urbanclip_ray import pipeline, plan
from urbanclip_ray.config import RunConfig
from urbanclip_ray.model.weights import WEIGHTS_FILE
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.representations import stages_of
from urbanclip_ray.search_results import BEST_FILE
from urbanclip_ray.search_stage import search_stages


def three_tiles(folder: Path) -> RunConfig:
    city = folder / "city"
    city.mkdir()
    lines = ["file,lon,lat,gdp"]
    for at in range(3):
        Image.fromarray(np.full((16, 16, 3), at, np.uint8)).save(city / f"{at}.png")
        lines.append(f"{at}.png,{at},{at},{at}")
    (city / "tiles.csv").write_text("\n".join(lines))
    return apply_overrides(
        load_recipe("tiny_test"),
        [f"source.uri={city}", "source.metadata=tiles.csv", f"storage={folder / 'storage'}"],
    )


def replace_stages(monkeypatch) -> list[str]:
    """Put quick stages in the place of the real ones; returns the names of those that will have been made."""
    names: list[str] = []

    def replace(stage):
        def make(_, publication):
            names.append(stage.name)
            publication.write_file(WEIGHTS_FILE, f"{stage.name} {len(names)}".encode())

        return stage._replace(make=make)

    def replace_search(stage):
        def make(_, publication):
            names.append(stage.name)
            publication.write_file(BEST_FILE, b'{"best": null}')

        return stage._replace(make=make)

    def searching(config):
        *before, search = search_stages(config)
        return (*(replace(stage) for stage in before), replace_search(search))

    monkeypatch.setattr(plan, "search_stages", searching)
    monkeypatch.setattr(plan, "stages_of", lambda config: tuple(replace(stage) for stage in stages_of(config)))
    monkeypatch.setattr(pipeline, "_show_results", lambda run, console: None)
    return names
