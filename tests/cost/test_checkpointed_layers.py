"""Peaks under checkpointing of some layers only, predicted from one recording in which all are checkpointed."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
import pytest
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.model import checkpointed_cost, fewest_checkpointed
from rankpilot.cost.training_step import release_inputs
from rankpilot.decide.plan.plan import least_cost
from transformers.modeling_layers import GradientCheckpointingLayer

from ..cases import first_cases
from ..families import FAMILIES
from .measured import Run, adamw_run, family_batch, family_model, random_plans


def checkpointed_run(family: Any, precision: str = "fp32") -> tuple[Run, Any]:
    """A run and its byte model, recorded with all layers checkpointed."""
    model = family_model(family, precision, checkpointing=False)
    release_inputs(model)
    run = adamw_run(model, family_batch(family, model, 6, 12), precision)
    return run, run.calibrated()


def names_of(run: Run, memory: Any) -> list[str]:
    """The names of the layers that can run again, in forward order; all are set to."""
    names = list(dict.fromkeys(segment.name for segment in memory.segments))
    checkpoint(run, names)
    return names


def checkpoint(run: Run, names: Collection[str]) -> None:
    """Let these layers run again in the backward pass, and no other."""
    for name, module in run.model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = name in names


QUICK = ("llama", "bert", "gpt2", "t5", "vit", "mixtral", "llama-dora")
"""Families that stand for those with other adapters, which are left to `make test-long`."""


@pytest.mark.parametrize("precision", first_cases(1, ["bf16", "fp32", "autocast"]))
@pytest.mark.parametrize(
    "family",
    [pytest.param(row, marks=() if row.name in QUICK else pytest.mark.long, id=row.name) for row in FAMILIES],
)
def test_any_set_of_checkpointed_layers_is_predicted(family, precision):
    run, memory = checkpointed_run(family, precision)
    names = names_of(run, memory)
    assert len(names) == (4 if family.name == "t5" else 2)
    generator = np.random.default_rng(0)
    for ranks in random_plans(run.targets, generator, 6):
        chosen = {name for name in names if generator.random() < 0.5}
        checkpoint(run, chosen)
        predicted = memory.with_checkpointed(chosen)
        error = plan_cost(predicted.cost(), ranks) / run.peak(ranks) - 1
        if "dora" in family.name:  # second runs compute its norms in another order; see test_model.py
            assert abs(error) <= 0.15
        else:
            assert -0.002 <= error <= 0.05
        assert predicted.margin == (memory.margin if chosen else 0)
        assert predicted.peak(ranks) == pytest.approx(plan_cost(predicted.cost(), ranks), rel=2e-4, abs=64)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_the_fewest_layers_that_fit_are_checkpointed(named_family, share):
    family = named_family("t5")
    run, memory = checkpointed_run(family)
    names = names_of(run, memory)
    most, least = memory.with_checkpointed(()), memory.with_checkpointed(names)
    ranks = np.full(len(run.targets), 4)
    limit = least.peak(ranks) + share * (most.peak(ranks) - least.peak(ranks))
    chosen = fewest_checkpointed(memory, ranks, limit)
    assert chosen == tuple(names[: len(chosen)]), "from the lowest layer upwards"
    assert memory.with_checkpointed(chosen).peak(ranks) <= limit
    assert memory.with_checkpointed(chosen[:-1]).peak(ranks) > limit
    checkpoint(run, chosen)
    assert run.peak(ranks) <= 1.002 * limit


def test_no_layer_is_checkpointed_that_holds_nothing(named_family):
    run, memory = checkpointed_run(named_family("llama"))
    lower, upper = names_of(run, memory)
    ranks = np.array([4 * (".layers.1." in target.name) for target in run.targets])
    assert fewest_checkpointed(memory, ranks, 1.0) == (upper,), "nothing below the lowest adapter is held"
    assert fewest_checkpointed(memory, np.full(len(ranks), 4), 1.0) == (lower, upper), "all, where no set fits"
    assert fewest_checkpointed(memory, ranks, np.inf) == ()


@pytest.mark.parametrize("share", [0.85, 1.5])
def test_a_budget_buys_less_checkpointing_before_more_rank(named_family, share):
    run, memory = checkpointed_run(named_family("llama"))
    names_of(run, memory)
    most = np.array([target.max_rank for target in run.targets])
    none = memory.with_checkpointed(())
    plain = none.peak(np.minimum(8, most))
    limit = share * plain
    cost = checkpointed_cost(memory, np.minimum(8, most), limit, least=partial(least_cost, run.targets, None, None))
    for ranks in random_plans(run.targets, np.random.default_rng(0), 6):
        fits = memory.peak(ranks) <= limit and none.peak(ranks) <= max(limit, plain)
        assert (plan_cost(cost, ranks) <= limit * (1 + 2e-4)) == fits
    assert plan_cost(cost, np.minimum(8, most)) <= limit * (1 + 2e-4), "plain LoRA fits, with some layers running again"
    assert (plan_cost(cost, most) <= limit) == (none.peak(most) <= limit)
