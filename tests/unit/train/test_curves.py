"""The history of a run, as JSON and as TensorBoard events."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from urbanclip_ray.train import curves
from urbanclip_ray.train.curves import Curves


def test_events_are_copied_up_and_say_what_the_history_says(tmp_path):
    where = tmp_path / "deep" / "tensorboard"
    found = Curves(str(where), None)
    for step in (1, 2, 3):
        found.train({"step": step, "loss": 3.0 / step, "lr": 0.1})
    found.validation({"step": 3, "contrastive": 0.25})
    events = EventAccumulator(str(where)).Reload()  # validation copies what there is
    found.close()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert [event.value for event in events.Scalars("validation/contrastive")] == [0.25]
    assert "train/step" not in events.Tags()["scalars"]
    assert json.loads(json.dumps(found.history)) == {
        "train": [{"step": step, "loss": 3.0 / step, "lr": 0.1} for step in (1, 2, 3)],
        "validation": [{"step": 3, "contrastive": 0.25}],
    }


def test_steps_are_copied_up_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "UPLOAD_EVERY_STEPS", 2)
    found = Curves(str(tmp_path / "events"), None)
    found.train({"step": 1, "loss": 1.0})
    assert not (tmp_path / "events").exists()
    found.train({"step": 2, "loss": 1.0})
    assert [event.step for event in EventAccumulator(str(tmp_path / "events")).Reload().Scalars("train/loss")] == [1, 2]
    found.train({"step": 3, "loss": 1.0})
    found.close()
    assert [event.step for event in EventAccumulator(str(tmp_path / "events")).Reload().Scalars("train/loss")] == [1, 2, 3]


def test_a_resumed_run_goes_on_with_its_history():
    before = {"train": [{"step": 1, "loss": 2.0}], "validation": []}
    found = Curves(None, before)
    found.train({"step": 2, "loss": 1.5})
    found.close()
    assert [record["step"] for record in found.history["train"]] == [1, 2]


@pytest.mark.parametrize("history", [None, {}])
def test_ranks_without_a_place_for_events_collect_all_the_same(history):
    found = Curves(None, history)
    found.train({"step": 1, "loss": 2.0})
    found.close()
    assert found.history == {"train": [{"step": 1, "loss": 2.0}], "validation": []}
