"""What every section of a config is: immutable, keyword-only, without unknown keys."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from urbanclip_ray.errors import UserError

T = TypeVar("T")


class ConfigError(UserError, ValueError):
    """A config that cannot be built; the message names the key and the fix."""


def execution(default: T, ge: float | None = None) -> T:
    """A field that says how or where a result is made, not what it is, so it is left out of digests; `ge` bounds it."""
    field: T = Field(default=default, ge=ge, json_schema_extra={"execution": True})
    return field


def added_later(default: T, ge: float | None = None, lt: float | None = None) -> T:
    """A field that is left out of digests while it has its default: what was made before there was one keeps its name."""
    field: T = Field(default=default, ge=ge, lt=lt, json_schema_extra={"added_later": True})
    return field


def _check_variable(value: str) -> str:
    if value and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
        raise ValueError("name an environment variable (capitals, digits and _); the key or secret itself has no place here")
    return value


VariableName = Annotated[str, AfterValidator(_check_variable)]  # of an environment variable that holds a secret, or empty


class Section(BaseModel):
    """Base of every section: immutable, keyword-only, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """The fields that decide what is made, as JSON-ready values: no :func:`execution` ones, nor :func:`added_later` ones
        at their default."""
        fields, deciding = type(self).model_fields, type(self).deciding_keys()
        kept = [
            name
            for name in deciding
            if not (_marks(fields[name]).get("added_later") and getattr(self, name) == fields[name].default)
        ]
        return self.model_dump(mode="json", include=set(kept))

    @classmethod
    def deciding_keys(cls) -> tuple[str, ...]:
        """The fields that may decide what is made: all but :func:`execution` ones."""
        return tuple(name for name, field in cls.model_fields.items() if not _marks(field).get("execution"))


def _marks(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
