"""The shipped policy where no module may be left without an adapter: what rank 0 is good for."""

from __future__ import annotations

from dataclasses import dataclass

from ..study import DoesNotFitError, Outcome, Study
from ..tasks import Cell
from .modules import depth, window
from .pilot import Piloted


@dataclass(frozen=True)
class WithoutRank0(Piloted):
    """As its policy, with rank 1 at least on all modules; it fits only budgets that allow that."""

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        modules = study.modules(cell.task)
        if not study.fits(cell, window(modules, depth(modules), 2)):  # room for what the policy holds beside adapters
            raise DoesNotFitError
        return super().outcome(study, cell)


WITHOUT_RANK_0 = WithoutRank0("ours-no-rank-0", "default", "the shipped policy, all modules at rank 1 or more", least=1)
