"""The policy that ships, over drawn models and budgets: what it weighs, and that its decision always fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankpilot.agents.policy_file import load_policy, policy_schedule
from rankpilot.common.errors import ConfigError
from rankpilot.cost.cost import ByteCost, Cost, ParameterCost, plan_cost
from rankpilot.cost.step_time import PlanSeconds
from rankpilot.decide import chooser
from rankpilot.decide.choice import PLAIN, PLAIN_WITHIN, Choice
from rankpilot.decide.observation import LABELS, MODULE_FEATURES, RUN_FEATURES, Observation
from rankpilot.decide.plan.goal import GOALS, Goal
from rankpilot.decide.plan.problem import AllocationProblem
from rankpilot.decide.plan.worth import FEATURES, PlanWorth
from rankpilot.decide.policy import decided_plan
from rankpilot.decide.rules import find_rule
from rankpilot.decide.settings import ONCE
from rankpilot.lora.spec import RankLadder

from .plan.synthetic_costs import LAYER, transformer_cost

TEXTS, LABELLED = 1.0, LABELS / 2
"""Shares of the tokens whose prediction the loss counts."""


def observed(problem: AllocationProblem, wide: np.ndarray, predicted: float = TEXTS) -> Observation:
    """What the chooser reads of an observation; all else is 0."""
    modules = np.zeros((len(wide), len(MODULE_FEATURES)), dtype=np.float32)
    modules[:, MODULE_FEATURES.index("wide")] = wide
    modules[:, MODULE_FEATURES.index("relative_depth")] = problem.blocks / max(1, problem.blocks.max())
    run = np.zeros(len(RUN_FEATURES), dtype=np.float32)
    run[RUN_FEATURES.index("predicted")] = np.log2(predicted) / 4
    return Observation(modules, run, problem, tuple(map(str, range(len(wide)))))


def seen(layers: int = 4, kinds: str = "aamm", *, predicted: float = TEXTS, **changes: Any) -> Observation:
    """A first decision on layers of (a)ttention and (m)LP modules, with bytes for layers, and room for all of it."""
    wide = np.array([kind == "m" for kind in kinds * layers])
    blocks = np.repeat(np.arange(layers), len(kinds))
    needs = np.arange(layers)[:, None] >= blocks[None]
    cost = ByteCost(("peak",), np.array([1e3]), np.full((1, len(wide)), 10.0), np.full((1, layers), 700.0), needs)
    options: dict[str, Any] = {"ranks": np.ones(len(wide), dtype=np.int64), "max_ranks": np.full(len(wide), 256)}
    options |= {"blocks": blocks, "cost": cost, "limit": 1e9, "ladder": RankLadder()}
    return observed(AllocationProblem(**options | changes), wide, predicted)


def known(noise: float = 0.0, **effects: float) -> PlanWorth:
    """What plans are worth by these effects, whose names begin with these words."""
    found = np.zeros(len(FEATURES))
    for index, name in enumerate(FEATURES):
        found[index] = sum(value for words, value in effects.items() if name.startswith(words.replace("_", " ")))
    return PlanWorth(found, np.zeros((len(found), len(found))), noise)


def chosen(observation: Observation, goal: Goal = Goal(), worth: PlanWorth | None = None) -> Choice:  # noqa: B008
    """The choice behind a decision, whose plan is the one that is taken."""
    decision = chooser.PlanChooser(goal=goal, worth=worth).decide(observation)
    assert decision.choice is not None
    np.testing.assert_array_equal(decision.ranks, decision.choice.plans[decision.choice.taken])
    return decision.choice


# Candidates -----------------------------------------------------------------------------------------------------------


def test_names_of_parts_and_which_modules_they_are() -> None:
    observation = seen(4, "am")
    found, blocks = chooser.parts(observation), observation.problem.blocks
    mlp = np.tile([False, True], 4)
    expected = {
        "all modules": mlp | ~mlp,
        "the MLP modules": mlp,
        "the attention modules": ~mlp,
        "all modules of the top 3 layers": blocks >= 1,
        "the MLP modules of the top 2 layers": mlp & (blocks >= 2),
        "the attention modules of the top layer": ~mlp & (blocks == 3),
        "all modules of every other layer": blocks % 2 == 1,
    }
    for name, part in expected.items():
        np.testing.assert_array_equal(found[name], part, err_msg=name)
    assert len(found) == 3 * (1 + 3 + 1)
    assert next(iter(found)) == "all modules"


@pytest.mark.parametrize("layers", [1, 2, 32, 33, 64, 100])
def test_deep_models_have_no_more_parts(layers: int) -> None:
    found = chooser.parts(seen(layers, "am"))
    assert len(found) <= 3 * (chooser.MOST_WINDOWS + 1)
    assert len({part.tobytes() for part in found.values()}) == len(found)
    assert all(part.any() for part in found.values())


def test_layers_are_counted_and_not_numbered() -> None:
    """As where only some layers have target modules."""
    one, other = (
        chooser.parts(seen(3, "am", blocks=blocks)) for blocks in (np.repeat([0, 1, 2], 2), np.repeat([4, 9, 30], 2))
    )
    assert one.keys() == other.keys()
    for name, part in one.items():
        np.testing.assert_array_equal(part, other[name])


def test_candidates_by_name() -> None:
    plans = dict(chooser.candidates(seen(4, "am")))
    assert next(iter(plans)) == PLAIN
    assert plans[PLAIN].tolist() == [8] * 8
    assert plans["rank 2 on the MLP modules of the top layer"].tolist() == [0] * 7 + [2]
    assert plans["rank 16 on the attention modules and 4 on the others"].tolist() == [16, 4] * 4
    assert plans["rank 64 on the MLP modules and 16 on the others"].tolist() == [16, 64] * 4
    assert plans["as much rank as fits"].tolist() == [128] * 8
    assert {f"rank {rank} on the attention modules" for rank in chooser.RANKS} <= plans.keys()


def test_candidates_keep_bounds_and_ladder() -> None:
    low, high = np.array([0, 3, 0, 0]), np.array([5, 256, 0, 256])
    observation = seen(2, "am", low=low, high=high, max_ranks=np.array([64, 64, 64, 3]))
    plans = dict(chooser.candidates(observation))
    assert plans["rank 1 on all modules"].tolist() == [1, 4, 0, 1]
    assert plans["rank 128 on all modules"].tolist() == [4, 64, 0, 2]
    assert plans["rank 8 on the MLP modules of the top layer"].tolist() == [0, 4, 0, 2]
    assert plans[PLAIN].tolist() == [8, 8, 8, 2], "bounds play no part"
    assert plans["rank 8 on all modules, as far as bounds allow"].tolist() == [4, 8, 0, 2]
    found = chosen(observation, worth=known(noise=1.0))
    assert not found.fits[0], "but it cannot be taken"
    assert found.names[found.taken] == "rank 8 on all modules, as far as bounds allow"


def parameters(limit: float, layers: int = 4, **changes: Any) -> Observation:
    """Layers of an attention module and a gated MLP, whose third module leads out; a rank takes 10 parameters."""
    cost = ParameterCost(np.full((1, 4 * layers), 10.0))
    observation = seen(layers, "ammm", **{"cost": cost, "limit": limit} | changes)
    observation.modules[:, MODULE_FEATURES.index("shape")] = np.tile([0.0, 1.0, 1.0, -1.0], layers)
    return observation


def test_few_parameters_go_to_the_outputs_of_mlps_in_all_layers() -> None:
    enough = chosen(parameters(80.0))
    assert not any("outputs" in name for name in enough.names)
    few = chosen(parameters(79.0))
    assert few.plans[few.taken].tolist() == [0, 0, 0, 1] * 4
    assert few.names == (PLAIN, "rank 1 on the outputs of MLPs")
    cheap = ParameterCost(np.tile([10.0, 10.0, 10.0, 5.0], 4)[None])
    assert chosen(parameters(69.0, cost=cheap)).plans[-1].tolist() == [0, 0, 0, 2] * 4
    assert chosen(parameters(40.0)).names[1:] == ("rank 1 on the outputs of MLPs",)


def test_fewer_still_go_to_outputs_of_evenly_spaced_layers() -> None:
    found = chosen(parameters(39.0))
    assert found.names[found.taken] == "rank 1 on the outputs of MLPs of one layer in 2"
    assert found.plans[found.taken].tolist() == [0, 0, 0, 0, 0, 0, 0, 1] * 2
    assert np.flatnonzero(chosen(parameters(19.0)).plans[1]).tolist() == [15]


def test_where_outputs_of_mlps_can_have_no_rank_other_plans_are_weighed() -> None:
    found = chosen(parameters(39.0, high=np.tile([256, 256, 256, 0], 4)))
    assert not found.plans[found.taken][3::4].any()
    assert found.plans[found.taken].any()
    assert len(found.names) > 3


def test_an_mlp_that_is_not_gated_has_no_plan_of_outputs_alone() -> None:
    observation = parameters(79.0)
    observation.modules[1::4, MODULE_FEATURES.index("wide")] = 0.0
    assert not any("outputs" in name for name in chosen(observation).names)


def test_what_worth_depends_on_in_a_model() -> None:
    modules = chooser.modules_of(seen(3, "am", max_ranks=np.array([64, 96, 32, 96, 64, 96])))
    assert modules.wide.tolist() == [False, True] * 3
    assert modules.depth.tolist() == [0, 0, 0.5, 0.5, 1, 1]
    assert modules.width == 96


# Over drawn problems --------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Observation:
    """First decisions on models of one layer to five, whole or with one kind of modules, under any budget."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    cost: Cost
    cost, blocks, widths = transformer_cost(generator, draw(st.integers(1, 5)), checkpointing=draw(st.booleans()))
    wide = np.array([name in ("gate", "up", "down") for name in LAYER * (blocks[-1] + 1)])
    kept = {"all": wide | True, "MLP": wide, "attention": ~wide}[draw(st.sampled_from(["all", "MLP", "attention"]))]
    cost = replace(cost, per_rank=cost.per_rank[:, kept], needs=cost.needs[:, kept])
    blocks, wide = blocks[kept], wide[kept]
    most = np.minimum(widths[kept], generator.choice([1, 3, 16, 4096], p=[0.05, 0.05, 0.1, 0.8], size=len(blocks)))
    if draw(st.booleans()):
        cost = ParameterCost(generator.integers(1, 100, size=(1, len(blocks))).astype(np.float64))
    bounds: dict[str, Any] = {}
    if draw(st.booleans()):
        low = np.where(generator.random(len(blocks)) < 0.1, generator.choice([1, 3, 12]), 0)
        bounds = {"low": low, "high": np.where(generator.random(len(blocks)) < 0.2, generator.choice([12, 30]), 256)}
        bounds["high"] = np.where((low == 0) & (generator.random(len(blocks)) < 0.1), 5, bounds["high"])
    problem = AllocationProblem(np.ones_like(blocks), most, blocks, cost, 0.0, RankLadder(), **bounds)
    least, plain = (
        plan_cost(cost, ranks) for ranks in (problem.ladder.array[problem.bottoms], chooser.plain_lora(problem))
    )
    share = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0, 3.0]))
    problem = replace(problem, limit=float(int(least + share * max(0.0, plain - least))) + 1)
    if draw(st.booleans()):
        time = PlanSeconds(1.0, np.full(len(blocks), 1e-3), generator.random(len(blocks)), np.eye(len(blocks)) > 0)
        problem = replace(problem, time=time)
    return observed(problem, wide, draw(st.sampled_from([TEXTS, LABELLED])))


@st.composite
def decisions(draw: st.DrawFn) -> tuple[Observation, Goal]:
    """First decisions, and goals that their costs know."""
    observation = draw(problems())
    problem = observation.problem
    kinds = [kind for kind in GOALS if kind != "time" or problem.time]
    kinds = [kind for kind in kinds if kind != "bytes" or problem.cost.unit == "bytes"]
    return observation, Goal(draw(st.sampled_from(kinds)))


@given(decisions())
def test_what_is_weighed_is_possible_and_the_decision_fits(drawn: tuple[Observation, Goal]) -> None:
    observation, goal = drawn
    problem, found = observation.problem, chosen(observation, goal)
    assert found.names[0] == PLAIN
    np.testing.assert_array_equal(found.plans[0], chooser.plain_lora(problem))
    assert len(np.unique(found.plans, axis=0)) == len(found.plans)
    assert len(set(found.names)) == len(found.names)
    assert found.fits[1:].all()
    low, high = (problem.ladder.array[rungs] for rungs in (problem.bottoms, problem.tops))
    for plan, fits in zip(found.plans, found.fits, strict=True):
        assert fits == (problem.fits(plan) and bool((plan >= low).all()) and bool((plan <= high).all()))
    assert np.isin(found.plans, problem.ladder.array).all()
    assert found.spread[0] == 0
    assert found.expected[0] == 0
    assert (found.spread[1:] > 0).all()
    np.testing.assert_array_equal(found.costs, [plan_cost(problem.cost, plan) for plan in found.plans])
    decision = chooser.PlanChooser(goal=goal).decide(observation)
    plan = decided_plan(problem, decision)
    assert problem.fits(plan.ranks) or np.array_equal(plan.ranks, low)
    if found.fits[found.taken]:
        np.testing.assert_array_equal(plan.ranks, found.plans[found.taken])
    else:
        assert len(found.plans) == 1, "nothing that adapts a module fits"
        assert not plan.ranks.any() or not problem.fits(plan.ranks)


@given(problems(), st.integers(1, 3))
def test_later_decisions_keep_the_ranks(observation: Observation, reach: int) -> None:
    later = replace(observation, problem=replace(observation.problem, max_step=reach))
    decision = chooser.PlanChooser(goal=Goal("bytes")).decide(later)
    np.testing.assert_array_equal(decision.ranks, later.problem.ranks)
    assert decision.exact
    assert decision.choice is None


# What is taken --------------------------------------------------------------------------------------------------------


def test_quality_takes_what_is_surely_better() -> None:
    observation = seen(4, "am")
    found = chosen(observation, worth=known(rank_of_MLP=-0.02))
    assert found.plans[found.taken][1::2].tolist() == [128] * 4
    assert found.expected[found.taken] == pytest.approx(-0.02 * 4)
    assert found.plans[found.taken].tolist() == found.plans[int(found.surely.argmin())].tolist()
    assert chosen(observation, worth=known(rank_of_MLP=-0.02, noise=1.0)).taken == 0, "it is not sure"


def test_bytes_and_time_are_saved_by_different_plans() -> None:
    """MLP modules take time and layers bytes, and no plan loses anything."""
    observation = seen(4, "am")
    needs, slow = np.eye(8, dtype=np.bool_), np.tile([0.01, 0.3], 4)
    time = PlanSeconds(1.0, np.full(8, 1e-4), slow, needs)
    timed = replace(observation, problem=replace(observation.problem, time=time))
    of_time, of_bytes = (chosen(timed, Goal(kind), known()) for kind in ("time", "bytes"))  # type: ignore[arg-type]
    assert of_time.seconds is not None
    np.testing.assert_allclose(of_time.seconds[0], 1 + 8 * 8e-4 + slow.sum(), rtol=1e-5)
    fastest, smallest = of_time.plans[of_time.taken], of_bytes.plans[of_bytes.taken]
    assert (fastest[1::2].any(), fastest[0::2].any()) == (False, True)
    assert (smallest[:6].any(), smallest[6:].any()) == (False, True)
    assert chosen(observation, Goal("bytes"), known(noise=1.0)).taken == 0, "no plan is sure to lose nothing"


def test_a_goal_that_the_costs_do_not_know() -> None:
    counted = ParameterCost(np.full((1, 16), 10.0))
    with pytest.raises(ConfigError, match="requires a known step time"):
        chooser.PlanChooser(goal=Goal("time")).decide(seen())
    with pytest.raises(ConfigError, match="goal='bytes' requires a budget in bytes; this one counts parameters"):
        chooser.PlanChooser(goal=Goal("bytes")).decide(seen(cost=counted))
    assert chosen(seen(cost=counted)).names[0] == PLAIN


def test_only_the_chooser_takes_a_goal_of_cost() -> None:
    rule = find_rule("signal-mean")
    assert chooser.with_goal(rule, Goal()) is rule
    with pytest.raises(ConfigError, match="signal-mean predicts no losses, so goal='time' requires policy='default'"):
        chooser.with_goal(rule, Goal("time"))
    with pytest.raises(ConfigError, match=r"so goal='time' requires policy='default'\. Otherwise, leave it out"):
        chooser.check_expects(rule, "goal='time'", "leave it out")
    chooser.check_expects(chooser.PlanChooser(), "goal='time'", "leave it out")
    assert chooser.with_goal(chooser.PlanChooser(), Goal("bytes")) == chooser.PlanChooser(goal=Goal("bytes"))


def test_it_is_the_policy_that_ships() -> None:
    assert load_policy("default") == chooser.PlanChooser()
    assert policy_schedule("default") == policy_schedule(chooser.PlanChooser(goal=Goal("time"))) == ONCE


# Runs unlike those that were learned from -----------------------------------------------------------------------------


def test_labels_widen_the_spread_and_are_told() -> None:
    texts, labels = (chosen(seen(predicted=predicted)) for predicted in (TEXTS, LABELLED))
    np.testing.assert_allclose(labels.spread, chooser.STRANGE_SPREAD * texts.spread)
    np.testing.assert_array_equal(labels.expected, texts.expected)
    assert texts.caveats == ()
    assert labels.caveats == ("it learns labels, not texts",)


def test_the_spread_grows_with_the_distance_from_what_is_known() -> None:
    spreads = []
    for width in (512, 1152, 2304):
        found = chosen(seen(max_ranks=np.full(16, width)), worth=known(noise=0.01))
        spreads.append(found.spread[found.names.index("rank 16 on all modules")])
        assert bool(found.caveats) == (width > 576)
    ratios = [chooser.STRANGE_SPREAD * (1 + chooser.OF_AN_OCTAVE * octaves) for octaves in (1, 2)]
    np.testing.assert_allclose(np.divide(spreads[1:], spreads[0]), ratios)


def test_quality_leaves_plain_lora_on_a_stranger_for_what_is_sure_alone() -> None:
    options: dict[str, Any] = {"predicted": LABELLED}
    for noise, leaves in ((0.001, True), (0.1, False)):
        found = chosen(seen(**options), worth=known(noise=noise, rank_of_MLP=-0.02))
        assert (found.names[found.taken] != PLAIN) == leaves
        assert found.surely[found.taken] <= found.goal.tolerance


def test_quality_stays_at_plain_lora_where_a_caveat_stands() -> None:
    free = 1e9
    known, strange = (chosen(seen(limit=free, predicted=predicted)) for predicted in (TEXTS, LABELLED))
    assert known.names[known.taken] != PLAIN, "or the test shows nothing"
    assert strange.names[strange.taken] == PLAIN
    assert "unlike those behind the expectations" in strange.promise()
    bounded = chosen(seen(limit=free, predicted=LABELLED, low=np.full(16, 16)))
    assert bounded.names[bounded.taken] == PLAIN_WITHIN, "ranks that are kept stay as they are"


def test_trained_adapters_are_told() -> None:
    trained = np.ones(16, dtype=np.int64)
    trained[3] = 4
    found = chosen(seen(ranks=trained))
    assert found.caveats == ("its adapters are already trained",)
    assert chosen(seen(ranks=np.zeros(16, dtype=np.int64))).caveats == ()


# Models of odd shapes -------------------------------------------------------------------------------------------------


def test_embeddings_count_as_no_mlp_of_the_lowest_layer() -> None:
    """A module before the layers, as narrow as its vocabulary; plans on the other kind leave it out."""
    observation = seen(3, "am", max_ranks=np.array([5, 64, 64, 64, 64, 64]))
    assert not chooser.modules_of(observation).wide[0]
    assert not chooser.parts(observation)["the MLP modules"][0]
    found = chosen(observation, worth=known(rank_of_attention=-0.1, MLP_modules=-0.1))
    assert found.plans[found.taken].tolist() == [4, 0, 64, 0, 64, 0]
