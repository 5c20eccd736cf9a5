"""What a process says while it works: a line for people, or a record with fields where the job's logs are JSON.

Ray makes JSON of the logs of all processes of a job that is started with RAY_LOGGING_CONFIG_ENCODING=JSON; its workers are told
by the job's runtime environment, as Ray Train puts handlers of its own in the place of that.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache

ENCODING_VARIABLE = "RAY_LOGGING_CONFIG_ENCODING"


def logs_environment() -> dict[str, str]:
    """The variable that tells another process how this one logs; empty where nothing was said."""
    return {ENCODING_VARIABLE: os.environ[ENCODING_VARIABLE]} if ENCODING_VARIABLE in os.environ else {}


def say(text: str, **fields: object) -> None:
    """Print a line of progress, or log it as a record with these fields and the ids of Ray's job, node and worker."""
    if os.environ.get(ENCODING_VARIABLE) == "JSON":
        _json_logger().info(text, extra=fields)
    else:
        print(text, flush=True)


@lru_cache
def _json_logger() -> logging.Logger:
    from ray._common.filters import CoreContextFilter
    from ray._common.formatters import JSONFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    handler.addFilter(CoreContextFilter())
    logger = logging.getLogger("urbanclip_ray.progress")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    return logger
