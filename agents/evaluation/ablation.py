"""Policies with something taken from them, to see what it was good for: features, later decisions, all of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...allocation.actions import base_depth_bias, base_rank_floor
from ...allocation.features import MODULE_FEATURES, RUN_FEATURES
from ...allocation.observation import Observation, module_feature
from ...allocation.policy import Decision, Policy, decision_from_scores, decision_to_keep, is_first
from ...common.arrays import FloatArray
from ...errors import ConfigError, UnknownNameError
from ..learned.policy import LearnedPolicy

FEATURE_GROUPS: dict[str, tuple[str, ...]] = {
    "signals": ("sensitivity", "snr", "relative_change", "gradient_norm", "importance"),
    "costs": ("rank_cost", "next_rung_cost", "drop_saving", "adapt_cost", "budget", "spent"),
    "place": ("relative_depth", "shape", "wide", "position"),
    "progress": ("progress", "decisions_left", "loss", "trend", "horizon", "rows", "probe_fall", "predicted"),
}
"""Features that are taken together, by name."""

_ALL = (*MODULE_FEATURES, *RUN_FEATURES)

_NOTHING = {"next_rung_cost": -3.0, "drop_saving": -3.0, "adapt_cost": -3.0}
"""What is seen in place of features whose 0 says something: these are logarithms of shares of the budget."""


def hide(
    names: Sequence[str], modules: NDArray[np.float32], run: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features with a constant in place of some: 0, or -3 where that is the logarithm of next to nothing.

    Args:
        names: of features or of groups of them.
        modules: (..., len(MODULE_FEATURES)).
        run: (..., len(RUN_FEATURES)).

    Raises:
        UnknownNameError: no such feature.
    """
    hidden = _features(names)
    nothing = np.array([_NOTHING.get(name, 0.0) for name in MODULE_FEATURES], dtype=np.float32)
    left = np.where(np.isin(MODULE_FEATURES, hidden), nothing, modules)
    return left, run * np.float32(~np.isin(RUN_FEATURES, hidden))


def _features(names: Sequence[str]) -> list[str]:
    """Single features; UnknownNameError for a name that is neither one nor a group of them."""
    for name in names:
        if name not in FEATURE_GROUPS and name not in _ALL:
            raise UnknownNameError.of("feature", name, [*FEATURE_GROUPS, *_ALL])
    return [feature for name in names for feature in FEATURE_GROUPS.get(name, (name,))]


@dataclass(frozen=True)
class Without:
    """A policy that sees a constant in place of some features, see `hide`.

    Attributes:
        policy: whose.
        features: names of features or of groups of them.

    Raises:
        UnknownNameError: no such feature.
    """

    policy: Policy
    features: tuple[str, ...]

    def __post_init__(self) -> None:
        _features(self.features)

    @property
    def name(self) -> str:
        """What logs and tables call it."""
        return f"{self.policy.name} without {', '.join(self.features)}"

    def decide(self, observation: Observation) -> Decision:
        """As the policy, on what is left."""
        modules, run = hide(self.features, observation.modules, observation.run)
        return self.policy.decide(replace(observation, modules=modules, run=run))


@dataclass(frozen=True)
class Once:
    """A policy that decides at the start of the run alone.

    Attributes:
        policy: whose.
    """

    policy: Policy

    @property
    def name(self) -> str:
        """What logs and tables call it."""
        return f"{self.policy.name} once"

    def decide(self, observation: Observation) -> Decision:
        """As the policy at the first decision; no change after."""
        return self.policy.decide(observation) if is_first(observation) else decision_to_keep(observation)


def actor_of(policy: Policy) -> Policy:
    """A learned policy without its value ensemble; ConfigError for one that has none."""
    if not isinstance(policy, LearnedPolicy) or policy.value_ensemble is None:
        raise ConfigError(f"{policy.name} has no value ensemble that could be left out.")
    return replace(policy, name=f"{policy.name} actor", value_ensemble=None)


KNOTS = np.linspace(0, 1, 5)
"""Relative depths at which scores are given; between them they are interpolated."""


@dataclass(frozen=True)
class Constant:
    """The same action at every decision: scores by relative depth, and a placement.

    Attributes:
        name: the name in logs and tables.
        scores: at each of `KNOTS`.
        placement: see `PLACEMENT`.
    """

    name: str
    scores: tuple[float, ...]
    placement: tuple[float, ...]

    def decide(self, observation: Observation) -> Decision:
        """Take the constant action."""
        scores = np.interp(module_feature(observation, "relative_depth"), KNOTS, self.scores)
        return decision_from_scores(observation, scores, self.placement)


def constant_of(policy: Policy, observations: Sequence[Observation], name: str) -> Constant:
    """The mean action of a policy over several tasks.

    Modules of different models have only their relative depth in common. So the scores at `KNOTS` are those from which
    interpolation comes nearest to the policy's scores, by least squares. A plan that follows from no scores counts with
    the logs of its ranks, half a rank where there is none, and its lowest rank as the rank floor.

    Args:
        policy: decides.
        observations: of first decisions.
        name: of the constant policy.
    """
    depths, scores, placement = [], [], []
    for observation in observations:
        decision, problem = policy.decide(observation), observation.problem
        base_floor, base_bias = base_rank_floor(problem), base_depth_bias(problem)
        depths.append(module_feature(observation, "relative_depth"))
        if decision.rank_floor > 0:
            scores.append(decision.scores)
            placement.append((np.log2(decision.rank_floor / base_floor), decision.depth_bias - base_bias))
        else:
            logs = np.log(np.maximum(decision.ranks, 0.5))
            scores.append(logs - logs.mean())
            lowest = decision.ranks[decision.ranks > 0].min(initial=problem.ladder.ranks[-1])
            placement.append((np.log2(lowest / base_floor), 0.0))
    fitted = np.linalg.lstsq(_hats(np.concatenate(depths)), np.concatenate(scores), rcond=None)[0]
    return Constant(name, tuple(fitted.tolist()), tuple(np.mean(placement, axis=0).tolist()))


def _hats(depths: FloatArray) -> FloatArray:
    """The weight of each knot in the interpolation at each relative depth, (depths, knots)."""
    return np.stack([np.interp(depths, KNOTS, one) for one in np.eye(len(KNOTS))], axis=1)
