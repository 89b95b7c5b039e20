"""Settings of the policy network, in a module that imports no library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import ConfigError


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

    GONE: ClassVar[Mapping[str, Any]] = {"attention_heads": 0}
    RENAMED: ClassVar[Mapping[str, str]] = {"floor_std": "rank_floor_std", "tilt_std": "depth_bias_std"}

    width: int = 32
    critics: int = 4
    score_std: float = 0.05
    shared_std: float = 0.2
    rank_floor_std: float = 0.5
    depth_bias_std: float = 0.7
    signal_gain: float = 0.5

    def __post_init__(self) -> None:
        if min(self.width, self.critics) < 1:
            raise ConfigError(f"width and critics of the network are at least 1; got {self.width} and {self.critics}.")
        stds = (self.score_std, self.shared_std, self.rank_floor_std, self.depth_bias_std)
        if not min(stds) > 0:
            raise ConfigError(f"Standard deviations of exploration are above 0; got {stds}.")
