"""One colour for each rank in all pictures."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from rankpilot.common.drawing import NO_ADAPTER, RUNGS, rank_colors
from rankpilot.lora.spec import DEFAULT_RANKS


def test_higher_ranks_are_darker_and_rungs_stay_apart() -> None:
    assert DEFAULT_RANKS[1:] == RUNGS
    colors = rank_colors(np.array(RUNGS))
    brightness = colors @ (0.299, 0.587, 0.114)
    assert (np.diff(brightness) < -0.5 * np.ptp(brightness) / len(RUNGS)).all(), "half of an even share at least"
    between = rank_colors(np.array([20])) @ (0.299, 0.587, 0.114)
    assert brightness[RUNGS.index(24)] < between < brightness[RUNGS.index(16)]
    np.testing.assert_array_equal(rank_colors(np.array([[2 * RUNGS[-1]]])), colors[-1:, None])


def test_no_adapter_is_grey() -> None:
    assert tuple(rank_colors(np.array([0]))[0]) == pytest.approx(to_rgb(NO_ADAPTER))
