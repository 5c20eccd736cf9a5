"""Ingest through a real Ray: every listed tile is a row, bad ones with their error."""

from __future__ import annotations

import hashlib
import io
import math
import threading

import boto3
import numpy as np
import pyarrow as pa
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from PIL import Image
from werkzeug.serving import make_server

from urbanclip_ray.config import FolderSource, IngestConfig
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.schema import TILES, labels_schema
from urbanclip_ray.sources import SourceError, TileRecord, open_source
from urbanclip_ray.sources.ingest import READ_THREADS, IngestError, as_table, check_tiles, collect_labels, ingest_tiles
from urbanclip_ray.storage import MissingDatasetError, open_dataset, publish

SMALL_BATCHES = 2  # several blocks and files even from a dozen tiles


def jpeg(seed: int, side_px: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Ten good tiles in two regions, one without bytes, one cut off."""
    root = tmp_path / "tiles"
    for region in ("paris", "rome"):
        (root / region).mkdir(parents=True)
        for index in range(5):
            (root / region / f"{index}.jpg").write_bytes(jpeg(index))
    (root / "paris/empty.jpg").write_bytes(b"")
    (root / "rome/cut.jpg").write_bytes(jpeg(9)[:-60])
    return root


def ingest(root, uri, **fields):
    config = IngestConfig(tiles_per_batch=SMALL_BATCHES, **fields)
    with publish(uri, "tiles", config.content(), {}) as publication:
        ingest_tiles(open_source(FolderSource(uri=str(root))), config, publication)
    return open_dataset(uri)


def test_every_tile_is_a_row_and_bad_ones_say_why(folder, tmp_path, ray_cluster):
    dataset = ingest(folder, str(tmp_path / "out"), max_error_share=0.2)
    table = dataset.read()
    assert table.schema.names == TILES.names
    rows = {row["tile_id"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows == 12
    good = rows["paris/0"]
    assert good["image"] == jpeg(0)  # untouched
    assert good["sha256"] == hashlib.sha256(jpeg(0)).hexdigest()
    assert (good["width"], good["height"], good["error"], good["scheme"]) == (16, 16, None, "none")
    assert rows["paris/empty"]["error"] == "zero bytes"
    cut = rows["rome/cut"]
    assert cut["error"].startswith("truncated or damaged: ")
    assert cut["image"] == jpeg(9)[:-60]  # kept, so that a person can look
    assert cut["width"] is None

    manifest = dataset.manifest
    assert (manifest.unit, manifest.rows_in, manifest.rows_out) == ("tiles", 12, 10)
    assert manifest.rejects == {"truncated or damaged": 1, "zero bytes": 1}
    assert manifest.facts == {"regions": {"paris": 6, "rome": 6}}


def test_files_that_are_not_read_are_counted_in_the_manifest(folder, tmp_path, ray_cluster):
    (folder / "paris/tile.pickle").write_bytes(b"x")
    dataset = ingest(folder, str(tmp_path / "out"), max_error_share=0.2)
    assert dataset.manifest.facts["ignored"] == {"file that is no image": 1}


def test_too_many_bad_tiles_stop_the_stage_and_leave_nothing(folder, tmp_path, ray_cluster):
    with pytest.raises(IngestError) as caught:
        ingest(folder, str(tmp_path / "out"))
    message = str(caught.value)
    assert "2 of 12" in message
    assert "paris/empty.jpg (zero bytes)" in message
    assert "--set ingest.max_error_share=0.168" in message
    with pytest.raises(MissingDatasetError):
        open_dataset(str(tmp_path / "out"))
    assert ingest(folder, str(tmp_path / "out"), max_error_share=0.168).manifest.rows_out == 10  # the fix fixes it


class BrokenReads:
    """A source whose reads fail in each way that a read may."""

    def read(self, location):
        if location == "gone":
            raise FileNotFoundError(location)
        if location == "locked":
            raise PermissionError("no")
        if location == "odd":
            raise TileImageError("not an image", "by the source's own word")
        return jpeg(0, side_px=int(location))


def test_failed_reads_and_limits_become_errors_without_file_names_in_the_reason():
    locations = ["gone", "locked", "odd", "4", "40", "16"]
    records = pa.table(
        {name: [getattr(TileRecord(f"r/{at}", "r", at), name) for at in locations] for name in TileRecord._fields}
    )
    rows = check_tiles(records, BrokenReads(), IngestConfig(min_side_px=8, max_pixels=1000)).to_pylist()
    assert [row["error"] and row["error"].partition(":")[0] for row in rows] == [
        "missing file",
        "unreadable file",
        "not an image",
        "too small",
        "too many pixels",
        None,
    ]
    assert [row["image"] is None for row in rows] == [True, True, True, False, False, False]


class CountedServer:
    """moto's S3 behind a gate that lets requests for objects through only when `num_together` of them wait there."""

    def __init__(self, num_together):
        self._app = DomainDispatcherApplication(create_backend_app)
        self._gate = threading.Barrier(num_together, timeout=60)
        self._lock = threading.Lock()
        self._in_flight = self.most_in_flight = 0
        self.is_counting = False
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __call__(self, environ, start_response):
        if not (self.is_counting and environ["REQUEST_METHOD"] == "GET"):
            return self._app(environ, start_response)
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        self._gate.wait()  # a reader that waits for each file before it asks for the next one stays here: the gate breaks
        with self._lock:
            self._in_flight -= 1
        return self._app(environ, start_response)


def test_small_files_on_object_storage_are_waited_for_together(use_s3):
    num_together, num_files = 16, 64
    counted = CountedServer(num_together)
    use_s3(f"http://127.0.0.1:{counted.server.server_port}")
    try:
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="many")
        for number in range(num_files):
            s3.put_object(Bucket="many", Key=f"city/paris/{number:03d}.jpg", Body=jpeg(number))
        source = open_source(FolderSource(uri="s3://many/city"))
        records = as_table(source.tiles())
        counted.is_counting = True
        rows = check_tiles(records, source, IngestConfig()).to_pylist()
    finally:
        counted.server.shutdown()
    assert [row["image"] for row in rows] == [jpeg(number) for number in range(num_files)]  # in order, whoever came first
    assert num_together <= counted.most_in_flight <= READ_THREADS


def publish_tiles(uri, tile_ids):
    table = pa.Table.from_pylist([{"tile_id": tile_id, "region": "r", "scheme": "none"} for tile_id in tile_ids], schema=TILES)
    with publish(uri, "tiles", {}, {}) as publication:
        publication.write_table(table)
    return open_dataset(uri)


def publish_labels(tmp_path, labels, tile_ids=("r/a", "r/b", "r/c")):
    tiles = publish_tiles(str(tmp_path / "tiles"), tile_ids)
    with publish(str(tmp_path / "labels"), "labels", {}, {"tiles": tiles}) as publication:
        collect_labels(labels, tiles, publication)
    return open_dataset(str(tmp_path / "labels"))


def test_labels_of_unknown_tiles_and_infinite_values_are_counted(tmp_path):
    labels = pa.table(
        {
            "tile_id": ["r/a", "r/x", "r/b"],
            "gdp": [math.inf, 0.0, 0.0],
            "people": pa.array([None, 1.0, math.nan], pa.float64()),
        }
    )
    dataset = publish_labels(tmp_path, labels)
    table = dataset.read()
    assert table.schema.equals(labels_schema(["gdp", "people"]))
    assert table.to_pylist() == [
        {"tile_id": "r/a", "gdp": None, "people": None},  # a row without a value stays
        {"tile_id": "r/b", "gdp": 0.0, "people": None},
    ]
    assert (dataset.manifest.rows_in, dataset.manifest.rows_out) == (3, 2)
    assert dataset.manifest.rejects == {"unknown tile": 1}
    assert dataset.manifest.facts == {
        "infinite": {"gdp": 1},
        "infinite_tile_ids": ["r/a"],
        "zeros": {"gdp": 1, "people": 0},  # of known tiles
        "most_frequent": {"gdp": [0.0, 1], "people": None},
        "unknown_tile_ids": ["r/x"],
        "tiles_without_labels": 1,
    }


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"tile_id": ["r/a", "r/a"], "gdp": [1.0, 2.0]}, "r/a among them: keep one row per tile"),
        ({"tile_id": ["q/a"], "gdp": [1.0]}, "none of the 1 label rows"),
        ({"tile_id": ["r/a"]}, "no indicator"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(tmp_path, labels, message):
    with pytest.raises(SourceError, match=message):
        publish_labels(tmp_path, pa.table(labels))
