from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from urbanclip_ray.config import PixelsConfig, ProbeConfig, SplitConfig
from urbanclip_ray.evaluate.leaks import LeakError
from urbanclip_ray.evaluate.methods import ProbeError
from urbanclip_ray.evaluate.probe import probe
from urbanclip_ray.evaluate.scores import score_predictions
from urbanclip_ray.evaluate.splits import assign_splits
from urbanclip_ray.schema import PREDICTIONS, SPLITS, TILES, embeddings_schema, labels_schema
from urbanclip_ray.storage import Dataset, open_dataset, publish, read_bytes

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_TILES = 240
WIDTH = 12
IDS = [f"city/{index:04d}" for index in range(NUM_TILES)]
QUICK = ProbeConfig(target="log", mlp_hidden=32, mlp_lr=1e-2, mlp_max_epochs=60, mlp_patience=10, indicators=("carbon",))

SPLIT = SplitConfig(outer="blocks", also=("random",), num_draws=2, block_km=8)


def store(where: str, table: pa.Table) -> Dataset:
    with publish(where, "made", {}, {}) as publication:
        publication.write_table(table)
        publication.count(unit="rows", rows_in=table.num_rows, rows_out=table.num_rows, rejects={})
    return open_dataset(where)


def vectors_table(vectors: np.ndarray, ids: list[str] = IDS) -> pa.Table:
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), vectors.shape[1])
    schema = embeddings_schema(vectors.shape[1])
    return pa.table([pa.array(ids), embedding, pa.array(["w"] * len(ids))], schema=schema)


def tiles_table(rng: np.random.Generator) -> pa.Table:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    values: dict[str, Any] = {
        "tile_id": IDS,
        "region": ["city"] * NUM_TILES,
        "scheme": ["none"] * NUM_TILES,
        "image": [buffer.getvalue()] * NUM_TILES,
        "lon": rng.uniform(179.5, 180.5, NUM_TILES),
        "lat": rng.uniform(10, 11, NUM_TILES),
    }
    columns = [pa.array(values.get(field.name, [None] * NUM_TILES), field.type) for field in TILES]
    return pa.table(columns, schema=TILES)


class World:
    """Tiles whose log carbon is linear in the pretrained vectors; the untrained vectors are noise."""

    def __init__(self, where: str) -> None:
        rng = np.random.default_rng(0)
        self.where = where
        self.vectors = rng.normal(size=(NUM_TILES, WIDTH))
        self.log_carbon = self.vectors @ rng.normal(size=WIDTH) + 0.1 * rng.normal(size=NUM_TILES)
        self.tiles_table = tiles_table(rng)
        self.tiles = store(f"{where}/tiles", self.tiles_table)
        self.splits_table, _ = assign_splits(self.tiles_table, SPLIT, None)
        self.splits = store(f"{where}/splits", self.splits_table)
        self.labels_table = pa.table([IDS, np.exp(self.log_carbon)], schema=labels_schema(["carbon"]))
        self.labels = store(f"{where}/labels", self.labels_table)
        shuffled = rng.permutation(NUM_TILES)  # embeddings come in an order of their own
        self.pretrained = store(
            f"{where}/pretrained", vectors_table(self.vectors[shuffled], [IDS[index] for index in shuffled])
        )
        self.untrained = store(f"{where}/untrained", vectors_table(rng.normal(size=(NUM_TILES, WIDTH))))
        self.num_probed = 0

    def probe(self, config: ProbeConfig = QUICK, **changed: Any) -> Dataset:
        self.num_probed += 1
        inputs: dict[str, Any] = {"labels": self.labels, "splits": self.splits, "tiles": self.tiles} | {
            "embeddings": {"pretrained": self.pretrained, "untrained": self.untrained}
        }
        where = f"{self.where}/probe-{self.num_probed}"
        with publish(where, "probe", config.content(), {}) as publication:
            probe(**(inputs | changed), config=config, pixels=PixelsConfig(), publication=publication, split=SPLIT)
        return open_dataset(where)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(str(tmp_path_factory.mktemp("world")))


def with_methods(*methods: str, **changed: Any) -> ProbeConfig:
    return ProbeConfig(**(QUICK.model_dump() | {"methods": methods} | changed))


def r2(scores: dict[str, Any], method: str, split: str, indicator: str = "carbon") -> float:
    wanted = (indicator, method, split, "r2")
    keys = ("indicator", "method", "split", "metric")
    [found] = [entry for entry in scores["probe"] if tuple(entry[key] for key in keys) == wanted]
    mean: float = found["mean"]
    return mean


def test_every_method_end_to_end_on_a_target_that_is_linear_in_the_vectors(world: World) -> None:
    result = world.probe()
    predictions = result.read()
    scores = json.loads(read_bytes(result.file_uri("scores.json")))
    assert predictions.schema.equals(PREDICTIONS)
    assert result.manifest.unit == "predictions"
    assert result.manifest.rows_out == predictions.num_rows
    facts = result.manifest.facts
    assert (facts["skipped"], facts["unusable_targets"], facts["too_small"]) == ({}, {"carbon": {}}, {})
    num_test = pc.sum(pc.equal(world.splits_table["part"], "test")).as_py()
    methods = ["pretrained", "pretrained_mlp", "untrained", "untrained_mlp", "colour", "coordinates", "mean"]
    assert predictions["method"].unique().to_pylist() == methods  # all that there are, as none is named
    assert predictions.num_rows == num_test * len(methods)
    for split in ("blocks", "random"):
        assert r2(scores, "pretrained", split) > 0.95
        assert r2(scores, "pretrained_mlp", split) > 0.5
        for method in ("untrained", "untrained_mlp", "colour", "coordinates", "mean"):
            assert r2(scores, method, split) < 0.2
    pooled = score_predictions(predictions, "blocks")
    assert [entry["mean"] for entry in scores["probe"]] == [entry["mean"] for entry in pooled["probe"]]
    assert scores["transductive"] == ["random"]
    truth = dict(zip(IDS, world.log_carbon, strict=True))
    rows = predictions.to_pylist()
    assert {row["space"] for row in rows} == {"log"}
    np.testing.assert_allclose([row["y"] for row in rows], [truth[row["tile_id"]] for row in rows])


def test_predictions_are_of_test_tiles_alone(world: World) -> None:
    keys = ["tile_id", "split", "seed"]
    held_out = world.splits_table.filter(pc.equal(world.splits_table["part"], "test")).select(keys).to_pylist()
    predicted = world.probe(with_methods("mean")).read(keys).to_pylist()
    assert sorted(map(str, predicted)) == sorted(map(str, held_out))


def test_labels_of_test_tiles_reach_no_prediction(world: World) -> None:
    """Only the outer split is left, where a tile is in test for all draws; its labels are then turned upside down."""
    outer = world.splits_table.filter(pc.equal(world.splits_table["split"], "blocks"))
    splits = store(f"{world.where}/outer", outer)
    test = np.isin(IDS, outer.filter(pc.equal(outer["part"], "test"))["tile_id"].to_pylist())
    changed = np.exp(np.where(test, -3 * world.log_carbon + 7, world.log_carbon))
    labels = store(f"{world.where}/changed-labels", pa.table([IDS, changed], schema=labels_schema(["carbon"])))
    config = with_methods("pretrained", "pretrained_mlp", "coordinates", "mean")
    before = world.probe(config, splits=splits).read()
    after = world.probe(config, splits=splits, labels=labels).read()
    assert after["y_pred"].equals(before["y_pred"])
    assert not after["y"].equals(before["y"])


def test_unusable_targets_are_left_out_and_counted(world: World) -> None:
    values = np.exp(world.log_carbon)
    values[:5] = [np.nan, np.inf, -np.inf, 0.0, -1.0]
    table = pa.table([IDS[:-2], values[:-2]], schema=labels_schema(["carbon"]))  # two tiles have no row at all
    result = world.probe(with_methods("mean"), labels=store(f"{world.where}/broken-labels", table))
    assert result.manifest.facts["unusable_targets"] == {"carbon": {"no value": 3, "infinite": 2, "not above 0": 2}}
    assert not set(result.read()["tile_id"].to_pylist()) & {*IDS[:5], *IDS[-2:]}


def test_methods_without_their_inputs_are_skipped_with_the_reason(world: World) -> None:
    index = world.tiles_table.column_names.index("lon")
    lon = world.tiles_table["lon"].to_pylist()
    tiles = world.tiles_table.set_column(index, TILES.field("lon"), pa.array([None, *lon[1:]], pa.float64()))
    result = world.probe(
        with_methods("pretrained", "coordinates", "mean"),
        tiles=store(f"{world.where}/unplaced", tiles),
        embeddings={"pretrained": world.pretrained},
    )
    assert result.manifest.facts["skipped"] == {"coordinates": "1 of 240 tiles have no lon and lat"}
    assert set(result.read()["method"].to_pylist()) == {"pretrained", "mean"}


def test_every_indicator_is_probed_unless_some_are_named(world: World) -> None:
    schema = labels_schema(["carbon", "gdp"])
    labels = store(f"{world.where}/two", pa.table([IDS, np.exp(world.log_carbon), np.ones(NUM_TILES)], schema=schema))
    result = world.probe(with_methods("mean", indicators=()), labels=labels)
    assert set(result.read()["indicator"].to_pylist()) == {"carbon", "gdp"}
    scores = json.loads(read_bytes(result.file_uri("scores.json")))
    undefined = [entry for entry in scores["probe"] if entry["mean"] is None]
    assert {(entry["indicator"], entry["metric"]) for entry in undefined} == {("gdp", "r2")}  # it is constant


def test_inputs_that_cannot_be_probed_name_the_fix(world: World) -> None:
    with pytest.raises(ProbeError, match=r"\['smog'\].*\['carbon'\]"):
        world.probe(with_methods("mean", indicators=("smog",)))
    short = store(f"{world.where}/short", vectors_table(world.vectors[:-4], IDS[:-4]))
    with pytest.raises(ProbeError, match="4 of 240 tiles of the splits are not in"):
        world.probe(with_methods("pretrained"), embeddings={"pretrained": short})
    broken = world.vectors.copy()
    broken[7, 3] = np.nan
    with pytest.raises(ProbeError, match=r"1 vectors of .* not finite"):
        world.probe(with_methods("pretrained"), embeddings={"pretrained": store(f"{world.where}/nan", vectors_table(broken))})
    with pytest.raises(ProbeError, match="names 'pretrained', but this run has colour, coordinates, mean"):
        world.probe(with_methods("pretrained"), embeddings={})
    with pytest.raises(ProbeError, match="cannot be called 'colour'"):
        world.probe(embeddings={"colour": world.pretrained})
    twice = store(f"{world.where}/twice", pa.concat_tables([world.labels_table, world.labels_table]))
    with pytest.raises(ProbeError, match="more than one row for a tile"):
        world.probe(with_methods("mean"), labels=twice)


def test_a_part_with_too_few_usable_rows_is_refused_before_anything_is_fitted(world: World) -> None:
    parts = ["train"] * 8 + ["val"] * 8 + ["test"]
    splits = pa.table([IDS[:17], ["blocks"] * 17, [0] * 17, [0] * 17, parts], schema=SPLITS)
    with pytest.raises(ProbeError, match=r"blocks, draw 0: test has 1 tiles with a usable 'carbon'.*split\.test_share"):
        world.probe(with_methods("mean"), splits=store(f"{world.where}/thin", splits))


def test_errors_name_the_space_that_each_indicator_is_judged_in(world: World) -> None:
    schema = labels_schema(["carbon", "gdp"])
    gdp = 1000 * world.log_carbon
    labels = store(f"{world.where}/spaces", pa.table([IDS, np.exp(world.log_carbon), gdp], schema=schema))
    config = with_methods("pretrained", "mean", indicators=(), targets={"gdp": "raw"})
    result = world.probe(config, labels=labels)
    scores = json.loads(read_bytes(result.file_uri("scores.json")))
    assert {(item["indicator"], item["space"]) for item in scores["probe"]} == {("carbon", "log"), ("gdp", "raw")}
    standard = world.probe(
        with_methods("pretrained", "mean", indicators=(), targets={"gdp": "raw"}, zscore=True), labels=labels
    )
    judged = json.loads(read_bytes(standard.file_uri("scores.json")))
    assert {(item["indicator"], item["space"]) for item in judged["probe"]} == {
        ("carbon", "z-score of log"),
        ("gdp", "z-score of raw"),
    }
    assert r2(judged, "pretrained", "blocks") == pytest.approx(r2(scores, "pretrained", "blocks"))

    def errors(found: dict[str, Any]) -> list[float]:
        keys = ("pretrained", "blocks", "rmse")
        return [item["mean"] for item in found["probe"] if (item["method"], item["split"], item["metric"]) == keys]

    assert errors(scores)[1] == pytest.approx(1000 * errors(scores)[0])
    assert errors(judged)[1] == pytest.approx(errors(judged)[0])  # one in its deviations is the other in its own
    with pytest.raises(ProbeError, match=r"probe\.targets names \['smog'\]"):
        world.probe(with_methods("mean", targets={"smog": "raw"}))


def test_zscores_are_of_the_training_tiles_of_each_draw(world: World) -> None:
    rows = world.probe(with_methods("mean", zscore=True)).read().to_pylist()
    for row in rows[::40]:
        chosen = (pc.field("split") == row["split"]) & (pc.field("seed") == row["seed"]) & (pc.field("part") == "train")
        train = np.isin(IDS, world.splits_table.filter(chosen)["tile_id"].to_pylist())
        y = world.log_carbon
        assert row["y"] == pytest.approx((y[IDS.index(row["tile_id"])] - y[train].mean()) / y[train].std())
        assert row["y_pred"] == pytest.approx(0, abs=1e-9)


def test_a_label_in_the_vectors_stops_the_probe_unless_it_may_be_published_with_its_name(world: World) -> None:
    leaking = np.concatenate([world.vectors, world.log_carbon[:, None]], axis=1)
    embeddings = {"pretrained": store(f"{world.where}/leaking", vectors_table(leaking))}
    with pytest.raises(LeakError, match="label_in_features: column 12 of 'pretrained' is the indicator 'carbon'"):
        world.probe(with_methods("pretrained"), embeddings=embeddings)
    result = world.probe(with_methods("pretrained", refuse_leaks=False), embeddings=embeddings)
    scores = json.loads(read_bytes(result.file_uri("scores.json")))
    assert result.manifest.facts["leaks"] == scores["leaks"]
    assert ("label_in_features", "error", 1) in {
        (leak["name"], leak["severity"], leak["num_found"]) for leak in scores["leaks"]
    }


def test_an_indicator_without_any_value_is_named(world: World) -> None:
    schema = labels_schema(["carbon", "gdp"])
    empty = pa.table([IDS, np.exp(world.log_carbon), pa.nulls(NUM_TILES, pa.float64())], schema=schema)
    labels = store(f"{world.where}/empty", empty)
    with pytest.raises(ProbeError, match=r"'gdp' has no usable value in space 'log' on any tile.*probe\.indicators"):
        world.probe(with_methods("mean", indicators=()), labels=labels)


def test_cities_are_scored_by_one_fit_for_all_and_by_their_own_where_they_have_enough_tiles(world: World) -> None:
    """Three cities, of which one has ten tiles; its few own fits that can be made are, and the others are counted."""
    regions = ["Beijing"] * 130 + ["Lhasa"] * 10 + ["Shanghai"] * 100
    index = world.tiles_table.column_names.index("region")
    table = world.tiles_table.set_column(index, TILES.field("region"), pa.array(regions))
    split = SplitConfig(outer="random", also=("city", "transfer"), num_draws=2, block_km=8)
    splits = store(f"{world.where}/cities", assign_splits(table, split, None)[0])
    tiles = store(f"{world.where}/city-tiles", table)
    config = with_methods("pretrained", "mean", per_city=True)
    with publish(f"{world.where}/per-city", "probe", {}, {}) as publication:
        embeddings = {"pretrained": world.pretrained}
        probe(world.labels, splits, tiles, embeddings, config, PixelsConfig(), publication, split)
    result = open_dataset(f"{world.where}/per-city")
    scores = json.loads(read_bytes(result.file_uri("scores.json")))
    found = {
        (item["city"], item["fit"], item["split"]): item["mean"]
        for item in scores["cities"]
        if (item["method"], item["metric"]) == ("pretrained", "r2")
    }
    for city in ("Beijing", "Shanghai"):
        assert found[city, "pooled", "random"] > 0.95
        assert found[city, "own", "random"] > 0.9
    assert ("Beijing", "own", "city") not in found  # a city that is held out has nothing of its own to learn from
    num_own = sum(item["seeds"] for item in scores["cities"] if item["city"] == "Lhasa" and item["fit"] == "own") // (2 * 3)
    assert result.manifest.facts["too_small"].get("Lhasa", 0) == 2 - num_own
    assert {item["fold"] for item in scores["folds"] if item["split"] == "transfer"} == set(range(9))
    [worst] = [item for item in scores["folds"] if (item["split"], item["fold"]) == ("city", 1) and item["method"] == "mean"][
        :1
    ]
    assert worst["num_test"] == 10
    assert "own_fits.feather" in {entry.path.rpartition("/")[2] for entry in result.manifest.files}
    assert set(result.read()["split"].to_pylist()) == {"random", "city", "transfer"}
