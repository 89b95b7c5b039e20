"""Which learning rate a plan wants: a rule for plain LoRA on a model, and the factor of a plan beside plain LoRA.

Plain LoRA has rank 8 on all modules. Everything is a sum of logarithms, fitted on fine-tunes of models of width 64 to
8192 (`python -m benchmarks rates`, docs/learning_rate.md), for Adam and its kin.
"""

from __future__ import annotations

import math

import numpy as np

from ..common.arrays import FloatArray, IntArray
from ..lora.spec import REFERENCE_RANK

REFERENCE_SCALE = 2.0
"""The scale of plain LoRA in the fit: `lora_alpha` 16 at rank 8."""

RATE = 5e-4
"""The rate of plain LoRA on a model of `WIDTH` in a run of `STEPS`."""

WIDTH, STEPS = 2048, 780

OF_WIDTH, OF_STEPS = -0.3, -0.3
"""Powers of width / `WIDTH` and of steps / `STEPS` in the rate."""

OF_RANK, OF_SCALE, OF_SHARE = 0.0, -0.5, -0.5
"""Powers of rank / 8, of scale / (scale of plain LoRA), and of the share of the modules that are adapted."""


def rule_rate(width: int, steps: int, scale: float = REFERENCE_SCALE) -> float:
    """The peak learning rate of plain LoRA under Adam.

    Args:
        width: of the model's hidden states, at least 1.
        steps: optimizer steps of the run, at least 1.
        scale: of plain LoRA: alpha / 8, or alpha / sqrt(8) under rsLoRA.
    """
    rate = RATE * (width / WIDTH) ** OF_WIDTH * (steps / STEPS) ** OF_STEPS
    return float(f"{rate * (scale / REFERENCE_SCALE) ** OF_SCALE:.3g}")


def plan_factor(ranks: IntArray, scales: FloatArray, plain_scales: FloatArray) -> float:
    """By what the learning rate of plain LoRA is multiplied under a plan; 1 for plain LoRA, and for no adapter.

    Args:
        ranks: of the modules, (modules,).
        scales: the factor in front of each adapter's output, (modules,).
        plain_scales: the same at rank 8, (modules,).
    """
    adapted = ranks > 0
    if not adapted.any():
        return 1.0
    rank = np.log(ranks[adapted] / REFERENCE_RANK).mean()
    scale = np.log(scales[adapted] / plain_scales[adapted]).mean()
    return math.exp(OF_RANK * rank + OF_SCALE * scale + OF_SHARE * math.log(adapted.mean()))
