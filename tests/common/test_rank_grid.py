"""One colour for each rank in all pictures."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from rankpilot.common.rank_grid import ABSENT, HIGHEST, NO_ADAPTER, draw_cells, draw_key, rank_colors, write_rank


def test_higher_ranks_are_darker_and_low_ones_stay_apart() -> None:
    colors = rank_colors(np.array([1, 2, 4, 8, 12, 16, 24, 32, 48, HIGHEST]))
    brightness = colors @ (0.299, 0.587, 0.114)
    assert (np.diff(brightness) < -0.02).all()
    assert np.abs(np.diff(colors[:4], axis=0)).max(axis=1).min() > 0.14
    np.testing.assert_array_equal(rank_colors(np.array([[2 * HIGHEST]])), colors[-1:, None])


def test_no_adapter_is_grey_and_no_module_is_white() -> None:
    grey, white = rank_colors(np.array([0, ABSENT]))
    assert tuple(grey) == pytest.approx(to_rgb(NO_ADAPTER))
    assert white.tolist() == [1, 1, 1]


def test_cells_fill_the_axes_and_only_rank_zero_is_hatched() -> None:
    axes = Figure().subplots()
    draw_cells(axes, np.array([[0, 1], [ABSENT, 0]]), (0, 30, 100), gap=1.0, hatched=True)
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 100), (0, 2))
    boxes = [path.get_extents().bounds for path in axes.collections[1].get_paths()]
    assert boxes == [(0, 0, 30, 1), (30, 1, 70, 1)]


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


def test_the_key_names_each_rank() -> None:
    axes = Figure().subplots()
    draw_key(axes, (0, 1, 8))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "8"]
    assert axes.get_title(loc="left") == "rank"
