"""The worth of a plan: its expected final log loss relative to plain LoRA, with an uncertainty.

Plain LoRA has rank 8 on all modules, or a module's maximum, and its own best learning rate; a plan has the rate given
by the rule (`decide/plan/rate.py`). A plan is described by a few numbers, `FEATURES`, all 0 for plain LoRA: the modules
without an adapter, and the differences in rank. Their effects vary between fine-tunes, so each has a mean and a
covariance over fine-tunes: a linear mixed model (Laird and Ware, Biometrics 38, 1982). `python -m benchmarks worth`
fits it on real fine-tunes and evaluates it on held-out models (docs/decision.md).

The wider the spread of an effect, the less a plan relying on it is trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...common.arrays import BoolArray, FloatArray, IntArray
from ...common.errors import DataError
from ...lora.spec import REFERENCE_RANK

FEATURES = {
    "MLP modules without adapter, lower half": "share of the MLP modules of the lower half of the layers",
    "MLP modules without adapter, upper half": "the same of the upper half",
    "attention modules without adapter, lower half": "the same of the other modules",
    "attention modules without adapter, upper half": "the same of the upper half",
    "few modules": "square of the share of all modules without adapter",
    "layers without adapter at the bottom": "relative depth of the lowest adapted module, 0 to 1",
    "rank of MLP modules": "mean of log2(rank / plain LoRA's), 0 where there is no adapter",
    "rank of attention modules": "the same of the other modules",
    "other ranks than 8": "mean of abs(log2(rank / plain LoRA's)) over all modules",
    "rank in a wide model": "mean of log2(rank / plain LoRA's) times log2(width / 512), over 4",
    "lower layers of a wide model": "share of the lower half without adapter, times log2(width / 512), over 4",
    "layers at the bottom of a wide model": "relative depth of the lowest adapted module, times the same",
}
"""Features of a plan, with their meanings."""

KNOWN = {"width": (32, 576), "layers": (1, 30), "steps": (50, 800)}
"""Range of the runs behind the expectations: model width, layers (the shallowest had 4), optimizer steps."""

FILE = Path(__file__).with_name("worth.json")


@dataclass(frozen=True, eq=False)
class Modules:
    """Properties of a model needed for the worth of a plan; L modules.

    Attributes:
        wide: mask of MLP modules, bool (L,); see `ModuleShapes`.
        depth: relative depth of the layer, from the bottom (0) to the top (1), (L,).
        width: width of the model's hidden states.
        plain: rank of plain LoRA on each, at least 1, int (L,) or one number.
    """

    wide: BoolArray
    depth: FloatArray
    width: float
    plain: IntArray | int = REFERENCE_RANK

    def features(self, ranks: IntArray) -> FloatArray:
        """Features of P plans with these ranks, int (P, L): (P, len(FEATURES))."""
        adapted = ranks > 0
        missing = np.asarray(1.0 - adapted)
        lower, width = self.depth < 0.5, math.log2(self.width / 512) / 4
        levels = np.asarray(np.where(adapted, np.log2(np.maximum(ranks, 1) / self.plain), 0.0))
        halves = [kind & half for kind in (self.wide, ~self.wide) for half in (lower, ~lower)]
        lowest = np.where(adapted, self.depth, 1.0).min(axis=1)
        columns = [
            *(_mean(missing, half) for half in halves),
            missing.mean(axis=1) ** 2,
            lowest,
            *(_mean(levels, kind) for kind in (self.wide, ~self.wide)),
            np.abs(levels).mean(axis=1),
            levels.mean(axis=1) * width,
            _mean(missing, lower) * width,
            lowest * width,
        ]
        return np.stack(columns, axis=1)


def octaves_beyond(name: str, value: float) -> float:
    """Doublings by which a value lies outside the `KNOWN` range of that name; 0 within half a unit of it."""
    low, high = KNOWN[name]
    if low - 0.5 < value < high + 0.5:
        return 0.0
    return abs(math.log2(value / (low if value < low else high)))


def _mean(values: FloatArray, chosen: BoolArray) -> FloatArray:
    """Mean over some modules, (P,); 0 if the model has none of them."""
    return np.asarray(values[:, chosen].mean(axis=1) if chosen.any() else np.zeros(len(values)))


@dataclass(frozen=True, eq=False)
class PlanWorth:
    """Effect of each feature on the log loss, over fine-tunes; F features.

    Attributes:
        effects: mean effects, (F,).
        covariance: covariance of the effects over fine-tunes, (F, F).
        noise: standard deviation of the residual for a plan that differs from plain LoRA everywhere.
    """

    effects: FloatArray
    covariance: FloatArray
    noise: float

    def parts(self, features: FloatArray) -> FloatArray:
        """Contribution of each feature to the expected log loss of plans, (P, F)."""
        return features * self.effects

    def spread(self, features: FloatArray) -> FloatArray:
        """Standard deviation of the log loss of plans relative to plain LoRA's, (P,); 0 for plain LoRA."""
        of_effects = np.einsum("pi,ij,pj->p", features, self.covariance, features)
        return np.asarray(np.sqrt(of_effects + self.noise**2 * distance(features)))

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        effects = dict(zip(FEATURES, self.effects.tolist(), strict=True))
        return {"effects": effects, "covariance": self.covariance.tolist(), "noise": self.noise}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> PlanWorth:
        """Restore from the output of `to_json`.

        Raises:
            DataError: it has other features.
        """
        if list(state["effects"]) != list(FEATURES):
            raise DataError(f"These effects are of the features {list(state['effects'])}, not {list(FEATURES)}.")
        return cls(np.array(list(state["effects"].values())), np.array(state["covariance"]), float(state["noise"]))


def distance(features: FloatArray) -> FloatArray:
    """Distance of plans from plain LoRA, (P,): 0 for plain LoRA itself, 1 for a plan that differs everywhere."""
    few, other = (features[:, list(FEATURES).index(name)] for name in ("few modules", "other ranks than 8"))
    return np.asarray(np.minimum(1.0, np.sqrt(few) + other / 4))


@cache
def packaged_worth() -> PlanWorth:
    """Load the fit included in the package."""
    return PlanWorth.from_json(json.loads(FILE.read_text(encoding="utf-8")))
