"""Static allocation: the initial ranks of a run, as a LoraConfig, without training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from ..common.errors import ConfigError, UnsupportedError, shown
from ..common.files import write_text
from ..cost.savers.checkpointed_layers import settings_put_back
from ..cost.training_step import LossFunction
from ..decide.chooser import DEFAULT
from ..decide.policy import Policy, decision_line
from ..decide.rules import plan_text
from ..lora.adapter_file import pattern_config
from ..lora.peft_config import adapter_ranks, config_for_others, fresh_adapters
from ..lora.spec import REFERENCE_RANK
from ..lora.targets import find_target_modules, tied_pairs, unwrap, wrappers_of
from .callback import bar_of_trainer, ready_to_train, tell_beside_bar
from .options import GivenOptions, PilotOptions
from .pilot import RankPilot
from .plan_rate import rule_knows
from .step.put_back import adapters_put_back, put_back, switches_put_back
from .step.replicas import check_arguments
from .step.run import TrainingRun
from .trainer_step import run_of_trainer

logger = logging.getLogger(__name__)

DEFAULT_RATE = 1e-4
"""Learning rate of the probe of a static plan, and of the plan if neither the user nor the rule gives one."""

TOTAL_STEPS = 1000
"""Steps assumed for a plan from a DataLoader. They set the number of later decisions, and the rate."""


_TASK_TYPES = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForCausalLM": TaskType.CAUSAL_LM,
}
"""Task types by a substring of the name of a transformers class."""

_NEW_HEADS = ("Classification", "MultipleChoice", "QuestionAnswering")
"""Substrings of the names of classes whose head is new in a fine-tune, and trains in full."""


@dataclass(frozen=True, eq=False)
class StaticPlan:
    """A plan made before training.

    Attributes:
        config: for a fine-tune by plain PEFT, with `rank_pattern` and `exclude_modules`, and with `alpha_pattern` if
            modules differ in alpha.
        ranks: the rank of each target module, by name.
        alphas: the alpha of each, by name.
        cost: predicted peak of a training step, or number of parameters.
        limit: the budget, in the same unit.
        unit: "bytes" or "parameters".
        learning_rate: peak rate for the plan: the given rate, or the rule's by default, times the plan's factor
            (docs/learning-rate.md).
    """

    config: LoraConfig
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    cost: float
    limit: float
    unit: str
    learning_rate: float | None = None

    def by_name(self) -> LoraConfig:
        """Return the same plan, with the full names of its modules as `target_modules`."""
        return pattern_config(self.config, self.ranks, self.alphas)

    def line(self) -> str:
        """Return the plan in one line."""
        after = list(self.ranks.values())
        return decision_line(0, [0] * len(after), after, self.cost, self.limit, self.unit)  # type: ignore[arg-type]

    def text(self, name: str = "plan.yaml") -> str:
        """Return the plan as an editable file, usable as the policy of a run; see `plan_text`."""
        return plan_text(self.ranks, self.cost, self.limit, self.unit, name)


def allocate(
    model: Any,
    data: DataLoader[Any] | None = None,
    policy: str | Path | Policy = DEFAULT,
    options: GivenOptions = None,
    *,
    output: str | Path | None = None,
    **changes: Any,
) -> LoraConfig:
    """Return the ranks of a policy before training, as a LoraConfig for plain PEFT; log the predicted memory.

    A few small steps measure the cost of plans and which modules matter. Nothing is trained: the model, its adapter and
    the Trainer are restored afterwards.

    Args:
        model: a Trainer that is ready to train, a PEFT model, or a transformers model. The latter gets adapters on all
            its linear layers, and a fully trained head if its class has a new one, such as a classifier.
        data: batches of the fine-tune; omitted for a Trainer, which has its own.
        policy: decides the ranks; see `RankPilot`.
        options: all options, or the budget alone. With `log`, a folder, the decision is logged like that of a run.
        output: also write the plan to this new file (plan.yaml). It can be edited there, and used as the `policy` of a
            run.
        changes: single options by name; see `PilotOptions`. For a model also `loss`, `optimizer`, `learning_rate` (of
            plain LoRA; by default the rule's), `accumulation` and `total_steps`, the length of the planned run.

    Raises:
        BudgetError: no plan fits the budget.
        ConfigError: there is no data, PEFT cannot adapt the model, or the output exists.
        UnsupportedError: the model or its training step is not supported, or it holds adapters outside of a PeftModel.

    Example:
        >>> config = rankpilot.allocate(model, loader, budget="60%")  # doctest: +SKIP
        >>> model = get_peft_model(model, config)  # doctest: +SKIP
    """
    if output is not None and Path(output).exists():
        raise ConfigError(f"{output} already exists. Choose a new file name.")
    plan = static_plan(model, data, policy, options, **changes)
    logger.info(plan.line())
    if output is not None:
        write_text(Path(output), plan.text(Path(output).name))
    return plan.config


def static_plan(
    model: Any,
    data: DataLoader[Any] | None = None,
    policy: str | Path | Policy = DEFAULT,
    options: GivenOptions = None,
    **changes: Any,
) -> StaticPlan:
    """Like `allocate`, but also return the ranks and the predicted memory.

    Args:
        model: see `allocate`, as for the other arguments.
        data: batches of the fine-tune.
        policy: decides the ranks.
        options: all options, or the budget alone.
        changes: see `allocate`.

    Raises:
        BudgetError, ConfigError, UnsupportedError: see `allocate`.
    """
    if isinstance(model, Trainer):
        if data is not None:
            raise ConfigError(
                f"A Trainer has its own data, so `data` must be left out; got {shown(data)}. To choose a policy, "
                "pass it by name: `rankpilot.allocate(trainer, policy=...)`."
            )
        return _plan_of_trainer(model, policy, PilotOptions.of(options, changes))
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"allocate takes a Trainer or a loaded model (from `from_pretrained`); got {shown(model)}. To "
            "plan for a model by name, use the command `rankpilot plan`."
        )
    if data is None:
        raise ConfigError("allocate needs batches of the fine-tune: pass a DataLoader as `data`, or a Trainer.")
    with switches_put_back(model):
        has_adapters = isinstance(wrappers_of(model)[-1], PeftModel)
        with nullcontext(model) if has_adapters else lent_adapters(model) as adapted:
            return _plan_of_model(adapted, data, policy, options, **changes)


def _plan_of_trainer(trainer: Trainer, policy: str | Path | Policy, options: PilotOptions) -> StaticPlan:
    check_arguments(trainer.args)
    seed = trainer.args.seed if options.seed is None else options.seed
    pilot = RankPilot(
        policy,
        replace(options, seed=seed),
        tell=partial(tell_beside_bar, trainer),
        progress=partial(bar_of_trainer, trainer),
    )
    targets = find_target_modules(trainer.model)
    put_back_adapters = adapters_put_back(trainer.model, targets, trainer.optimizer)
    with put_back(trainer), settings_put_back(trainer.model), put_back_adapters:
        ready_to_train(trainer, options.scaling)
        try:
            return _first_plan(pilot, run_of_trainer(trainer), trainer.model)
        finally:
            if trainer.args.neftune_noise_alpha is not None:  # `train` removes it at its end
                trainer.neftune_hook_handle.remove()


def _plan_of_model(
    model: PeftModel,
    data: DataLoader[Any],
    policy: str | Path | Policy,
    options: GivenOptions,
    *,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate: float | Literal["auto"] | None = None,
    total_steps: int = TOTAL_STEPS,
    accumulation: int = 1,
    **changes: Any,
) -> StaticPlan:
    given = learning_rate if isinstance(learning_rate, int | float) else None
    if learning_rate not in (None, "auto") and (given is None or not 0 < given < math.inf or optimizer is not None):
        raise ConfigError(
            "learning_rate must be 'auto' or a number above 0, and left out if an optimizer is given; got "
            f"{shown(learning_rate)}{' and an optimizer' if optimizer is not None else ''}."
        )
    ruled = learning_rate == "auto" or (learning_rate is None and optimizer is None)
    optimizer = optimizer or torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=given or DEFAULT_RATE
    )
    pilot = RankPilot(policy, options, **changes)
    with adapters_put_back(model, find_target_modules(model), optimizer):
        run = TrainingRun.of_loader(
            model, optimizer, data, loss=loss, total_steps=total_steps, accumulation=accumulation
        )
        if ruled and (learning_rate == "auto" or rule_knows(run)):
            pilot.options = replace(pilot.options, learning_rate="auto")
        return _first_plan(pilot, run, model)


def _first_plan(pilot: RankPilot, run: TrainingRun, model: Any) -> StaticPlan:
    """Return the first plan of a run."""
    # No row is read twice here, no step could correct a rate, and the later training runs whole batches.
    pilot.options = replace(pilot.options, control=False, parts="off")
    pilot.begin(run)
    pilot.finish()
    applier = pilot.applier
    assert applier is not None
    adapter, tied = applier.targets[0].adapter, tied_pairs(unwrap(model), applier.targets)
    return StaticPlan(
        config=config_for_others(unwrap(model), adapter),
        ranks=adapter_ranks(applier.targets) | {name: layer.r[adapter] for name, layer in tied.items()},
        alphas={target.name: target.alpha for target in applier.targets}
        | {name: layer.lora_alpha[adapter] for name, layer in tied.items()},
        cost=pilot.predictions[-1][1],
        limit=pilot.limit,
        unit=applier.cost.unit,
        learning_rate=pilot.rates[1] if pilot.rates else None,
    )


@contextmanager
def lent_adapters(model: nn.Module) -> Iterator[PeftModel]:
    """Yield the model with fresh adapters on all its linear layers, then restore its modules.

    Args:
        model: a model without adapters.

    Raises:
        UnsupportedError: it already holds adapters, indistinguishable from the new ones.
        ConfigError: PEFT cannot adapt it.
    """
    name = type(model).__name__
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedError(
            f"{name} already has adapters, but is not a PeftModel with a single kind of adapter. Pass the "
            "PeftModel returned by `peft.get_peft_model(model, LoraConfig(...))`, or the model without "
            "adapters."
        )
    new_head = isinstance(model, PreTrainedModel) and any(part in name for part in _NEW_HEADS)
    modules = dict(model.named_modules(remove_duplicate=False))
    size: dict[str, Any] = {"r": REFERENCE_RANK, "lora_alpha": 16}
    try:
        yield fresh_adapters(model, name, task_type(model), new_head=new_head, target_modules="all-linear", **size)
    finally:
        _put_back(model, modules)


def task_type(model: nn.Module) -> TaskType | None:
    """Return PEFT's task type of a model, by its class; None if unknown, or if the model's main input is not text.

    Args:
        model: a transformers model, or any other.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if "ForConditionalGeneration" in name:  # translation, speech, and models of text and images
        if getattr(model, "main_input_name", "") != "input_ids":
            return None
        return TaskType.SEQ_2_SEQ_LM if getattr(config, "is_encoder_decoder", False) else TaskType.CAUSAL_LM
    return next((kind for part, kind in _TASK_TYPES.items() if part in name), None)


def _put_back(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Restore the modules of a model, by path, parents before children."""
    for path, module in modules.items():
        if path and model.get_submodule(path) is not module:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
    vars(model).pop("peft_config", None)  # PEFT leaves it behind on failure, and warns about it later
