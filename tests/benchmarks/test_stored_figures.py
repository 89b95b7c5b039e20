"""What the pages say of predicted memory, of the cost of a step and of SmolLM2 is what stored figures say.

The command on the page of SmolLM2 printed its figures and wrote them into `summary.json`. Benchmarks wrote the others:

python -m benchmarks published --json benchmarks/results/published.json
python -m benchmarks memory --json benchmarks/results/memory.json
python -m benchmarks overhead --json benchmarks/results/overhead.json
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rankpilot.common.files import read_json

ROOT = Path(__file__).parents[2]


def stored(name: str) -> dict[str, Any]:
    """The figures of a benchmark by their flat names."""
    found = read_json(ROOT / "benchmarks" / "results" / f"{name}.json")
    assert isinstance(found, dict)
    return found


def page(name: str) -> str:
    """A page in one line."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_published_peaks() -> None:
    found = stored("published")
    mean, worst = (f"{found[f't4.{name}_percent']:.2f}" for name in ("mean", "worst"))
    told = f"fine-tunes that others measured on a T4, the live bytes are {mean} % off in the mean, {worst} % at worst"
    assert f"43 {told}" in page("docs/memory.md")
    mean, most, least = (
        choice(
            value for key, value in found.items() if key.startswith("t4_reserved.") and key.endswith(f".{name}_percent")
        )
        for name, choice in (("mean", max), ("worst", max), ("under", min))
    )
    assert f"{mean:.1f} % off in the mean of the worst of four kinds of runs" in page("docs/memory.md")
    assert f"at worst {most:.1f} % too much and {-least:.1f} % too little" in page("docs/memory.md")
    every, clear = (100 * found[f"t4_verdicts.{name}_right_share"] for name in ("smaller", "clear"))
    assert f"{every:.1f} % of the verdicts are right, and {clear:.1f} % where the published" in page("docs/memory.md")


def test_random_plans() -> None:
    found = stored("memory")
    plain = [value for key, value in found.items() if re.match(r"accuracy\.no_checkpointing\.\w+_error_", key)]
    assert plain
    assert set(plain) == {0.0}, "exact to the byte"
    low, high = (f"{100 * found[f'accuracy.checkpointing.peak_error_{name}']:.2f}" for name in ("under", "over"))
    told = f"Over {found['accuracy.plans']} random plans of four families the predicted peak is exact to the byte"
    assert f"{told} without gradient checkpointing, and {low} to {high} % too high" in page("docs/memory.md")


@pytest.mark.parametrize(
    ("name", "words"),
    [("resident", "{} to {} % of them for three plans"), ("resident_given_back", "and {} to {} % with `MALLOC_MMAP")],
)
def test_what_a_process_holds_beside_tensors(name: str, words: str) -> None:
    found = stored("memory")
    plans = {key.rpartition(".")[0] for key in found if key.startswith("outside.bert.")}
    shares = [found[f"{plan}.{name}"] / found[f"{plan}.predicted"] for plan in plans]
    assert len(shares) == 3
    assert words.format(f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}") in page("docs/memory.md")


def test_what_a_step_costs() -> None:
    found, text = stored("overhead"), page("docs/step-cost.md")
    for method, words in (
        ("plain_again", "plain LoRA once more"),
        ("adalora", "AdaLoRA, 12 to 8"),
        ("rankpilot", "rankpilot, signal-mean"),
    ):
        cells = []
        for family in ("bert", "llama"):
            ratio = f"{family}.{method}.cycle_ratio"
            mean, low, high = (f"{found[ratio + end]:.3f}" for end in ("", "_low", "_high"))
            cells.append(f"{mean} ({low} to {high})")
        assert f"| {words} | {' | '.join(cells)} |" in text
    own, usual = (
        100 * max(found[f"{family}.rankpilot.{share}"] for family in ("bert", "llama"))
        for share in ("own_share", "own_share_of_a_step")
    )
    assert f"take {own:.1f} % of ten steps" in text
    assert f"and {usual:.1f} % of a step between two decisions" in text


def test_a_run_of_smollm2() -> None:
    found, text = stored("smollm2"), page("docs/smollm2.md")
    first, *others = found["told"]
    for line in (first.partition(" r=8 of the LoraConfig")[0], *others):
        assert line in text, "what is told before the first step"
    ours, plain = (found["runs"][name] for name in ("rankpilot", "all-linear"))
    assert ours["held_out_loss"] == plain["held_out_loss"]
    assert f"in {100 * ours['peak_bytes'] / plain['peak_bytes']:.0f} % of the bytes" in text
    for name, form in (("held_out_loss", "{:.4f}"), ("adapter_parameters", "{:,}")):
        assert f"| {form.format(ours[name])} | {form.format(plain[name])} |" in text
    peaks = [f"{run['peak_bytes'] / 2**20:.1f} MiB" for run in (ours, plain)]
    assert f"| peak memory of a step | {peaks[0]} | {peaks[1]} |" in text
    assert f"| budget | {ours['budget_bytes'] / 2**20:.1f} MiB | none |" in text
