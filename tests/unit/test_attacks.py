"""Attacks by what others wrote, tried and refused; cluster/README.md lists these and those that stand beside their modules."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from geotiffs import LEFT, TOP
from images import noise_png
from local_server import serve_http
from markupsafe import escape
from PIL import Image
from rich.table import Table

from urbanclip_ray import object_storage, storage
from urbanclip_ray.captioners.base import Tile, UnusableCaptionerError
from urbanclip_ray.captioners.model_files import resolve_model
from urbanclip_ray.captioners.rules import load_rules
from urbanclip_ray.captioners.vision_language import VisionLanguageCaptioner
from urbanclip_ray.config import CaptionConfig, ConfigError, FolderSource, PixelsConfig, SceneSource
from urbanclip_ray.evaluate.page import render_page
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.model.image_tower import read_tensors
from urbanclip_ray.model.weights import load_model
from urbanclip_ray.places import find_weights
from urbanclip_ray.sources import SourceError, open_source
from urbanclip_ray.sources.raster_files import open_raster
from urbanclip_ray.storage import MANIFEST, StorageError, open_dataset
from urbanclip_ray.terminal import open_console

ROOT = Path(__file__).parents[2]
README = (ROOT / "cluster" / "README.md").read_text()


def test_every_defence_that_the_readme_names_is_a_test():
    section = README.partition("## Security")[2].partition("\n## ")[0]
    named = re.findall(r"`(test_\w+)`", section)
    defined = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) > 20
    assert set(named) <= defined


# Object storage that sends requests on


class Asked(NamedTuple):
    method: str
    headers: dict[str, str]


class Server(NamedTuple):
    url: str
    asked: list[Asked]


@contextmanager
def serve(status: int, headers: dict[str, str]) -> Iterator[Server]:
    """A server that gives one answer to whatever it is asked, and remembers it."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            asked.append(Asked(self.command, {name.lower(): value for name, value in self.headers.items()}))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            for name, value in {"Content-Length": "0", "ETag": '"x"', **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = answer  # noqa: N815 http.server's names

        def log_message(self, *_: Any) -> None:
            pass

    with serve_http(Handler) as url:
        yield Server(url, asked)


STORAGE_CALLS: dict[str, Callable[[str], Any]] = {
    "read": storage.read_bytes,
    "read ranges": lambda uri: storage.open_file(uri).__enter__(),
    "write": lambda uri: storage.write_bytes(uri, b"tiles"),
    "list": lambda uri: storage.list_files(uri.rpartition("/")[0]),
    "write a manifest": lambda uri: storage.create_exclusively(uri, b"{}"),
    "ask first": storage.check_access,
}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_an_s3_server_that_redirects_is_refused_and_the_other_host_hears_nothing(monkeypatch, use_s3, status):
    monkeypatch.setattr(object_storage, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-token")
    with serve(200, {}) as other, serve(status, {"Location": f"{other.url}/tiles/x"}) as first:
        use_s3(first.url)
        for call in STORAGE_CALLS.values():
            with pytest.raises((StorageError, OSError)):
                call("s3://tiles/x/y")
        assert {asked.headers.get("x-amz-security-token") for asked in first.asked} == {"session-token"}
        assert all("/us-east-1/s3/aws4_request" in asked.headers["authorization"] for asked in first.asked)
        assert other.asked == []


def test_the_s3_error_of_a_redirect_says_what_to_correct(use_s3):
    with serve(307, {"Location": "http://127.0.0.1:9/"}) as server:
        use_s3(server.url)
        with pytest.raises(
            StorageError, match=r"s3://tiles/x: it sends requests on to another host, which is not followed: correct"
        ):
            storage.check_access("s3://tiles/x")


# Files that name other files


def write_manifest(folder: Path, **changes: Any) -> str:
    with storage.publish(str(folder), "made", {}, {}) as publication:
        publication.write_file("rows.parquet", b"")
    where = folder / MANIFEST
    where.write_text(json.dumps(json.loads(where.read_text()) | {"seal": ""} | changes))
    return str(folder)


@pytest.mark.parametrize("path", ["../../rows.parquet", "/etc/rows.parquet", "a/../../rows.parquet"])
def test_a_manifest_that_names_files_outside_of_its_dataset_is_refused(tmp_path, path):
    uri = write_manifest(tmp_path / "d", files=[{"path": path, "num_bytes": 0, "sha256": ""}])
    for use in (lambda: open_dataset(uri).file_uri("rows.parquet"), lambda: open_dataset(uri).read()):
        with pytest.raises(StorageError, match="is not a name below"):
            use()


def test_a_manifest_that_names_another_storage_means_a_file_below_its_own_folder(tmp_path):
    uri = write_manifest(tmp_path / "d", files=[{"path": "s3://other/rows.parquet", "num_bytes": 0, "sha256": ""}])
    assert open_dataset(uri).file_uri("rows.parquet") == f"{uri}/s3://other/rows.parquet"
    with pytest.raises(StorageError, match=f"{uri}/s3://other/rows.parquet is not there any more"):
        open_dataset(uri).read()


def test_a_manifest_without_end_is_refused(tmp_path, monkeypatch):
    uri = write_manifest(tmp_path / "d", config={"deep": "x"})
    where = tmp_path / "d" / MANIFEST
    where.write_text(where.read_text().replace('"x"', "[" * 100_000))
    with pytest.raises(StorageError, match=r"manifest\.json is not a manifest of ours"):
        open_dataset(uri)
    monkeypatch.setattr(storage, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(StorageError, match=r"manifest\.json is not a manifest of ours: it has more than 1,000 bytes"):
        open_dataset(uri)


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        ({"datasets": {"pretrain": "../../other/pretrain/1"}}, StorageError, "is not a name below"),
        ({"datasets": {"pretrain": "/etc"}}, StorageError, "is not a name below"),
        ({"datasets": ["pretrain"]}, ConfigError, r"run\.json is none of ours"),
        ([], ConfigError, r"run\.json is none of ours"),
    ],
)
def test_a_run_that_names_datasets_outside_of_itself_is_refused(tmp_path, run, error, words):
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(error, match=words):
        find_weights(str(tmp_path))


@pytest.mark.parametrize("uri", ["/vsicurl/{url}/x.tif", "/vsis3/bucket/x.tif", "{folder}/vrt.tif"])
def test_a_raster_reaches_no_server_and_no_other_file(tmp_path, uri):
    with serve(200, {}) as server:
        (tmp_path / "vrt.tif").write_text(
            f'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
            f"<SourceFilename>/vsicurl/{server.url}/x.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
            "</VRTRasterBand></VRTDataset>"
        )
        with (
            pytest.raises((SourceError, StorageError, FileNotFoundError)),
            open_raster(uri.format(url=server.url, folder=tmp_path)),
        ):
            pass
        assert server.asked == []


# Models


@pytest.fixture
def blip(vision_language_models, tmp_path) -> Path:
    return shutil.copytree(vision_language_models["blip"], tmp_path / "blip")


def load_captioner(folder: Path) -> VisionLanguageCaptioner:
    config = CaptionConfig(captioner="transformers", model=str(folder), cache_folder=str(folder.parent / "cache"))
    return VisionLanguageCaptioner(config, resolve_model(config))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, where: Path) -> None:
        self.where = str(where)

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.where,)


def test_a_pickle_under_the_name_of_safe_weights_is_refused_and_not_run(blip, tmp_path):
    stream = io.BytesIO()
    torch.save({"trap": Trap(tmp_path / "sprung")}, stream)
    for data in (stream.getvalue(), pickle.dumps(Trap(tmp_path / "sprung"))):
        (blip / "model.safetensors").write_bytes(data)
        with pytest.raises(UnusableCaptionerError, match=r"blip cannot be loaded.*safetensors"):
            load_captioner(blip)
        with pytest.raises(ConfigError, match="does not hold tensors alone"):
            read_tensors(data, "model.safetensors")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "shard", ["pytorch_model.bin", "../other.safetensors", "/etc/model.safetensors", "a/b.safetensors", 7, ["x.safetensors"]]
)
def test_an_index_of_weights_that_names_other_files_is_refused(blip, shard):
    weights = safetensors.torch.load_file(blip / "model.safetensors")
    torch.save(weights, blip / "pytorch_model.bin")
    (blip / "model.safetensors").rename(blip / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (blip / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnusableCaptionerError, match=r"model\.safetensors\.index\.json (names|is no index)"):
        load_captioner(blip)


def test_code_beside_a_model_is_not_run(blip, tmp_path):
    (blip / "modeling.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    remote = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"), "modeling.Model")
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        if (blip / name).exists():
            change_json(blip / name, auto_map=remote)
    change_json(blip / "config.json", model_type="of_its_own")
    with pytest.raises(UnusableCaptionerError, match="cannot be loaded"):
        load_captioner(blip)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(10 ** 12) %}x{% endfor %}"]
)
def test_a_chat_template_that_would_run_code_or_run_for_ever_is_the_tile_s_error(vision_language_models, tmp_path, template):
    folder = shutil.copytree(vision_language_models["qwen2_vl"], tmp_path / "qwen2_vl")
    (folder / "chat_template.jinja").write_text(template)
    (described,) = load_captioner(folder).describe([Tile("a/1", noise_png(0, 56, 56), PixelsConfig(), "describe this")])
    assert isinstance(described, Exception)
    assert re.search("SecurityError|OverflowError", str(described))


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1])
def test_a_header_of_tensors_that_claims_more_than_there_is_is_refused(tmp_path, length):
    data = struct.pack("<Q", length) + b'{"__metadata__": {}}'
    with pytest.raises(ConfigError, match="does not hold tensors alone"):
        read_tensors(data, "model.safetensors")
    with pytest.raises(ConfigError, match="is not a folder of weights"):
        load_model(str(tmp_path))


# YAML, images, rasters

BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases are not taken"),
        ("[" * 5000, "nested too deeply"),
        ("x" * (2 << 20), "more than 1,048,576 bytes"),
        ("lead: !!python/object/apply:os.mkdir [HERE]", "could not determine a constructor"),
    ],
)
def test_rules_that_are_a_bomb_or_want_objects_built_are_refused(tmp_path, text, words):
    (tmp_path / "rules.yaml").write_text(text.replace("HERE", str(tmp_path / "sprung")))
    with pytest.raises(ConfigError, match=rf"rules\.yaml holds no rules \(.*{words}"):
        load_rules(str(tmp_path / "rules.yaml"))
    assert not (tmp_path / "sprung").exists()


def png(width: int, height: int, *others: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size, with chunks before its few pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*each) for each in ((b"IHDR", header), *others, (b"IDAT", pixels), (b"IEND", b""))
    )


def tiff(**tags: tuple[int, int, int]) -> bytes:
    """A little-endian TIFF of one directory that is its own successor; a tag is (number, type, value)."""
    entries = b"".join(struct.pack("<HHII", number, kind, 1, value) for number, kind, value in sorted(tags.values()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 8)


def frames(kind: str, count: int) -> bytes:
    stream = io.BytesIO()
    images = [Image.new("RGB", (64, 64), (number % 256, 0, 0)) for number in range(count)]
    images[0].save(stream, kind, save_all=True, append_images=images[1:])
    return stream.getvalue()


TEXT_BOMB = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 1))
IMAGES: dict[str, Callable[[], bytes]] = {  # what must be refused, or cost no more than its first frame
    "a huge header": lambda: png(100_000, 100_000),
    "wide and flat": lambda: png(2**31 - 1, 1),
    "a hundred megabytes of comment": lambda: png(64, 64, TEXT_BOMB),
    "directories without end": lambda: tiff(width=(256, 4, 64), height=(257, 4, 64), bits=(258, 3, 8), offset=(273, 4, 8)),
    "a strip of gigabytes": lambda: tiff(
        width=(256, 4, 7999), height=(257, 4, 7999), offset=(273, 4, 8), rows=(278, 4, 2**31), size=(279, 4, 2**32 - 1)
    ),
    "two thousand frames": lambda: frames("TIFF", 2000),
    "an animation": lambda: frames("WEBP", 500),
    "nested archives": lambda: zlib.compress(zlib.compress(bytes(10_000_000))),
}
DECODE = """
import resource, sys, time
from urbanclip_ray.imagery import TileImageError, decode
limit = 1 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit + int(open("/proc/self/statm").read().split()[0]) * 4096,) * 2)
for path in sys.argv[1:]:
    begin = time.process_time()
    try:
        said = str(decode(open(path, "rb").read()).size)
    except TileImageError as error:
        said = error.reason
    assert time.process_time() - begin < 10, path
    print(said)
"""


def test_image_bombs_are_refused_or_cost_one_frame_in_a_gigabyte_of_memory(tmp_path):
    paths = []
    for number, make in enumerate(IMAGES.values()):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(make())
    command = [sys.executable, "-c", DECODE, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    said = dict(zip(IMAGES, result.stdout.splitlines(), strict=True))
    assert said["a huge header"] == said["wide and flat"] == "too many pixels"
    assert said["two thousand frames"] == said["an animation"] == "(64, 64)"
    assert said["nested archives"] == "not an image"
    for name in ("a hundred megabytes of comment", "directories without end", "a strip of gigabytes"):
        assert said[name] == "truncated or damaged"


def test_a_tile_of_gigabytes_is_a_row_with_that_error_and_is_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 40)
    source = open_source(FolderSource(uri=str(tmp_path)))
    (tile,) = source.tiles()
    with pytest.raises(TileImageError, match="too large: more than 67108864 bytes"):
        source.read(tile.location)


def test_a_scene_whose_blocks_fill_memory_is_refused(tmp_path):
    side = 40_000
    data = zlib.compress(bytes(side * side // 16))
    scale, tie = struct.pack("<3d", 10, 10, 0), struct.pack("<6d", 0, 0, 0, LEFT, TOP, 0)
    keys = struct.pack("<16H", 1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32650)
    begin = 8 + len(data)
    tags = [
        *((256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)),
        *((322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, len(data))),
        *((33550, 12, 3, begin), (33922, 12, 6, begin + 24), (34735, 3, 16, begin + 72)),
    ]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    head = b"II*\0" + struct.pack("<I", begin + 72 + len(keys))
    (tmp_path / "s.tif").write_bytes(head + data + scale + tie + keys + directory)
    with pytest.raises(SourceError, match=r"s\.tif is stored in blocks of 40000 x 40000 px, .*gdal_translate -of COG"):
        open_source(SceneSource(uri=str(tmp_path / "s.tif"), bands=(1,))).tiles()


# Words that are read as something else


TEMPLATE = "{{ 7 * 7 }}{% include 'head.html' %}${7*7}{{ self.__init__.__globals__ }}"


def test_braces_in_a_text_or_a_name_are_no_template():
    page = render_page("search.html", text=TEMPLATE, num_tiles=1, rows=[{"tile_id": TEMPLATE, "image": None, "score": 0.5}])
    assert page.count(str(escape(TEMPLATE))) >= 2


def test_brackets_in_names_are_no_markup_in_the_terminal(capsys):
    table = Table()
    table.add_column("indicator")
    table.add_row("[link=http://evil.example]price[/link] [/nothing]")
    open_console().print(table)
    open_console().print("[/red] \u2192")
    assert "[link=http://evil.example]price[/link] [/nothing]" in capsys.readouterr().out
