"""Plans with their results: what a value ensemble is fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..learned.plan_value import Plans


@dataclass(frozen=True, eq=False)
class PlanDataset:
    """Plans and their results.

    Attributes:
        plans: one plan for each state: ranks (states, 1, modules).
        gains: minus the log of the held-out loss at the end of the run, (states,).
        reference_gains: the same of the run with plain LoRA of the same task, (states,).
        groups: number of each state's group, int64 (states,). The states of one task at one decision are a group; their
            plans can be compared.
        tasks: number of each state's task, int64 (states,).
        families: number of the family of each state's model, int64 (states,).
        weights: how often each state's task is learned from whenever it is drawn, int64 (states,).
    """

    plans: Plans
    gains: torch.Tensor
    reference_gains: torch.Tensor
    groups: torch.Tensor
    tasks: torch.Tensor
    families: torch.Tensor
    weights: torch.Tensor

    def __getitem__(self, states: torch.Tensor) -> PlanDataset:
        return PlanDataset(*(getattr(self, name)[states] for name in self.__dataclass_fields__))
