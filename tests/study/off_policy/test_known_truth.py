"""Many targets on tasks whose expected outcomes are known: intervals hold the truth, and estimates rank targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rankpilot.bench.known_outcomes import KnownOutcomes, closed_form, planted
from rankpilot.bench.off_policy import accuracy_of
from rankpilot.study.off_policy.compare import compare_targets
from rankpilot.study.off_policy.overlap import overlap
from rankpilot.study.off_policy.weighted import doubly_robust, importance, self_normalised

pytestmark = pytest.mark.usefixtures("one_thread")

LOGS, TARGETS, TASKS, RUNS = 8, 80, 60, 3
WEIGHTED = (importance, self_normalised, doubly_robust)


@pytest.fixture(scope="module", params=["closed form", "planted"])
def pool(request: pytest.FixtureRequest) -> KnownOutcomes:
    return closed_form(40) if request.param == "closed form" else planted(12)


def test_intervals_hold_the_truth_and_estimates_rank_targets(pool: KnownOutcomes) -> None:
    """At least 50 targets of each log have enough overlap; the truth is that of all tasks of the pool."""
    policies = pool.targets(TARGETS, seed=0)
    truth = {policy.name: pool.truth(policy) for policy in policies}
    found = []
    for number in range(LOGS):
        generator = np.random.default_rng(number)
        log = pool.log(policies, tasks=TASKS, runs=RUNS, temperature=2.0, generator=generator)
        results = compare_targets(log.choices, log.targets)
        found.append({method: accuracy_of(results, truth, method) for method in results[0].estimates})
    for method in ("self-normalised", "doubly robust"):
        each = [log[method] for log in found]
        assert min(accuracy.estimated for accuracy in each) >= 50
        covered = sum(accuracy.covered * accuracy.estimated for accuracy in each)
        assert covered >= 0.9 * sum(accuracy.estimated for accuracy in each)
        assert np.median([accuracy.rank_correlation for accuracy in each]) >= 0.8
    direct = [log["direct"].rank_correlation for log in found]
    assert np.median(direct) >= 0.8, "predictions rank targets, though their intervals do not hold the truth"
    widths = {method: np.median([log[method].width for log in found]) for method in found[0]}
    assert widths["doubly robust"] < widths["importance"]


def test_without_overlap_all_are_refused(pool: KnownOutcomes) -> None:
    """The policy that decided took its best plan, and all others take another one at every decision."""
    policies = pool.targets(50, seed=1)
    log = pool.log(policies, tasks=TASKS, runs=RUNS, temperature=2.0, generator=np.random.default_rng(0))
    taken = np.zeros(len(log.targets[0].probabilities))
    taken[log.choices.starts + log.choices.chosen] = 1
    deterministic = replace(log.choices, probabilities=taken)
    hidden = replace(log.choices, probabilities=None)
    for policy in log.targets:
        for estimator in WEIGHTED:
            assert estimator(deterministic, policy).gain is None
            assert estimator(hidden, policy).gain is None


def test_a_log_that_hardly_explored_refuses_nearly_all(pool: KnownOutcomes) -> None:
    policies = pool.targets(50, seed=1)
    log = pool.log(policies, tasks=200, runs=1, temperature=0.05, generator=np.random.default_rng(0))
    refused = [overlap(log.choices, policy).refused for policy in log.targets]
    assert sum(each is not None for each in refused) >= 45
    assert all("Not enough overlap" in each for each in refused if each)
