"""Off-policy estimates against known outcomes: the pools, their logs, how accuracy is told, one small measurement."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rankpilot.bench import off_policy
from rankpilot.bench.known_outcomes import NOISE, KnownOutcomes, closed_form, planted
from rankpilot.bench.off_policy import Options, Setting, accuracy_of, benchmark
from rankpilot.common.statistics import Estimate
from rankpilot.errors import ConfigError
from rankpilot.study.off_policy.compare import TargetResult
from rankpilot.study.off_policy.estimates import PolicyEstimate
from rich.console import Console

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pool() -> KnownOutcomes:
    return closed_form(12)


def test_pools_are_the_same_each_time() -> None:
    for make in (closed_form, planted):
        one, other = make(3), make(3)
        assert (one.gains == other.gains).all()
        assert (one.features == other.features).all()
        assert (make(3, seed=1).gains[:3] != one.gains[:3]).any()
        starts = np.cumsum(one.plans) - one.plans
        assert (one.gains[starts] == 0).all(), "uniform rank gains nothing over itself"
        assert one.plans.min() > 1
        assert np.isfinite(one.gains).all()


def test_what_policies_look_at_tells_of_gains(pool: KnownOutcomes) -> None:
    """The plan with most rank where the signal is high gains more than the mean of the plans."""
    knowing = pool.target("signal", np.array([1.0, 0, 0, 0, 0]), 0.0)
    random = pool.target("random", np.zeros(5), 1.0)
    np.testing.assert_allclose(random.probabilities, np.repeat(1 / pool.plans, pool.plans))
    assert pool.truth(knowing) > pool.truth(random) + 0.02


def test_a_softmax_by_hand(pool: KnownOutcomes) -> None:
    weights = np.array([1.0, 0, 0, 0, 0])
    values = pool.features[: pool.plans[0], 0]
    likely = np.exp(values / values.std() / 0.5)
    found = pool.target("softmax", weights, 0.5).probabilities[: pool.plans[0]]
    np.testing.assert_allclose(found, likely / likely.sum(), rtol=1e-6)


def test_logs_follow_the_probabilities(pool: KnownOutcomes) -> None:
    generator = np.random.default_rng(0)
    policies = pool.targets(3, seed=0)
    log = pool.log(policies, tasks=3000, runs=2, temperature=1.0, generator=generator)
    choices = log.choices
    assert len(choices.tasks) == 6000
    assert choices.tasks[0] == choices.tasks[1] != choices.tasks[2]
    assert choices.probabilities is not None
    expected, taken = choices.of_chosen(choices.probabilities), choices.sums(choices.probabilities**2)
    assert expected.mean() == pytest.approx(taken.mean(), abs=0.01), "plans are drawn as often as their probability"
    errors = choices.outcomes - log.expected
    assert errors.std() == pytest.approx(NOISE, rel=0.05)
    for policy, here in zip(policies, log.targets, strict=True):
        here.check(choices)
        gained = choices.sums(here.probabilities)
        assert gained == pytest.approx(1)
        assert policy.name == here.name


def made(name: str, gain: Estimate | None) -> TargetResult:
    refused = None if gain else "Not enough overlap: made up."
    return TargetResult(name, {"doubly robust": PolicyEstimate("doubly robust", gain, refused, None)})


def test_agreement_with_the_truth_by_hand() -> None:
    results = [
        made("a", Estimate(1.0, 0.5, 1.5)),
        made("b", Estimate(3.0, 2.0, 4.0)),
        made("c", Estimate(2.0, 1.9, 2.1)),
        made("d", None),
    ]
    found = accuracy_of(results, {"a": 1.5, "b": 2.0, "c": 5.0, "d": 0.0}, "doubly robust")
    assert (found.estimated, found.refused) == (3, 1)
    assert found.covered == pytest.approx(2 / 3), "ends count as inside"
    assert found.width == pytest.approx(1.0)
    assert found.rank_correlation == pytest.approx(0.5)


def test_agreement_of_refusals_alone() -> None:
    found = accuracy_of([made("a", None)], {"a": 1.0}, "doubly robust")
    assert (found.estimated, found.refused) == (0, 1)
    assert np.isnan([found.covered, found.width, found.rank_correlation]).all()


def test_a_small_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(off_policy, "QUICK", (Setting(40, 3, 2.0), Setting(20, 1, 0.05)))
    monkeypatch.setattr(off_policy, "planted", lambda count: closed_form(9, seed=1))
    shown = io.StringIO()
    figures = benchmark(Options(logs=3, targets=12, quick=True), Console(file=shown, width=130))
    json.dumps(figures, allow_nan=False)
    assert figures["logs"] == 3
    for name in ("closed_form", "planted"):
        for method in ("restricted_choice", "self-normalised", "doubly_robust"):
            assert figures[f"{name}.40x3.t2.{method}.covered"] > 0.8
        assert figures[f"{name}.40x3.t2.direct.covered"] < figures[f"{name}.40x3.t2.doubly_robust.covered"]
        assert figures[f"{name}.20x1.t0.05.restricted_choice.refused"] == 1
        assert f"{name}.20x1.t0.05.restricted_choice.covered" not in figures
    assert "closed form: 40 tasks, runs of each: 3, temperature 2" in shown.getvalue()


@pytest.mark.parametrize("options", [Options(logs=0), Options(targets=1)])
def test_options_out_of_range(options: Options) -> None:
    with pytest.raises(ConfigError, match="--logs is at least 1 and --targets at least 2"):
        benchmark(options, Console(file=io.StringIO()))
