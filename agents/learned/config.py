"""Settings of the policy network, in a module that imports no library."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import ConfigError, shown

MOST_WIDTH, MOST_NETWORKS = 8192, 256
"""The widest hidden layer and the most networks of one kind: a policy's card asks for them before weights are read."""


@dataclass(frozen=True)
class NetworkConfig:
    """Size of the policy network, and the policy at its start.

    Attributes:
        width: of every hidden layer.
        critics: number of networks that predict the result of a run; their spread is the uncertainty.
        score_std: standard deviation of exploration for each score.
        shared_std: for the gain of each direction, which the modules share.
        rank_floor_std: for log2 of the rank floor.
        depth_bias_std: for the depth bias.
        signal_gain: gain of the mean signal in the scores at the start.

    Raises:
        ConfigError: a value out of range.
    """

    width: int = 32
    critics: int = 4
    score_std: float = 0.05
    shared_std: float = 0.2
    rank_floor_std: float = 0.5
    depth_bias_std: float = 0.7
    signal_gain: float = 0.5

    def __post_init__(self) -> None:
        if not (1 <= self.width <= MOST_WIDTH and 1 <= self.critics <= MOST_NETWORKS):
            raise ConfigError(
                f"width of the network is from 1 to {MOST_WIDTH} and critics from 1 to {MOST_NETWORKS}; got "
                f"{shown(self.width)} and {shown(self.critics)}."
            )
        stds = (self.score_std, self.shared_std, self.rank_floor_std, self.depth_bias_std)
        if not all(0 < std < math.inf for std in stds):
            raise ConfigError(f"Standard deviations of exploration are above 0 and finite; got {stds}.")
        if not math.isfinite(self.signal_gain):
            raise ConfigError(f"signal_gain of the network is finite; got {self.signal_gain}.")
