"""What a user reads of an error, also of one that was raised in a worker and came back wrapped in Ray's."""

from __future__ import annotations

import re
from collections.abc import Iterator

from urbanclip_ray.errors import UserError

# Ray Data and failed actors keep of the original nothing but its traceback's text
RAISED = re.compile(r"^(?P<name>urbanclip_ray(?:\.\w+)+): (?P<message>.*?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


def explain_error(error: BaseException) -> str | None:
    """The message for a user where the error, or what Ray wraps in it, is one that a user can mend; else None."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):  # Ray's wrapper of a task's error is also of the error's class
        explained = explain_error(cause)
        if explained is not None:
            return explained
    if is_remote(error):
        return _raised_in_text(str(error))
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    return None


def is_remote(error: BaseException) -> bool:
    """Whether Ray raised it: in a worker, or about one."""
    return any(base.__module__.startswith("ray.") for base in type(error).__mro__)


def _raised_in_text(text: str) -> str | None:
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in _kinds(UserError)}
    for match in RAISED.finditer(text):
        if match["name"] in names:
            return match["message"].strip()
    return None


def _kinds(kind: type[UserError]) -> Iterator[type[UserError]]:
    yield kind
    for sub in kind.__subclasses__():
        yield from _kinds(sub)
