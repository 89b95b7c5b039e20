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
from rankpilot.cost.forecast.outlook import Choice, GridCell, MeasuredStep
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
    remarks,
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


def outlook(layers: int = 6, *, budget: bool = True, card: bool = False, measured: MeasuredStep | None = None) -> Any:
    """An outlook of given numbers, without a model."""
    count = 2 * layers
    plan, targets = np.full(count, 8), [SimpleNamespace(name=f"m{number}") for number in range(count)]
    mixed = np.where(np.arange(count) % 2, 4, 16) * (np.arange(count) >= count // 2)
    scales: dict[int, float] = {}

    def choice(kind: Any, scale: float, ranks: Any, again: int = 0, label: str = "") -> Choice:
        total, rank = breakdown(layers, scale).total, int(ranks.max())
        use = CardUse(CARD, 90 * MIB, int(total), int(total), 0, 0, MIB, CARD.context_bytes, 0) if card else None
        verdict: Any = use.verdict if use else ("fits" if total <= 0.6 * whole else "does not fit") if budget else None
        checkpointed = tuple(f"layer.{number}" for number in range(again))
        time = 1 + again / 100 if card else None
        within = None if verdict is None else verdict == "fits"
        made = Choice(
            kind,
            rank,
            layers,
            checkpointed,
            ranks,
            total,
            time,
            SHAPE,
            label,
            memory=None,
            _use=lambda: use,
            _within=within,
            _has_slack=True,
        )
        scales[id(made)] = scale
        return made

    whole = breakdown(layers).total
    choices = (
        choice("depth" if card else "asked", 1.0, plan),
        choice("depth", 0.2, plan, layers),
        choice("rank", 0.9, np.ones(count, dtype=int)),
        choice("rank", 1.3, 4 * plan),
        *(choice("rule", 0.5, mixed, label=f"{name} inside 60%") for name in (("a", "b") if budget else ())),
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
        settings=MemoryConfig("some/model"),
        facts={} if card else {"model": "some/model", "task": "classification", "device": "cpu"},
        card=CARD if card else None,
        room=SimpleNamespace(taken=CARD.context_bytes + 90 * MIB),
        plain_seconds=0.5,
        rank=8,
        dtype="bf16",
        slack=0.08,
        blocks=layers,
        base=BaseLayers(layers, ()),
        streamed=0,
        checkpointable=tuple(f"layer.{number}" for number in range(layers)),
        reference_bytes=whole,
        limit_bytes=CARD.memory_bytes if card else 0.6 * whole if budget else None,
        choices=choices,
        by_depth=lambda: choices,
        as_asked=choices[0] if card else None,
        instead=None,
        main=choices[0],
        grid=(),
        measured=measured,
        notes=["a note"],
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


@pytest.mark.parametrize("card", [False, True])
def test_the_table_fits_a_narrow_terminal(card: bool) -> None:
    text = printed(choice_table(outlook(30, card=card)), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_choices_inside_a_budget() -> None:
    text = printed(choice_table(outlook()))
    assert cells_of(text) == [
        ["all layers, as requested", "8", "0 of 6", "90.00", "100.0%", "no"],
        ["all layers", "8", "6 of 6", "22.80", "25.3%", "yes"],
        ["all layers", "1", "0 of 6", "81.60", "90.7%", "no"],
        ["all layers", "32", "0 of 6", "115.20", "128.0%", "no"],
        ["a inside 60%", "mixed", "0 of 6", "48.00", "53.3%", "yes"],
        ["b inside 60%", "mixed", "0 of 6", "48.00", "53.3%", "yes"],
    ]
    assert "in MiB; budget 54.00" in text
    assert "fits" not in printed(choice_table(outlook(budget=False)))


def test_choices_on_a_card() -> None:
    text = printed(choice_table(outlook(card=True)))
    plain, again, *_ = cells_of(text)
    assert (plain[:3], plain[-2:]) == (["all layers", "8", "0 of 6"], ["yes", "1.00"])
    assert float(plain[4]) + float(plain[5]) == pytest.approx(CARD.memory_bytes / 2**30, abs=0.02)
    assert (again[2], again[-1]) == ("6 of 6", "1.06")
    assert "in GiB" in text
    assert "budget" not in text


def test_measured_beside_predicted() -> None:
    told = " ".join(remarks(outlook(measured=MeasuredStep(90 * MIB, 99 * MIB, 700 * MIB))))
    assert "Measured step: 90 MiB in live tensors, 100.0% of predicted" in told
    assert "resident memory rose by 99 MiB, 110.0% of predicted" in told
    assert "the process peaked at 700 MiB" in told
    assert "MALLOC_MMAP_THRESHOLD_" in told
    calm = " ".join(remarks(outlook(measured=MeasuredStep(90 * MIB, 91 * MIB, 700 * MIB))))
    assert "MALLOC_MMAP_THRESHOLD_" not in calm
    cuda = outlook(measured=MeasuredStep(90 * MIB, reserved_bytes=200 * MIB))
    cuda.facts["device"] = "cuda"
    told = " ".join(remarks(cuda))
    assert "90 MiB allocated by CUDA's allocator" in told
    assert "reserved 200 MiB, including the model" in told
    assert "Measured step" not in " ".join(remarks(outlook()))


def test_words() -> None:
    here, config = outlook(), MemoryConfig("some/model")
    assert subject(here, config) == (
        "model, classification, 30M parameters on cpu, 16 x 64 tokens, rank 8 on 12 modules of 6 layers, adamw"
    )
    assert subject(outlook(card=True), config).startswith("model, 30M parameters on RTX 4090, 16 x 64 tokens")
    found = verdict_text(here)
    assert "67% of the peak" in found
    assert "takes 90 MiB per step, and 4 MiB with all layers checkpointed" in found
    assert "smallest choice, all layers at rank 8 with checkpointing, takes 25%." in found
    told = list(notes(here))
    assert "backward: loss): 60 MiB tensors saved for backward; 12 MiB optimizer state" in told[0]
    assert "signal" not in told[0], "kinds of which there is nothing are left out"
    assert told[1] == (
        "The frozen model (90 MiB) comes on top: it counts toward a total budget, but not toward a 'step' budget."
    )
    assert list(remarks(here)) == ["a note"]


def test_activations_that_run_again_are_told() -> None:
    here = outlook(card=True)
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
    here = outlook(card=True)
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
    here = outlook(measured=MeasuredStep(5))
    write_memory_report(here, MemoryConfig("some/model"), tmp_path / "memory")
    figures = read_json(tmp_path / "memory" / "memory.json")
    assert (tmp_path / "memory" / "memory.png").stat().st_size > 10_000
    layers = [sum(layer[kind] for kind in KINDS) for layer in figures["layers"]]
    assert sum(layers) + figures["margin_bytes"] == figures["peak_bytes"] == 90 * MIB
    assert sum(figures["kinds"].values()) == sum(layers)
    assert figures["choices"][0]["ranks"]["m11"] == 8
    assert figures["choices"][1]["share"] == pytest.approx(0.2533, abs=1e-3)
    assert figures["measured"]["peak_bytes"] == 5
    assert figures["model"] == "some/model"


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
    return memory_picture(shown, picture_labels(shown), subject(shown, MemoryConfig("some/model")))


@pytest.mark.parametrize(("layers", "budget", "card"), [(30, True, False), (80, False, False), (30, False, True)])
def test_no_text_of_the_picture_overlaps_or_leaves_it(layers: int, budget: bool, card: bool) -> None:
    figure = picture_of(outlook(layers, budget=budget, card=card))
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
    taken = sum(choice.step_bytes for choice in here.choices) / MIB
    assert sum(patch.get_width() for patch in bottom.patches) == pytest.approx(taken)
    card = outlook(card=True)
    held = sum(each.use.total_bytes - each.use.base_bytes - each.use.context_bytes for each in card.choices) / 2**30
    assert sum(patch.get_width() for patch in picture_of(card).axes[1].patches) == pytest.approx(held)


def test_the_table_of_exact_savers():
    text = printed(saver_table(outlook().step.saved))
    assert "Same losses in less memory" in text
    assert re.search(r"\+ loss in tiles\W+6\.00\W+1\.00", text)
