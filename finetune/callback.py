"""The callback for the transformers Trainer: a policy decides the ranks of a real fine-tune."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..agents.learned.policy_file import DEFAULT, load_policy, policy_schedule
from ..allocation.bounds import Bounds, rank_bounds
from ..allocation.controller import RankController
from ..allocation.decision_log import DecisionLog
from ..allocation.decision_record import DecisionRecord
from ..allocation.observation import Observation
from ..allocation.plan import Plan
from ..allocation.policy import Decision, Policy, decision_from_plan
from ..allocation.schedule import DecisionSchedule
from ..errors import UnsupportedError
from ..lora.adapters import PeftAdapters
from ..lora.optimizer_state import check_optimizer
from ..lora.peft_config import finish_load, make_resizable
from ..lora.targets import TargetModule, find_target_modules
from ..memory.budget import Budget
from ..memory.model import MemoryModel
from .before_training import TrainingRun, prepare
from .checkpoint import load_state, save_state
from .loss_meter import LossMeter
from .peak_guard import Correction, PeakGuard
from .recompiles import warn_of_recompiles

logger = logging.getLogger(__name__)


class RankPilotCallback(TrainerCallback):  # type: ignore[misc]
    """Moves LoRA rank between modules during a Trainer's run, inside a hard budget.

    Before the first step it measures what plans cost on your model and data, and probes which modules matter. Then the
    policy decides the ranks, and again at a few later steps. The adapters really change their size, the optimiser keeps
    its state, and every checkpoint is an adapter that plain PEFT loads.

    Args:
        policy: "default", which ships with the package, the folder of a trained policy, the name of a rule
            ("signal-mean", "top-down"), or a policy object.
        budget: bytes at the peak of a step ("350MB", "6GiB", an int from 1024 on), a share of what uniform rank 8 takes
            there ("80%", 0.8), most of the memory that is free on the device ("auto"), or a number of adapter
            parameters ("300k params"). See `Budget.parse`.
        log: the folder of the decision log; by default `decisions` in the Trainer's output folder.
        schedule: when to decide; by default as the policy was trained to.
        seed: of the probe and of fresh rows; by default `TrainingArguments.seed`.
        measure_every: measure the real peak every so many steps, and after each change of ranks.
        bounds: the rank of single modules, or their least and largest rank, by the module's name or the end of it:
            `{"q_proj": 8, "layers.0.mlp.down_proj": (0, 4)}`.

    Attributes:
        controller: observes the adapters and changes their ranks; None before training.
        predictions: (step, cost of the plan) of each decision.

    Example:
        >>> trainer = Trainer(..., callbacks=[RankPilotCallback("signal-mean", budget="80%")])  # doctest: +SKIP

    Pass it in the Trainer's `callbacks`. Added later, it cannot resume from a checkpoint.
    """

    def __init__(
        self,
        policy: str | Path | Policy = DEFAULT,
        budget: str | float | Budget = "100%",
        *,
        log: str | Path | None = None,
        schedule: DecisionSchedule | None = None,
        seed: int | None = None,
        measure_every: int = 100,
        bounds: Bounds | None = None,
    ) -> None:
        self.policy = load_policy(policy)
        self.budget = Budget.parse(budget)
        self.schedule = schedule or policy_schedule(policy)
        self.seed = seed
        self.controller: RankController[PeftAdapters] | None = None
        self.predictions: list[tuple[int, float]] = []
        self._log_folder = Path(log) if log else None
        self._bounds = bounds or {}
        self._measure_every = measure_every
        self._guard = PeakGuard(measure_every)
        self._losses = LossMeter()

    @property
    def peaks(self) -> list[tuple[int, int]]:
        """(step, bytes at its peak) of each measured step."""
        return self._guard.meter.history

    @property
    def limit(self) -> float:
        """What a plan may cost, in bytes or parameters. It is known from the start of training on."""
        return float(self._controller.limit)

    # Trainer events, in the order of a run ----------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Let the adapters load any ranks: a checkpoint may be loaded before training begins."""
        make_resizable(objects["model"], find_target_modules(objects["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Prepare the run and take the first decision, or go on from a checkpoint."""
        _check_arguments(args)
        model, optimizer = objects["model"], objects["optimizer"]
        check_optimizer(optimizer)
        targets = find_target_modules(model)
        make_resizable(model, targets)
        later = [step for step in self.schedule.steps(state.max_steps) if step > state.global_step]
        warn_of_recompiles(model, args, 1 + len(later))
        self._seed = args.seed if self.seed is None else self.seed
        self._run = Path(args.output_dir).name
        self._log = DecisionLog(self._log_folder or Path(args.output_dir) / "decisions")
        if state.global_step > 0:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}", model, targets)
            memory = None
        else:
            self._log.truncate(-1)
            memory = self._begin(TrainingRun.of(args, state, objects), targets)
        self._losses.attach(model, args.gradient_accumulation_steps)
        accumulates = args.gradient_accumulation_steps > 1
        self._guard.attach(
            model, optimizer, self._controller, memory, self._losses, self._corrected, accumulates=accumulates
        )
        if state.global_step == 0:
            self._decide(0, optimizer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Measure this step if it is due."""
        self._guard.before_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Add the gradients, which are complete now, to the signals."""
        self._guard.meter.stepping()
        if not self._controller.finished:
            self._controller.adapters.meter.accumulate()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Compare the peak with the budget, and decide if a decision is due."""
        step = state.global_step
        self._guard.after_step(step)
        if self._controller.due(step) and step < state.max_steps:
            self._decide(step, objects["optimizer"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        """Write the state of this callback into the checkpoint, as the last of its files."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            save_state(folder, self._state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Stop measuring, and write the ranks to PEFT's configuration: the best checkpoint may have been loaded."""
        self._guard.detach()
        self._losses.detach()
        finish_load(objects["model"], self._controller.targets)

    # What the events do -----------------------------------------------------------------------------------------------

    @property
    def _controller(self) -> RankController[PeftAdapters]:
        assert self.controller is not None, "training has not begun"
        return self.controller

    def _begin(self, run: TrainingRun, targets: list[TargetModule]) -> MemoryModel | None:
        self._losses.detach()
        self._losses.restart()
        self._guard.detach()
        self._guard = PeakGuard(self._measure_every)
        self.predictions = []
        self.controller, memory = prepare(run, targets, self.budget, self.schedule, self._bounds, self._seed)
        return memory

    def _resume(self, folder: Path, model: nn.Module, targets: list[TargetModule]) -> None:
        finish_load(model, targets)
        state = load_state(folder)
        low, high = rank_bounds(targets, self._bounds)
        adapters = PeftAdapters(model, targets)
        adapters.meter.load_state_dict(state["signals"])
        self.controller = RankController.from_state_dict(
            state["controller"], adapters, self.schedule, low=low, high=high
        )
        self._losses.load_state_dict(state["losses"])
        self._guard.load_state_dict(state["guard"])
        self.predictions = [(int(step), float(cost)) for step, cost in state["predictions"]]
        step = int(folder.name.rpartition("-")[2])
        self._log.truncate(step)

    def _state_dict(self) -> dict[str, Any]:
        return {
            "controller": self._controller.state_dict(),
            "signals": self._controller.adapters.meter.state_dict(),
            "losses": self._losses.state_dict(),
            "guard": self._guard.state_dict(),
            "predictions": self.predictions,
        }

    def _decide(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        controller = self._controller
        loss = self._losses.mean()
        observation = controller.observe(step, loss)
        decision = self.policy.decide(observation)
        plan = controller.apply(decision.ranks, decision.scores, step, optimizer)
        self._losses.restart()
        self._guard.decided(observation.problem.ranks, step)
        self._record(step, loss, observation, decision, plan)

    def _corrected(self, correction: Correction) -> None:
        """Record a change of ranks by the guard like a decision."""
        decision = decision_from_plan(correction.wanted)
        moved = correction.plan.ranks != correction.observation.problem.ranks
        names = np.array(self._controller.names)[moved].tolist()
        notes = dict.fromkeys(names, correction.reason)
        self._record(correction.step, self._losses.mean(), correction.observation, decision, correction.plan, notes)

    def _record(
        self,
        step: int,
        loss: float | None,
        observation: Observation,
        decision: Decision,
        plan: Plan,
        notes: dict[str, str] | None = None,
    ) -> None:
        measured = self.peaks and observation.problem.cost.unit == "bytes"
        self.predictions.append((step, plan.cost))
        self._log.append(
            DecisionRecord.of(
                self._controller,
                observation,
                decision,
                plan,
                policy=self.policy,
                number=len(self.predictions) - 1,
                step=step,
                run=self._run,
                loss=loss,
                measured_cost=float(self.peaks[-1][1]) if measured else None,
                notes=notes,
            )
        )


def _check_arguments(args: TrainingArguments) -> None:
    """Refuse settings under which ranks cannot be changed.

    Raises:
        UnsupportedError: the run has several processes or devices, or uses DeepSpeed or FSDP.
    """
    if args.world_size > 1 or args.n_gpu > 1:
        raise UnsupportedError(
            f"This run spreads over {max(args.world_size, args.n_gpu)} processes or devices; ranks can be changed in "
            "a run on one device only so far. Set CUDA_VISIBLE_DEVICES to one of them."
        )
    if args.deepspeed_plugin or args.fsdp:
        raise UnsupportedError("Ranks cannot be changed under DeepSpeed or FSDP. Use a plain single-device run.")
