"""Ways to train an adapter, as loops whose steps can be timed: plain LoRA, PEFT's AdaLoRA, rankpilot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from ...allocation.controller import RankController
from ...allocation.schedule import DecisionSchedule
from ...finetune.callback import RankPilotCallback
from ...lora.adapters import PeftAdapters
from ...lora.targets import find_target_modules
from ...memory.budget import REFERENCE_RANK, Budget
from ...memory.model_states import state_bytes
from ...memory.recording import Batch

LEARNING_RATE = 1e-3
SETTINGS: dict[str, Any] = {"lora_alpha": 2 * REFERENCE_RANK, "target_modules": "all-linear"}


class PlainLora:
    """LoRA of uniform rank 8 under AdamW, in the order of transformers' Trainer: gradients are freed after the step.

    The other methods are this loop with work of their own at the places where the Trainer has events.

    Args:
        base: the model, on its device; adapters are put into it.
        task: as in `peft.LoraConfig.task_type`.

    Attributes:
        steps: optimiser steps done.
        own_seconds: for each step, the time on the host that the method's own work at the events took.
    """

    def __init__(self, base: PreTrainedModel, task: str) -> None:
        self.model = self._adapt(base, task).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # Fused, without decay: the Trainer's defaults.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.steps = 0
        self.own_seconds: list[float] = []

    def _adapt(self, base: PreTrainedModel, task: str) -> PeftModel:
        return get_peft_model(base, LoraConfig(r=REFERENCE_RANK, task_type=task, **SETTINGS))

    def step(self, batch: Batch) -> None:
        """One whole training step."""
        self.own_seconds.append(0.0)
        self._own(self.on_step_begin)
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._own(self.on_pre_optimizer_step)
        self.optimizer.step()
        self._own(self.on_optimizer_step)
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self._own(self.on_step_end)

    def _own(self, event: Callable[[], None]) -> None:
        start = time.perf_counter()
        event()
        self.own_seconds[-1] += time.perf_counter() - start

    def on_step_begin(self) -> None:
        """Before the forward pass."""

    def on_pre_optimizer_step(self) -> None:
        """Gradients are there, and clipped."""

    def on_optimizer_step(self) -> None:
        """The optimiser has stepped; gradients are still there."""

    def on_step_end(self) -> None:
        """Gradients are gone, and `steps` counts this step."""

    def ranks(self) -> tuple[int, ...]:
        """Current rank of each module; empty where nothing can change."""
        return ()

    def buffer_bytes(self) -> int:
        """Bytes that the method holds beside weights, gradients and the optimiser's state."""
        return 0

    def held_bytes(self) -> int:
        """Bytes of all that trains, as allocated now: weights, gradients, optimiser state, the method's buffers."""
        return state_bytes(self.model, self.optimizer) + self.buffer_bytes()


class AdaLora(PlainLora):
    """PEFT's AdaLoRA, rank 12 pruned to a mean of 8 over the whole run, without phases before or after.

    Args:
        base: the model, on its device.
        task: as in `peft.LoraConfig.task_type`.
        total_steps: length of the run; allocations go on until its end.
        period: steps between allocations.
    """

    def __init__(self, base: PreTrainedModel, task: str, total_steps: int, period: int) -> None:
        self._schedule = {"total_step": total_steps, "deltaT": period}
        super().__init__(base, task)

    def _adapt(self, base: PreTrainedModel, task: str) -> PeftModel:
        config = AdaLoraConfig(init_r=12, target_r=REFERENCE_RANK, task_type=task, **self._schedule, **SETTINGS)
        return get_peft_model(base, config)

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
        kept = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
        return _bytes_of(tensor for by_name in kept for tensor in by_name.values())


class RankPilot(PlainLora):
    """The Trainer callback with the rule signal-mean, driven by the events that a Trainer would send.

    So the steps hold all that a fine-tune pays for: signals, decisions, resizes, the decision log, the average of the
    loss, the checks of the peak. The budget is uniform rank 8's number of parameters: under a budget of bytes low
    modules would lose their adapters, which makes steps faster and would hide what the callback costs.

    Args:
        base: the model, on its device.
        task: as in `peft.LoraConfig.task_type`.
        loader: what the probe before the first step draws from.
        total_steps: length of the run.
        period: steps between decisions.
        folder: for the decision log.
        seed: of the probe and of fresh rows.

    Attributes:
        setup_seconds: what the callback took before the first step, mostly the probe; once a run.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        task: str,
        loader: DataLoader[Any],
        total_steps: int,
        period: int,
        folder: Path,
        seed: int,
    ) -> None:
        super().__init__(base, task)
        schedule = every(period, total_steps)
        self.callback = RankPilotCallback("signal-mean", self._budget(), schedule=schedule)
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

    def _budget(self) -> Budget:
        targets = find_target_modules(self.model)
        return Budget("parameters", sum(min(REFERENCE_RANK, t.max_rank) * (t.d_in + t.d_out) for t in targets))

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


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
