"""Pictures show the numbers that they were given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread
from rankpilot.agents.training import learning_curve, learning_sentence
from rankpilot.common.drawing import save_figure
from rankpilot.common.text import module_kinds, short_names
from rankpilot.lora.spec import DEFAULT_RANKS
from rankpilot.study.page import RANK_COLORS
from rankpilot.study.verdict import ranks_sentence

ROOT = Path(__file__).parents[2]
SMALL = ["encoder.layer.0.query", "encoder.layer.0.key", "encoder.layer.1.query", "encoder.layer.1.key"]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_ranks_in_words_tell_what_changed_or_how_concentrated_they_are() -> None:
    def told(*ranks: list[int]) -> str:
        return ranks_sentence(np.array(ranks), SMALL)

    moved = told([1, 1, 1, 1], [8, 0, 1, 1])
    assert "layer 0 query went from rank 1 to 8" in moved
    assert "of 2 changes" in moved
    assert moved.endswith("; 1 ends without an adapter")
    assert told([8, 0, 1, 1], [8, 0, 1, 1]).startswith("No rank changed")
    assert told([8, 0, 1, 1]).startswith("1 of 4 modules"), "of a single plan"
    assert told([1] * 4, [4] * 4) == "All 4 modules end at rank 4"
    assert told([1] * 4, [0] * 4) == "No module ends with an adapter"


def test_experts_of_one_kind_are_one_kind() -> None:
    kinds = ("self_attn.q_proj", *(f"mlp.experts.{number}.up_proj" for number in range(8)))
    modules = [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in kinds]
    assert set(module_kinds(short_names([*modules, "lm_head"]))) == {"q_proj", "up_proj", "lm_head"}


def test_higher_ranks_are_darker_and_rungs_stay_apart() -> None:
    colors = np.array([list(bytes.fromhex(color)) for color in RANK_COLORS.split()])
    assert len(colors) == len(DEFAULT_RANKS[1:])
    brightness = colors @ (0.299, 0.587, 0.114)
    assert (np.diff(brightness) < -0.5 * np.ptp(brightness) / len(colors)).all(), "half of an even share at least"


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
        assert save_figure(learning_curve(progress(5)), path) == path
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(paths[0].parent.iterdir()) == paths
    assert imread(paths[0]).shape[1] == 1350


def test_pyplot_stays_out() -> None:
    """It would open windows and keep figures, in the programs of users."""
    sources = [path for room in ("study", "common", "finetune") for path in (ROOT / room).glob("*.py")]
    assert not [path for path in sources if "pyplot" in path.read_text()]
