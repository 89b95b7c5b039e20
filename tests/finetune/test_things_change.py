"""Equal means equal, also while things change: each saver in runs in which something happens in the middle."""

from __future__ import annotations

from functools import cache

import pytest
import rankpilot
import torch
from rankpilot.decide.rules import AsConfigured
from rankpilot.finetune.step.part_plans import PartPlans
from torch.utils.data import DataLoader

from ..cases import first_cases
from .changing_runs import (
    AT_ONCE,
    CHANGE,
    CHANGES,
    SAVERS,
    STEPS,
    Batch,
    Change,
    Outcome,
    batches,
    new_model,
    padded_rows,
    plain,
    take,
    train,
)
from .tiny_runs import PLAIN

FAMILIES = {
    "tiled loss": ("llama", "gpt2"),
    "input copies": ("llama", "bert"),
    "routed rows": ("qwen3-moe",),
    "selective": ("llama", "gpt2"),
    "whole layers": ("llama", "bert"),
}
EXACT = {"input copies", "selective", "whole layers"}
"""Those that promise the same bits; kernels round otherwise beside padding, and where two parts of a loss are added."""

TOLERANCE = 2e-5
"""Of numbers of some steps, as a share of the largest."""

ROUTED_TOLERANCE = 2e-4
"""The same where products are summed in another order, through all layers and steps."""

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def plain_run(family: str, dtype: torch.dtype, change: str) -> Outcome:
    return train(family, dtype, CHANGES[change], plain, resumed=False)


def assert_same(one: torch.Tensor, other: torch.Tensor, tolerance: float, what: str) -> None:
    if tolerance:
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max()) + 1e-7, what
    else:
        assert torch.equal(one, other), what


CELLS = [(saver, family) for saver, families in FAMILIES.items() for family in families]


@pytest.mark.parametrize("resumed", [False, True], ids=["fresh", "resumed"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("saver", "family"), CELLS)
def test_a_run_equals_the_plain_one(saver: str, family: str, change: str, resumed: bool) -> None:
    dtype = torch.bfloat16 if saver == "input copies" else torch.float32
    expected = plain_run(family, dtype, change)
    found = train(family, dtype, CHANGES[change], SAVERS[saver], resumed=resumed)
    tolerance = 0.0 if saver in EXACT else ROUTED_TOLERANCE if saver == "routed rows" else TOLERANCE
    for step, (one, other) in enumerate(zip(found.losses, expected.losses, strict=True)):
        assert_same(one, other, tolerance, f"loss {step}")
    for step, (one, other) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        assert one.keys() == other.keys(), f"step {step}"
        for name in one:
            assert_same(one[name], other[name], tolerance, f"gradient of {name} in step {step}")
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in found.weights.items():
        assert_same(weight, expected.weights[name], tolerance, name)


# Parts ----------------------------------------------------------------------------------------------------------------

WHOLE = {"z-loss", "KL to the base", "two passes"}
"""Losses whose rows meet from the beginning, in padding or since one of them comes twice."""

WHOLE_LATER = {"z-loss later", "hidden states", "a second adapter"}
"""Those whose rows meet from the step `CHANGE` on, which still runs in parts. Squares of normed states are constant."""

SAME_OPERATORS = {"masks and labels": CHANGE + 2}
"""Those whose rows meet from a step on, in padding, which the next test would tell: the operators are the same."""


@pytest.mark.parametrize(
    ("change", "family"),
    first_cases(
        4,
        sorted(
            [(change, family) for family in ("llama", "bert") for change in CHANGES if change != "dropout"],
            key=lambda case: (
                case not in [(name, "llama") for name in ("hidden states", "z-loss", "a layer trains")]
                and case != ("masks and labels", "bert")
            ),
        ),
    ),
)
def test_a_run_in_parts_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, change: str, family: str) -> None:
    """Each row is a part, as launches cost nothing here. Dropout draws other numbers, so it is left out."""
    monkeypatch.setattr("rankpilot.cost.streaming.PROCESSOR_LAUNCH", 0.0)
    monkeypatch.setattr("rankpilot.finetune.step.exact_parts.TESTED_ROWS", AT_ONCE)
    monkeypatch.setattr(PartPlans, "least", property(lambda self: 1, lambda self, least: None), raising=False)
    expected, (found, parts) = plain_run(family, torch.float32, change), run_in_parts(family, CHANGES[change])
    assert parts == (1 if change in WHOLE else 2)
    told = [line for line in found.lines if "from step" in line]
    later = change in WHOLE_LATER and (change, family) != ("hidden states", "bert")
    assert bool(told) == later
    steps = CHANGE if later else SAME_OPERATORS.get(change, STEPS)
    losses = steps * len(expected.losses) // STEPS
    for step, (one, other) in enumerate(zip(found.losses[:losses], expected.losses, strict=False)):
        assert_same(one, other, TOLERANCE, f"loss {step}")
    for step, (one, other) in enumerate(zip(found.gradients[:steps], expected.gradients, strict=False)):
        for name in one:
            assert_same(one[name], other[name], TOLERANCE, f"gradient of {name} in step {step}")


def run_in_parts(family: str, change: Change) -> tuple[Outcome, int]:
    """A run under a pilot whose steps run in parts if they may, and the most parts that a batch had."""
    outcome, model, most = Outcome(), new_model(family, torch.float32), 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    epochs, step = batches(family), 0
    rows = [{name: value[:1] for name, value in batch.items()} for epoch in epochs[:1] for batch in epoch]

    def joined(rows: list[Batch]) -> Batch:
        return padded_rows(family, [row["input_ids"][0, : int(row["attention_mask"].sum())] for row in rows])

    loader = DataLoader(rows * 4, batch_size=AT_ONCE, collate_fn=joined)  # type: ignore[arg-type]
    options = PLAIN | {"keep_rate": True, "tell": outcome.lines.append, "parts": "on"}
    pilot = rankpilot.RankPilot(AsConfigured(), "1GiB step", **options)
    run = rankpilot.TrainingRun.of_loader(
        model,
        optimizer,
        loader,
        total_steps=STEPS,
        accumulation=change.micro,
        loss=lambda batch: change.loss(model, batch, step),
        in_parts=True,
    )
    pilot.begin(run)

    def passes(batch: Batch) -> torch.Tensor:
        nonlocal most
        total = torch.zeros(())
        for number, (part, share) in enumerate(pilot.parts(batch), 1):
            loss = change.loss(model, part, step) / change.micro
            pilot.guard.parts.hear(loss)
            (share * loss).backward()
            total, most = total + share * loss.detach(), max(most, number)
        return total

    while step < STEPS:
        take(model, optimizer, change, step, outcome, epochs, passes, pilot)
        step += 1
    pilot.finish()
    return outcome, most
