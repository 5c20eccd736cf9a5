"""YAML that others may have written: plain values, nothing that YAML can be told to build, up to a size.

No aliases either, by which a few lines can stand for more than memory holds.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_BYTES = 1 << 20


class PlainLoader(yaml.SafeLoader):
    """No tags that build objects (as SafeLoader), and no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A part of the file as it is read."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not taken: write the value again", self.get_mark())
        return super().compose_node(parent, index)


def parse_yaml(data: bytes, loader: type[PlainLoader] = PlainLoader) -> Any:
    """What a file holds; raises ValueError saying in one line why it is not read."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    try:
        return yaml.load(data, Loader=loader)  # noqa: S506  a SafeLoader that takes less than it
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
