"""WebDataset shards of strangers: what is read, what is counted, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import pytest

from urbanclip_ray.config import WebDatasetSource
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.sources import SourceError, open_source
from urbanclip_ray.sources import webdataset as module

JPEG = b"\xff\xd8\xff pixels"


def write_shard(path, members, **options):
    """`members`: name -> bytes, or a TarInfo for what is no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def source_of(folder, **fields):
    return open_source(WebDatasetSource(uri=str(folder), **fields))


def facts(**fields) -> bytes:
    return json.dumps(fields).encode()


def test_shards_of_others_need_no_json_and_name_tiles_by_their_keys(tmp_path):
    write_shard(tmp_path / "city/a.tar", [("0001.jpg", JPEG), ("0001.txt", b"A park."), ("rome/x.PNG", b"png")])
    write_shard(tmp_path / "city/b.tar", [("rome/y.seg.png", b"mask"), ("rome/y.webp", b"webp"), ("README", b"hello")])
    source = source_of(tmp_path / "city")
    found = {tile.tile_id: (tile.region, source.read(tile.location)) for tile in source.tiles()}
    assert found == {"city/0001": ("city", JPEG), "rome/x": ("rome", b"png"), "rome/y": ("rome", b"webp")}
    assert source.captions().to_pylist() == [{"tile_id": "city/0001", "text": "A park."}]
    assert source.parts() is None
    assert source.ignored() == {"member .seg.png": 1, "member without extension": 1}


def test_a_json_member_says_who_where_and_what(tmp_path):
    row = {"tile_id": "paris/7", "region": "paris", "lon": 2.3, "lat": 48.9, "texts": ["One.", "Two."], "part": "val"}
    write_shard(tmp_path / "a.tar", [("7.jpg", JPEG), ("7.json", facts(**row)), ("7.txt", b"Another.")])
    source = source_of(tmp_path)
    (tile,) = source.tiles()
    assert (tile.tile_id, tile.region, tile.lon, tile.lat, tile.west) == ("paris/7", "paris", 2.3, 48.9, None)
    assert source.captions()["text"].to_pylist() == ["One.", "Two."]
    assert source.parts().to_pylist() == [{"tile_id": "paris/7", "part": "val"}]


def test_a_worker_reads_one_range_and_gets_no_listing(tmp_path):
    write_shard(tmp_path / "a.tar", [("1.jpg", JPEG), ("2.jpg", b"\xff\xd8 second")])
    source = source_of(tmp_path)
    _, second = source.tiles()
    travelled = pickle.dumps(source)
    assert b"a.tar" not in travelled
    assert pickle.loads(travelled).read(second.location) == b"\xff\xd8 second"
    with pytest.raises(SourceError, match="relative path"):
        source.read("../a.tar#512+9")


def link(name, kind, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def test_links_devices_climbing_names_and_pickles_are_counted_and_never_opened(tmp_path, caplog):
    write_shard(
        tmp_path / "a.tar",
        [
            ("1.jpg", JPEG),
            link("2.jpg", tarfile.SYMTYPE),
            link("3.jpg", tarfile.LNKTYPE, "1.jpg"),
            link("4.jpg", tarfile.CHRTYPE),
            link("5.jpg", tarfile.FIFOTYPE),
            link("folder", tarfile.DIRTYPE),
            ("../6.jpg", JPEG),
            ("/etc/7.jpg", JPEG),
            ("a/../../8.jpg", JPEG),
            ("1.pickle", b"cos\nsystem\n(S'touch x'\ntR."),
            ("1.pyd", b"\x80\x04"),
        ],
    )
    source = source_of(tmp_path)
    assert [tile.tile_id for tile in source.tiles()] == [f"{tmp_path.name}/1"]
    assert source.ignored() == {
        "link, device or sparse file": 4,
        "member with an unsafe name": 3,
        "member .pickle": 1,
        "member .pyd": 1,
    }
    assert "member with an unsafe name: 3" in caplog.text
    assert {path.name for path in tmp_path.rglob("*")} == {"a.tar"}


def test_a_key_that_unquotes_to_a_climbing_path_is_refused(tmp_path):
    write_shard(tmp_path / "a.tar", [("%2E%2E%2Fx.jpg", JPEG)])
    with pytest.raises(SourceError, match=r"a\.tar: %2E%2E%2Fx: a tile id is text such as paris/17_3, but '../x'"):
        source_of(tmp_path).tiles()


def test_two_tiles_of_one_id_are_refused_by_both_names(tmp_path):
    write_shard(tmp_path / "a.tar", [("r/1.jpg", JPEG)])
    write_shard(tmp_path / "b.tar", [("x.jpg", JPEG), ("x.json", facts(tile_id="r/1"))])
    with pytest.raises(SourceError, match=r"a\.tar: r/1 and .*b\.tar: x both are the tile 'r/1': remove one"):
        source_of(tmp_path).tiles()


@pytest.mark.parametrize("names", [("1.jpg", "1.png"), ("1.txt", "1.txt")])
def test_two_members_of_one_kind_are_refused(tmp_path, names):
    write_shard(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(SourceError, match=r"a\.tar: 1 has two members of the kind"):
        source_of(tmp_path).tiles()


@pytest.mark.parametrize(
    ("member", "data", "words"),
    [
        ("1.json", b"{", r"1\.json is not JSON"),
        ("1.json", b"[1]", r"1\.json is not a JSON object"),
        ("1.json", b"[" * 100_000, r"1\.json is not JSON"),
        ("1.txt", b"\xff\xfe", r"1\.txt is not UTF-8"),
        ("1.txt", b"x" * (module.MAX_TEXT_BYTES + 1), r"1\.txt has 1048577 bytes, more than 1048576"),
        ("1.json", facts(tile_id=7), "1: a tile id is text such as paris/17_3, but 7"),
        ("1.json", facts(tile_id="../../x"), "a tile id is text"),
        ("1.json", facts(region=7), "region=7 is not text"),
        ("1.json", facts(texts="a", lon=2.0), "gives only some of lon, lat"),
        ("1.json", facts(lon=200, lat=1), "lon=200 is not a number within ±180 degrees"),
        ("1.json", b'{"lon": NaN, "lat": 1}', "lon=nan is not a number"),
        ("1.json", facts(texts=[1]), "texts must be a text or a list of texts"),
        ("1.json", facts(scheme="moon"), "scheme='moon' is none of web_mercator"),
        ("1.json", facts(sha256=1), "sha256=1 is not text"),
    ],
)
def test_members_that_cannot_be_meant_are_refused_by_name(tmp_path, member, data, words):
    write_shard(tmp_path / "a.tar", [("1.jpg", JPEG), (member, data)])
    with pytest.raises(SourceError, match=words):
        source_of(tmp_path).tiles()


def damaged(data: bytes, how: str) -> bytes:
    header = data.index(b"2.jpg")  # of the second member, in the middle
    return {
        "cut in a member": data[: header + 600],
        "cut between members": data[:header],
        "a header overwritten": data[:header] + b"\xaa" * 512 + data[header + 512 :],
        "a header of zeros": data[:header] + b"\0" * 512 + data[header + 512 :],
        "no archive": b"hello" * 500,
        "empty": b"",
    }[how]


@pytest.mark.parametrize(
    "how", ["cut in a member", "cut between members", "a header overwritten", "a header of zeros", "no archive", "empty"]
)
def test_a_damaged_archive_is_refused_and_not_read_half(tmp_path, how):
    path = write_shard(tmp_path / "a.tar", [("1.jpg", JPEG * 100), ("2.jpg", JPEG * 100), ("3.jpg", JPEG * 100)])
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(SourceError, match=r"a\.tar is no tar archive, or damaged .*: download or make it again"):
        source_of(tmp_path).tiles()


def test_a_header_that_claims_gigabytes_is_refused_without_reading_them(tmp_path):
    info = tarfile.TarInfo("1.jpg")
    info.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf() + b"\0" * 10_240)
    with pytest.raises(SourceError, match=r"would end behind the archive"):
        source_of(tmp_path).tiles()
    record = tarfile.TarInfo("pax")
    record.type, record.size = tarfile.XHDTYPE, module.MAX_HEADER_BYTES * 4
    (tmp_path / "a.tar").write_bytes(record.tobuf() + b"0" * record.size + b"\0" * 10_240)
    with pytest.raises(SourceError, match=r"a header claims \d+ bytes for itself"):
        source_of(tmp_path).tiles()


def test_a_tile_of_too_many_bytes_is_a_row_with_that_error_and_is_not_read(tmp_path):
    source = source_of(tmp_path)
    with pytest.raises(TileImageError, match="too large: 67108865 bytes are more than 67108864"):
        source.read(f"a.tar#512+{module.MAX_IMAGE_BYTES + 1}")


def test_compressed_shards_and_folders_without_shards_are_refused_with_the_fix(tmp_path):
    write_shard(tmp_path / "packed/a.tar", [("1.jpg", JPEG)])
    (tmp_path / "packed/b.tar.gz").write_bytes(b"")
    with pytest.raises(SourceError, match=r"b\.tar\.gz is compressed, .* unpack it to a \.tar"):
        source_of(tmp_path / "packed").tiles()
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match=r"holds no \.tar file among its 0 files"):
        source_of(tmp_path / "none").tiles()
    with pytest.raises(SourceError, match=r"source.kind=webdataset has no folder: set --set source.uri=FOLDER"):
        source_of("")


def test_the_fingerprint_follows_the_files_and_not_where_they_lie(tmp_path):
    path = write_shard(tmp_path / "one/a.tar", [("r/1.jpg", JPEG)])
    first = source_of(tmp_path / "one").fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    assert source_of(tmp_path / "two").fingerprint() == first
    write_shard(tmp_path / "two" / path.name, [("r/2.jpg", JPEG)])
    assert source_of(tmp_path / "two").fingerprint() != first


def test_ones_own_copy_that_has_none_of_the_tiles_is_refused(tmp_path):
    write_shard(tmp_path / "texts/a.tar", [("paris%2F1.txt", b"A park.")])
    (tmp_path / "own/rome").mkdir(parents=True)
    (tmp_path / "own/rome/1.jpg").write_bytes(JPEG)
    with pytest.raises(
        SourceError, match=r"has none of the 1 tiles .* its tiles are 'rome/1' and the like, those are 'paris/1'"
    ):
        source_of(tmp_path / "texts", pixels=str(tmp_path / "own")).tiles()


def test_shards_on_s3_read_as_local_ones(tmp_path, moto_s3):
    path = write_shard(tmp_path / "a.tar", [("r/1.jpg", JPEG), ("r/1.txt", b"A park."), ("r/2.jpg", JPEG * 2)])
    moto_s3.create_bucket(Bucket="pairs")
    moto_s3.put_object(Bucket="pairs", Key="city/a.tar", Body=path.read_bytes())
    source = source_of("s3://pairs/city")
    assert [source.read(tile.location) for tile in source.tiles()] == [JPEG, JPEG * 2]
