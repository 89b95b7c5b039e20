"""Plans with which a run can be gone on with: those that its log knows, and those of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...agents.rules.given_plan import read_plan, shuffled_plan
from ...allocation.log import DecisionLog
from ...allocation.plan import uniform_ranks
from ...errors import ConfigError

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
        which: one of `NAMED`, or a file that `read_plan` reads.
        seed: of a shuffled plan.

    Raises:
        ConfigError: no such plan or file, or it holds no ranks.
        RunFolderError: the log cannot be read.
    """
    if which not in NAMED:
        if not Path(which).exists():
            known = ", ".join(f"{name} ({meaning})" for name, meaning in NAMED.items())
            raise ConfigError(f"{which} is no file and no plan by name. Plans by name: {known}.")
        return read_plan(Path(which))
    if which == "first":
        return log.logged(0).plan()
    last = log.read()[-1]
    if which == "shuffled":
        return shuffled_plan(last, seed)
    if which == "uniform":
        ladder, ranks = last.problem.ladder, uniform_ranks(last.problem.fresh())
        return dict(zip(last.observation.names, ladder.array[ladder.rung(ranks)].tolist(), strict=True))
    return last.plan()
