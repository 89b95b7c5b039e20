"""Checks the options of `RankPilot`, and its run."""

from __future__ import annotations

from collections.abc import Mapping

from ..allocation.schedule import DecisionSchedule
from ..errors import BudgetError, ConfigError, UnsupportedError
from ..lora.optimizer_state import check_optimizer
from ..lora.scaling_names import check_scaling
from ..lora.targets import check_unmerged, find_target_modules, unwrap
from ..memory.budget import Budget
from ..memory.step_config import check_seed
from .parallel_kinds import check_one_device
from .run import TrainingRun

LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Settings of transformers models that leave layers out at random in training."""


def readable_budget(given: str | float | Budget, *, recompute: bool) -> Budget:
    """The budget of a run.

    Raises:
        BudgetError: it cannot be read, or counts parameters where the layers that run again are to be chosen by it.
    """
    budget = Budget.parse(given)
    if recompute and budget.kind == "parameters":
        raise BudgetError(
            f"The budget {str(given)!r} counts parameters, and a layer that runs again saves none. Give a budget of "
            "bytes ('6GiB', '80%') or leave `recompute` out."
        )
    return budget


def check_options(
    schedule: object,
    measure_every: object,
    bounds: object,
    scaling: object,
    seed: object,
    **switches: object,
) -> None:
    """Refuse options of `RankPilot` of a wrong type now, and not after minutes of work; switches are True or False.

    Raises:
        ConfigError: one is of a wrong type.
    """
    if schedule is not None and not isinstance(schedule, DecisionSchedule):
        raise ConfigError(f"schedule is a rankpilot.DecisionSchedule or None; got {schedule!r}.")
    if not isinstance(measure_every, int) or measure_every < 1:
        raise ConfigError(f"measure_every is a number of steps, at least 1; got {measure_every!r}.")
    check_seed(seed)
    check_scaling(scaling)
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise ConfigError(f"{name} is True or False; got {switch!r}.")
    if bounds is not None and not isinstance(bounds, Mapping):
        raise ConfigError(f"bounds are a dictionary from module names to ranks; got {bounds!r}.")


def check_run(run: TrainingRun) -> None:
    """Refuse a run that cannot be trained.

    Raises:
        UnsupportedError: the adapters are on several devices, the optimiser cannot be handled, the model leaves layers
            out at random, or several processes run that share no gradients; see `check_optimized` as well.
        ConfigError: it has no steps, or some adapters are not in the optimiser.
    """
    run.replicas.check()
    check_one_device(run.model)
    check_optimizer(run.optimizer)
    _check_all_layers_run(run)
    if run.total_steps < 1:
        raise ConfigError(f"A run has at least one step; this one has {run.total_steps}. Raise max_steps.")
    check_optimized(run)


def _check_all_layers_run(run: TrainingRun) -> None:
    """Raise UnsupportedError if the model leaves layers out at random: no step tells then what another one takes."""
    config = getattr(unwrap(run.model), "config", None)
    for name in LAYER_DROPS:
        share = getattr(config, name, 0)
        if isinstance(share, float) and share > 0:
            raise UnsupportedError(
                f"The model leaves layers out at random (config.{name} is {share:g}), so what a step takes is "
                f"not known before, and one may meet no adapter at all. Set model.config.{name} = 0."
            )


def check_optimized(run: TrainingRun) -> None:
    """Refuse a run whose optimiser does not hold all adapters that may train: they would get rank for nothing.

    Raises:
        ConfigError: an adapter is in no group of the optimiser.
        UnsupportedError: an adapter is merged into its layer.
    """
    targets = find_target_modules(run.model)
    check_unmerged(targets)
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    left = [
        target
        for target in targets
        if any((p.requires_grad or not target.rank) and id(p) not in held for p in target.parameters.values())
    ]
    if left:
        text = (
            f"{len(left)} of {len(targets)} adapters are not in the optimiser and would train nothing, such as that of "
            f"{left[0].name}. Make the optimiser after the adapters, of all parameters that require gradients; leave "
            "modules that are to have no adapter out of `target_modules`."
        )
        if any(not target.rank for target in left):
            text += (
                " An earlier run left some at rank 0, where they require none: make the optimiser of "
                "`[p for name, p in model.named_parameters() if p.requires_grad or 'lora_' in name]`."
            )
        raise ConfigError(text)
