"""Plain LoRA with equal ranks inside a budget, with which a run under a policy is compared."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..allocation.plan import check_budget, uniform_ranks
from ..allocation.problem import AllocationProblem
from ..lora.adapters import PeftAdapters
from ..lora.peft_config import finish_load, make_resizable
from ..lora.targets import find_target_modules
from .before_training import run_costs
from .options import PilotOptions
from .recomputation import Recomputation
from .time_before_training import time_limit
from .trainer_step import TrainerStep, add_before_users


class UniformRanks(TrainerCallback):  # type: ignore[misc]
    """Gives as many top layers as can have rank 8 the largest equal rank that fits a budget, before the first step.

    Args:
        trainer: whose ranks it sets, as one of its callbacks. Its model can load adapters of any ranks from now on.
        options: budget, time, recomputation and seed count.

    Attributes:
        limit: what the plan may cost, in bytes or parameters; 0 before training.
    """

    def __init__(self, trainer: Trainer, options: PilotOptions) -> None:
        self._step, self._options = TrainerStep(trainer), options
        self.limit: float = 0.0
        make_resizable(trainer.model, find_target_modules(trainer.model))
        add_before_users(trainer, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Set the ranks; those of a checkpoint stay.

        Raises:
            BudgetError: no plan fits the budget.
        """
        model, optimizer, options = objects["model"], objects["optimizer"], self._options
        targets = find_target_modules(model)
        adapters = PeftAdapters(model, targets)
        recomputation = Recomputation(model) if options.recompute else None
        run = self._step.run(args, state, objects)
        costs = run_costs(run, targets, options.budget_read, signals=False, recompute=options.recompute)
        self.limit = costs.limit.value
        if recomputation:
            recomputation.memory = costs.memory
        if state.global_step > 0:
            finish_load(model, targets)
            if recomputation:
                recomputation.take(recomputation.fewest(adapters.ranks, self.limit))
            if state.global_step >= state.max_steps:
                self._step.take_no_more()
                control.should_training_stop = True
            return
        timed = None
        if options.time_read:
            timed = time_limit(run, targets, options.time_read, costs.memory, self.limit, recomputation)
        problem = AllocationProblem.of(
            targets, timed.added_to(costs.cost, self.limit) if timed else costs.cost, self.limit
        )
        check_budget(problem, [target.name for target in targets], options.budget_read.share)
        ranks = uniform_ranks(timed.choose(problem, uniform_ranks) if timed else problem)
        adapters.set_ranks(ranks, optimizer, seed=options.seed or 0, step=0)
        if recomputation:
            recomputation.take(recomputation.fewest(ranks, self.limit))
