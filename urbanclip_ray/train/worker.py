"""What Ray Train's controller passes on to its workers: a pickled function, which they alone unpickle.

Handed the function itself, the controller would import all that this needs: three seconds in which the workers wait, and a
quarter of a gigabyte for as long as it lives.
"""

from __future__ import annotations

from typing import Any

import ray

PICKLED = "pickled"


def train_loop_config(function: Any, argument: Any) -> dict[str, bytes]:
    """The `train_loop_config` with which :func:`train_loop` calls `function(argument)`."""
    return {PICKLED: ray.cloudpickle.dumps((function, argument))}


def train_loop(config: dict[str, bytes]) -> None:
    """Ray Train's `train_loop_per_worker`."""
    function, argument = ray.cloudpickle.loads(config[PICKLED])  # of this run's own driver, by way of Ray
    function(argument)
