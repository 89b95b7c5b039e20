"""Running out of memory: how far a plan shrinks, what that takes for a while, and what is put back if it is no use.

A smaller plan is tried at most twice, and only where the prediction says that it takes noticeably fewer bytes. If the
step passes, the plan comes back later; if it does not, all is as it was before the step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..common.arrays import IntArray
from ..common.checks import counted, finite
from ..lora.optimizer_state import kept_state, state_bytes_of
from ..lora.resize import update_peft_records, write_in_place
from ..lora.targets import TargetModule, unwrap

MOST_TRIES = 2
"""A step that ran out of memory is taken again so many times at most."""

STEP_SHARE = 0.1
"""The share of the whole step's bytes by which each try is smaller than the one before."""

PLAN_SHARE = 0.25
"""The share of what adapters, and layers that can run again, take by which each try is smaller at most. So two tries
leave half of the rank."""

LEAST_SHARE = 0.01
"""The share of the whole step's bytes below which a smaller plan is no help."""

GOOD_STEPS = 20
"""After so many steps without an error a plan comes back, and after twice as many each time that it was no use."""


@dataclass(frozen=True, eq=False)
class Taken:
    """What out-of-memory errors have taken from a plan for a while.

    Attributes:
        ranks: of the plan before the first, int64 (modules,).
        layers: that ran again under it.
        limit: of its cost at that time.
        cost: of that plan, in the unit of the limit.
        saved: what each smaller plan takes less than the one before, in that unit; 0 where none would be a help.
        times: how many times it has shrunk since, 0 to `MOST_TRIES`.
        step: the optimiser steps done at the latest error.
    """

    ranks: IntArray
    layers: tuple[str, ...]
    limit: float
    cost: float
    saved: float
    times: int
    step: int

    def smaller_limit(self, cost: float) -> float | None:
        """What the next smaller plan may cost; None where there is none, or it would be no help.

        Args:
            cost: of the plan as it is, in the unit of the limit.
        """
        if not self.saved or self.times == MOST_TRIES:
            return None
        return min(cost, self.cost - self.times * self.saved) - self.saved

    def state(self) -> dict[str, Any]:
        """What `from_state` needs, as tensors and JSON values."""
        return {**vars(self), "ranks": torch.from_numpy(self.ranks.copy()), "layers": list(self.layers)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Taken:
        """What was taken at the time of `state`."""
        return cls(
            ranks=state["ranks"].numpy().copy(),
            layers=tuple(state["layers"]),
            limit=finite(state["limit"]),
            cost=finite(state["cost"]),
            saved=finite(state["saved"]),
            times=counted(state["times"]),
            step=counted(state["step"]),
        )


def saved_by_a_try(whole: float | None, reducible: float) -> float:
    """What each smaller plan should take less than the one before; 0 where none would be a noticeable help.

    Args:
        whole: what the step takes in all, in the unit of costs; None where it is not known.
        reducible: what adapters, and layers that can run again, take of it.
    """
    if whole is None:
        return PLAN_SHARE * reducible
    saved = min(STEP_SHARE * whole, PLAN_SHARE * reducible)
    return saved if saved >= LEAST_SHARE * whole else 0.0


def adapter_bytes(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the adapters' factors, their gradients and their optimiser state."""
    factors = [weight.detach() for target in targets for weight in (target.weight_a, target.weight_b) if target.rank]
    return sum(2 * factor.nbytes + state_bytes_of(optimizer, factor) for factor in factors)


class Kept:
    """The adapters of a model at this moment, PEFT's configuration and the optimiser's state, in main memory.

    Args:
        model: the PEFT model.
        targets: its target modules.
        optimizer: makes no step until `put_back`; None for none.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None
    ) -> None:
        self._targets, self._configs = targets, unwrap(model).peft_config
        parameters = [parameter for target in targets for parameter in target.parameters.values()]
        self._values = [(p, p.detach().to("cpu", copy=True), p.requires_grad) for p in parameters]
        self._settings = {name: copy.deepcopy(vars(config)) for name, config in self._configs.items()}
        self._put_back_state = kept_state(optimizer, parameters)

    def put_back(self) -> None:
        """Give all of it back, after any changes of rank; this can be done once."""
        self._put_back_state()
        for parameter, value, _ in self._values:
            write_in_place(parameter, value.to(parameter.device))
        for target in self._targets:
            update_peft_records(target, target.rank)
        for parameter, _, trains in self._values:
            parameter.requires_grad_(trains)
        for name, settings in self._settings.items():
            vars(self._configs[name]).clear()
            vars(self._configs[name]).update(settings)
