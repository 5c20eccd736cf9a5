"""What a user reads of errors that were raised in a worker, with a real Ray."""

from __future__ import annotations

import sys

import pyarrow as pa
import pytest
import ray
import ray.data
from ray import cloudpickle

from urbanclip_ray import dataflow
from urbanclip_ray.config import ConfigError
from urbanclip_ray.errors import UserError
from urbanclip_ray.remote_errors import explain_error, is_remote
from urbanclip_ray.storage import StorageError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test file

MESSAGE = "weights/x: not a folder of weights\nit needs a config: copy it again"


@pytest.fixture
def fail():
    """A function that workers can run: they cannot import this module, so it travels by value."""
    message = MESSAGE

    def fail(_: object = None) -> pa.Table:
        raise ConfigError(message)

    return fail


def raised_by(action) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 whatever Ray makes of it
        action()
    return caught.value


def test_a_mistake_of_the_user_is_explained_and_one_of_ours_is_not():
    assert explain_error(StorageError("s3://b: fix it")) == "s3://b: fix it"
    assert explain_error(FileNotFoundError(2, "No such file", "/x")) == "/x: No such file"
    assert explain_error(AssertionError("rows do not add up")) is None
    assert not is_remote(UserError())


def test_an_error_of_a_task_is_read_without_its_traceback(ray_cluster, fail):
    error = raised_by(lambda: ray.get(ray.remote(fail).remote()))
    assert is_remote(error)
    assert explain_error(error) == MESSAGE


def test_an_os_error_of_a_task_names_its_file(ray_cluster):
    def lose() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/data/x")

    assert explain_error(raised_by(lambda: ray.get(ray.remote(lose).remote()))) == "/data/x: No such file or directory"


def test_an_error_in_a_batch_is_read_without_its_traceback(ray_cluster, fail):
    dataflow.connect()
    rows = dataflow.map_tables(ray.data.from_items([{"x": 1}]), fail, batch_size=1)
    assert explain_error(raised_by(rows.materialize)) == MESSAGE


def test_an_error_in_the_making_of_an_actor_is_read_without_its_traceback(ray_cluster, fail):
    class Failing:
        def __init__(self) -> None:
            fail()

        def answer(self) -> None: ...

    actor = ray.remote(Failing).remote()
    assert explain_error(raised_by(lambda: ray.get(actor.answer.remote()))) == MESSAGE


def test_a_bug_in_a_task_keeps_its_traceback(ray_cluster):
    assert explain_error(raised_by(lambda: ray.get(ray.remote(lambda: [][0]).remote()))) is None
