"""The final ranks of a run under the shipped policy, static from the start: as they are, or dealt anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....agents.rules.given_plan import shuffled_within_kinds
from ....common.arrays import IntArray
from ....common.module_names import kinds_in_layers
from ..method import Group
from ..ranks import plan_ranks
from ..study import Modules, Outcome, Study
from ..tasks import Cell
from ..work import Work
from .modules import blocks
from .pilot import Piloted


@dataclass(frozen=True)
class Replay:
    """Plain LoRA at the ranks with which another method ended, at the same seed.

    Attributes:
        name: see `Method`.
        source: whose ranks.
        description: see `Method`.
        shuffled: whether ranks are dealt anew among the adapted modules of each kind.
        group: see `Method`.
        quick: see `Method`.
    """

    name: str
    source: Piloted
    description: str
    shuffled: bool = False
    group: Group = "ours"
    quick: bool = False

    def run(self, study: Study, cell: Cell, rate: float, seed: int) -> Work:
        """The training at the final ranks of the source's run at this seed, at the source's rate."""
        its_rate = self.source.outcome(study, cell).rate
        ranks = plan_ranks(study.result(self.source.run(study, cell, its_rate, seed))["ranks"])
        if self.shuffled:
            ranks = dealt(study.modules(cell.task), ranks, seed)
        return study.plan_run(cell.task, ranks, rate, seed)

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        return study.outcome(cell, lambda rate, seed: self.run(study, cell, rate, seed))


def dealt(modules: Modules, ranks: IntArray, seed: int) -> IntArray:
    """Ranks dealt anew among the adapted modules of each kind."""
    names = modules.names
    kinds = dict(zip(names, kinds_in_layers(names, blocks(modules).tolist()), strict=True))
    given = dict(zip(names, ranks.tolist(), strict=True))
    return np.array(list(shuffled_within_kinds(given, kinds, seed, adapted_alone=True).values()))
