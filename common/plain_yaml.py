"""YAML as people write settings in it: read within bounds, with plain values alone."""

from __future__ import annotations

from typing import Any

import yaml

MOST_YAML_BYTES = 2**22
"""Bytes of a YAML file, at most: reading takes some seconds for each MiB."""

_FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What PyYAML raises besides its own errors, for values such as `!!int ''` or a 13th month."""


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]  # the library has no types
    """The safe loader, without references: a few lines of them stand for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "references (*name) are not read; write values out", mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: dicts, lists and scalars, each in one place only.

    Raises:
        YAMLError: it is no YAML, is nested more deeply than Python reads, has references (`*name`), or tags that ask
            for objects.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except _FAULTS as error:
        raise yaml.YAMLError(str(error) or type(error).__name__) from error
