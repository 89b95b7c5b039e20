"""One colour for each rank in all pictures."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from rankpilot.common.drawing import ABSENT, NO_ADAPTER, RUNGS, rank_colors, write_rank
from rankpilot.lora.spec import DEFAULT_RANKS


def test_higher_ranks_are_darker_and_rungs_stay_apart() -> None:
    assert DEFAULT_RANKS[1:] == RUNGS
    colors = rank_colors(np.array(RUNGS))
    brightness = colors @ (0.299, 0.587, 0.114)
    assert (np.diff(brightness) < -0.5 * np.ptp(brightness) / len(RUNGS)).all(), "half of an even share at least"
    between = rank_colors(np.array([20])) @ (0.299, 0.587, 0.114)
    assert brightness[RUNGS.index(24)] < between < brightness[RUNGS.index(16)]
    np.testing.assert_array_equal(rank_colors(np.array([[2 * RUNGS[-1]]])), colors[-1:, None])


def test_no_adapter_is_grey_and_no_module_is_white() -> None:
    grey, white = rank_colors(np.array([0, ABSENT]))
    assert tuple(grey) == pytest.approx(to_rgb(NO_ADAPTER))
    assert white.tolist() == [1, 1, 1]


def test_a_rank_can_be_read_in_its_cell() -> None:
    axes = Figure().subplots()
    for rank in (0, 1, 64):
        write_rank(axes, rank, (0.5, 0.5))
    write_rank(axes, 8, (0.5, 0.5), "8 ↑", fontsize=11)
    dark, *_ = (to_rgb(text.get_color()) for text in axes.texts[1:])
    assert dark < (0.3, 0.3, 0.3)
    assert axes.texts[2].get_color() == "white"
    assert [text.get_text() for text in axes.texts] == ["0", "1", "64", "8 ↑"]
    assert axes.texts[3].get_fontsize() == 11
