"""Planted teachers and their oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.common.arrays import IntArray
from rankpilot.common.errors import ConfigError
from rankpilot.cost.cost import plan_cost
from rankpilot.decide.plan.plan import uniform_ranks
from rankpilot.env import task_data as oracle
from rankpilot.env.bases import adapted_base, find_base, load_base_model
from rankpilot.env.tasks import FineTuneTask
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules

MakeTask = Callable[..., FineTuneTask]
BASES = ["llama-4x32", "bert-4x64", "gpt2-4x32"]


def base_weights(name: str) -> dict[str, torch.Tensor]:
    state = adapted_base(name)[0].get_base_model().state_dict()
    return {key: value.clone() for key, value in state.items() if "lora_" not in key}


# Changes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_truncations_are_the_best_of_their_rank(base: str) -> None:
    """Eckart and Young: no approximation of a rank is nearer, and what is left is what the energy says."""
    for change in oracle.draw_changes(adapted_base(base)[1], "spread", np.random.default_rng(0)):
        whole = change.truncated(change.left.shape[1]).double()
        shares = torch.linalg.svdvals(whole).square() / whole.square().sum()
        for rank in range(len(change.energy) + 1):
            left = float((whole - change.truncated(rank)).square().sum() / whole.square().sum())
            assert left == pytest.approx(1 - sum(change.energy[:rank]), abs=1e-5)
            assert left == pytest.approx(float(shares[rank:].sum()), abs=1e-5)


@pytest.mark.parametrize(("placement", "allowed"), [("low", {0, 1}), ("high", {2, 3}), ("spread", {0, 1, 2, 3})])
def test_placement(make_task: MakeTask, placement: str, allowed: set[int]) -> None:
    blocks = {target.name: target.block for target in adapted_base("llama-4x32")[1]}
    seen = set()
    for seed in range(6):
        task = make_task("planted", seed, placement=placement, steps=1, batch_size=1, eval_rows=1)
        names = [change.name for change in oracle.load_task(task).changes]
        possible = 28 * len(allowed) // 4
        assert round(oracle.DENSITY[0] * possible) <= len(names) <= round(oracle.DENSITY[1] * possible)
        assert len(set(names)) == len(names)
        seen |= {blocks[name] for name in names}
    assert seen == allowed


# Teachers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["rankpilot.env.task_data._log_probabilities", "rankpilot.env.task_data.Change.truncated"]
)
def test_the_teacher_is_taken_out_after_an_error(make_task, monkeypatch, where):
    before, original, calls = base_weights("llama-4x32"), oracle.Change.truncated, iter(range(9))

    def fail(*arguments: Any) -> Any:
        if where.endswith("truncated") and next(calls) < 2:  # in the middle of the changes
            return original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(where, fail)
    with pytest.raises(KeyboardInterrupt):
        oracle.load_task(make_task("planted", 12))
    after = base_weights("llama-4x32")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("base", BASES)
def test_a_teacher_is_the_base_with_an_adapter_that_holds_the_changes(make_task: MakeTask, base: str) -> None:
    """Also where weights are stored the other way round (Conv1D of GPT-2)."""
    data = oracle.load_task(make_task("planted", 13, base=base))
    kind = find_base(base)
    config = LoraConfig(
        r=8, lora_alpha=8, target_modules=list(kind.target_modules), fan_in_fan_out=kind.family == "gpt2"
    )
    plain = get_peft_model(load_base_model(base), config).eval()
    targets = find_target_modules(plain)
    by_name = {target.name: target for target in targets}
    set_ranks(targets, {change.name: change.left.shape[1] for change in data.changes})
    with torch.no_grad():
        for change in data.changes:
            target = by_name[change.name]
            target.weight_a.copy_(change.right)
            target.weight_b.copy_(change.left / target.scaling)
        expected = torch.log_softmax(plain(input_ids=data.held_out_inputs).logits, dim=-1)
        trained = torch.log_softmax(plain(input_ids=data.inputs[0]).logits, dim=-1)
        assert data.teacher is not None
        torch.testing.assert_close(data.held_out_teacher, expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(data.teacher[0], trained, rtol=0, atol=1e-3)
    assert data.held_out_loss(plain) == pytest.approx(0, abs=1e-6)


# Oracle ---------------------------------------------------------------------------------------------------------------


def attainable_loss(task: FineTuneTask, ranks: IntArray) -> float:
    """The least divergence from the teacher that these ranks allow, nearly, in nats."""
    by_name = dict(zip((target.name for target in adapted_base(task.base)[1]), ranks.tolist(), strict=True))
    return oracle._loss(task, [by_name[change.name] for change in oracle.load_task(task).changes])


@pytest.mark.parametrize("base", BASES)
def test_attainable_losses_run_from_the_base_to_nothing(make_task: MakeTask, base: str) -> None:
    task = make_task("planted", 14, base=base)
    model, targets = adapted_base(base)
    with model.disable_adapter():
        untrained = oracle.load_task(task).held_out_loss(model)
    ranks = [np.full(len(targets), rank, dtype=np.int64) for rank in (0, 1, 2, 4, 8, 64)]
    losses = [attainable_loss(task, plan) for plan in ranks]
    assert losses[0] == pytest.approx(untrained, abs=1e-6)
    assert all(a > b for a, b in itertools.pairwise(losses[:5])), "more rank reaches a lower loss"
    assert losses[-2] == pytest.approx(0, abs=1e-6)
    assert losses[-1] == losses[-2]
    unplanted = {target.name for target in targets} - {change.name for change in oracle.load_task(task).changes}
    nothing = np.array([64 if target.name in unplanted else 0 for target in targets], dtype=np.int64)
    assert attainable_loss(task, nothing) == losses[0], "rank where nothing was planted is worth nothing"


@pytest.mark.parametrize("options", [{"mean_rank": 2.0}, {"base": "gpt2-4x32", "mean_rank": 1.0}])
def test_the_oracle_fits_and_beats_uniform(make_task: MakeTask, options: dict[str, Any]) -> None:
    task = make_task("planted", 15, **options)
    problem = oracle.first_problem(task)
    plan = oracle.oracle_plan(task, problem)
    assert problem.fits(plan)
    assert set(plan.tolist()) <= set(problem.ladder.ranks)
    uniform = uniform_ranks(problem)
    best, of_uniform, of_nothing = (attainable_loss(task, each) for each in (plan, uniform, np.zeros_like(plan)))
    assert of_uniform - best > 0.1 * of_uniform
    assert of_nothing > best
    half = replace(problem, limit=0.999 * plan_cost(problem.cost, plan))
    assert not half.fits(plan)


def test_only_planted_tasks_have_an_oracle(make_task: MakeTask) -> None:
    task = make_task("text")
    with pytest.raises(ConfigError, match="has no teacher, so its best allocation is unknown"):
        oracle.oracle_plan(task, oracle.first_problem(task))
    oracle._worth.cache_clear()
