"""What is said of a captioning job, running or stopped, and of a store."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pytest

from urbanclip_ray.captioners import upkeep
from urbanclip_ray.captioners.base import Origin
from urbanclip_ray.captioners.caption import CaptionWork
from urbanclip_ray.captioners.model_files import ModelReference
from urbanclip_ray.captioners.status import holdings, progress_of, show_progress
from urbanclip_ray.captioners.store import CaptionStore, FailedTile, StoredCaption
from urbanclip_ray.config import CaptionConfig, ConfigError, PixelsConfig
from urbanclip_ray.schema import TILES
from urbanclip_ray.storage import open_dataset, publish

NUM_TILES = 10


@pytest.fixture
def work(tmp_path) -> CaptionWork:
    rows = [
        {"tile_id": f"r/{n}", "region": "r", "scheme": "none", "sha256": f"{n:064}", "error": None} for n in range(NUM_TILES)
    ]
    rows.append({"tile_id": "r/copy", "region": "r", "scheme": "none", "sha256": f"{0:064}", "error": None})
    rows.append({"tile_id": "r/bad", "region": "r", "scheme": "none", "sha256": None, "error": "zero bytes"})
    with publish(str(tmp_path / "tiles"), "tiles", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=TILES))
        publication.count(unit="tiles", rows_in=12, rows_out=11, rejects={"zero bytes": 1})
    config = CaptionConfig(captioner="transformers", model="m", prompt="p")
    model = ModelReference("m", "1" * 40, "m", True)
    return CaptionWork(open_dataset(str(tmp_path / "tiles")), config, PixelsConfig(), None, model, str(tmp_path / "store"))


def write(store: CaptionStore, number: int, ago_s: float) -> None:
    store.add(f"j-{number}", [StoredCaption(f"{number:064}", 0, "A road.")])
    when = time.time() - ago_s
    os.utime(Path(store.folder.uri) / f"j-{number}.parquet", (when, when))


def test_before_anything_is_written(work):
    (progress,) = progress_of(work)
    assert (progress.num_tiles, progress.num_done, progress.num_to_do) == (NUM_TILES, 0, NUM_TILES)
    assert "nothing is written yet" in str(progress)


def test_a_running_job_has_a_rate_and_a_time_left(work):
    store = work.store_of(work.config.prompt)
    for number, ago_s in enumerate((122, 62, 2)):
        write(store, number, ago_s)
    store.add_failed("j-1", [FailedTile(f"{1:064}", "r/1", "the model failed: once", 1)])  # described since
    store.add_failed("j-9", [FailedTile(f"{9:064}", "r/9", "the model failed: no memory", 3)])
    (progress,) = progress_of(work)
    assert (progress.num_done, progress.num_to_do, progress.failed) == (3, 7, {"the model failed": 1})
    assert progress.captions_per_minute == pytest.approx(1.0, rel=0.01)  # two after the first, in two minutes
    text = str(progress)
    assert "tiles: 10; done: 3 (30.0%); to do: 7, of which 1 failed so far" in text
    assert "1 × the model failed" in text
    assert "rate: 1 captions a minute; time left: 7 min" in text


def test_a_stopped_job_says_since_when(work):
    store = work.store_of(work.config.prompt)
    write(store, 0, 7300)
    assert "stopped: the last caption was written 2.0 h ago" in str(progress_of(work)[0])


def test_a_captioner_without_a_store_has_no_progress(work):
    with pytest.raises(ConfigError, match="keeps nothing in the caption store"):
        progress_of(work._replace(model=None, config=CaptionConfig()))


def test_a_limit_is_refused(work):
    with pytest.raises(ConfigError, match="--limit does not go with --status"):
        show_progress(work, 5)


def test_what_a_store_holds(work, tmp_path, capsys):
    store = work.store_of(work.config.prompt)
    write(store, 0, 10)
    write(store, 1, 5)
    store.add("k-1", [StoredCaption(f"{1:064}", 0, "A road."), StoredCaption(f"{1:064}", 1, "A lake.")])
    store.add_failed("j-1", [FailedTile("x", "r/1", "died", 1), FailedTile(f"{1:064}", "r/1", "died", 1)])
    other = CaptionStore(str(tmp_path / "store"), Origin("n", "2", "q", {}))
    other.add_failed("j-1", [FailedTile("x", "r/1", "died: at once", 1)])
    found = {holding.origin["model"]: holding for holding in holdings(work.store_uri)}
    assert set(found) == {"m", "n"}
    assert (found["m"].num_tiles, found["m"].num_captions, found["m"].num_parts) == (2, 3, 3)
    assert (found["m"].failed, found["n"].failed, found["n"].num_captions) == ({"died": 1}, {"died": 1}, 0)
    (tmp_path / "store").rename(tmp_path / upkeep.STORE)
    upkeep.show_store(str(tmp_path))
    said = capsys.readouterr().out
    assert "3 captions of 2 tiles in 3 files" in said
    assert "1 × died" in said
    upkeep.compact_store(str(tmp_path))
    assert "3 files before, 1 now" in capsys.readouterr().out
    upkeep.clean_store(str(tmp_path), delete=False)
    assert "0 could be deleted: add --yes" in capsys.readouterr().out
