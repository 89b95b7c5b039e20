"""An explanation of a decision, in the form that a page takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .conftest import plans

PLANS = 30


def explanation(decision: int, modules: int = 36) -> dict[str, Any]:
    """A decision over 30 plans, of which plan 2 was taken; the further down the list, the worse a plan."""
    rng = np.random.default_rng(decision)
    taken = plans()[decision].tolist() if modules == 36 else [4] * modules
    listed = []
    for index in range(PLANS):
        votes = (0.3 - 0.01 * abs(index - 2) + 0.02 * np.array([-1, 0, 0.5, 1.0])).tolist()
        mean, sd = float(np.mean(votes)), float(np.std(votes))
        ranks = taken if index == 2 else [rank + 4 * (rng.random() < 0.1) for rank in taken]
        listed.append(
            {"ranks": ranks, "votes": votes, "mean": mean, "sd": sd, "bound": mean - sd, "probability": None,
             "tied": index in (1, 2, 3), "cost": 1e6}
        )  # fmt: skip
    return {
        "decision": decision, "step": 0, "first": decision == 0, "policy": "default",
        "verdict": f"Verdict on decision {decision}.", "sentences": ["Four networks agree."],
        "candidates": [
            {"name": "signal-mean", "gains": {"signal_mean": 0.5, "actor": -1.0}, "rank_floor": 8.0, "depth_bias": 4.0,
             "plan": 2},
            {"name": None, "gains": {}, "rank_floor": 8.0, "depth_bias": 4.0, "plan": PLANS - 1},
        ],
        "plans": listed, "taken": 2, "reference": PLANS - 1, "caution": 1.0, "margin": 0.02,
        "unit_of_votes": "standard deviations", "actor": {"directions": ["sensitivity"], "gains": [float("nan")]},
        "shapley": {"quantity": "lower bound", "baseline": "the mean module.", "alone": 0.05, "total": 0.25,
                    "groups": [{"name": "signals", "value": 0.25, "mean": 0.3}, {"name": "shape", "value": -0.05}]},
        "what_ifs": [{"text": "With less memory it would have rank 4.", "side_effects": 11}],
        "projection": None, "stability": {"same": 0.9, "noise": 0.05, "sure": [True] * (modules - 1) + [False]},
    }  # fmt: skip
