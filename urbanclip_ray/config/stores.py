"""Object storage: how the servers behind `s3://` and `gs://` are reached."""

from __future__ import annotations

import re
from typing import Self

from pydantic import field_validator, model_validator

from urbanclip_ray.config.section import Section, VariableName, execution


class StoreConfig(Section):
    """How the object storage below one root is reached. What is empty comes from the AWS variables and config
    files, or is found as Google's libraries find it.

    A store names who asks (a profile of the AWS config files, or environment variables, on every node); it holds no secret.
    """

    root: str = execution("s3://")  # or gs://; s3://bucket/prefix; of several that hold a URI the longest wins
    endpoint: str = execution("")  # http://host:port of a server that is not AWS's
    region: str = execution("")
    anonymous: bool = execution(False)  # for public buckets
    profile: str = execution("")
    key_id_variable: VariableName = execution("")  # names of environment variables
    secret_variable: VariableName = execution("")

    @field_validator("root")
    @classmethod
    def _is_object_storage(cls, value: str) -> str:
        if not value.startswith(("s3://", "gs://")):
            raise ValueError(f"a store's root is s3:// or gs://, with or without bucket or bucket/prefix, not {value}")
        return value

    @field_validator("endpoint")
    @classmethod
    def _is_endpoint(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^/@?#\s]+/?", value):
            raise ValueError("write it as http://host:port or https://host, without keys and paths")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.key_id_variable) != bool(self.secret_variable):
            raise ValueError("key_id_variable and secret_variable belong together: give both or neither")
        if sum(map(bool, (self.anonymous, self.profile, self.key_id_variable))) > 1:
            raise ValueError("give one of anonymous, profile, and key_id_variable with secret_variable")
        if self.root.startswith("gs://") and (self.region or self.profile or self.key_id_variable):
            raise ValueError(
                "region, profile, key_id_variable and secret_variable are S3's: gs:// takes the machine's service account, or "
                "the file that GOOGLE_APPLICATION_CREDENTIALS names; leave them out"
            )
        return self
