"""Why the plan that was taken is better than the one it was compared with: Shapley values of groups of features.

Both plans stay as they are; what the value networks see of the run is hidden, group by group, behind a baseline. The
Shapley value of a group (Shapley, 1953) is the mean over all orders of the groups of how much the difference of the two
plans changes when the group is shown; Lundberg and Lee (2017, arXiv 1705.07874) introduced it for the predictions of
models. There are few groups, so it is exact: all coalitions are computed. What is left with every group hidden is what
the networks expect of the plan's shape alone.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from math import factorial
from typing import Any

import numpy as np
import torch

from ..agents.learned.networks import Plans, PlanValueEnsemble
from ..agents.learned.policy import LearnedPolicy
from ..agents.log import DecisionRecord
from ..agents.observation import MODULE_FEATURES, RUN_FEATURES
from ..agents.policy import Deliberation
from ..common.arrays import BoolArray, FloatArray, IntArray
from ..errors import ConfigError
from ..lora.adapters import SIGNALS

ACTOR = "actor"
GROUPS: dict[str, tuple[str, ...]] = {
    "signals": SIGNALS,
    "state": ("rank", "adapted", "signal_age"),
    "depth": ("relative_depth",),
    "shape": ("shape", "wide", "position"),
    "costs": ("rank_cost", "next_rung_cost", "drop_saving", "adapt_cost"),
    ACTOR: (),
    "budget of the run": ("budget", "spent"),
    "rest of the run": (
        "progress",
        "decisions_left",
        "modules",
        "depth",
        "loss",
        "trend",
        "horizon",
        "rows",
        "probe_fall",
        "predicted",
    ),
}
"""Features that are hidden together, by name; "actor" are the actor's scores, which networks see too."""

USUAL_RUN = {
    "progress": 0.0,
    "decisions_left": 0.75,
    "budget": 0.58,
    "spent": 1.66,
    "modules": 0.5,
    "depth": 1.0,
    "loss": 0.0,
    "trend": 0.0,
    "horizon": 0.0,
    "rows": 0.6,
    "probe_fall": 0.1,
    "predicted": -0.2,
}
"""Features of a usual run at its first decision: their means over the 48 validation tasks, rounded."""

BASELINE = (
    "A hidden feature of a module is its mean over the modules of this run, hidden scores of the actor are all equal, "
    "and hidden features of the run are those of the first decision of a usual validation task."
)

TOKENS_AT_ONCE = 2**16
"""Modules, counted in each coalition, that go through the networks together."""

TOLERANCE = 1e-3
"""The most by which networks in double precision may differ from the votes in the log, in the unit of votes."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """The parts of the difference of two plans, G groups; all in the unit of votes.

    Attributes:
        plan: number of the plan that is explained, as in the deliberation.
        reference: number of the plan with which it is compared.
        bound: what each group adds to the lower confidence bound of the difference, which is maximised, (G,).
        bound_alone: what is left of the bound with all groups hidden: the plan's shape alone.
        mean: what each group adds to the mean of the networks, (G,).
        mean_alone: what is left of the mean.
        bound_total: the bound with all groups shown; `bound` and `bound_alone` sum up to it.
        mean_total: the mean with all groups shown.
    """

    plan: int
    reference: int
    bound: FloatArray
    bound_alone: float
    mean: FloatArray
    mean_alone: float
    bound_total: float
    mean_total: float

    @property
    def error(self) -> float:
        """By how much the parts miss the whole, for the bound or the mean."""
        missed = self.bound.sum() + self.bound_alone - self.bound_total
        return float(max(abs(missed), abs(self.mean.sum() + self.mean_alone - self.mean_total)))

    def to_json(self) -> dict[str, Any]:
        """The attribution as JSON values."""
        rows = zip(GROUPS, self.bound.tolist(), self.mean.tolist(), strict=True)
        return {
            "quantity": "lower bound",
            "baseline": BASELINE,
            "alone": self.bound_alone,
            "groups": [{"name": name, "value": value, "mean": mean} for name, value, mean in rows],
            "total": self.bound_total,
        }


def attribute(logged: DecisionRecord, policy: LearnedPolicy) -> Attribution | None:
    """Explain the plan that was taken; where that is the reference, the best of the others.

    Args:
        logged: a decision of this policy.
        policy: has a value ensemble.

    Returns:
        None where there is only one plan.

    Raises:
        ConfigError: the log holds no votes there, or these networks give others.
    """
    found, ensemble = logged.deliberation, policy.value_ensemble
    if found is None or ensemble is None:
        raise ConfigError(
            f"Shapley values need the votes of a value ensemble; decision {logged.number} of {logged.policy} has none."
        )
    if len(found.plans) < 2:
        return None
    plan = explained_plan(found)
    differences = _differences(logged, found, ensemble, plan)
    bounds = differences.mean(axis=0) - found.lcb_coefficient * differences.std(axis=0)
    means = differences.mean(axis=0)
    if abs(bounds[-1] - found.bound[plan]) > TOLERANCE:
        raise ConfigError(
            f"The value ensemble of {policy.name} puts the lower bound of this plan at {bounds[-1]:.4f}, and the log "
            f"says {found.bound[plan]:.4f}. Pass the policy that decided."
        )
    weights = _weights(len(GROUPS))
    return Attribution(
        plan,
        found.reference,
        weights @ bounds,
        float(bounds[0]),
        weights @ means,
        float(means[0]),
        float(bounds[-1]),
        float(means[-1]),
    )


def explained_plan(deliberation: Deliberation) -> int:
    """The plan that is compared with the reference: the one taken, or the best other one if that is the reference."""
    if deliberation.plan != deliberation.reference:
        return deliberation.plan
    others = np.arange(len(deliberation.plans)) != deliberation.reference
    return int(np.argmax(np.where(others, deliberation.bound, -np.inf)))


@torch.no_grad()
def _differences(logged: DecisionRecord, found: Deliberation, ensemble: PlanValueEnsemble, plan: int) -> FloatArray:
    """The votes on the plan less those on the reference, float64 (networks, coalitions).

    Coalition number n shows the groups whose bits are set in n.
    """
    networks = deepcopy(ensemble).double()
    observation, count = logged.observation, 2 ** len(GROUPS)
    shown = (np.arange(count)[:, None] >> np.arange(len(GROUPS))) & 1 == 1
    modules = observation.modules.astype(np.float64)
    scores = (found.actor_scores - found.actor_scores.mean()).astype(np.float32).astype(np.float64)
    run, usual = observation.run.astype(np.float64), np.array([USUAL_RUN[name] for name in RUN_FEATURES])
    hidden = {name: ~shown[:, number] for number, name in enumerate(GROUPS)}
    of_modules, of_run = (_hidden_columns(hidden, names) for names in (MODULE_FEATURES, RUN_FEATURES))
    ranks = torch.from_numpy(found.plans[[found.reference, plan]])
    parts = []
    for rows in np.array_split(np.arange(count), -(-count * len(modules) // TOKENS_AT_ONCE)):
        plans = Plans(
            torch.from_numpy(np.where(of_modules[rows, None], modules.mean(axis=0), modules)),
            torch.from_numpy(np.where(hidden[ACTOR][rows, None], 0.0, scores)),
            torch.from_numpy(np.where(of_run[rows], usual, run)),
            torch.ones(len(rows), len(modules), dtype=torch.float64),
            ranks.expand(len(rows), -1, -1),
        )
        values = networks(plans).numpy()
        parts.append(values[:, :, 1] - values[:, :, 0])
    return np.concatenate(parts, axis=1)


def _hidden_columns(hidden: dict[str, BoolArray], features: tuple[str, ...]) -> BoolArray:
    """Which features are hidden in each coalition, bool (coalitions, features)."""
    group_of = {feature: group for group, names in GROUPS.items() for feature in names}
    return np.stack([hidden[group_of[feature]] for feature in features], axis=1)


def _weights(groups: int) -> FloatArray:
    """What each coalition's value counts in each group's Shapley value, (groups, coalitions)."""
    coalitions: IntArray = np.arange(2**groups)
    sizes = ((coalitions[:, None] >> np.arange(groups)) & 1).sum(axis=1)
    orders = np.array([factorial(size) * factorial(groups - size - 1) for size in range(groups)]) / factorial(groups)
    rows = []
    for group in range(groups):
        inside = (coalitions >> group) & 1 == 1
        rows.append(np.where(inside, orders[sizes - 1], -orders[np.minimum(sizes, groups - 1)]))
    return np.stack(rows)
