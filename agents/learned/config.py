"""Settings of the policy network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import ConfigError


@dataclass(frozen=True)
class NetworkConfig:
    """Size and start of the network.

    Attributes:
        width: of every hidden layer.
        critics: networks that predict the outcome of a run; their disagreement is the uncertainty.
        score_std: standard deviation of exploration on each score.
        shared_std: of exploration on the gain of each feature, shared by the modules.
        rank_floor_std: of exploration on log2 of the rank floor.
        depth_bias_std: of exploration on the depth bias.
        signal_gain: weight of signal-mean in the score at the start.

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
