"""One decision as it is logged: what was seen, wanted and done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..common.arrays import FloatArray, IntArray
from ..errors import DataError
from .controller import RankController
from .decision_line import decision_line
from .decision_state import DecisionState
from .features import MODULE_FEATURES, RUN_FEATURES
from .log_part import DECISION_TYPES, FEATURE_PREFIX, MODULE_TYPES, RUN_PREFIX, SCHEMA_KEY, SCHEMA_VERSION
from .observation import Observation
from .plan import Plan
from .policy import Decision, Policy, keeps
from .problem import AllocationProblem


@dataclass(frozen=True, eq=False)
class DecisionRecord:
    """One decision of a policy; L modules, F features.

    Attributes:
        run: name of the run.
        policy: name of the policy or rule that decided.
        policy_sha256: of the policy's weights; None for a rule, or for a policy that was not loaded from a folder.
        decision: number of the decision in its run, from 0.
        step: optimiser steps done before it.
        seed: seed of the run.
        loss: latest training loss; None before the first step.
        predicted_cost: predicted cost of the plan, in the unit of the problem.
        measured_cost: measured since the decision before this one, in the same unit; None if nothing measures it.
        rank_floor: see `Decision`, as the four that follow.
        depth_bias: how much upper layers came before lower ones.
        log_prob: log-probability of the plan; None where the policy does not draw plans.
        expected: improvement that the policy expects.
        uncertainty: standard deviation of that.
        modules: full names, in the order of all arrays.
        problem: the plans that were possible, with the ranks in place and the pinned modules.
        rank_wanted: ranks that the policy wanted, int (L,).
        rank_clipped: those on the ladder and within the bounds, before the budget, int (L,). Where a person changed a
            rank in review, it is the person's.
        rank_after: ranks of the plan, int (L,).
        score: priority in the projection, float (L,).
        features: what the policy saw of each module, float32 (L, F).
        feature_names: names of the columns of `features`.
        run_features: what the policy saw of the whole run.
        kept: whether the policy wanted the ranks in place.
        correction: whether the guard or a person changed the ranks, and not the policy.
        state: what the policy computed, and the schedule.
        notes: why a module did not get the rank that the policy wanted, by name; the others are left out.

    Raises:
        DataError: lengths disagree, a name is used twice, or a number is out of range.
    """

    run: str
    policy: str
    policy_sha256: str | None
    decision: int
    step: int
    seed: int
    loss: float | None
    predicted_cost: float
    measured_cost: float | None
    rank_floor: float
    depth_bias: float
    log_prob: float | None
    expected: float
    uncertainty: float
    kept: bool
    correction: bool
    modules: tuple[str, ...]
    problem: AllocationProblem
    rank_wanted: IntArray
    rank_clipped: IntArray
    rank_after: IntArray
    score: FloatArray
    features: NDArray[np.float32]
    feature_names: tuple[str, ...]
    run_features: Mapping[str, float]
    state: DecisionState
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        controller: RankController[Any],
        observation: Observation,
        decision: Decision,
        plan: Plan,
        *,
        policy: Policy,
        number: int,
        step: int,
        run: str = "",
        loss: float | None = None,
        measured_cost: float | None = None,
        notes: Mapping[str, str] | None = None,
        correction: bool = False,
    ) -> DecisionRecord:
        """The record of a decision that has just been applied, in a fine-tune or in an episode.

        Args:
            controller: has applied it.
            observation: what the decision was made from.
            decision: what was wanted.
            plan: what was applied.
            policy: made the decision.
            number: of the decision in its run, from 0.
            step: optimiser steps done before it.
            run: name of the run.
            loss: mean training loss since the decision before this one.
            measured_cost: see the class.
            notes: by module name, beside those of the controller.
            correction: see the class.
        """
        return cls(
            run=run,
            policy=policy.name,
            policy_sha256=getattr(policy, "sha256", None),  # of learned policies alone
            decision=number,
            step=step,
            seed=controller.seed,
            loss=loss,
            predicted_cost=plan.cost,
            measured_cost=measured_cost,
            rank_floor=decision.rank_floor,
            depth_bias=decision.depth_bias,
            log_prob=decision.log_prob,
            expected=decision.expected,
            uncertainty=decision.uncertainty,
            kept=keeps(observation, decision),
            correction=correction,
            modules=observation.names,
            problem=_with_pinned(observation, controller.notes),
            rank_wanted=decision.ranks,
            rank_clipped=plan.clipped,
            rank_after=plan.ranks,
            score=decision.scores,
            features=observation.modules,
            feature_names=MODULE_FEATURES,
            run_features=dict(zip(RUN_FEATURES, observation.run.tolist(), strict=True)),
            state=DecisionState(asdict(controller.schedule), decision.deliberation),
            notes={**(notes or {}), **controller.notes},
        )

    def __post_init__(self) -> None:
        count = len(self.modules)
        if count == 0 or self.decision < 0 or self.step < 0:
            raise DataError(
                "A decision has modules, and a number and a step from 0 on; "
                f"got {count} modules, decision {self.decision}, step {self.step}."
            )
        shapes = dict.fromkeys(("rank_wanted", "rank_clipped", "rank_after", "score"), (count,))
        given = {name: np.shape(getattr(self, name)) for name in shapes}
        given |= {"problem.ranks": np.shape(self.problem.ranks), "features": np.shape(self.features)}
        wanted = {**shapes, "problem.ranks": (count,), "features": (count, len(self.feature_names))}
        for name, shape in given.items():
            if shape != wanted[name]:
                raise DataError(f"`{name}` of decision {self.decision} has shape {shape}, not {wanted[name]}.")
        for names in (self.modules, self.feature_names):
            if len(set(names)) < len(names):
                raise DataError(f"A module or feature name of decision {self.decision} is used twice: {names}.")

    def line(self) -> str:
        """The decision in one line; see `decision_line`."""
        problem = self.problem
        cost, unit = self.predicted_cost, problem.cost.unit
        return decision_line(self.step, problem.ranks, self.rank_after, cost, problem.limit, unit)

    def to_table(self, problem_file: str) -> pa.Table:
        """One row for each module.

        Args:
            problem_file: name of the file that holds `problem`.
        """
        count, problem, deliberation = len(self.modules), self.problem, self.state.deliberation
        values = {
            **vars(self),
            "margin": deliberation and deliberation.margin,
            "tie_size": deliberation and int(deliberation.tied.sum()),
            "filled": int(np.count_nonzero(np.asarray(self.rank_after) > np.asarray(self.rank_clipped))),
            "limit": problem.limit,
            "unit": problem.cost.unit,
            "max_step": problem.max_step,
            "hysteresis": problem.hysteresis,
            "problem": problem_file,
            "module_index": range(count),
            "module": self.modules,
            "block": problem.blocks,
            "pinned": problem.is_pinned,
            "rank_before": problem.ranks,
            "changed_by_projection": np.asarray(self.rank_clipped) != np.asarray(self.rank_after),
            "note": [self.notes.get(name) for name in self.modules],
        }
        columns = {name: pa.repeat(pa.scalar(values[name], kind), count) for name, kind in DECISION_TYPES.items()}
        columns |= {name: pa.array(values[name], kind) for name, kind in MODULE_TYPES.items()}
        for index, name in enumerate(self.feature_names):
            columns[FEATURE_PREFIX + name] = pa.array(self.features[:, index], pa.float32())
        for name, value in self.run_features.items():
            columns[RUN_PREFIX + name] = pa.repeat(pa.scalar(value, pa.float32()), count)
        return pa.table(columns).replace_schema_metadata({SCHEMA_KEY: str(SCHEMA_VERSION).encode()})


def _with_pinned(observation: Observation, notes: Mapping[str, str]) -> AllocationProblem:
    """The problem of an observation, with the modules pinned of which a controller notes why it left them alone."""
    pinned = np.isin(observation.names, list(notes))
    return replace(observation.problem, pinned=pinned) if pinned.any() else observation.problem
