"""Methods beside plain LoRA, as loops whose steps can be timed: PEFT's AdaLoRA, and rankpilot."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, LoraConfig
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from ...allocation.controller import RankController
from ...allocation.schedule import DecisionSchedule
from ...finetune.callback import RankPilotCallback
from ...lora.adapters import PeftAdapters
from ...memory.budget import REFERENCE_RANK, Budget
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
    """The Trainer callback with the rule signal-mean, driven by the events that a Trainer would send.

    So the steps hold all that a fine-tune pays for: signals, decisions, resizes, the decision log, the average of the
    loss, the checks of the peak. The budget is uniform rank 8's number of parameters: under a budget of bytes low
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
        self.callback = RankPilotCallback("signal-mean", budget, schedule=schedule)
        self._arguments = TrainingArguments(
            str(folder),
            max_steps=total_steps,
            per_device_train_batch_size=loader.batch_size or 1,
            learning_rate=LEARNING_RATE,
            use_cpu=base.device.type == "cpu",
            report_to="none",
            seed=seed,
        )
        self._state = TrainerState(max_steps=total_steps, train_batch_size=loader.batch_size)
        start = time.perf_counter()
        self._send("on_init_end")
        self._send("on_train_begin", train_dataloader=loader)
        self.setup_seconds = time.perf_counter() - start

    def _send(self, event: str, **objects: Any) -> None:
        self._state.global_step = self.steps
        objects |= {"model": self.model, "optimizer": self.optimizer}
        getattr(self.callback, event)(self._arguments, self._state, TrainerControl(), **objects)

    def on_step_begin(self) -> None:
        """Start to measure the peak, where it is due."""
        self._send("on_step_begin")

    def on_pre_optimizer_step(self) -> None:
        """Take in signals."""
        self._send("on_pre_optimizer_step")

    def on_step_end(self) -> None:
        """Decide and resize, where it is due."""
        self._send("on_step_end")

    @property
    def controller(self) -> RankController[PeftAdapters]:
        """The callback's link to the adapters."""
        assert self.callback.controller is not None, "the callback was begun with this object"
        return self.callback.controller

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
