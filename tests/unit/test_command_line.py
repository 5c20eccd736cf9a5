"""What all jobs share: options, help, and errors in one line."""

from __future__ import annotations

import json
import sys

import pytest
from search_data import make_search

from urbanclip_ray import check, pipeline, plan
from urbanclip_ray.command_line import Look, build_parser, run_job, run_report
from urbanclip_ray.config import RunConfig
from urbanclip_ray.recipes import RECIPES, load_recipe
from urbanclip_ray.storage import StorageError


def run(monkeypatch, *arguments: str, stages=("tiles",), looks=()) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    run_job("A job.", ["train"], list(stages), looks)


def test_help_lists_recipes_and_the_keys_of_its_sections():
    text = build_parser("A job.", ["train", "pixels"]).format_help()
    for name in RECIPES:
        assert f"\n  {name} " in text
    for key in RunConfig().train.model_dump():
        assert f"\n  train.{key}=" in text
    assert "pixels.crop_left_px=0" in text
    assert "\n  probe." not in text  # a key; a recipe's own words may name the probe


def test_the_stages_are_run_with_the_config_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "run_stages", lambda config, stages: seen.append((config, stages)))
    run(monkeypatch, "--recipe", "tiny_test", "--set", "train.lr=2", "--set", "run=other", "--storage", "s3://b/p")
    ((config, stages),) = seen
    assert (config.train.lr, config.run, config.storage, stages) == (2.0, "other", "s3://b/p", ["tiles"])
    assert config.probe == load_recipe("tiny_test").probe


def test_show_config_prints_what_holds_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "run_stages", lambda config, stages: pytest.fail("must not run"))
    run(monkeypatch, "--recipe", "world_demo", "--set", "train.lr=2", "--show-config")
    shown = json.loads(capsys.readouterr().out)
    assert shown["train"]["lr"] == 2
    assert shown["source"]["kind"] == "world"


def test_a_dry_run_and_a_check_run_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "run_stages", lambda config, stages: pytest.fail("must not run"))
    monkeypatch.setattr(plan, "show_plan", lambda config, stages: asked.append(("plan", stages)))
    monkeypatch.setattr(check, "check_run", lambda config, stages: asked.append(("check", stages)))
    run(monkeypatch, "--recipe", "tiny_test", "--dry-run")
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--recipe", "tiny_test", "--check")
    assert caught.value.code == 1  # nothing that is true came back
    assert asked == [("plan", ["tiles"]), ("check", ["tiles"])]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StorageError("s3://b/x: fix it"), "error: s3://b/x: fix it"),
        (FileNotFoundError(2, "No such file or directory", "/data/tiles.csv"), "error: /data/tiles.csv: No such file"),
        (OSError(28, "/disk/run: the disk is full: free space"), "error: /disk/run: the disk is full: free space"),
        (OSError("plain words"), "error: plain words"),
    ],
)
def test_errors_that_a_user_can_mend_are_one_line(monkeypatch, error, message):
    def fail(config, stages):
        raise error

    monkeypatch.setattr(pipeline, "run_stages", fail)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--recipe", "tiny_test")
    assert str(caught.value.code).startswith(message)
    assert "\n" not in caught.value.code


def test_mistakes_of_ours_keep_their_traceback(monkeypatch):
    def fail(config, stages):
        raise AssertionError("rows do not add up")

    monkeypatch.setattr(pipeline, "run_stages", fail)
    with pytest.raises(AssertionError):
        run(monkeypatch, "--recipe", "tiny_test")


@pytest.fixture
def looks(monkeypatch):
    """Two looks that record what they were shown, and a pipeline that must not run."""
    monkeypatch.setattr(pipeline, "run_stages", lambda config, stages: pytest.fail("must not run"))
    monkeypatch.setattr(pipeline, "find_parents", lambda config, name, and_itself: (config.run, name))
    shown: list = []
    both = [Look(flag, "Look.", lambda *seen, flag=flag: shown.append((flag, *seen))) for flag in ("--preview", "--plan")]
    return both, shown


@pytest.mark.parametrize(("arguments", "limit"), [([], None), (["--limit", "7"], 7)])
def test_a_look_takes_the_place_of_the_stage(monkeypatch, looks, arguments, limit):
    both, shown = looks
    run(monkeypatch, "--recipe", "tiny_test", "--plan", *arguments, stages=["captions"], looks=both)
    assert shown == [("--plan", ("tiny_test", "captions"), limit)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "3"], "--limit goes with --preview or --plan"),
        (["--plan", "--limit", "0"], "'0' is not a whole number above 0"),
        (["--plan", "--limit", "many"], "'many' is not a whole number above 0"),
        (["--plan", "--preview"], "not allowed with argument"),
    ],
)
def test_a_look_that_makes_no_sense_is_refused(monkeypatch, looks, capsys, arguments, message):
    both, shown = looks
    with pytest.raises(SystemExit):
        run(monkeypatch, "--recipe", "tiny_test", *arguments, looks=both)
    assert message in capsys.readouterr().err
    assert shown == []


def test_a_job_without_looks_has_no_limit(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--recipe", "tiny_test", "--limit", "3")
    assert "unrecognized arguments: --limit 3" in capsys.readouterr().err


def test_a_look_at_the_result_is_shown_the_dataset_too_and_takes_no_limit(monkeypatch, capsys):
    asked, shown = [], []
    monkeypatch.setattr(pipeline, "find_parents", lambda config, name, and_itself: asked.append((name, and_itself)))
    look = Look("--quality", "Look.", lambda *seen: shown.append(seen), at_result=True)
    run(monkeypatch, "--recipe", "tiny_test", "--quality", stages=["pairs"], looks=[look])
    assert asked == [("pairs", True)]
    assert shown == [(None, None)]
    with pytest.raises(SystemExit):
        run(monkeypatch, "--recipe", "tiny_test", "--quality", "--limit", "3", stages=["pairs"], looks=[look])
    assert "unrecognized arguments: --limit 3" in capsys.readouterr().err


def test_the_report_of_a_search_takes_the_name_of_its_run_or_a_uri(monkeypatch, capsys, tmp_path):
    run = make_search(tmp_path, 2, lambda trial: 0.1 * (1 + trial.number))
    for options in (
        ["--tune", "demo_search"],
        ["--tune", run],
        [f"--tune={run}/search/0123abcd", "--output", f"{tmp_path}/out"],
    ):
        monkeypatch.setattr(sys, "argv", ["report.py", "--storage", str(tmp_path), *options])
        run_report("A report.")
    pages = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert pages == [f"{run}/search/0123abcd/report/search.html"] * 2 + [f"{tmp_path}/out/search.html"]


def test_a_report_compares_runs_or_trials_and_not_both(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "--runs", "a", "b", "--tune", "c"])
    with pytest.raises(SystemExit):
        run_report("A report.")
    assert "not allowed with argument --runs" in capsys.readouterr().err
