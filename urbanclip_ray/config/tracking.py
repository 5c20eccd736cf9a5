"""Who is told of the trials of a search while it runs."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import field_validator

from urbanclip_ray.config.section import Section, execution
from urbanclip_ray.schema import is_safe_name


class TrackingConfig(Section):
    """Experiment trackers that are told of every trial; none of it holds a key, see `tracking`."""

    mlflow: str = execution("")  # http(s)://host:port of an MLflow tracking server
    wandb: str = execution("")  # a project of Weights & Biases

    @field_validator("mlflow")
    @classmethod
    def _server_without_a_secret(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("write the address of an MLflow server, for example http://127.0.0.1:5000")
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError(
                "an address with a user, a password or a token would be kept: export MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, where the job runs, and write the address alone"
            )
        return value

    @field_validator("wandb")
    @classmethod
    def _project_and_no_key(cls, value: str) -> str:
        if value and (not is_safe_name(value) or re.fullmatch(r"[0-9a-f]{40,}|wandb_v\d+_\w+", value)):
            raise ValueError("name a project (letters, digits, '.', '_' and '-'); the key belongs into WANDB_API_KEY")
        return value
