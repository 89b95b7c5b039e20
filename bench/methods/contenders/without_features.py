"""Policies that do not see some features, to see what these are good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ....allocation.features import MODULE_FEATURES, RUN_FEATURES
from ....allocation.observation import Observation
from ....allocation.policy import Decision, Policy
from ....errors import UnknownNameError

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
