"""Plans with which a run can be gone on with: those that its log knows, and those of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...agents.rules.given_plan import shuffled_plan
from ...allocation.log import DecisionLog
from ...allocation.plan import uniform_ranks
from ...common.files import read_text
from ...common.plain_yaml import MOST_YAML_BYTES, parse_yaml
from ...errors import ConfigError, DataError, first_line, shown

NAMED = {
    "final": "the ranks with which the run ended",
    "first": "the ranks of its first plan",
    "shuffled": "the final ranks, dealt anew among the modules of each kind, or the adapted ones if bytes count",
    "uniform": "one rank on as many top layers as can have rank 8 in the budget, rounded down onto the ladder",
}
"""Plans by name."""


def other_plan(log: DecisionLog, which: str, seed: int = 0) -> Mapping[str, int]:
    """A plan by name, or from a file.

    Args:
        log: of the run.
        which: one of `NAMED`, or a YAML or JSON file with the rank of each module by its full name. A file that
            `rankpilot finetune --review` wrote has them under `modules`.
        seed: of a shuffled plan.

    Raises:
        ConfigError: no such plan or file, or it holds no ranks.
        RunFolderError: the log cannot be read.
    """
    if which not in NAMED:
        return _from_file(Path(which))
    if which == "first":
        return log.logged(0).plan()
    last = log.read()[-1]
    if which == "shuffled":
        return shuffled_plan(last, seed)
    if which == "uniform":
        ladder, ranks = last.problem.ladder, uniform_ranks(last.problem.fresh())
        return dict(zip(last.observation.names, ladder.array[ladder.rung(ranks)].tolist(), strict=True))
    return last.plan()


def _from_file(path: Path) -> dict[str, int]:
    try:
        content = parse_yaml(read_text(path, MOST_YAML_BYTES))
    except FileNotFoundError as error:
        known = ", ".join(f"{name} ({meaning})" for name, meaning in NAMED.items())
        raise ConfigError(f"{path} is no file and no plan by name. Plans by name: {known}.") from error
    except (OSError, DataError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML or JSON: {first_line(error)}.") from error
    modules = content.get("modules", content) if isinstance(content, Mapping) else None
    if not isinstance(modules, Mapping) or not modules:
        raise ConfigError(f"{path} holds no ranks. It maps the full name of each module to its rank.")
    entries: dict[Any, Any] = dict(modules)
    ranks: dict[Any, Any] = {
        name: entry.get("rank") if isinstance(entry, Mapping) else entry for name, entry in entries.items()
    }
    for name, rank in ranks.items():
        if not isinstance(name, str) or type(rank) is not int or rank < 0:
            raise ConfigError(f"The rank of {shown(name)} in {path} is {shown(rank)}; it is a whole number from 0 on.")
    return ranks
