"""The whole walk with its storage and its tiles on `gs://`, against fake-gcs-server."""

from __future__ import annotations

from pathlib import Path

import pytest
from google_server import google_server
from small_run import city_options, run_job, write_city

from urbanclip_ray.config import StoreConfig
from urbanclip_ray.filesystems import STORES_VARIABLE, use_stores
from urbanclip_ray.storage import read_bytes, write_bytes

RUNS = "gs://tiles/runs"


@pytest.mark.slow
def test_a_pipeline_runs_on_google_storage_and_finds_all_of_it_again(tmp_path: Path, monkeypatch):
    with google_server() as url:
        store = StoreConfig(root="gs://", endpoint=url, anonymous=True)
        monkeypatch.setenv(STORES_VARIABLE, "[]")
        use_stores([store])
        city = write_city(tmp_path / "city")
        for file in filter(Path.is_file, city.rglob("*")):
            write_bytes(f"gs://tiles/city/{file.relative_to(city)}", file.read_bytes())
        options = [*city_options("gs://tiles/city", RUNS), "--set", f"stores=[{store.model_dump_json(exclude_defaults=True)}]"]
        first = run_job("pipeline", *options)
        assert first.returncode == 0, first.stderr[-3000:]
        assert f"report: {RUNS}/tiny_test/report/report.html" in first.stdout
        assert b"</html>" in read_bytes(f"{RUNS}/tiny_test/report/report.html")
        again = run_job("pipeline", *options)
        assert again.returncode == 0, again.stderr[-3000:]
        assert "made in" not in again.stdout
