"""What Ray Train's controller passes on to its workers: what they are told, pickled, which they alone unpickle.

Handed the loop itself and what it is told, the controller would import all that these need: seconds in which the workers wait,
and a quarter of a gigabyte for as long as it lives. The driver does without the loop, too (see `train.spec`).
"""

from __future__ import annotations

import ray

from urbanclip_ray.train.spec import TrainSpec

PICKLED = "pickled"


def train_loop_config(spec: TrainSpec) -> dict[str, bytes]:
    """The `train_loop_config` with which :func:`train_loop` trains a rank."""
    return {PICKLED: ray.cloudpickle.dumps(spec)}


def train_loop(config: dict[str, bytes]) -> None:
    """Ray Train's `train_loop_per_worker`."""
    from urbanclip_ray.train.loop import train_rank

    train_rank(ray.cloudpickle.loads(config[PICKLED]))  # of this run's own driver, by way of Ray
