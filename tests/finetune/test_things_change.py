"""Equal means equal, also while things change: each saver in runs in which something happens in the middle."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from rankpilot.decide.rules import AsConfigured
from rankpilot.finetune.part_plans import PartPlans
from rankpilot.finetune.prefix_cache import PrefixCache, Room
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from torch.utils.data import DataLoader
from transformers import LlamaConfig, TrainerCallback

from ..cases import first_cases
from .changing_runs import (
    AT_ONCE,
    CHANGE,
    CHANGES,
    HEADS,
    SAVERS,
    STEPS,
    WORDS,
    Batch,
    Change,
    Outcome,
    all_logits,
    batches,
    near_the_base,
    new_model,
    padded_rows,
    plain,
    take,
    train,
)
from .tiny_runs import PLAIN, Run, counting, messages_of, take_step

FAMILIES = {
    "cache": ("llama", "gpt2", "bert"),
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
    return train(family, dtype, CHANGES[change], plain, Path(), resumed=False)


def assert_same(one: torch.Tensor, other: torch.Tensor, tolerance: float, what: str) -> None:
    if tolerance:
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max()) + 1e-7, what
    else:
        assert torch.equal(one, other), what


CELLS = [(saver, family) for saver, families in FAMILIES.items() for family in families]


@pytest.mark.parametrize("resumed", [False, True], ids=["fresh", "resumed"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("saver", "family"), CELLS)
def test_a_run_equals_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saver: str, family: str, change: str, resumed: bool
) -> None:
    """The cache compares nothing here, so that it has to see each change by itself."""
    monkeypatch.setattr("rankpilot.finetune.prefix_cache.CHECKED_FIRST", 0)
    monkeypatch.setattr("rankpilot.finetune.prefix_cache.CHECK_EVERY", (10**6, 10**6))
    dtype = torch.bfloat16 if saver == "input copies" else torch.float32
    expected = plain_run(family, dtype, change)
    found = train(family, dtype, CHANGES[change], SAVERS[saver], tmp_path, resumed=resumed)
    if saver == "cache":
        assert found.left_out > 0
        assert any(CHANGES[change].told in line for line in found.lines), found.lines
        if CHANGES[change].differs:
            return
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
    monkeypatch.setattr("rankpilot.cost.part_seconds.PROCESSOR_LAUNCH", 0.0)
    monkeypatch.setattr("rankpilot.finetune.exact_parts.TESTED_ROWS", AT_ONCE)
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
    epochs, step = batches(family, shuffled=change.shuffled), 0
    rows = [{name: value[:1] for name, value in batch.items()} for epoch in epochs[:1] for batch in epoch]

    def joined(rows: list[Batch]) -> Batch:
        return padded_rows(family, [row["input_ids"][0, : int(row["attention_mask"].sum())] for row in rows])

    loader = DataLoader(rows * 4, batch_size=AT_ONCE, collate_fn=joined)  # type: ignore[arg-type]
    options: dict[str, Any] = {"prefix_cache": "off", "keep_rate": True, "tell": outcome.lines.append} | PLAIN
    pilot = rankpilot.RankPilot(AsConfigured(), "1GiB step", parts="on", **options)
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
            pilot.hear_loss(loss)
            (share * loss).backward()
            total, most = total + share * loss.detach(), max(most, number)
        return total

    while step < STEPS:
        take(model, optimizer, change, step, outcome, epochs, passes, pilot)
        step += 1
    pilot.finish()
    return outcome, most


# Whole runs -----------------------------------------------------------------------------------------------------------


class Unfreezes(TrainerCallback):
    """Lets the MLP of a layer train from the third epoch on."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.epoch >= 2:
            mlp(objects["model"]).requires_grad_(True)


def mlp(model: Any) -> torch.nn.Module:
    module: torch.nn.Module = model.get_base_model().model.layers[1].mlp
    return module


def test_gradual_unfreezing_under_a_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The optimizer holds the MLP of a frozen layer, which a callback lets train in the middle of six epochs."""
    caplog.set_level(logging.INFO, "rankpilot")
    config = LlamaConfig(**HEADS | {"num_hidden_layers": 3}, vocab_size=WORDS, intermediate_size=32)
    top: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [2]}
    runs = []
    for kept in ("off", "auto"):
        options: dict[str, Any] = {"policy": "top-down", "budget": "1k params", "max_steps": 18, "prefix_cache": kept}
        options |= {"lora": top, "data": counting(13)[1:], "callbacks": (Unfreezes(),), "optimizer": torch.optim.AdamW}
        run = Run(tmp_path / kept, config, prepare=lambda model: mlp(model).requires_grad_(True), **options)
        mlp(run.model).requires_grad_(False)
        before = [parameter.clone() for parameter in mlp(run.model).parameters()]
        runs.append(run.train())
        assert all(not torch.equal(*pair) for pair in zip(before, mlp(run.model).parameters(), strict=True))
    plain, cached = runs
    assert cached.recorder.losses == pytest.approx(plain.recorder.losses, rel=1e-6)
    for name, parameter in cached.model.named_parameters():
        torch.testing.assert_close(parameter, plain.model.get_parameter(name), rtol=0, atol=1e-5)
    assert cached.pilot.pilot._piloted.prefix.left_out > 0
    (line,) = messages_of(caplog, "trains now")
    assert line.startswith(
        "layers.1.mlp.gate_proj.weight trains now, so what frozen layers returned is forgotten. The 1"
    )


def test_a_z_loss_over_all_logits_in_a_loop() -> None:
    """Padding on the right, and batches that come back: their rows are served as they were, with their padding."""
    rows = batches("llama", shuffled=False)[0]
    found, told = [], list[str]()
    for kept in ("off", "auto"):
        model = new_model("llama", torch.float32)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        loader = DataLoader(rows, batch_size=None, collate_fn=None)  # type: ignore[arg-type]
        pilot = rankpilot.RankPilot("top-down", "1k params", prefix_cache=kept, tell=told.append)
        pilot.begin(rankpilot.TrainingRun.of_loader(model, optimizer, loader, total_steps=18))
        loss = lambda batch, model=model: all_logits(model, batch, 0)  # noqa: E731
        found.append([take_step(pilot, optimizer, batch, loss) for _ in range(6) for batch in loader])
        pilot.finish()
    assert pilot._piloted.prefix is not None
    assert pilot._piloted.prefix.left_out > 0
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert "The loss reads padding. Rows are kept with their padding from now on." in told


def test_modules_at_rank_0_stay_frozen_where_their_layer_is_left_out(tmp_path: Path) -> None:
    """PEFT lets the whole adapter train at the end of `disable_adapter`, and nothing below hears of it."""
    model, told = new_model("llama", torch.float32, everywhere=True), list[str]()
    targets = find_target_modules(model)
    set_ranks(targets, {target.name: 0 for target in targets if target.name.split(".")[2] in "01"})
    cache = PrefixCache(model, Room(tmp_path, 2**14, 0), epochs=9, tokens=9, evaluates=False, tell=told.append)
    cache.ranks_changed()
    for _ in range(5):
        near_the_base(model, batches("llama", shuffled=False)[0][0], 0).backward()
    assert cache.left_out > 0
    assert not any("trains now" in line for line in told)
