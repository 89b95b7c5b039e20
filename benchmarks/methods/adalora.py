"""AdaLoRA (Zhang et al., 2023, arXiv 2303.10512), from PEFT: more components than wanted at first, pruned on the way.

A component that is pruned is masked and stays in memory, so the ranks of the start decide the bytes. Therefore two
versions: one whose start fits the budget, and one that ends at what a static plan within the budget has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from rankpilot.common.arrays import IntArray
from rankpilot.data.task import KINDS

from .plans import deepest, deepest_measured, module_names, window
from .rows import Work, plan_ranks, plan_text
from .study import FACTORS as FIRST_FACTORS
from .study import DoesNotFitError, Group, Outcome, Study
from .tasks import Cell
from .texts import load_data
from .training import ALPHA, Driver, by_name, new_base

ALLOCATIONS = 20
"""Allocations between the phases before and after."""

FACTORS = (*FIRST_FACTORS, 2, 3, 4)
"""The search for its rate begins this high: it learns slowly, and on a plateau of the loss a low rate may look best."""

RANK = 8
"""The rank at the end, or at the start, of all adapted modules in the mean."""


class AdaLoraDriver(Driver):
    """AdaLoRA inside the loop; see `Driver`.

    Args:
        work: with the arguments plan (the ranks of the start), target (the mean rank of the end) and seed.
    """

    def __init__(self, work: Work) -> None:
        plan = plan_ranks(work.get("plan"))
        self._names = module_names(work.task)
        super().__init__(_model(work, by_name(plan, self._names)), plan)
        self._moved = 0

    def stepped(self, step: int) -> None:
        """Importance of every weight, and an allocation where one is due; gradients are still there."""
        tuner: Any = self.model.base_model
        before = self.ranks()
        tuner.update_and_allocate(step)
        self._moved += int(np.abs(self.ranks() - before).sum())

    def ranks(self) -> IntArray:
        """Components that are not masked, by module."""
        pattern = self.model.peft_config["default"].rank_pattern or {}
        if not pattern:
            return self._plan
        kept = {
            key.removeprefix("model.").removesuffix(".lora_E.default"): int(np.sum(mask))
            for key, mask in pattern.items()
        }
        return np.array([kept.get(name, 0) for name in self._names])

    def buffer_bytes(self) -> int:
        """The importance of each weight and its two averages."""
        tuner: Any = self.model.base_model
        allocator = tuner.rankallocator
        tables = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
        return int(sum(tensor.nbytes for table in tables for tensor in table.values()))

    def finish(self) -> dict[str, Any]:
        """Components that were masked or unmasked, and no bump: nothing happens between two steps.

        No model predicts its bytes: the third factor and the averages of importance come on top of LoRA's.
        """
        return {"predicted": None, "moved": self._moved, "bump": None}


def _period(steps: int) -> int:
    return max(1, steps // (2 * ALLOCATIONS))


def _model(work: Work, plan: dict[str, int]) -> PeftModel:
    task, steps = work.task, work.task.steps
    kind, seed = KINDS[task.kind], work.get("seed")
    base = new_base(task, load_data(task).labels, seed)
    config = AdaLoraConfig(
        init_r=max(plan.values()),
        target_r=work.get("target"),
        lora_alpha=ALPHA,
        target_modules=list(plan),
        task_type=kind.peft_type,
        total_step=steps,
        tinit=max(1, steps // 10),
        tfinal=max(1, steps // 4),
        deltaT=_period(steps),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(base, config).train()


@dataclass(frozen=True)
class AdaLora:
    """AdaLoRA on as many top layers as fit.

    Attributes:
        name: see `Method`.
        description: see `Method`.
        start: components of each module at the start.
        target: at the end, in the mean.
        fits: whether it keeps the budget, as its steps are measured; else it has the layers that plain LoRA at rank 8
            has there.
        group: see `Method`.
        quick: see `Method`.
    """

    name: str
    description: str
    start: int
    target: int
    fits: bool
    group: Group = "adaptive"
    quick: bool = False

    def outcome(self, study: Study, cell: Cell) -> Outcome:
        """See `Method`."""
        modules = study.modules(cell.task)
        layers = deepest(modules, cell.budget, RANK)
        if self.fits:
            layers = deepest_measured(study, cell, layers, "adalora", self.start, target=self.target)
        if not layers:
            raise DoesNotFitError
        plan = plan_text(window(modules, layers, self.start))
        return study.outcome(
            cell,
            lambda rate, seed: study.training(cell.task, "adalora", rate, seed, plan=plan, target=self.target),
            factors=FACTORS,
        )


METHODS = (
    AdaLora("adalora-peak", "AdaLoRA, rank 8 to 5, on as many top layers as fit", RANK, 5, True, quick=True),
    AdaLora("adalora-final", "AdaLoRA, rank 12 to 8, on the layers of plain LoRA: above the budget", 12, RANK, False),
)
"""Two versions: one whose start fits the budget, and one that ends at the ranks of plain LoRA."""
