"""The table of what place alone predicts: on the paper's labels, and on fields whose answer is known."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from urbanclip_ray.config import FolderSource, RsicdSource, RunConfig, UrbanClipSource
from urbanclip_ray.evaluate.leak_table import (
    Leakage,
    LeakTableError,
    leak_config,
    leakage_table,
    measure_leakage,
    write_leakage,
)

ROOT = Path(__file__).parents[3]
RELEASE = Path(os.environ.get("URBANCLIP_SHARED_DATA", ROOT.parent / "shared" / "data")) / "urbanclip"
KNOWN = {  # R² on random tiles, the mean of five seeds, as measured independently on the same labels
    ("Beijing", "carbon"): 0.98,
    ("Beijing", "population"): 0.92,
    ("Beijing", "gdp"): 0.77,
    ("Guangzhou", "carbon"): 0.95,
    ("Guangzhou", "population"): 0.89,
    ("Guangzhou", "gdp"): 0.63,
}


def of_source(source: object) -> RunConfig:
    return leak_config().model_copy(update={"source": source})


def write_release(folder: Path, side: int = 40) -> UrbanClipSource:
    """Labels of a square of tiles: `carbon` is smooth, `population` noise, `gdp` the same number everywhere."""
    rng = np.random.default_rng(0)
    lines = ["satellite_img_name,carbon_emissions (ton),population (unit),gdp (million yuan)"]
    for x in range(side):
        for y in range(side):
            carbon = np.exp(np.sin(x / 4) + np.cos(y / 5))
            lines.append(f"Town/16_{12600 + x}_{4700 + y}_s.jpg,{carbon},{rng.integers(1, 10**6)},10000")
    (folder / "Town_labels.csv").write_text("\n".join(lines))
    return UrbanClipSource(release=str(folder), cities=("Town",))


def test_a_smooth_label_leaks_on_random_tiles_and_less_on_blocks(tmp_path):
    lines, definition = measure_leakage(of_source(write_release(tmp_path)))
    found = {(line.indicator, line.split): line for line in lines}
    smooth, blocked = found["carbon", "random"], found["carbon", "blocks"]
    assert smooth.r2 > 0.99
    assert blocked.r2 < smooth.r2
    assert smooth.low <= smooth.r2 <= smooth.high
    assert found["population", "random"].r2 < 0.1
    assert found["population", "random"].repeated < 0.05
    assert "10 by 10 tiles" in definition
    assert "probability 0.2" in definition


def test_a_constant_label_has_no_r2_and_repeats_in_full(tmp_path):
    lines, _ = measure_leakage(of_source(write_release(tmp_path)))
    constant = [line for line in lines if line.indicator == "gdp"]
    assert [(line.r2, line.low, line.repeated) for line in constant] == [(None, None, 1.0)] * 2


def test_the_table_is_written_in_three_forms_that_say_the_same(tmp_path):
    lines, definition = measure_leakage(of_source(write_release(tmp_path)))
    json_uri, csv_uri, markdown_uri = write_leakage(lines, definition, str(tmp_path / "out"))
    record = json.loads(Path(json_uri).read_text())
    assert record["definition"] == definition
    assert [Leakage(**line) for line in record["lines"]] == lines
    rows = list(csv.DictReader(Path(csv_uri).read_text().splitlines()))
    assert [float(row["repeated"]) for row in rows] == [line.repeated for line in lines]
    text = Path(markdown_uri).read_text()
    assert definition in text
    assert f"| Town | carbon | 1,600 | {lines[0].r2:.2f} [" in text
    assert "| Town | gdp | 1,600 | undefined | 100% |" in text
    assert leakage_table(lines).row_count == 3


def test_a_folder_with_coordinates_has_a_table_too_and_one_without_is_refused(tmp_path):
    (tmp_path / "town").mkdir()
    lines = ["file,lon,lat,price"]
    for index in range(100):
        (tmp_path / "town" / f"{index}.png").write_bytes(b"not looked at")
        lines.append(f"town/{index}.png,{116 + index % 10 / 100},{40 + index // 10 / 100},{1 + index // 10}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    source = FolderSource(uri=str(tmp_path), metadata="labels.csv")
    found, definition = measure_leakage(of_source(source))
    assert {(line.city, line.indicator, line.num_tiles) for line in found} == {("town", "price", 100)}
    assert found[0].r2 > 0.8
    assert "squares of 5 km" in definition
    (tmp_path / "labels.csv").write_text("\n".join(line.replace("lon,lat", "a,b") for line in lines))
    with pytest.raises(LeakTableError, match="100 of 100 labelled tiles have no lon and lat"):
        measure_leakage(of_source(source))


def test_a_source_without_labels_is_refused(tmp_path):
    with pytest.raises(LeakTableError, match="kind rsicd without labels"):
        measure_leakage(of_source(RsicdSource(uri=str(tmp_path))))


@pytest.mark.shared_data
@pytest.mark.skipif(not RELEASE.is_dir(), reason=f"no labels at {RELEASE}: set URBANCLIP_SHARED_DATA to their folder's")
def test_the_papers_labels_leak_as_measured_independently():
    lines, _ = measure_leakage(of_source(UrbanClipSource(release=str(RELEASE), cities=("Beijing", "Guangzhou"))))
    found = {(line.city, line.indicator): line for line in lines if line.split == "random"}
    assert {key: line.num_tiles for key, line in found.items() if key[1] == "gdp"} == {
        ("Beijing", "gdp"): 4566,
        ("Guangzhou", "gdp"): 3251,
    }
    for key, expected in KNOWN.items():
        assert found[key].r2 == pytest.approx(expected, abs=0.03), key
    shares = [found["Beijing", name].repeated for name in ("carbon", "population", "gdp")]
    assert shares == pytest.approx([0.31, 0.51, 0.72], abs=0.03)
