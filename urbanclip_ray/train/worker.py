"""What Ray Train's controller is given to start: a rank's work in a sealed parcel, which the workers alone open.

The controller passes on what workers do. Were it handed the function itself, it would import all that this needs: seconds in
which the workers wait, and half a gigabyte for as long as it lives.
"""

from __future__ import annotations

from typing import Any

import ray

PARCEL = "parcel"


def pack_work(function: Any, argument: Any) -> dict[str, bytes]:
    """The `train_loop_config` with which :func:`work` calls `function(argument)`."""
    return {PARCEL: ray.cloudpickle.dumps((function, argument))}


def work(config: dict[str, bytes]) -> None:
    """What a worker does."""
    function, argument = ray.cloudpickle.loads(config[PARCEL])  # of this run's own driver, by way of Ray
    function(argument)
