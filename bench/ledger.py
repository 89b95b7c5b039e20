"""Results of a long benchmark, written as they come, so that an interrupted run can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..common.files import append_json_line, read_json_lines
from ..errors import ConfigError


class Ledger:
    """Keeps the result of each piece of work under what defines it: as JSON lines, or in memory only.

    Args:
        path: the file; None keeps nothing.
        resume: take over what the file holds already.

    Raises:
        ConfigError: there is something in the file, and it is not to be taken over, or no results.
    """

    def __init__(self, path: Path | None, *, resume: bool = False) -> None:
        self._path = path
        rows = read_json_lines(path) if path else []
        if rows and not resume:
            raise ConfigError(f"{path} holds {len(rows)} results of an earlier run. Go on with --resume, or remove it.")
        try:
            self._results = {_text(row["work"]): row["result"] for row in rows}
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds something else than results of a benchmark. Name another file.") from error

    def get(self, work: Mapping[str, Any]) -> Any:
        """The result of a piece of work; None if there is none yet."""
        return self._results.get(_text(work))

    def add(self, work: Mapping[str, Any], result: Any) -> None:
        """Keep a result."""
        self._results[_text(work)] = result
        if self._path:
            append_json_line(self._path, {"work": work, "result": result})

    def fetch(self, work: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The result of a piece of work, computed and kept if it is not there yet."""
        if self.get(work) is None:
            self.add(work, compute())
        return self.get(work)


def _text(work: Mapping[str, Any]) -> str:
    return json.dumps(work, sort_keys=True)
