"""Plain LoRA with equal ranks inside a budget, with which a run under a policy is compared."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..allocation.plan import check_budget, uniform_ranks
from ..allocation.problem import AllocationProblem
from ..lora.adapters import PeftAdapters
from ..lora.peft_config import finish_load, make_resizable
from ..lora.targets import find_target_modules
from ..memory.budget import Budget, TimeBudget
from .before_training import run_costs
from .callback import run_of
from .recomputation import Recomputation
from .time_before_training import StepTimer
from .trainer_step import TrainerStep, find_trainer


class UniformRanks(TrainerCallback):  # type: ignore[misc]
    """Gives as many top layers as can have rank 8 the largest equal rank that fits a budget, before the first step.

    Args:
        budget: the limit, as for `RankPilotCallback`.
        seed: of fresh rows.
        recompute: let as few layers as the plan needs run again in the backward pass, as for `RankPilotCallback`.
        time: the limit of the time of a step, as for `RankPilotCallback`.

    Attributes:
        limit: what the plan may cost, in bytes or parameters; 0 before training.
    """

    budget: Budget
    recompute: bool
    seed: int
    time: TimeBudget | None

    def __init__(self, budget: Budget, seed: int, *, recompute: bool = False, time: TimeBudget | None = None) -> None:
        self.budget, self.seed, self.recompute, self.time = budget, seed, recompute, time
        self.limit: float = 0.0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Let the adapters load any ranks: a checkpoint may be loaded before training begins."""
        make_resizable(objects["model"], find_target_modules(objects["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Set the ranks; those of a checkpoint stay.

        Raises:
            BudgetError: no plan fits the budget.
        """
        model, optimizer = objects["model"], objects["optimizer"]
        targets = find_target_modules(model)
        adapters = PeftAdapters(model, targets)
        trainer = find_trainer(self)
        assert trainer, "a Trainer calls this"
        step = TrainerStep(trainer)
        recomputation = Recomputation(model) if self.recompute else None
        run = run_of(step, args, state, objects)
        costs = run_costs(run, targets, self.budget, signals=False, recompute=self.recompute)
        self.limit = costs.limit.value
        if recomputation:
            recomputation.memory = costs.memory
        if state.global_step > 0:
            finish_load(model, targets)
            if recomputation:
                recomputation.take(recomputation.fewest(adapters.ranks, self.limit))
            if state.global_step >= state.max_steps:
                step.take_no_more()
                control.should_training_stop = True
            return
        timed = None
        if self.time:
            timed = StepTimer(run, targets, costs.memory, self.limit, recomputation).time_limit(self.time)
        problem = AllocationProblem.of(
            targets, timed.added_to(costs.cost, self.limit) if timed else costs.cost, self.limit
        )
        check_budget(problem, [target.name for target in targets], self.budget.share)
        ranks = uniform_ranks(timed.choose(problem, uniform_ranks) if timed else problem)
        adapters.set_ranks(ranks, optimizer, seed=self.seed, step=0)
        if recomputation:
            recomputation.take(recomputation.fewest(ranks, self.limit))
