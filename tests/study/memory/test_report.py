"""Tables and picture of memory show the numbers that they were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rankpilot.common.files import read_json
from rankpilot.common.module_names import layer_titles
from rankpilot.memory.batch_shape import BatchShape
from rankpilot.memory.breakdown import KINDS, LOSS, Breakdown
from rankpilot.study.memory.alternatives import Alternative, MemoryUse
from rankpilot.study.memory.config import MemoryConfig
from rankpilot.study.memory.measured_step import MeasuredStep
from rankpilot.study.memory.picture import memory_picture
from rankpilot.study.memory.report import (
    allocator_note,
    change_table,
    finding,
    layer_table,
    measured_table,
    moment_text,
    peak_table,
    rank_table,
    subject,
    write_memory_report,
)
from rich.console import Console
from rich.table import Table

from ...cases import first_cases

MIB = 2**20


def breakdown(layers: int, scale: float = 1.0) -> Breakdown:
    """As of a model with two modules in each layer."""
    names = ("bert.embeddings", *(f"bert.encoder.layer.{number}" for number in range(layers)), "classifier", LOSS)
    table = np.zeros((len(names), len(KINDS)))
    for kind, count in {"saved": 10, "weights": 1, "gradients": 1, "optimizer": 2}.items():
        table[1 : layers + 1, KINDS.index(kind)] = scale * count * MIB  # type: ignore[arg-type]
    table[-1, KINDS.index("transient")] = 6 * MIB
    return Breakdown("backward: base_model.model", names, table, 0.0, tuple(np.repeat(names[1 : layers + 1], 2)))


def memory_use(layers: int = 6, *, budget: bool = True, measured: MeasuredStep | None = None) -> MemoryUse:
    asked, count = breakdown(layers), 2 * layers
    plan = np.full(count, 8)
    mixed = np.where(np.arange(count) % 2, 4, 16) * (np.arange(count) >= count // 2)
    fits = {"fits": True} if budget else {}
    rules = [Alternative("budget", f"{name} inside 60%", breakdown(layers, 0.5), mixed, **fits) for name in ("a", "b")]
    return MemoryUse(
        config=MemoryConfig("some/model", budget="60%" if budget else None),
        task="classification",
        device="cpu",
        shape=BatchShape(16, 64),
        modules=tuple(f"m{number}" for number in range(count)),
        frozen_bytes=90 * MIB,
        reference_bytes=asked.total,
        alternatives=(
            Alternative("asked", "rank 8 on all modules, as asked", asked, plan, False if budget else None),
            Alternative("rank", "rank 1 on all modules", breakdown(layers, 0.9), np.ones(count, dtype=int), **fits),
            Alternative("rank", "rank 32 on all modules", breakdown(layers, 1.3), 4 * plan, **fits),
            Alternative("checkpointing", "with gradient checkpointing", breakdown(layers, 0.2), plan, **fits),
            *(rules if budget else []),
        ),
        notes=("a note",),
        limit_bytes=0.6 * asked.total if budget else None,
        measured=measured,
    )


def printed(table: Table | None, width: int = 160) -> str:
    assert table is not None
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def row_of(text: str, start: str) -> list[str]:
    """The cells of the first row that begins so."""
    line = next(line for line in text.splitlines() if line.lstrip("│ ").startswith(start))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_peak_by_kind() -> None:
    text = printed(peak_table(memory_use()))
    assert row_of(text, "tensors saved") == ["tensors saved for backward", "60 MiB", "66.7%"]
    assert row_of(text, "total")[1] == "90 MiB"
    assert row_of(text, "frozen model")[1] == "90 MiB"
    assert "signal" not in text, "kinds of which there is nothing are left out"
    assert "Peak of a training step: backward: loss" in text


def first_column(text: str) -> list[str]:
    return [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]


def test_layers_from_the_top() -> None:
    text = printed(layer_table(memory_use()))
    assert first_column(text) == ["loss and rest", "classifier", "layers 0 to 5, each", "embeddings"]
    assert row_of(text, "layers") == ["layers 0 to 5, each", "10 MiB", "–", "4 MiB", "15.6%"]


def test_only_layers_with_equal_cells_share_a_row() -> None:
    use = memory_use()
    use.breakdown.bytes[3, KINDS.index("saved")] += MIB
    text = printed(layer_table(use))
    layers = ["layers 3 to 5, each", "layer 2", "layers 0 to 1, each"]
    assert first_column(text) == ["loss and rest", "classifier", *layers, "embeddings"]
    assert row_of(text, "layer 2")[1] == "11 MiB"


def test_ranks_by_layer() -> None:
    text = printed(rank_table(memory_use()))
    assert "Ranks inside 60%" in text
    assert first_column(text) == ["layers 3 to 5, each", "layers 0 to 2, each"]
    assert row_of(text, "layers 3") == ["layers 3 to 5, each", "16 ×1, 4 ×1", "16 ×1, 4 ×1"]
    assert row_of(text, "layers 0")[1:] == ["–", "–"]
    assert rank_table(memory_use(budget=False)) is None


@pytest.mark.parametrize("make", [peak_table, layer_table, rank_table, change_table, measured_table])
def test_tables_fit_a_narrow_terminal(make: Callable[[MemoryUse], Table | None]) -> None:
    table = make(memory_use(30, measured=MeasuredStep(5)))
    assert table is not None
    text = printed(table, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_choices() -> None:
    text = printed(change_table(memory_use()))
    assert row_of(text, "rank 8") == ["rank 8 on all modules, as asked", "90 MiB", "", "100.0%", "no"]
    assert row_of(text, "rank 32")[2:] == ["−28.0%", "128.0%", "yes"]
    assert row_of(text, "with gradient")[2:4] == ["74.7%", "25.3%"]
    assert "budget 54 MiB" in text
    assert "fits" not in printed(change_table(memory_use(budget=False)))


def test_measured_beside_predicted() -> None:
    use = memory_use(measured=MeasuredStep(90 * MIB, 99 * MIB, 700 * MIB))
    text = printed(measured_table(use))
    assert row_of(text, "measured: live")[1:] == ["90 MiB", "100.0%"]
    assert row_of(text, "measured: rise")[1:] == ["99 MiB", "110.0%"]
    assert row_of(text, "peak resident")[1] == "700 MiB"
    assert "MALLOC_MMAP_THRESHOLD_" in allocator_note(use)
    assert not allocator_note(memory_use(measured=MeasuredStep(90 * MIB, 91 * MIB, 700 * MIB)))
    cuda = replace(memory_use(measured=MeasuredStep(90 * MIB, reserved_bytes=200 * MIB)), device="cuda")
    assert row_of(printed(measured_table(cuda)), "reserved")[1] == "200 MiB"
    assert not allocator_note(cuda)
    assert measured_table(memory_use()) is None


def test_words() -> None:
    use = memory_use()
    assert subject(use) == "model, classification, 16 x 64 tokens, rank 8 on 12 modules, adamw, cpu"
    assert "67% of the peak" in finding(use)
    assert "saves most, with gradient checkpointing, takes 25% of them" in finding(use)
    assert moment_text("optimizer step") == "optimizer step"
    assert moment_text("forward: base_model.model.lm_head.base_layer") == "forward: lm_head"


def test_layer_titles_stay_different() -> None:
    assert layer_titles(["a.embeddings", "a.layer.0", "a.layer.1", "head"]) == [
        "embeddings",
        "layer 0",
        "layer 1",
        "head",
    ]
    stacks = ["encoder.block.0", "decoder.block.0", "decoder.block.1"]
    assert layer_titles(stacks) == ["encoder.block.0", "decoder.block.0", "layer 1"]


def test_files(tmp_path: Path) -> None:
    use = memory_use(measured=MeasuredStep(5))
    write_memory_report(use, tmp_path / "memory")
    figures = read_json(tmp_path / "memory" / "memory.json")
    assert (tmp_path / "memory" / "memory.png").stat().st_size > 10_000
    layers = [sum(layer[kind] for kind in KINDS) for layer in figures["layers"]]
    assert sum(layers) + figures["margin_bytes"] == figures["peak_bytes"] == 90 * MIB
    assert sum(figures["kinds"].values()) == sum(layers)
    assert figures["alternatives"][0]["ranks"]["m11"] == 8
    assert figures["alternatives"][3]["share"] == pytest.approx(0.2533, abs=1e-3)
    assert figures["measured"]["peak_bytes"] == 5
    assert figures["config"]["model"] == "some/model"


def boxes(figure: Figure) -> dict[str, tuple[float, float, float, float]]:
    """Where each text that is drawn stands, in pixels: left, bottom, right, top."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, *axes.get_yticklabels()]
    return {
        f"{index} {text.get_text()}": text.get_window_extent(renderer).extents
        for index, text in enumerate(texts)
        if text.get_text()
    }


@pytest.mark.parametrize(("layers", "budget"), first_cases(2, [(30, True), (80, False), (2, True), (6, False)]))
def test_no_text_of_the_picture_overlaps_or_leaves_it(layers: int, budget: bool) -> None:
    figure = memory_picture(memory_use(layers, budget=budget))
    texts = boxes(figure)
    width, height = figure.canvas.get_width_height()
    for name, (left, bottom, right, top) in texts.items():
        assert left >= 0, name
        assert bottom >= 0, name
        assert right <= width, name
        assert top <= height, name
    for (one, a), (two, b) in combinations(texts.items(), 2):
        across = min(a[2], b[2]) - max(a[0], b[0])
        down = min(a[3], b[3]) - max(a[1], b[1])
        assert across <= 1 or down <= 2, f"{one!r} and {two!r} overlap"


def test_bars_are_the_bytes() -> None:
    use = memory_use()
    top, bottom = memory_picture(use).axes
    assert sum(patch.get_width() for patch in top.patches) == pytest.approx(90)
    assert sum(patch.get_width() for patch in bottom.patches) == pytest.approx(
        sum(choice.peak_bytes for choice in use.alternatives) / MIB
    )
