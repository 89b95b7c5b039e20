"""What-if statements: true when the decision is taken again, and false where they are changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rankpilot.common.errors import ConfigError
from rankpilot.decide.chooser import PlanChooser
from rankpilot.decide.observation import MODULE_FEATURES, Observation, with_limit
from rankpilot.decide.plan.goal import Goal
from rankpilot.decide.policy import Decision, decided_plan
from rankpilot.decide.rules import find_rule
from rankpilot.lora.adapters import SIGNALS
from rankpilot.study.replay import (
    SIGNAL_COLUMNS,
    Question,
    redecide,
    usual_questions,
    what_if,
    with_bounds,
    with_signals,
)

from .conftest import Decide, Observe, chooser

RULE = find_rule("signal-mean")
THRIFTY = chooser("bytes", 0.03)


def test_usual_answers_about_a_rule_are_true(make_observation: Observe, log_decision: Decide) -> None:
    case = redecide(log_decision(make_observation(16), RULE), RULE)
    answers = [answer for question in usual_questions(case) if (answer := what_if(case, question))]
    assert {answer.question.kind for answer in answers} >= {"budget", "signals", "most"}
    for answer in answers:
        assert answer.holds(case), answer.text
        assert answer.side_effects < len(answer.before)
    top = int(np.argmax(case.ranks))
    for kind in ("most", "least"):
        answer = what_if(case, Question(kind, 1, (top,), "it", top))
        assert answer is None or ((answer.after < answer.before)[top] == (kind == "most"))
    assert answers[-1].after[top] < answers[-1].before[top]


@pytest.mark.parametrize("policy", [chooser(), THRIFTY])
def test_usual_answers_about_a_choice_are_true(policy: PlanChooser, first: Observation, log_decision: Decide) -> None:
    tight = with_limit(first, first.problem.limit if policy.goal.saves else 6500.0)
    case = redecide(log_decision(tight, policy), policy)
    answers = [answer for question in usual_questions(case) if (answer := what_if(case, question))]
    kinds = {answer.question.kind for answer in answers}
    assert kinds == ({"tolerance"} if policy.goal.saves else {"budget"})
    for answer in answers:
        assert answer.holds(case), answer.text
        assert "the plan would be " in answer.text


def test_the_tolerance_that_is_told_changes_the_decision(first: Observation, log_decision: Decide) -> None:
    case = redecide(log_decision(first, THRIFTY), THRIFTY)
    answer = what_if(case, Question("tolerance", 1))
    for steps, ranks in ((answer.steps, answer.after), (answer.steps - 1, answer.before)):
        found = replace(case.decision.choice, goal=Goal("bytes", 0.03 + 0.001 * steps))
        np.testing.assert_array_equal(found.plans[found.best], ranks)
    assert answer.text.startswith(f"With a tolerance of {0.03 + 0.001 * answer.steps:.4g} instead of 0.03 (")
    for policy in (chooser(), RULE):
        with pytest.raises(ConfigError, match="no cost goal"):
            what_if(redecide(log_decision(first, policy), policy), Question("tolerance"))


def test_a_false_statement_does_not_hold(first: Observation, log_decision: Decide) -> None:
    case = redecide(log_decision(first, chooser()), chooser())
    answer = what_if(case, Question("budget", -1))
    assert answer.holds(case)
    assert not replace(answer, steps=answer.steps + 1).holds(case), "more than the smallest change"
    assert not replace(answer, after=answer.before).holds(case)


class Threshold:
    """Gives module 0 a higher rank if the first signal of module 3 is above a value."""

    name = "threshold"

    def __init__(self, value: float) -> None:
        self.value = value

    def decide(self, observation: Observation) -> Decision:
        ranks = np.full(len(observation.modules), 2)
        ranks[0] = 4 if observation.modules[3, SIGNAL_COLUMNS[0]] > self.value else 2
        return Decision(ranks, np.zeros(len(ranks)), exact=True)


def test_the_smallest_change_is_found(make_observation: Observe, log_decision: Decide) -> None:
    observation = make_observation(10, seed=5)
    signal = float(observation.modules[3, SIGNAL_COLUMNS[0]] - observation.modules[:, SIGNAL_COLUMNS[0]].mean())
    left = 0.9  # of a shift, as signals are centred again over ten modules
    policy = Threshold(signal + left * 0.375)
    case = redecide(log_decision(observation, policy), policy)
    answer = what_if(case, Question("signals", 1, (3,), "module 3"))
    assert answer.steps == 38
    assert "were 1.46 times as strong (+0.38 in log; +0.37 changes nothing), 1 module would have" in answer.text
    assert answer.holds(case)
    assert what_if(case, Question("budget", 1)) is None


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
    bounded = with_bounds(observation, module, most=2)
    assert decided_plan(bounded.problem, rule.decide(bounded)).ranks[module] <= 2
    assert with_bounds(bounded, module, most=8).problem.high[module] == 2
    least = with_bounds(with_bounds(observation, 0, least=16), 0, least=4)
    assert decided_plan(least.problem, rule.decide(least)).ranks[0] >= 16
