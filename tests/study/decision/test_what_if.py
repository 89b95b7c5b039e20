"""What-if statements: true when the decision is taken again, and false where they are changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from rankpilot.agents.learned.networks import Plans
from rankpilot.agents.learned.policy import LearnedPolicy
from rankpilot.agents.log import DecisionLog, DecisionRecord
from rankpilot.agents.observation import MODULE_FEATURES
from rankpilot.agents.policy import decided_plan
from rankpilot.agents.rules import find_rule
from rankpilot.common.text import short_names
from rankpilot.cost.cost import ParameterCost
from rankpilot.cost.step_time import SecondsRow
from rankpilot.errors import ConfigError
from rankpilot.lora.adapters import SIGNALS
from rankpilot.study.replay import (
    SIGNAL_COLUMNS,
    DecidedAgain,
    Kind,
    Question,
    stability,
    usual_questions,
    what_if,
    with_least,
    with_most,
    with_signals,
)

from .conftest import Decide, Observe, PolicyOf


def drawn_question(case: DecidedAgain, generator: np.random.Generator) -> Question:
    kinds: list[Kind] = ["signals", "signals", "budget", "most", "least"]
    if case.decision.deliberation is not None:
        kinds.append("caution")
    if case.decision.rank_floor > 0:
        kinds.append("recipe budget")
    kind = kinds[generator.integers(len(kinds))]
    names, direction = short_names(case.observation.names), 1 if generator.integers(2) else -1
    module = int(generator.integers(len(names)))
    target = module if generator.integers(2) else None
    if kind in ("most", "least"):
        return Question(kind, 1 if kind == "least" else -1, (module,), str(names[module]), target)
    if kind != "signals":
        return Question(kind, direction, target=target)
    if generator.integers(2):
        return Question(kind, direction, (module,), str(names[module]), target)
    alike = tuple(number for number, name in enumerate(names) if name.kind == names[module].kind)
    return Question(kind, direction, alike, f"all {names[module].kind} modules", target)


def test_drawn_statements_are_true(logs: list[DecisionLog], policy: LearnedPolicy) -> None:
    """Each is checked on a decision that is read again from its log."""
    generator, kinds = np.random.default_rng(1), set()
    for turn in range(24):
        log, number = logs[turn % len(logs)], turn // 2 % 4
        case = DecidedAgain(log.logged(number), policy)
        question = drawn_question(case, generator)
        answer = what_if(case, question)
        if answer:
            assert answer.holds(DecidedAgain(log.logged(number), policy)), answer.text
            kinds.add(question.kind)
            assert answer.side_effects <= len(answer.before)
    assert len(kinds) >= 4


def test_a_false_statement_does_not_hold(decisions: list[DecisionRecord], policy: LearnedPolicy) -> None:
    case = DecidedAgain(decisions[0], policy)
    answer = what_if(case, Question("budget", 1))
    assert answer.holds(case)
    assert not replace(answer, steps=answer.steps + 1).holds(case), "more than the smallest change"
    assert not replace(answer, after=answer.before).holds(case)
    cases = [DecidedAgain(decision, policy) for decision in decisions]
    larger = [(case, answer) for case in cases if (answer := what_if(case, Question("budget", 1)))]
    smaller = [replace(answer, question=Question("budget", -1)).holds(case) for case, answer in larger]
    assert not all(smaller), "the same plan follows from less by chance alone"


def test_the_usual_questions(decisions: list[DecisionRecord], policy: LearnedPolicy) -> None:
    case = DecidedAgain(decisions[0], policy)
    questions = usual_questions(case)
    assert [question.kind for question in questions] == [
        *("caution",) * 2, *("budget",) * 2, *("recipe budget",) * 2, "signals", "signals", "most"
    ]  # fmt: skip
    answers = [answer for question in questions if (answer := what_if(case, question))]
    assert len(answers) > 4
    for answer in answers:
        assert answer.holds(case)
        assert answer.text.endswith(".")


def steps_of(plans: Plans, threshold: float) -> torch.Tensor:
    """Networks that want a high rank somewhere if the first signal of module 3 is above a threshold, else uniform."""
    highest = plans.ranks.max(2).values.to(plans.modules.dtype)
    high = plans.modules[:, 3, SIGNAL_COLUMNS[0]] > threshold
    return torch.where(high[:, None], highest, -highest)[None].repeat(2, 1, 1)


def test_the_smallest_change_is_found(make_observation: Observe, policy_of: PolicyOf, log_decision: Decide) -> None:
    observation = make_observation(10, seed=2)
    signal = float(observation.modules[3, SIGNAL_COLUMNS[0]] - observation.modules[:, SIGNAL_COLUMNS[0]].mean())
    left = 0.9  # of a shift, as signals are centred again over ten modules
    policy = policy_of(lambda plans: steps_of(plans, signal + left * 0.375))
    case = DecidedAgain(log_decision(observation, policy), policy)
    answer = what_if(case, Question("signals", 1, (3,), "module 3"))
    assert answer.steps == 38
    assert "were 1.46 times as strong (+0.38 in log; +0.37 changes nothing)" in answer.text
    assert answer.holds(case)


def test_caution_is_what_the_votes_say(make_observation: Observe, policy_of: PolicyOf, log_decision: Decide) -> None:
    """Two networks: every other plan is worth 1 on the mean, with a spread of .5; so caution of 2 is too much."""

    def say(plans: Plans) -> torch.Tensor:
        other = (plans.ranks != plans.ranks[:, :1]).any(2).to(plans.modules.dtype)
        return torch.stack([0.5 * other, 1.5 * other])

    policy = policy_of(say)
    case = DecidedAgain(log_decision(make_observation(10), policy), policy)
    answer = what_if(case, Question("caution", 1))
    assert answer.text.startswith("With a caution of 2.00 instead of 1.00 standard deviations (1.99 changes nothing)")
    assert answer.holds(case)
    assert what_if(case, Question("caution", -1)) is None


def test_the_same_recipe_under_another_budget_keeps_scores(
    decisions: list[DecisionRecord], policy: LearnedPolicy
) -> None:
    case = DecidedAgain(decisions[0], policy)
    question = Question("recipe budget", 1)
    means = [question.plan(case, steps).mean() for steps in (0, 100, 200, 400)]
    assert means == sorted(means)
    assert means[0] < means[-1]
    np.testing.assert_array_equal(question.plan(case, 0), decisions[0].rank_after)


@pytest.mark.parametrize("kind", ["budget", "recipe budget"])
def test_another_budget_leaves_the_limit_of_time(make_observation: Observe, log_decision: Decide, kind: Kind) -> None:
    """Time is what stops the plan, so more budget does not change it, and less does once it is the tighter limit."""
    modules, limit, seconds = 8, 6400.0, 2.0
    row = SecondsRow(1.0, np.full(modules, 0.03), np.zeros(0), np.zeros((0, modules), dtype=np.bool_))
    cost = row.added_to(ParameterCost(np.full((1, modules), 100.0)), limit, seconds)
    rule = find_rule("signal-mean")
    case = DecidedAgain(log_decision(make_observation(modules, cost=cost, limit=limit), rule), rule)
    assert 1.9 < row.seconds(case.plan) <= seconds
    assert what_if(case, Question(kind, 1)) is None
    for steps in (100, 400):
        assert row.seconds(Question(kind, 1).plan(case, steps)) <= seconds
    smaller = Question(kind, -1).plan(case, 800)
    assert smaller.sum() * 100 <= 0.2 * limit + 1


def test_rules_can_be_asked_too(make_observation: Observe, log_decision: Decide) -> None:
    rule = find_rule("signal-mean")
    case = DecidedAgain(log_decision(make_observation(12), rule), rule)
    assert "caution" not in {question.kind for question in usual_questions(case)}
    top = int(np.argmax(case.plan))
    answer = what_if(case, Question("most", -1, (top,), "it", top))
    assert answer.after[top] < answer.before[top]
    with pytest.raises(ConfigError, match="signal-mean has no value ensemble"):
        what_if(case, Question("caution", 1))


# Changes --------------------------------------------------------------------------------------------------------------


def test_signals_are_shifted_and_centred_again(make_observation: Observe) -> None:
    observation = make_observation(6)
    calm = replace(observation, modules=observation.modules / 3)
    shifts = np.zeros((6, len(SIGNALS)))
    shifts[2] = 0.6
    before, after = calm.modules, with_signals(calm, shifts).modules
    centred = before[:, SIGNAL_COLUMNS] - before[:, SIGNAL_COLUMNS].mean(axis=0)
    moved = after[:, SIGNAL_COLUMNS] - centred
    np.testing.assert_allclose(moved[2], 0.5, atol=1e-6)
    np.testing.assert_allclose(np.delete(moved, 2, axis=0), -0.1, atol=1e-6)
    others = [column for column in range(len(MODULE_FEATURES)) if column not in SIGNAL_COLUMNS]
    np.testing.assert_array_equal(after[:, others], before[:, others])


def test_bounds_hold_and_never_loosen(make_observation: Observe) -> None:
    observation, rule = make_observation(8), find_rule("top-down")
    free = decided_plan(observation.problem, rule.decide(observation)).ranks
    module = int(np.argmax(free))
    bounded = with_most(observation, module, 2)
    assert decided_plan(bounded.problem, rule.decide(bounded)).ranks[module] <= 2
    assert with_most(bounded, module, 8).problem.high[module] == 2
    least = with_least(with_least(observation, 0, 16), 0, 4)
    assert decided_plan(least.problem, rule.decide(least)).ranks[0] >= 16


# Noise on the signals -------------------------------------------------------------------------------------------------


def test_more_noise_moves_more(make_observation: Observe, log_decision: Decide) -> None:
    rule = find_rule("signal-mean")
    logged = log_decision(make_observation(16), rule)
    calm, windy = (stability(logged, rule, noise, draws=20) for noise in (0.001, 1.0))
    assert calm.same == 1
    assert calm.sure.all()
    assert windy.same == 0
    assert not windy.sure.all()
    assert windy.near.min() < calm.near.min()
    told = windy.to_json()
    assert told == {"same": 0.0, "noise": 1.0, "sure": windy.sure.tolist()}
    assert f"{windy.sure.sum()} of 16 modules" in windy.sentence()
    assert stability(logged, rule, 1.0, draws=20).near.tolist() == windy.near.tolist(), "the draws are the same"


def test_a_rule_that_reads_no_signals_is_sure(make_observation: Observe, log_decision: Decide) -> None:
    logged = log_decision(make_observation(12), find_rule("top-down"))
    found = stability(logged, find_rule("top-down"), noise=1.0, draws=5)
    assert (found.same, found.sure.all()) == (1.0, True)


@pytest.mark.parametrize(("noise", "draws"), [(-0.1, 5), (float("nan"), 5), (0.1, 0)])
def test_out_of_range(decisions: list[DecisionRecord], policy: LearnedPolicy, noise: float, draws: int) -> None:
    with pytest.raises(ConfigError, match="noise is at least 0 and draws are at least 1"):
        stability(decisions[0], policy, noise, draws)
