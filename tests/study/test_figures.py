"""Pictures show the numbers that they were given."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rankpilot.common.drawing import save_figure
from rankpilot.common.text import short_names
from rankpilot.study.pictures import learning_curve, learning_sentence, rank_heatmap

ROOT = Path(__file__).parents[2]
KINDS = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
LLAMA = [f"model.layers.{layer}.{kind}" for layer in range(143) for kind in KINDS]
SMALL = ["encoder.layer.0.query", "encoder.layer.0.key", "encoder.layer.1.query", "encoder.layer.1.key"]


def small_heatmap(ranks: list[list[int]]) -> Figure:
    return rank_heatmap([0, 50], np.array(ranks), SMALL, np.array([0, 0, 1, 1]), 100)


def pixel(figure: Figure, step: float, row: float) -> tuple[int, int, int]:
    """Colour at a place of the heat-map."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=100, format="png")
    stream.seek(0)
    picture = imread(stream)
    x, y = figure.axes[0].transData.transform((step, row))
    red, green, blue = (picture[picture.shape[0] - 1 - int(y), int(x), :3] * 255).round().astype(int)
    return int(red), int(green), int(blue)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_heatmap_colours_follow_rank_step_and_layer() -> None:
    figure = small_heatmap([[1, 1, 32, 1], [32, 1, 32, 1]])
    low, high = pixel(figure, 75, 1.25), pixel(figure, 75, 2.25)
    assert sum(high) < sum(low) - 150  # higher is darker
    assert pixel(figure, 25, 2.25) == high  # layer 1 is above layer 0
    assert pixel(figure, 25, 0.25) == low  # drawn to scale: the change comes at step 50 of 100
    assert pixel(figure, 48, 0.25) == low
    assert pixel(figure, 52, 0.25) == high


def test_heatmap_shows_rank_zero_grey() -> None:
    figure = small_heatmap([[0, 1, 1, 1], [0, 1, 1, 1]])
    red, green, blue = pixel(figure, 75, 0.25)
    assert red == green == blue
    assert 180 < red < 240


def test_heatmap_numbers_only_new_ranks_and_marks_decisions() -> None:
    figure = small_heatmap([[1, 2, 4, 8], [1, 2, 4, 12]])
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == sorted(["1", "2", "4", "8", "12"])
    decisions = axes.child_axes[-1]
    assert [label.get_text() for label in decisions.get_xticklabels()] == ["0", "50"]
    key = figure.axes[1]
    assert [label.get_text() for label in key.get_yticklabels()] == ["0", "1", "2", "4", "8", "12"]


def test_heatmap_title_tells_how_concentrated_the_ranks_are() -> None:
    moved = texts(small_heatmap([[1, 1, 1, 1], [8, 0, 1, 1]]))[0]
    assert "layer 0 query went from rank 1 to 8" in moved
    assert "of 2 changes" in moved
    assert moved.endswith("1 of 4 modules ends with 80% of the total rank; 1 ends without an adapter")
    assert texts(small_heatmap([[8, 0, 1, 1]] * 2))[0].startswith("1 of 4 modules"), "none moved"
    assert texts(small_heatmap([[1] * 4, [4] * 4]))[0] == "All 4 modules end at rank 4"
    assert texts(small_heatmap([[1] * 4, [0] * 4]))[0] == "No module ends with an adapter"


def test_heatmap_names_modules_only_while_there_is_room() -> None:
    few = small_heatmap([[1] * 4, [1] * 4]).axes[0]
    assert [label.get_text() for label in few.get_yticklabels()] == ["query", "key", "query", "key"]
    blocks = np.repeat(np.arange(32), 7)
    many = rank_heatmap([0], np.ones((1, 224), dtype=int), LLAMA[:224], blocks, 10)
    assert [axes.get_title() for axes in many.axes] == [*(kind.rpartition(".")[2] for kind in KINDS), ""]
    assert [label.get_text() for label in many.axes[0].get_yticklabels()] == [f"layer {i}" for i in range(32)]
    assert not many.axes[0].texts


def test_panels_show_the_rank_of_each_kind_and_layer() -> None:
    ranks = np.ones((2, 224), dtype=int)
    ranks[1, 7 * 31 + 1] = 32  # k_proj of the top layer
    figure = rank_heatmap([0, 50], ranks, LLAMA[:224], np.repeat(np.arange(32), 7), 100)
    cells = [axes.collections[0].get_array().reshape(32, 2, -1) for axes in figure.axes[:7]]
    low = cells[0][0, 0]
    changed = [np.argwhere(~np.isclose(values, low).all(axis=2)).tolist() for values in cells]
    assert changed == [[], [[31, 1]], *[[]] * 5]


def test_panels_of_experts_show_their_mean() -> None:
    kinds = ("self_attn.q_proj", *(f"mlp.experts.{number}.up_proj" for number in range(8)))
    modules = [f"model.layers.{layer}.{kind}" for layer in range(10) for kind in kinds]
    modules += ["lm_head", "embed"]
    ranks = np.full((1, 92), 4)
    blocks = np.array([*np.repeat(np.arange(10), 9), 10, 11])
    figure = rank_heatmap([0], ranks, modules, blocks, 10)
    assert [axes.get_title() for axes in figure.axes] == ["q_proj", "up_proj", "other", ""]
    assert "Cells with several modules show their mean." in texts(figure)[1]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [*(f"layer {number}" for number in range(10)), "lm_head", "embed"]


@pytest.mark.parametrize("layers", [4, 143])
def test_nothing_is_clipped(layers: int) -> None:
    count = layers * 7
    ranks = np.arange(2 * count).reshape(2, count) % 33
    figure = rank_heatmap([0, 36], ranks, LLAMA[:count], np.repeat(np.arange(layers), 7), 200)
    figure.savefig(io.BytesIO(), format="png")
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height


def test_short_names() -> None:
    bert = [f"bert.encoder.layer.10.{k}" for k in ("attention.self.query", "attention.output.dense", "output.dense")]
    assert [str(name) for name in short_names(bert)] == [
        "layer 10 query",
        "layer 10 attention.output.dense",
        "layer 10 output.dense",
    ]
    mixed = short_names(["lm_head", "model.layers.0.mlp.up_proj"])
    assert [str(name) for name in mixed] == ["lm_head", "layer 0 up_proj"]
    experts = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(2)]
    assert [name.kind for name in short_names(experts)] == ["experts.0.up_proj", "experts.1.up_proj"]
    t5 = [f"{stack}.block.0.layer.0.SelfAttention.q" for stack in ("encoder", "decoder")]
    assert len({str(name) for name in short_names(t5)}) == 2, "two stacks stay different"


def progress(rounds: int) -> list[dict[str, float]]:
    """Rows of a training that is validated before it and after every second round."""
    rows: list[dict[str, float]] = [{"round": 0, "validation": 0.5}]
    for i in range(1, rounds + 1):
        rows.append({"round": i, "episodes": 64, "over_rule": i / 10, "over_rule_p10": -1.0, "over_rule_p90": 2.0})
        if i % 2 == 0:
            rows[-1]["validation"] = round(0.5 - i / 5, 9)
    return rows


def test_learning_curve() -> None:
    figure = learning_curve(progress(5))
    assert texts(figure)[0].startswith("The agent of round 4 is kept: its losses on validation tasks are 0.3 % below")
    training, validation = figure.axes
    assert list(training.lines[0].get_ydata()) == [0.1, 0.2, 0.3, 0.4, 0.5]
    band = training.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (-1.0, 2.0)
    np.testing.assert_allclose(validation.lines[0].get_xydata(), [[0, -0.5], [2, -0.1], [4, 0.3]])


def test_learning_curve_of_an_agent_that_got_worse_or_was_not_validated() -> None:
    rows = [{"round": 0, "validation": 0.1}, *progress(1)[1:]]
    assert learning_sentence(rows).startswith("The copy of the rule is kept")
    assert learning_curve(rows[1:]).axes
    assert learning_curve([]).axes


def test_saved_figures_are_reproducible_and_leave_nothing_else(tmp_path: Path) -> None:
    paths = [tmp_path / "figures" / f"{name}.png" for name in "ab"]
    for path in paths:
        assert save_figure(small_heatmap([[1, 2, 4, 8], [8, 4, 2, 1]]), path) == path
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(paths[0].parent.iterdir()) == paths
    assert imread(paths[0]).shape[1] == 1350


def test_pyplot_stays_out() -> None:
    """It would open windows and keep figures, in the programs of users."""
    sources = [path for room in ("study", "common", "finetune") for path in (ROOT / room).glob("*.py")]
    assert not [path for path in sources if "pyplot" in path.read_text()]
