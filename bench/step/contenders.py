"""Methods beside plain LoRA, as loops whose steps can be timed: PEFT's AdaLoRA, and rankpilot."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, LoraConfig
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ...allocation.controller import RankController
from ...allocation.schedule import DecisionSchedule
from ...finetune.pilot import RankPilot as Pilot
from ...finetune.run import TrainingRun
from ...lora.adapters import PeftAdapters
from ...lora.ladder import REFERENCE_RANK
from ...memory.budget import Budget
from ..learner import LEARNING_RATE, Learner
from ..models import LORA, Family


class AdaLora(Learner):
    """PEFT's AdaLoRA, rank 12 pruned to a mean of 8 over the whole run, without phases before or after.

    Args:
        base: the model, on its device.
        family: of the model.
        total_steps: length of the run; allocations go on until its end.
        period: steps between allocations.
    """

    def __init__(self, base: PreTrainedModel, family: Family, total_steps: int, period: int) -> None:
        schedule = {"total_step": total_steps, "deltaT": period}
        super().__init__(base, AdaLoraConfig(init_r=12, target_r=REFERENCE_RANK, **schedule, **LORA[family]))

    def on_optimizer_step(self) -> None:
        """Importance of every weight, and an allocation at each `deltaT`-th step, counted from 1."""
        self.model.base_model.update_and_allocate(self.steps + 1)

    def ranks(self) -> tuple[int, ...]:
        """Components that are not masked, by module; empty before the first allocation."""
        pattern = self.model.peft_config["default"].rank_pattern or {}
        return tuple(sum(kept) for kept in pattern.values())

    def buffer_bytes(self) -> int:
        """The importance of each parameter and its two averages."""
        allocator = self.model.base_model.rankallocator
        tables = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
        storages = (tensor.untyped_storage() for by_name in tables for tensor in by_name.values())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class RankPilot(Learner):
    """The core of a fine-tune with the rule signal-mean, called as the Trainer callback calls it.

    So the steps hold all that a fine-tune pays for: signals, decisions, resizes, the decision log, the look at the
    gradients, the checks of the peak. The budget is uniform rank 8's number of parameters: under a budget of bytes low
    modules would lose their adapters, which makes steps faster and would hide what the callback costs.

    Args:
        base: the model, on its device.
        family: of the model.
        loader: what the probe before the first step draws from.
        total_steps: length of the run.
        period: steps between decisions.
        folder: for the decision log.
        seed: of the probe and of fresh rows.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        family: Family,
        loader: DataLoader[Any],
        total_steps: int,
        period: int,
        folder: Path,
        seed: int,
    ) -> None:
        super().__init__(base, LoraConfig(**LORA[family]))
        parameters = sum(min(REFERENCE_RANK, t.max_rank) * (t.d_in + t.d_out) for t in self.targets)
        budget, schedule = Budget("parameters", parameters), every(period, total_steps)
        self.pilot: Pilot = Pilot("signal-mean", budget, schedule=schedule, log=folder / "decisions", seed=seed)
        run = TrainingRun.of_loader(
            self.model, self.optimizer, loader, total_steps=total_steps, learning_rate=LEARNING_RATE
        )
        start = time.perf_counter()
        self.pilot.begin(run)
        self.setup_seconds: float = time.perf_counter() - start

    def on_step_begin(self) -> None:
        """Start to measure the peak, where it is due."""
        self.pilot.before_step()

    def on_pre_optimizer_step(self) -> None:
        """Take in signals."""
        self.pilot.before_optimizer_step(0.0)

    def on_step_end(self) -> None:
        """Decide and resize, where it is due."""
        self.pilot.after_step()

    @property
    def controller(self) -> RankController[PeftAdapters]:
        """The link to the adapters."""
        assert self.pilot.controller is not None, "the run was begun with this object"
        return self.pilot.controller

    def ranks(self) -> tuple[int, ...]:
        """Real ranks by module."""
        return tuple(target.rank for target in self.controller.targets)

    def buffer_bytes(self) -> int:
        """The averages of gradients that the signals come from."""
        return self.controller.adapters.meter.buffer_bytes


def every(period: int, total_steps: int) -> DecisionSchedule:
    """A schedule with a decision before the first step and after each `period` steps."""
    # Half a step more than needed, so that no rounding puts a decision one step early.
    later = ((step + 0.5) / total_steps for step in range(period, total_steps, period))
    return DecisionSchedule(fractions=(0.0, *later))
