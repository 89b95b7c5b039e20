"""Plan runs as logged choices: which plans, which outcomes, and predictions by ensembles that have not seen them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.plan_value import Plans, PlanValueConfig
from rankpilot.agents.training.fit_plan_value import FitConfig
from rankpilot.agents.training.plan_dataset import PlanDataset
from rankpilot.allocation.features import MODULE_FEATURES, RUN_FEATURES
from rankpilot.errors import DataError
from rankpilot.study.off_policy.compare import compare_targets
from rankpilot.study.off_policy.plan_run_choices import PlanRunChoices
from rankpilot.study.off_policy.targets import TargetPolicy

pytestmark = pytest.mark.usefixtures("one_thread")

PROGRESS = RUN_FEATURES.index("progress")
TASKS, RUNS, MODULES = 24, 9, 5
QUICK = FitConfig(epochs=30, batch=4, rate=1e-2)
SMALL = PlanValueConfig(count=2, width=16)


def good(plans: Plans) -> torch.Tensor:
    """What a plan gains: rank on the module with the largest first feature, (states, plans)."""
    best = plans.modules[:, :, 0].argmax(dim=1)
    logs = torch.log2(1 + plans.ranks.float())
    return 0.2 * (logs.gather(2, best[:, None, None].expand(-1, logs.shape[1], 1)).squeeze(2) - logs.mean(dim=2))


def dataset(seed: int = 0) -> PlanDataset:
    """Plan runs of two decisions each, decision by decision; the last two plans of a task are the same."""
    generator = torch.Generator().manual_seed(seed)
    modules = torch.randn(TASKS, MODULES, len(MODULE_FEATURES), generator=generator)
    ranks = torch.tensor([0, 1, 2, 4, 8])[torch.randint(5, (TASKS, RUNS, MODULES), generator=generator)]
    ranks[:, -1] = ranks[:, -2]
    task = torch.arange(TASKS).repeat_interleave(RUNS)
    rows = torch.cat([task, task])
    run = torch.rand(len(rows), len(RUN_FEATURES), generator=generator)
    run[:, PROGRESS] = torch.cat([torch.zeros(len(task)), torch.full((len(task),), 0.4)])
    plans = Plans(
        modules[rows],
        torch.zeros(len(rows), MODULES),
        run,
        torch.ones(len(rows), MODULES),
        ranks.reshape(-1, 1, MODULES).repeat(2, 1, 1),
    )
    gains = good(plans)[:, 0]
    groups = 2 * rows + torch.cat([0 * task, 0 * task + 1])
    zero = torch.zeros_like(rows)
    return PlanDataset(plans, gains, torch.zeros_like(gains), groups, rows, zero, zero + 1)


RUNS_MADE = dataset()


def test_the_plans_of_a_task_are_those_that_were_run_for_it() -> None:
    made = PlanRunChoices.of(RUNS_MADE)
    choices = made.choices
    assert len(choices.tasks) == TASKS * RUNS, "first decisions alone"
    assert choices.probabilities is None
    assert len(made.plans) == TASKS
    for task, plans in enumerate(made.plans):
        ranks = RUNS_MADE.plans.ranks[task * RUNS : (task + 1) * RUNS, 0]
        assert plans.ranks.shape[:2] == (1, len({tuple(row) for row in ranks.tolist()})), "distinct ones"
        for run in range(RUNS):
            decision = task * RUNS + run
            assert choices.tasks[decision] == task
            assert choices.plans[decision] == plans.ranks.shape[1]
            assert torch.equal(plans.ranks[0, choices.chosen[decision]], ranks[run])
    outcomes = choices.outcomes.reshape(TASKS, RUNS)
    np.testing.assert_allclose(outcomes.mean(axis=1), 0, atol=1e-6)
    gains = RUNS_MADE.gains[: TASKS * RUNS].reshape(TASKS, RUNS).numpy()
    for task in range(TASKS):
        assert np.corrcoef(outcomes[task], gains[task])[0, 1] == pytest.approx(1, abs=1e-5)


def test_targets_rank_them() -> None:
    """One that knows what is good takes the best plan of each task; its opposite takes the worst."""
    made = PlanRunChoices.of(RUNS_MADE)
    scores = made.scores(lambda plans: good(plans)[0])
    knowing = TargetPolicy.greedy("knowing", made.choices, scores)
    opposite = TargetPolicy.greedy("opposite", made.choices, -scores)
    outcomes = made.choices.outcomes.reshape(TASKS, RUNS)
    best, worst = compare_targets(made.choices, [knowing, opposite])
    for result, expected in ((best, outcomes.max(axis=1)), (worst, outcomes.min(axis=1))):
        gain = result.estimates["restricted choice"].gain
        assert gain is not None
        assert gain.value == pytest.approx(expected.mean(), abs=1e-5)
        refused = result.estimates["self-normalised"].refused
        assert refused is not None
        assert f"of {TASKS * RUNS} decisions are not known" in refused


def test_ensembles_predict_tasks_that_they_have_not_seen() -> None:
    made = PlanRunChoices.of(RUNS_MADE).with_predictions(RUNS_MADE, config=SMALL, fit=QUICK, folds=3)
    predictions = made.choices.predictions
    assert predictions is not None
    means = made.choices.sums(predictions) / made.choices.plans
    np.testing.assert_allclose(means, 0, atol=1e-6)
    assert np.corrcoef(made.choices.of_chosen(predictions), made.choices.outcomes)[0, 1] > 0.5
    knowing = TargetPolicy.greedy("knowing", made.choices, made.scores(lambda plans: good(plans)[0]))
    (result,) = compare_targets(made.choices, [knowing])
    direct = result.estimates["direct"].gain
    assert direct is not None
    assert direct.low > 0, "better than the mean of the plans"


def test_a_task_is_predicted_without_its_outcomes() -> None:
    """Other gains of one task change the predictions of others, in whose models it has a part, and not its own."""
    changed = torch.where(RUNS_MADE.tasks == 3, -RUNS_MADE.gains, RUNS_MADE.gains)
    both = [
        PlanRunChoices.of(data).with_predictions(data, config=SMALL, fit=FitConfig(epochs=1), folds=2).choices
        for data in (RUNS_MADE, replace(RUNS_MADE, gains=changed))
    ]
    first, second = both[0].predictions, both[1].predictions
    assert first is not None
    assert second is not None
    own = np.array(both[0].tasks)[both[0].decision_of] == 3
    assert (first[own] == second[own]).all()
    assert (first[~own] != second[~own]).any()


def test_runs_without_company() -> None:
    alone = RUNS_MADE[torch.arange(0, TASKS * RUNS, RUNS)]
    with pytest.raises(DataError, match="no plan runs that share a task and a first decision"):
        PlanRunChoices.of(alone)
    later = RUNS_MADE[RUNS_MADE.plans.run[:, PROGRESS] > 0]
    with pytest.raises(DataError, match="no plan runs"):
        PlanRunChoices.of(later)
