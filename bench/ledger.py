"""Results of a long benchmark, written as they come, so that an interrupted run can go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.files import append_json_line, read_json_lines
from ..errors import ConfigError


class Ledger:
    """Keeps the result of each piece of work under what defines it: as JSON lines, or in memory only.

    Args:
        figures: the file of the option --json; results go beside it, into a .jsonl file. None keeps nothing.
        resume: take over what the file holds already.

    Raises:
        ConfigError: there is something in the file, and it is not to be taken over, or no results; or there is no file
            to take over.
    """

    def __init__(self, figures: Path | None, *, resume: bool = False) -> None:
        if resume and not figures:
            raise ConfigError("--resume goes on with the .jsonl file beside --json FILE: name that too.")
        self._path = figures.with_suffix(".jsonl") if figures else None
        rows = read_json_lines(self._path) if self._path else []
        if rows and not resume:
            raise ConfigError(
                f"{self._path} holds {len(rows)} results of an earlier run. Go on with --resume, or remove it."
            )
        try:
            self._results = {_text(row["work"]): row["result"] for row in rows}
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._path} holds something else than results of a benchmark. Name another file."
            ) from error

    def get(self, work: Any) -> Any:
        """The result of a piece of work; None if there is none yet."""
        return self._results.get(_text(work))

    def add(self, work: Any, result: Any) -> None:
        """Keep a result."""
        self._results[_text(work)] = result
        if self._path:
            append_json_line(self._path, {"work": json.loads(_text(work)), "result": result})

    def fetch(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function for some arguments, computed and kept if it is not there yet."""
        work = [compute.__name__, *arguments]
        if self.get(work) is None:
            self.add(work, compute(*arguments))
        return self.get(work)


def _text(work: Any) -> str:
    return json.dumps(work, sort_keys=True, default=repr)
