"""What is kept, what is made anew and which job comes first; the stages themselves are replaced by quick ones.

The real ones run in tests/integration.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from quick_stages import replace_stages, three_tiles

from urbanclip_ray import pipeline, plan
from urbanclip_ray.config import ConfigError, RunConfig
from urbanclip_ray.model.weights import WEIGHTS_FILE
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.pipeline import find_parents, run_stages
from urbanclip_ray.places import find_weights
from urbanclip_ray.stages import STAGES
from urbanclip_ray.storage import MissingDatasetError, find_dataset, open_dataset, publish

NAMES = [stage.name for stage in STAGES]


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return three_tiles(tmp_path)


@pytest.fixture
def made(monkeypatch, ray_cluster) -> list[str]:
    monkeypatch.setattr(pipeline.Run, "given_weights_digest", "0123")
    return replace_stages(monkeypatch)


def rerun(config: RunConfig, made: list[str], *overrides: str) -> list[str]:
    """What a run with other options makes."""
    made.clear()
    run_stages(apply_overrides(config, list(overrides)), None)
    return list(made)


def test_stages_are_made_once_in_an_order_in_which_parents_come_first(config, made):
    assert rerun(config, made) == NAMES
    assert rerun(config, made) == []
    for at, stage in enumerate(STAGES):
        assert set(stage.parents) <= set(NAMES[:at])


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("refine.max_words=9", ["tiles", "labels", "captions", "splits"]),
        ("refine.rules=[all]", ["tiles", "labels", "captions", "splits"]),
        ("refine.rules_file=elsewhere.yaml", NAMES),  # without a rule switched on, no file is read
        ("caption.max_error_share=0.5", ["tiles", "labels", "splits"]),
        ("split.num_draws=3", ["tiles", "labels", "captions", "pairs"]),
        ("pack.seed=1", ["tiles", "labels", "captions", "pairs", "splits"]),
        ("train.lr=0.01", ["tiles", "labels", "captions", "pairs", "splits", "shards"]),
        ("model.patch_dropout=0.5", ["tiles", "labels", "captions", "pairs", "splits", "shards"]),
        ("embed.views=8", [name for name in NAMES if name not in ("embeddings", "untrained", "retrieval", "prompts", "probe")]),
        ("probe.target=log", NAMES[:-1]),
        ("pixels.crop_left_px=2", ["tiles", "labels", "splits"]),
        ("ingest.min_side_px=9", []),
    ],
)
def test_a_change_remakes_what_depends_on_it_and_nothing_else(config, made, override, kept):
    rerun(config, made)
    assert rerun(config, made, override) == [name for name in NAMES if name not in kept]
    assert rerun(config, made) == []  # the old ones still stand beside the new ones


@pytest.mark.parametrize(
    "override",
    [
        "ingest.tiles_per_batch=3",
        "caption.num_actors=1",
        "train.checkpoint_every_steps=7",
        "embed.num_actors=1",
        "resources.cpus_per_worker=2",
    ],
)
def test_how_the_work_is_done_remakes_nothing(config, made, override):
    rerun(config, made)
    assert rerun(config, made, override) == []


def test_the_bytes_to_start_from_decide_and_not_where_they_lie(config, made, tmp_path):
    options = ["model.tokenizer=open_clip", "model.architecture=coca_ViT-B-32"]
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    rerun(config, made, *options)
    assert "pretrain" in rerun(config, made, *options, f"model.pretrained={first}")
    assert rerun(config, made, *options, f"model.pretrained={second}") == []
    second.write_bytes(b"other weights")
    assert "pretrain" in rerun(config, made, *options, f"model.pretrained={second}")


def test_another_number_of_workers_keeps_the_shards(config, made):
    rerun(config, made)
    tree = config.model_dump()
    tree["resources"]["num_workers"] = 1
    made.clear()
    run_stages(RunConfig.model_validate(tree), None)
    assert "shards" not in made


def test_a_changed_source_is_read_again(config, made, tmp_path):
    rerun(config, made)
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(tmp_path / "city" / "3.png")
    assert rerun(config, made) == NAMES


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_job_run_too_early_names_the_job_to_run_first(config, made, name):
    with pytest.raises(
        MissingDatasetError, match=r"tiles/\w+ is not made yet: run jobs/ingest\.py with the same options first"
    ):
        run_stages(config, [name])
    assert made == []


def test_each_job_names_the_one_before_it_until_all_are_run(config, made):
    jobs = ["ingest", "caption", "refine", "split", "pack", "pretrain", "embed", "probe"]
    asked = []
    while True:
        try:
            run_stages(config, ["probe"])
            break
        except MissingDatasetError as error:
            job = str(error).split("jobs/")[1].split(".py")[0]
            asked.append(job)
            run_stages(config, [stage.name for stage in STAGES if stage.job == job])
    assert asked == jobs[:-1]
    assert made == NAMES
    assert rerun(config, made) == []  # the pipeline keeps what the jobs made


def test_a_stage_that_fails_leaves_nothing_and_the_next_run_goes_on_from_there(config, made, monkeypatch):
    def fail(run, publication):
        publication.write_file("half", b"")
        raise RuntimeError("the power is out")

    good = plan.stages_of

    def broken(config):
        return tuple(stage._replace(make=fail) if stage.name == "shards" else stage for stage in good(config))

    monkeypatch.setattr(plan, "stages_of", broken)
    with pytest.raises(RuntimeError, match="power"):
        run_stages(config, None)
    before = list(made)
    monkeypatch.setattr(plan, "stages_of", good)
    assert before + rerun(config, made) == NAMES


def test_of_two_runs_the_first_to_finish_a_dataset_stands_and_the_other_is_told(tmp_path, capsys):
    uri = str(tmp_path / "made")
    with pipeline.publish_or_say(uri, "tiles", {}, {}) as second:
        with pipeline.publish_or_say(uri, "tiles", {}, {}) as first:
            first.write_file("word", b"first")
        second.write_file("word", b"second")
        assert capsys.readouterr().out == ""
    assert f"{uri}: another run has finished it first" in capsys.readouterr().out
    assert [entry.path for entry in open_dataset(uri).manifest.files] == [f"{first.attempt}/word"]
    assert [folder.name for folder in (tmp_path / "made").iterdir() if folder.is_dir()] == [first.attempt]


def test_a_run_with_given_weights_neither_captions_nor_pretrains(config, made):
    assert rerun(config, made, "embed.weights=elsewhere") == [
        *("tiles", "labels", "splits", "embeddings", "untrained", "prompts", "probe")
    ]


def test_a_source_without_labels_is_not_probed(config, made, tmp_path):
    (tmp_path / "city" / "tiles.csv").write_text("file,lon,lat\n0.png,0,0\n")
    assert rerun(config, made) == [name for name in NAMES if name not in ("labels", "untrained", "probe")]


def test_a_run_without_a_probe_says_that_it_has_no_report(config, capsys):
    run = pipeline.Run(config)
    pipeline._show_results(run, pipeline.Console(width=200))
    assert "no report: the source has no indicators" in capsys.readouterr().out


def test_run_json_names_the_current_datasets_relative_to_the_run(config, made, tmp_path):
    rerun(config, made)
    rerun(config, made, "pack.seed=1")
    record = json.loads((tmp_path / "storage" / "tiny_test" / "run.json").read_text())
    assert list(record["datasets"]) == NAMES
    assert record["config"]["pack"]["seed"] == 1
    for place in record["datasets"].values():
        assert find_dataset(f"{tmp_path}/storage/tiny_test/{place}") is not None


def test_captions_depend_on_the_model_s_files_and_not_on_where_they_lie(config, made, tmp_path):
    model = tmp_path / "here" / "blip"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    options = ["caption.captioner=transformers", f"caption.cache_folder={tmp_path / 'cache'}"]
    after_captions = [name for name in NAMES if name not in ("tiles", "labels", "splits")]
    rerun(config, made)
    assert rerun(config, made, *options, f"caption.model={model}") == after_captions
    (tmp_path / "there").mkdir()
    moved = model.rename(tmp_path / "there" / "blip")
    assert rerun(config, made, *options, f"caption.model=file://{moved}") == []
    (moved / "config.json").write_text('{"changed": 1}')
    assert rerun(config, made, *options, f"caption.model={moved}") == after_captions


def test_a_stage_s_parents_are_found_or_the_job_to_run_first_is_named(config, made):
    with pytest.raises(MissingDatasetError, match=r"run jobs/ingest\.py"):
        find_parents(config, "captions")
    rerun(config, made)
    assert set(find_parents(config, "captions").datasets) == {"tiles"}
    assert set(find_parents(config, "retrieval").datasets) == set(NAMES) - {
        "labels",
        "untrained",
        "prompts",
        "probe",
        "retrieval",
    }


def test_weights_as_they_were_before_training_are_embedded_only_for_a_probe_that_judges_them(config, made):
    assert not {"untrained"} & set(rerun(config, made, "probe.methods=[pretrained, colour]"))
    assert rerun(config, made, "probe.methods=[pretrained, untrained_mlp]") == ["untrained", "probe"]


def test_pairs_are_made_anew_when_sentences_end_elsewhere(config, made, monkeypatch):
    rerun(config, made)
    assert rerun(config, made) == []
    monkeypatch.setattr("urbanclip_ray.captioners.sentences.SPLITTER_VERSION", "another")
    assert "pairs" in rerun(config, made)


def test_pairs_are_made_of_tiles_where_sentences_are_held_against_them(config, made):
    by_name = {stage.name: stage for stage in plan.stages_of(config)}
    assert by_name["pairs"].parents == ("captions",)
    strict = apply_overrides(config, ["refine.rules=[all]", 'tune.space={"train.lr": {"choice": [0.1, 0.2]}}'])
    for stages in (plan.stages_of(strict), plan.walk(strict, ["search"])):
        assert {stage.name: stage for stage in stages}["pairs"].parents == ("captions", "tiles")


def test_rules_decide_by_their_content_and_not_by_where_they_lie(config, made, tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    for path in (first, second):
        path.write_text("lead: 'a '\ntail: ', b'\nrules: [{reason: x, patterns: [y]}]")
    assert "pairs" in rerun(config, made, "refine.rules=[x]", f"refine.rules_file={first}")
    assert rerun(config, made, "refine.rules=[x]", f"refine.rules_file={second}") == []
    second.write_text("lead: 'a '\ntail: ', b'\nrules: [{reason: x, patterns: [z]}]")
    assert "pairs" in rerun(config, made, "refine.rules=[x]", f"refine.rules_file={second}")


def test_a_look_at_a_result_finds_it_or_names_its_job(config, made):
    rerun(config, made)
    assert set(find_parents(config, "pairs", and_itself=True).datasets) == {"tiles", "captions", "pairs"}
    with pytest.raises(MissingDatasetError, match=r"run jobs/refine\.py"):
        find_parents(apply_overrides(config, ["refine.max_words=9"]), "pairs", and_itself=True)


def test_weights_are_found_in_a_folder_a_dataset_or_a_run(config, made, tmp_path):
    rerun(config, made)
    run_uri = f"{tmp_path}/storage/tiny_test"
    record = json.loads((tmp_path / "storage" / "tiny_test" / "run.json").read_text())
    dataset = open_dataset(f"{run_uri}/{record['datasets']['pretrain']}")
    folder = dataset.file_uri(WEIGHTS_FILE).removesuffix(f"/{WEIGHTS_FILE}")
    assert find_weights(run_uri) == find_weights(dataset.uri) == find_weights(folder) == folder


def test_a_run_that_pretrained_nothing_has_no_weights(config, made, tmp_path):
    rerun(config, made, "embed.weights=elsewhere")
    with pytest.raises(ConfigError, match="that run has no pretrain; it has tiles, "):
        find_weights(f"{tmp_path}/storage/tiny_test")


def test_another_stages_dataset_has_no_weights(tmp_path):
    with publish(str(tmp_path / "tiles"), "tiles", {}, {}) as publication:
        publication.write_file("something", b"")
    with pytest.raises(Exception, match=f"has no file '{WEIGHTS_FILE}'"):
        find_weights(str(tmp_path / "tiles"))


def test_a_search_makes_what_comes_before_pretraining_and_then_its_trials(config, made, monkeypatch):
    shown = []
    monkeypatch.setattr(pipeline, "show_search", lambda search, console: shown.append(search))
    config = apply_overrides(config, ['tune.space={"train.lr": {"loguniform": [1e-4, 1e-3]}}'])
    before = NAMES[: NAMES.index("pretrain")]
    run = run_stages(config, ["search"])
    assert made == [*before, "search"]
    assert shown == [run.datasets["search"]]
    made.clear()
    run_stages(config, ["search"])  # a finished search is shown again
    assert made == []
    assert len(shown) == 2
    for change, again in (("tune.num_trials=9", []), ("train.lr=0.5", []), ("pack.seed=3", ["shards"])):
        run_stages(apply_overrides(config, [change]), ["search"])
        assert made == [*again, "search"], change
        made.clear()
    run_stages(apply_overrides(config, ["tune.max_concurrent=3"]), ["search"])
    assert made == []


def test_what_trials_refine_otherwise_is_made_once_for_each_value(config, made, monkeypatch):
    monkeypatch.setattr(pipeline, "show_search", lambda search, console: None)
    space = '{"refine.min_words": {"choice": [3, 4, 5]}, "train.lr": {"choice": [0.001, 0.002]}}'
    config = apply_overrides(config, [f"tune.space={space}", "tune.sampler=grid"])
    before = NAMES[: NAMES.index("pretrain")]
    others = ["pairs_1", "shards_1", "pairs_2", "shards_2"]
    run = run_stages(config, ["search"])
    assert made == [*before, *others, "search"]
    assert [run.datasets[name].manifest.config["refine"]["min_words"] for name in ("pairs", "pairs_1", "pairs_2")] == [3, 4, 5]
    assert run.datasets["shards_1"].manifest.parents["pairs_1"] == run.datasets["pairs_1"].sha256
    assert set(run.datasets["search"].manifest.parents) == {"labels", "shards", "shards_1", "shards_2"}
    made.clear()
    run_stages(apply_overrides(config, ["refine.max_words=50"]), ["search"])  # of all of them
    assert made == ["pairs", "shards", *others, "search"]


def test_a_search_may_caption_otherwise_too(config, made, monkeypatch):
    monkeypatch.setattr(pipeline, "show_search", lambda search, console: None)
    space = '{"caption.max_error_share": {"choice": [0.05, 0.5]}}'
    run = run_stages(apply_overrides(config, [f"tune.space={space}", "tune.sampler=grid"]), ["search"])
    assert made[-4:] == ["captions_1", "pairs_1", "shards_1", "search"]
    assert run.datasets["captions_1"].manifest.config["caption"]["max_error_share"] == 0.5


def test_a_search_that_cannot_be_is_refused_before_anything_is_made(config, made, tmp_path):
    with pytest.raises(ConfigError, match=r"tune\.space is empty"):
        run_stages(config, ["search"])
    config = apply_overrides(config, ['tune.space={"train.lr": {"loguniform": [1e-4, 1e-3]}}'])
    (tmp_path / "city" / "tiles.csv").write_text("file,lon,lat\n0.png,0,0\n")
    with pytest.raises(ConfigError, match="a search needs indicators"):
        run_stages(config, ["search"])
    (tmp_path / "city" / "tiles.csv").write_text("file,lon,lat,gdp\n0.png,0,0,1\n")
    with pytest.raises(ConfigError, match=r"split\.transductive=true packs the test tiles, which no trial may see"):
        run_stages(apply_overrides(config, ["split.transductive=true"]), ["search"])
    assert made == []
