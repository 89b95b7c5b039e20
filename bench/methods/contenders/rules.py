"""Hand-written rules and one-shot signals as allocators."""

from __future__ import annotations

from .first_plan import FirstPlan
from .pilot import Piloted

GRADIENT_NORM = FirstPlan("gradient-norm", "gradient-norm", "one-shot gradient norms, within the modules of top-down")
RANDOM = FirstPlan("random", "random", "random ranks that use the budget up", quick=True)
TOP_DOWN = FirstPlan("top-down", "top-down", "rule: as many top layers as fit at a useful rank", quick=True)
TOP_DOWN_MLP = FirstPlan("top-down-mlp", "top-down-mlp", "rule: as top-down, more rank for larger modules")
SIGNAL_MEAN = Piloted(
    "signal-mean", "signal-mean", "rule: ranks by the mean of three signals, decided anew", "adaptive"
)
