"""What is taken from a policy is gone, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from rankpilot.agents.evaluation.ablation import FEATURE_GROUPS, Once, Without
from rankpilot.allocation.features import MODULE_FEATURES, RUN_FEATURES
from rankpilot.allocation.observation import Observation
from rankpilot.allocation.policy import Decision
from rankpilot.allocation.problem import AllocationProblem
from rankpilot.errors import UnknownNameError
from rankpilot.lora.ladder import RankLadder
from rankpilot.memory.cost import ParameterCost

COUNT = 4


@dataclass
class Recorder:
    """A policy that notes what it sees, and wants every module one rung up."""

    name: str = "recorder"
    seen: list[Observation] = field(default_factory=list)

    def decide(self, observation: Observation) -> Decision:
        self.seen.append(observation)
        problem = observation.problem
        return Decision(problem.ladder.step(problem.ranks, 1), np.zeros(COUNT))


@pytest.fixture
def observation() -> Observation:
    ranks = np.ones(COUNT, dtype=np.int64)
    cost = ParameterCost(np.full((1, COUNT), 10.0))
    problem = AllocationProblem(ranks, 8 * ranks, np.arange(COUNT), cost, 400.0, RankLadder())
    generator = np.random.default_rng(0)
    modules = generator.uniform(1, 2, size=(COUNT, len(MODULE_FEATURES))).astype(np.float32)
    run = generator.uniform(1, 2, size=len(RUN_FEATURES)).astype(np.float32)
    return Observation(modules, run, problem, tuple("abcd"))


@pytest.mark.parametrize("name", [*FEATURE_GROUPS, "relative_depth", "trend"])
def test_features_are_zero_and_the_rest_is_untouched(observation: Observation, name: str) -> None:
    recorder = Recorder()
    assert Without(recorder, (name,)).name == f"recorder without {name}"
    Without(recorder, (name,)).decide(observation)
    gone = FEATURE_GROUPS.get(name, (name,))
    for names, before, after in (
        (MODULE_FEATURES, observation.modules, recorder.seen[0].modules),
        (RUN_FEATURES, observation.run, recorder.seen[0].run),
    ):
        for column, feature in enumerate(names):
            nothing = -3 if feature in ("next_rung_cost", "drop_saving", "adapt_cost") else 0
            np.testing.assert_array_equal(after[..., column], nothing if feature in gone else before[..., column])
    assert observation.modules.all(), "the observation itself stays as it is"


def test_groups_hold_features_that_exist() -> None:
    known = {*MODULE_FEATURES, *RUN_FEATURES}
    assert all(set(names) <= known for names in FEATURE_GROUPS.values())
    with pytest.raises(UnknownNameError, match=r"Unknown feature 'snrr'\. Did you mean: 'snr'"):
        Without(Recorder(), ("snrr",))
    assert Without(Recorder(), ("costs", "relative_depth")).name == "recorder without costs, relative_depth"


def test_once_decides_at_the_first_decision_alone(observation: Observation) -> None:
    recorder = Recorder()
    once = Once(recorder)
    assert once.name == "recorder once"
    np.testing.assert_array_equal(once.decide(observation).ranks, 2)
    later = replace(observation, problem=replace(observation.problem, max_step=2))
    np.testing.assert_array_equal(once.decide(later).ranks, observation.problem.ranks)
    assert len(recorder.seen) == 1
