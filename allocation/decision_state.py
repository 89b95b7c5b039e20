"""Files of decision states: what a policy computed at one decision, beside what its part of the log holds.

A file holds the deliberation, if there was one, and the schedule of the run. What was seen is in the part (features,
ranks in place) and in the problem's file (costs, limit, ladder, bounds). The recipes of candidates are the same at many
decisions; they are in a file of their own, named after its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.arrays import Arrays
from ..common.files import parse_json
from ..common.tensor_files import read_arrays
from ..errors import RunFolderError, first_line
from .deliberation import Deliberation

_METADATA = "rankpilot.state"


@dataclass(frozen=True, eq=False)
class DecisionState:
    """What a state file holds.

    Attributes:
        schedule: fields of the run's `DecisionSchedule`, by name.
        deliberation: None for a rule, a correction, and a policy without a value ensemble.
    """

    schedule: Mapping[str, Any]
    deliberation: Deliberation | None

    def files(self, name: str) -> dict[str, bytes]:
        """The files of the state by name; the state's own comes last.

        Args:
            name: of the state's file.
        """
        found = self.deliberation
        scalars: dict[str, Any] = {"schedule": dict(self.schedule)}
        if found is None:
            return {name: _content({}, scalars)}
        recipes = _content(found.recipes(), {})
        recipes_name = f"recipes-{hashlib.sha256(recipes).hexdigest()[:12]}.safetensors"
        scalars |= {"deliberation": found.scalars(), "recipes": recipes_name}
        return {recipes_name: recipes, name: _content(found.arrays(), scalars)}


def _content(arrays: Arrays, scalars: Mapping[str, Any]) -> bytes:
    from safetensors.numpy import save  # late: a Trainer does not load it

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content: bytes = save(contiguous, {_METADATA: json.dumps(scalars, separators=(",", ":"))})
    return content


def read_state(path: Path) -> DecisionState:
    """Read a state file.

    Raises:
        RunFolderError: it is missing or corrupt, or holds no state.
    """
    try:
        arrays, scalars = _read(path)
        schedule, given = dict(scalars["schedule"]), scalars.get("deliberation")
        if given is None:
            return DecisionState(schedule, None)
        recipes, _ = _read(path.with_name(Path(scalars["recipes"]).name))
        return DecisionState(schedule, Deliberation.restored(arrays, recipes, given))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise RunFolderError(f"{path} is missing, or is no file of a decision's state: {first_line(error)}") from error


def _read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    arrays, metadata = read_arrays(path)
    return arrays, parse_json(metadata[_METADATA])
