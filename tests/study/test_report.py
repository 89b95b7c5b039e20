"""Table and picture of an outlook show the numbers that they were given."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rankpilot.common.files import read_json
from rankpilot.common.text import layer_titles
from rankpilot.cost.breakdown import KINDS, LOSS, Breakdown
from rankpilot.cost.cards import find_device_spec
from rankpilot.cost.forecast.card_use import CardUse
from rankpilot.cost.forecast.configured_step import LoadedAs, LoadedModel, Shards
from rankpilot.cost.forecast.outlook import Choice, GridCell
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.savers.prices import ACTIVATIONS, Saved
from rankpilot.cost.streaming import BaseLayers
from rankpilot.report.config import MemoryConfig
from rankpilot.report.memory import (
    choice_table,
    configuration_text,
    grid_table,
    notes,
    picture_labels,
    saver_table,
    subject,
    verdict_text,
    write_memory_report,
)
from rankpilot.report.picture import memory_picture
from rich.console import Console
from rich.table import Table

MIB = 2**20
CARD = find_device_spec("RTX 4090")
SHAPE = BatchShape(16, 64)


SAVED = (Saved("plain LoRA", 8.0 * MIB, 4.0 * MIB), Saved("loss in tiles", 6.0 * MIB, 1.0 * MIB))


def breakdown(layers: int, scale: float = 1.0) -> Breakdown:
    """As of a model with two modules in each layer."""
    names = ("bert.embeddings", *(f"bert.encoder.layer.{number}" for number in range(layers)), "classifier", LOSS)
    table = np.zeros((len(names), len(KINDS)))
    for kind, count in {"saved": 10, "weights": 1, "gradients": 1, "optimizer": 2}.items():
        table[1 : layers + 1, KINDS.index(kind)] = scale * count * MIB
    table[-1, KINDS.index("transient")] = 6 * MIB
    return Breakdown("backward: base_model.model", names, table, 0.0, tuple(np.repeat(names[1 : layers + 1], 2)))


@pytest.fixture(autouse=True)
def _no_bytes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outlook of given numbers has no byte model."""
    for name in ("brought_by_offloading", "brought_by_streaming"):
        monkeypatch.setattr(f"rankpilot.report.memory.{name}", lambda outlook: None)
    for name in ("too_large_evaluation", "highest_moment", "rollouts_text", "uncounted_moments"):
        monkeypatch.setattr(f"rankpilot.report.memory.{name}", lambda outlook: "")
    monkeypatch.setattr("rankpilot.report.memory.moments_of", lambda outlook, choice: ())
    monkeypatch.setattr("rankpilot.report.memory.engine_figures", lambda outlook: None)


def outlook(layers: int = 6) -> Any:
    """An outlook of given numbers, without a model."""
    count = 2 * layers
    plan, targets = np.full(count, 8), [SimpleNamespace(name=f"m{number}") for number in range(count)]
    scales: dict[int, float] = {}

    def choice(kind: Any, scale: float, ranks: Any, again: int = 0) -> Choice:
        total, rank = breakdown(layers, scale).total, int(ranks.max())
        use = CardUse(CARD, 90 * MIB, int(total), int(total), 0, 0, MIB, CARD.context_bytes, 0)
        checkpointed = tuple(f"layer.{number}" for number in range(again))
        hopeless, time = use.verdict == "does not fit", 1 + again / 100
        made = Choice(
            kind, rank, layers, checkpointed, ranks, total, time, SHAPE, None, lambda: use, hopeless, True
        )  # fmt: skip
        scales[id(made)] = scale
        return made

    choices = (
        choice("depth", 1.0, plan),
        choice("depth", 0.2, plan, layers),
        choice("rank", 0.9, np.ones(count, dtype=int)),
        choice("rank", 1.3, 4 * plan),
    )
    return SimpleNamespace(
        step=SimpleNamespace(
            targets=targets,
            saved=SAVED,
            libraries={},
            loaded=LoadedAs(),
            model=LoadedModel("LlamaForCausalLM", tuple(targets), int(30e6), (90 * MIB,)),
        ),
        memory=SimpleNamespace(shape=SHAPE),
        shards=Shards(),
        settings=MemoryConfig("some/model", device="RTX 4090"),
        card=CARD,
        room=SimpleNamespace(taken=CARD.context_bytes + 90 * MIB),
        plain_seconds=0.5,
        rank=8,
        dtype="bf16",
        slack=0.08,
        blocks=layers,
        base=BaseLayers(layers, ()),
        streamed=0,
        checkpointable=tuple(f"layer.{number}" for number in range(layers)),
        reference_bytes=breakdown(layers).total,
        engine_lacks=0,
        choices=choices,
        by_depth=lambda: choices,
        as_asked=choices[0],
        instead=None,
        main=choices[0],
        grid=(),
        breakdown=lambda choice: breakdown(layers, scales[id(choice)]),
    )


def printed(table: Table, width: int = 160) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def cells_of(text: str) -> list[list[str]]:
    """The cells of each row of a printed table."""
    rows = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in rows]


def test_the_table_fits_a_narrow_terminal() -> None:
    text = printed(choice_table(outlook(30)), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_choices_on_a_card() -> None:
    text = printed(choice_table(outlook()))
    plain, again, *_ = cells_of(text)
    assert (plain[:3], plain[-2:]) == (["all layers", "8", "0 of 6"], ["yes", "1.00"])
    assert float(plain[4]) + float(plain[5]) == pytest.approx(CARD.memory_bytes / 2**30, abs=0.02)
    assert (again[2], again[-1]) == ("6 of 6", "1.06")
    assert "in GiB" in text


def test_words() -> None:
    here = outlook()
    assert subject(here, here.settings).startswith("model, 30M parameters on RTX 4090, 16 x 64 tokens")
    assert "takes 90 MiB per step, and 4 MiB with all layers checkpointed" in verdict_text(here)
    told = list(notes(here))
    assert "backward: loss): 60 MiB tensors saved for backward; 12 MiB optimizer state" in told[0]
    assert "signal" not in told[0], "kinds of which there is nothing are left out"
    assert told[1].startswith("Counted on the card: the frozen model (90 MiB)")


def test_activations_that_run_again_are_told() -> None:
    here = outlook()
    here.step.saved = (*SAVED, Saved(ACTIVATIONS, 5 * MIB, MIB))
    here.grid = [GridCell(BatchShape(1, length), again, length > 64, 1.0) for length, again in ((64, 0), (128, 0))]
    assert "all layers at rank 8 with selective checkpointing" in verdict_text(here)
    assert any("so all choices use selective checkpointing" in note for note in notes(here))
    assert cells_of(printed(grid_table(here))) == [["64", "none"], ["128", "0*"]]
    assert (
        "# With selective checkpointing, which attach(trainer) enables under budget='90MiB step'"
        in configuration_text(here)
    )


def test_experts_are_told_and_nf4_is_not_advised_for_them() -> None:
    here = outlook()
    here.as_asked = None
    assert "Use --quantization nf4, a smaller model" in verdict_text(here)
    here.step.model = replace(here.step.model, fused=int(27e6), named=("k_proj", "q_proj"))
    assert "No batch of the grid fits. Use a smaller model" in verdict_text(here)
    assert any(note.startswith("90% of the weights are fused experts") for note in notes(here))
    here.as_asked = here.choices[0]
    assert "target_modules=['k_proj', 'q_proj']," in configuration_text(here)


def test_layer_titles_stay_different() -> None:
    whole = ["a.embeddings", "a.layer.0", "a.layer.1", "head"]
    assert layer_titles(whole) == ["embeddings", "layer 0", "layer 1", "head"]
    stacks = ["encoder.block.0", "decoder.block.0", "decoder.block.1"]
    assert layer_titles(stacks) == ["encoder.block.0", "decoder.block.0", "layer 1"]


def test_files(tmp_path: Path) -> None:
    here = outlook()
    write_memory_report(here, here.settings, tmp_path / "memory")
    figures = read_json(tmp_path / "memory" / "memory.json")
    assert (tmp_path / "memory" / "memory.png").stat().st_size > 10_000
    layers = [sum(layer[kind] for kind in KINDS) for layer in figures["layers"]]
    assert sum(layers) + figures["margin_bytes"] == figures["peak_bytes"] == 90 * MIB
    assert sum(figures["kinds"].values()) == sum(layers)
    assert figures["choices"][0]["ranks"]["m11"] == 8
    assert figures["choices"][1]["share"] == pytest.approx(0.2533, abs=1e-3)


def boxes(figure: Figure) -> dict[str, tuple[float, float, float, float]]:
    """Where each text that is drawn stands, in pixels: left, bottom, right, top."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, *axes.get_yticklabels()]
    shown = [text for text in texts if text.get_text()]
    return {f"{at} {text.get_text()}": text.get_window_extent(renderer).extents for at, text in enumerate(shown)}


def picture_of(shown: Any) -> Figure:
    return memory_picture(shown, picture_labels(shown), subject(shown, shown.settings))


@pytest.mark.parametrize("layers", [30, 80])
def test_no_text_of_the_picture_overlaps_or_leaves_it(layers: int) -> None:
    figure = picture_of(outlook(layers))
    texts = boxes(figure)
    width, height = figure.canvas.get_width_height()
    for name, (left, bottom, right, top) in texts.items():
        assert 0 <= left <= right <= width, name
        assert 0 <= bottom <= top <= height, name
    for (one, a), (two, b) in combinations(texts.items(), 2):
        across = min(a[2], b[2]) - max(a[0], b[0])
        down = min(a[3], b[3]) - max(a[1], b[1])
        assert across <= 1 or down <= 2, f"{one!r} and {two!r} overlap"


def test_bars_are_the_bytes() -> None:
    here = outlook()
    top, bottom = picture_of(here).axes
    widths = np.array([patch.get_width() for patch in top.patches])
    assert [label.get_text() for label in top.get_yticklabels()] == [
        "embeddings",
        "layers 0 to 5, each",
        "classifier",
        "loss and rest",
    ]
    assert widths.sum() == pytest.approx(14 + 6)
    held = sum(each.use.total_bytes - each.use.base_bytes - each.use.context_bytes for each in here.choices) / 2**30
    assert sum(patch.get_width() for patch in bottom.patches) == pytest.approx(held)


def test_the_table_of_exact_savers():
    text = printed(saver_table(outlook().step.saved))
    assert "Same losses in less memory" in text
    assert re.search(r"\+ loss in tiles\W+6\.00\W+1\.00", text)
