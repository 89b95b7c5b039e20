"""A static allocation: the ranks that a run would begin with, as a LoraConfig, without training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ..agents.learned.goals import check_any_cost
from ..agents.learned.policy_file import DEFAULT, load_policy
from ..agents.rules.given_plan import plan_text
from ..allocation.decision_line import decision_line
from ..allocation.frontier import FrontierPlan
from ..allocation.frontier import frontier as frontier_of
from ..allocation.policy import Policy
from ..common.files import write_text
from ..errors import ConfigError, shown
from ..lora.export import pattern_config
from ..lora.factors import write_in_place
from ..lora.optimizer_state import kept_state
from ..lora.peft_config import adapter_ranks
from ..lora.resize import update_peft_records
from ..lora.targets import TargetModule, find_target_modules, unwrap, wrappers_of
from ..memory.budget import Budget
from ..memory.training_step import LossFunction
from .attributes import put_back
from .callback import RankPilotCallback
from .lent_adapters import lent_adapters
from .model_settings import settings_put_back
from .pilot import RankPilot
from .run import TrainingRun

logger = logging.getLogger(__name__)

TOTAL_STEPS = 1000
"""Steps of the run that a DataLoader's plan is made for. They decide how many decisions would follow, no more."""


@dataclass(frozen=True, eq=False)
class StaticPlan:
    """A plan made before training.

    Attributes:
        config: for a fine-tune by plain PEFT, with `rank_pattern` and `exclude_modules`, and with `alpha_pattern` where
            modules differ in alpha.
        ranks: the rank of each target module, by name.
        alphas: its alpha, likewise.
        cost: what a training step is predicted to take at its peak, or the number of parameters.
        limit: the budget, in the same unit.
        unit: "bytes" or "parameters".
        frontier: the plans that are worth their cost, the cheapest first; None unless they were asked for.
    """

    config: LoraConfig
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    cost: float
    limit: float
    unit: str
    frontier: tuple[FrontierPlan, ...] | None = None

    def by_name(self) -> LoraConfig:
        """The same plan, with the full names of its modules as `target_modules`."""
        return pattern_config(self.config, self.ranks, self.alphas)

    def line(self) -> str:
        """The plan in one line."""
        after = list(self.ranks.values())
        return decision_line(0, [0] * len(after), after, self.cost, self.limit, self.unit)  # type: ignore[arg-type]

    def text(self, name: str = "plan.yaml") -> str:
        """The plan as a file that a person edits, and that can be the policy of a run; see `plan_text`."""
        return plan_text(self.ranks, self.cost, self.limit, self.unit, name)


def allocate(
    model: Any,
    data: DataLoader[Any] | None = None,
    *,
    budget: str | float | Budget = "100%",
    policy: str | Path | Policy = DEFAULT,
    output: str | Path | None = None,
    **options: Any,
) -> LoraConfig:
    """The ranks that a policy gives before training, as a LoraConfig for plain PEFT; logs the memory that it predicts.

    A few small steps measure what plans cost and which modules matter. Nothing is trained: the model, its adapter and
    the Trainer are afterwards as they were.

    Args:
        model: a Trainer that is ready to train, a PEFT model, or a transformers model, which then gets adapters on all
            its linear layers, and a head that trains whole if its class has a new one, such as a classifier.
        data: batches of the fine-tune; left out for a Trainer, which has its own.
        budget: see `RankPilot`, as `policy`.
        policy: who decides.
        output: also write the plan to this new file (plan.yaml). A person may edit it there, and it can be the `policy`
            of a run.
        options: for a Trainer those of `RankPilotCallback`; for a model those of `RankPilot`, and `loss`, `optimizer`,
            `learning_rate`, `accumulation` and `total_steps`, the length of the run that is planned. With `log`, a
            folder, the decision is logged as that of a run is.

    Raises:
        BudgetError: no plan fits the budget.
        ConfigError: there is no data, PEFT cannot adapt the model, or the output exists.
        UnsupportedError: the model or its training step cannot be handled, or it holds adapters outside of a PeftModel.

    Example:
        >>> config = rankpilot.allocate(model, loader, budget="60%")  # doctest: +SKIP
        >>> model = get_peft_model(model, config)  # doctest: +SKIP
    """
    if output is not None and Path(output).exists():
        raise ConfigError(f"{output} exists already. Name a file that does not.")
    plan = static_plan(model, data, budget=budget, policy=policy, **options)
    logger.info(plan.line())
    if output is not None:
        write_text(Path(output), plan.text(Path(output).name))
    return plan.config


def frontier(
    model: Any,
    data: DataLoader[Any] | None = None,
    *,
    budget: str | float | Budget = "100%",
    policy: str | Path | Policy = DEFAULT,
    **options: Any,
) -> list[FrontierPlan]:
    """The plans that are worth their cost, before training: bytes, the time of a step, and the expected loss.

    Args:
        model: see `allocate`, as the other arguments.
        data: batches of the fine-tune.
        budget: no plan above it is among them, but for plain LoRA, with which all are compared.
        policy: its networks must tell plans of any cost apart.
        options: see `allocate`.

    Returns:
        The cheapest first: by time under `goal="time"`, else by what the budget counts.

    Raises:
        ConfigError: the policy is a rule, or compares plans of one cost alone; and all that `allocate` raises.
    """
    plan = static_plan(model, data, budget=budget, policy=policy, frontier=True, **options)
    return list(plan.frontier or ())


def static_plan(
    model: Any,
    data: DataLoader[Any] | None = None,
    *,
    budget: str | float | Budget = "100%",
    policy: str | Path | Policy = DEFAULT,
    frontier: bool = False,
    **options: Any,
) -> StaticPlan:
    """As `allocate`, with the ranks and the predicted memory beside the LoraConfig.

    Args:
        model: see `allocate`, as the other arguments.
        data: batches of the fine-tune.
        budget: of a training step.
        policy: who decides.
        frontier: also fill `StaticPlan.frontier`. The time of steps is then measured as well, unless layers run again
            as a plan needs.
        options: see `allocate`.

    Raises:
        ConfigError: with `frontier`, the policy cannot tell plans of any cost apart; and all that `allocate` raises.
    """
    if frontier:
        check_any_cost(load_policy(policy), "a frontier", "leave the frontier out")
    if isinstance(model, Trainer):
        callback = _FirstPlan(policy, budget, **options)
        callback.pilot.times_plans |= frontier and not callback.pilot.recompute
        return _with_frontier(_plan_of_trainer(model, callback), callback.pilot, frontier)
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"allocate takes a Trainer or a model that is loaded, as `from_pretrained` returns it; got {shown(model)}. "
            "A model by name is planned by the command `rankpilot allocate`."
        )
    if data is None:
        raise ConfigError("allocate needs the batches of the fine-tune: pass a DataLoader, or a Trainer.")
    with _switches_put_back(model):
        has_adapters = isinstance(wrappers_of(model)[-1], PeftModel)
        with nullcontext(model) if has_adapters else lent_adapters(model) as adapted:
            return _plan_of_model(adapted, data, budget, policy, frontier, **options)


class _DecidedError(Exception):
    """Ends `Trainer.train` after the first decision."""


class _FirstPlan(RankPilotCallback):
    """Ends the run as soon as it has its first plan, and writes no log."""

    def on_train_begin(self, *arguments: Any, **objects: Any) -> None:
        """Take the first decision, and end the run."""
        super().on_train_begin(*arguments, **objects)
        self._break_off()
        raise _DecidedError

    def _default_log(self, args: TrainingArguments) -> None:
        return None


def _plan_of_trainer(trainer: Trainer, callback: _FirstPlan) -> StaticPlan:
    handler = trainer.callback_handler
    callbacks = handler.callbacks
    targets = find_target_modules(trainer.model)
    put_back_adapters = _adapters_put_back(trainer.model, targets, trainer.optimizer)
    with put_back(trainer), settings_put_back(trainer.model), put_back_adapters:
        handler.callbacks = [callback]  # alone, so that no tracker opens a run
        try:
            trainer.train()
        except _DecidedError:
            return _static_plan(callback.pilot, trainer.model)
        finally:
            handler.callbacks = callbacks
            if trainer.args.neftune_noise_alpha is not None:  # `train` removes it at its end
                trainer.neftune_hook_handle.remove()
    raise AssertionError("a run begins with a plan")


def _plan_of_model(
    model: PeftModel,
    data: DataLoader[Any],
    budget: str | float | Budget,
    policy: str | Path | Policy,
    frontier: bool,
    *,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate: float = 1e-4,
    total_steps: int = TOTAL_STEPS,
    accumulation: int = 1,
    **options: Any,
) -> StaticPlan:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    pilot = RankPilot(policy, budget, **options)
    pilot.times_plans |= frontier and not pilot.recompute
    targets = find_target_modules(model)
    with _adapters_put_back(model, targets, optimizer):
        size = {"total_steps": total_steps, "accumulation": accumulation}
        run = TrainingRun.of_loader(model, optimizer, data, loss=loss, **size)
        pilot.begin(run)
        pilot.finish()
        return _with_frontier(_static_plan(pilot, model), pilot, frontier)


def _static_plan(pilot: RankPilot, model: Any) -> StaticPlan:
    controller = pilot.controller
    assert controller is not None
    config: LoraConfig = copy.deepcopy(unwrap(model).peft_config[controller.targets[0].adapter])
    config.inference_mode = False
    ranks = adapter_ranks(controller.targets)
    alphas = {target.name: target.alpha for target in controller.targets}
    return StaticPlan(config, ranks, alphas, pilot.predictions[-1][1], pilot.limit, controller.cost.unit)


def _with_frontier(plan: StaticPlan, pilot: RankPilot, wanted: bool) -> StaticPlan:
    """A plan with the frontier of the decision that led to it."""
    if not wanted:
        return plan
    assert pilot.decision is not None
    assert pilot.decision.deliberation is not None
    return replace(plan, frontier=tuple(frontier_of(pilot.decision.deliberation)))


@contextmanager
def _switches_put_back(model: torch.nn.Module) -> Iterator[None]:
    """Let parameters train, modules be in training mode and torch draw numbers afterwards as they did before."""
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with settings_put_back(model), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, before in trains:
            parameter.requires_grad_(before)
        for module, training in modes:
            module.training = training


@contextmanager
def _adapters_put_back(
    model: Any, targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer | None
) -> Iterator[None]:
    """Give the adapters their values, ranks, PEFT's configuration and the optimiser's state back afterwards."""
    put_back_state = kept_state(optimizer, [p for target in targets for p in target.parameters.values()])
    configs = unwrap(model).peft_config
    before = {name: copy.deepcopy(vars(config)) for name, config in configs.items()}
    values = [(p, p.detach().clone(), p.requires_grad) for target in targets for p in target.parameters.values()]
    try:
        yield
    finally:
        put_back_state()
        for parameter, value, _ in values:
            write_in_place(parameter, value)
        for target in targets:
            update_peft_records(target, target.rank)
        for parameter, _, trains in values:
            parameter.requires_grad_(trains)
        for name, settings in before.items():
            vars(configs[name]).clear()
            vars(configs[name]).update(settings)
