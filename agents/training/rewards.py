"""The reward of training: how much lower an episode's held-out loss is than the rule's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...env.reward import REWARD_BOUND
from ...env.tasks.proxy_task import ProxyTask
from .stack_worker import StackState


def rewards_of(state: StackState, tasks: Sequence[ProxyTask]) -> NDArray[np.float32]:
    """Improvements over the rule in shares of the headroom, less the churn; -3 to 3, failed runs at the lower end.

    Args:
        state: of a stack that has ended.
        tasks: one a group; the reference of each says how the headroom compares with what uniform gains.
    """
    rows = []
    groups = np.array(state.losses).reshape(len(tasks), -1)
    for task, losses, rule, initial in zip(tasks, groups, state.rule_losses, state.initial_losses, strict=True):
        assert task.reference is not None
        sound = losses[np.isfinite(losses)]
        level = rule if math.isfinite(rule) else float(np.median(sound)) if len(sound) else initial
        gain = max(initial - level, 0.01 * initial, 1e-6)
        shares = (level - losses) / (gain * task.reference.headroom / task.reference.gain)
        rows.append(np.clip(np.nan_to_num(shares, nan=-REWARD_BOUND), -REWARD_BOUND, REWARD_BOUND))
    return np.asarray(np.concatenate(rows) - np.array(state.churn), dtype=np.float32)
