"""What users bring that cannot be used: counted with its reason, or refused with the fix, through the real entry points."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from small_run import run_job

from urbanclip_ray import apply_overrides, load_recipe, run_stages
from urbanclip_ray.config import ConfigError, RunConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.storage import MissingDatasetError, StorageError, find_dataset, open_dataset


def noise(mode: str = "RGB", side_px: int = 24) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 100,000 px wide and high."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


UNUSABLE = {  # file name -> bytes and the reason
    "cut.png": (encode(noise())[:-300], "truncated or damaged"),
    "cut_jpeg.jpg": (encode(noise(), "JPEG")[:-200], "truncated or damaged"),
    "empty.png": (b"", "zero bytes"),
    "text.jpg": (b"<html>404 not found</html>", "not an image"),
    "point.png": (encode(noise(side_px=1)), "too small"),
    "bomb.png": (bomb(), "too many pixels"),
}
USABLE = {
    "plain.png": encode(noise()),
    "cmyk.jpg": encode(noise("CMYK"), "JPEG"),
    "deep.png": encode(Image.fromarray(np.random.default_rng(0).integers(0, 65536, (24, 24)).astype(np.uint16))),
    "deep_tiff.tif": encode(Image.fromarray(np.full((24, 24), 40_000, np.uint16)), "TIFF"),
    "palette.png": encode(noise("P")),
    "alpha.png": encode(noise("RGBA")),
    "grey.webp": encode(noise("L"), "WEBP"),
}


def make_config(tmp_path: Path, *overrides: str) -> RunConfig:
    base = [f"source.uri={tmp_path / 'city'}", f"storage={tmp_path / 'storage'}"]
    return apply_overrides(load_recipe("tiny_test"), [*base, *overrides])


def write_tiles(tmp_path: Path, files: dict[str, bytes], csv: str = "") -> None:
    folder = tmp_path / "city"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if csv:
        (folder / "tiles.csv").write_text(csv)


def test_every_kind_of_image_is_captioned_or_counted_with_its_reason(tmp_path, ray_cluster):
    write_tiles(tmp_path, {name: data for name, (data, _) in UNUSABLE.items()} | USABLE)
    run = run_stages(make_config(tmp_path, "ingest.max_error_share=0.5"), ["tiles", "captions"])

    tiles = run.datasets["tiles"].manifest
    assert (tiles.unit, tiles.rows_in, tiles.rows_out) == ("tiles", 13, 7)
    reasons = ("not an image", "too many pixels", "too small", "truncated or damaged", "zero bytes")
    assert tiles.rejects == dict(zip(reasons, (1, 1, 1, 2, 1), strict=True))
    errors = {row["tile_id"]: row["error"] for row in run.datasets["tiles"].read(["tile_id", "error"]).to_pylist()}
    for name, (_, reason) in UNUSABLE.items():
        assert errors[f"city/{name.partition('.')[0]}"].startswith(reason)

    captions = run.datasets["captions"].manifest
    assert captions.rejects == {"unreadable tile": 6}
    assert captions.rows_in == captions.rows_out + 6
    described = {row["tile_id"] for row in run.datasets["captions"].read().to_pylist() if row["text"]}
    assert described == {f"city/{name.partition('.')[0]}" for name in USABLE}


def test_too_many_unusable_images_stop_the_run_and_the_first_ones_are_named(tmp_path, ray_cluster):
    write_tiles(tmp_path, {name: data for name, (data, _) in UNUSABLE.items()} | {"plain.png": USABLE["plain.png"]})
    with pytest.raises(UserError, match=r"6 of 7 tiles cannot be used.*bomb\.png \(too many pixels.*ingest\.max_error_share="):
        run_stages(make_config(tmp_path), ["tiles"])


def test_two_tiles_of_one_id_are_both_named(tmp_path):
    write_tiles(tmp_path, {"a.png": USABLE["plain.png"], "a.jpg": USABLE["cmyk.jpg"]})
    with pytest.raises(UserError, match=r"a\.jpg and a\.png both have the tile id 'city/a': rename or remove one"):
        run_stages(make_config(tmp_path), ["tiles"])


def test_captions_for_unknown_tiles_are_counted_and_named(tmp_path, ray_cluster):
    csv = "file,caption\na.png,A river beside houses.\ngone.png,A tile that is not there.\nb.png,Green fields.\n"
    write_tiles(tmp_path, {"a.png": USABLE["plain.png"], "b.png": USABLE["grey.webp"]}, csv)
    run = run_stages(make_config(tmp_path, "source.metadata=tiles.csv", "caption.captioner=given"), ["tiles", "captions"])
    manifest = run.datasets["captions"].manifest
    assert (manifest.unit, manifest.rows_in, manifest.rows_out) == ("captions", 3, 2)
    assert manifest.rejects == {"caption of an unknown tile": 1}
    assert manifest.facts["unknown_tiles"] == ["city/gone"]


def test_labels_that_are_no_finite_number_are_unknown_and_counted(tmp_path, ray_cluster):
    csv = "file,gdp,people\na.png,1.5,nan\nb.png,inf,3\nc.png,-inf,\n"
    write_tiles(tmp_path, dict.fromkeys(("a.png", "b.png", "c.png"), USABLE["plain.png"]), csv)
    run = run_stages(make_config(tmp_path, "source.metadata=tiles.csv"), ["tiles", "labels"])
    labels = {row["tile_id"]: (row["gdp"], row["people"]) for row in run.datasets["labels"].read().to_pylist()}
    assert labels == {"city/a": (1.5, None), "city/b": (None, 3.0), "city/c": (None, None)}
    facts = run.datasets["labels"].manifest.facts
    assert facts["infinite"] == {"gdp": 2}
    assert facts["infinite_tile_ids"] == ["city/b", "city/c"]


def test_a_label_that_is_no_number_is_named_by_row_and_column(tmp_path, ray_cluster):
    write_tiles(tmp_path, {"a.png": USABLE["plain.png"]}, "file,gdp\na.png,much\n")
    config = make_config(tmp_path, "source.metadata=tiles.csv", 'source.indicators=["gdp"]')
    with pytest.raises(UserError, match=r"tiles\.csv, row 2, column 'gdp': 'much' is not a number"):
        run_stages(config, ["tiles", "labels"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1", "error: unknown key 'train.learning_rate': train has no 'learning_rate'"),
        ("tarin.lr=1", "error: unknown key 'tarin.lr': the config has no 'tarin'; did you mean 'train'?"),
        ("train.contrastive_batch_size=24", "train.contrastive_batch_size=24"),
    ],
)
def test_a_job_refuses_a_bad_option_without_a_traceback(override, message):
    result = run_job("pretrain", "--recipe", "tiny_test", "--set", override)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.global_batch_size=24"], r"train\.global_batch_size=24 is not a multiple of train\.contrastive_batch_size=16"),
        (["resources.num_workers=3"], r"train\.contrastive_batch_size=16 cannot be shared out to 3 workers: set.*=18 and"),
    ],
)
def test_batch_sizes_that_do_not_fit_together_are_refused_with_ones_that_do(overrides, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(load_recipe("tiny_test"), overrides)


def test_an_input_without_a_manifest_does_not_exist(tmp_path, ray_cluster):
    write_tiles(tmp_path, {f"{at}.png": USABLE["plain.png"] for at in range(3)})
    config = make_config(tmp_path)
    uri = run_stages(config, ["tiles"]).datasets["tiles"].uri
    (Path(uri) / "manifest.json").unlink()
    assert list(Path(uri).rglob("*.parquet"))  # its files are there
    assert find_dataset(uri) is None
    with pytest.raises(MissingDatasetError, match=rf"{uri} has no manifest\.json: it is not a finished dataset"):
        open_dataset(uri)
    with pytest.raises(MissingDatasetError, match=r"/tiles/\w+ is not made yet: run jobs/ingest\.py"):
        run_stages(config, ["captions"])
    assert not (tmp_path / "storage" / "tiny_test" / "captions").exists()


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"stage": "tiles"}'])
def test_a_manifest_that_is_none_is_named(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(StorageError, match=f"{tmp_path}/manifest.json is not a manifest of ours"):
        open_dataset(str(tmp_path))


def test_a_job_on_a_folder_that_is_not_there_says_so(tmp_path, ray_cluster):
    address = ray.get_runtime_context().gcs_address
    options = ["--recipe", "tiny_test", "--storage", str(tmp_path / "storage"), "--set", f"source.uri={tmp_path / 'nowhere'}"]
    result = run_job("ingest", *options, ray_address=address)
    assert result.returncode == 1
    assert f"source.uri='{tmp_path / 'nowhere'}' is not a folder" in result.stderr
    assert "Traceback" not in result.stderr
