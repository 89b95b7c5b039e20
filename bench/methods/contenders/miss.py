"""MiSS (Kang and Yin, 2024, arXiv 2409.15371), from PEFT: one trained matrix a module, in place of LoRA's two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import MissConfig, get_peft_model

from ....data.task import KINDS
from ..bases import new_base
from ..loop import Driver
from ..method import Group
from ..ranks import plan_ranks, plan_text
from ..study import DoesNotFitError, Outcome, Study
from ..tasks import Cell
from ..texts import load_data
from ..work import Work, by_name
from .modules import deepest, deepest_measured, module_names, window

RANK = 16
"""Its matrix has rank x d_out numbers: about as many as LoRA's rank 8."""


def miss(work: Work) -> Driver:
    """MiSS on the modules of the argument `plan`, which have one rank."""
    ranks, task, seed = plan_ranks(work.get("plan")), work.task, work.get("seed")
    kind = KINDS[task.kind]
    base = new_base(task, load_data(task).labels, seed)
    config = MissConfig(r=RANK, target_modules=list(by_name(ranks, module_names(task))), task_type=kind.peft_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MissDriver(get_peft_model(base, config).train(), ranks)


class _MissDriver(Driver):
    """Its bytes are not LoRA's, and no model predicts them."""

    def finish(self) -> dict[str, Any]:
        """No bytes are predicted."""
        return {"predicted": None}


@dataclass(frozen=True)
class Miss:
    """MiSS on as many top layers as fit, as its steps are measured."""

    name: str = "miss"
    group: Group = "peer"
    description: str = "MiSS, rank 16, on as many top layers as fit"
    quick: bool = False

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        modules = study.modules(cell.task)
        if cell.task.model.startswith("gpt2"):  # PEFT has no MiSS for Conv1D
            raise DoesNotFitError
        layers = deepest_measured(study, cell, deepest(modules, cell.budget, 1), "miss", RANK)
        if not layers:
            raise DoesNotFitError
        plan = plan_text(window(modules, layers, RANK))
        return study.outcome(cell, lambda rate, seed: study.training(cell.task, "miss", rate, seed, plan=plan))


MISS = Miss()
