"""Control of real runs: alignments are those of the steps, rates move, damage is undone; in loops and the Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rankpilot
import torch
import transformers
from peft import LoraConfig, get_peft_model
from rankpilot.common.errors import ConfigError
from rankpilot.common.files import read_json_lines
from rankpilot.decide.log import CONTROL
from rankpilot.decide.plan.rate import TYPICAL
from rankpilot.decide.rate_control import CHANGES, FEATURES, KEEP, UNDO, decision_steps
from rankpilot.finetune import run_rate
from rankpilot.finetune.controlled_rate import alignment
from rankpilot.finetune.plan_rate import learns_labels
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.targets import find_target_modules
from rankpilot.study.run_data import read_run
from rankpilot.study.verdict import verdict
from torch.utils.data import DataLoader
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, Trainer, default_data_collator

from .tiny_runs import PLAIN, adapted, arguments, counting, load_loop, save_loop, take_step
from .tiny_runs import llama_config as llama_config

STEPS = 60
MOMENTS = decision_steps(STEPS)


@dataclass
class Scripted:
    """The control that acts as it is told."""

    actions: list[int]
    seen: list[Any] = field(default_factory=list)

    def act(self, observations: Any) -> Sequence[int]:
        self.seen.append(dict(zip(FEATURES, observations[0], strict=True)))
        return [self.actions[len(self.seen) - 1] if len(self.seen) <= len(self.actions) else KEEP]


class Loop:
    """A loop of one's own at a constant rate."""

    def __init__(self, config: LlamaConfig, rate: float, **options: Any) -> None:
        self.model, self.told = adapted(config, modules_to_save=["lm_head"]), list[str]()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        self.loader = DataLoader(counting(), 8, collate_fn=default_data_collator)  # type: ignore[arg-type]
        self.batches = cycle(list(self.loader))
        settings: dict[str, Any] = {"budget": "400%", "control": True, "keep_rate": True}
        self.pilot = rankpilot.RankPilot("uniform", tell=self.told.append, **PLAIN | settings | options)

    @property
    def run(self) -> TrainingRun:
        return TrainingRun.of_loader(self.model, self.optimizer, self.loader, total_steps=STEPS)

    def begin(self) -> Loop:
        self.pilot.begin(self.run)
        self.rates: list[float] = []
        self.optimizer.register_step_pre_hook(lambda *_: self.rates.append(self.optimizer.param_groups[0]["lr"]))
        return self

    def steps(self, count: int) -> Loop:
        for _ in range(count):
            take_step(self.pilot, self.optimizer, next(self.batches), lambda batch: self.model(**batch).loss)
        return self

    def state(self) -> list[torch.Tensor]:
        """Adapters and the optimizer's means."""
        state = self.optimizer.state
        means = [state[p][name] for p in self.parameters for name in ("exp_avg", "exp_avg_sq") if p in state]
        return [each.detach().clone() for each in (*self.parameters, *means)]


def scripted(monkeypatch: pytest.MonkeyPatch, *actions: int) -> Scripted:
    script = Scripted(list(actions))
    monkeypatch.setattr(run_rate, "CONTROL", script)
    return script


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam])
def test_alignment_is_the_cosine_of_the_last_step_and_the_descent(llama_config: LlamaConfig, kind: Any) -> None:
    model = adapted(llama_config)
    targets = find_target_modules(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(parameters, lr=1e-2, weight_decay=0.0)
    rows = default_data_collator(counting(8))  # type: ignore[arg-type]
    model(**rows).loss.backward()
    assert alignment(optimizer, targets).isnan()
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    optimizer.step()
    optimizer.zero_grad()
    model(**rows).loss.backward()
    moved = torch.cat([p.detach().flatten() for p in parameters]) - before
    descent = -torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    found = float(alignment(optimizer, targets))
    near = 0.01 if kind is torch.optim.AdamW else 0.3  # NAdam steps a little to the side of its mean
    assert found == pytest.approx(float(torch.cosine_similarity(moved, descent, dim=0)), abs=near)


def test_rates_move_and_what_is_undone_is_as_it_was(
    llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = scripted(monkeypatch, CHANGES.index(1.0), CHANGES.index(-1.0), UNDO)
    loop = Loop(llama_config, 1e-3, log=tmp_path).begin().steps(MOMENTS[0])
    kept = loop.state()
    loop.steps(MOMENTS[2] - MOMENTS[0])
    assert any(not torch.equal(a, b) for a, b in zip(kept, loop.state(), strict=True))
    loop.pilot.before_step(next(loop.batches))
    assert all(torch.equal(a, b) for a, b in zip(kept, loop.state(), strict=True)), "a rate that fell keeps the copy"
    assert [round(rate / 1e-3, 6) for rate in loop.rates] == [
        *[1.0] * MOMENTS[0],
        *[2.0] * (MOMENTS[1] - MOMENTS[0]),
        *[1.0] * (MOMENTS[2] - MOMENTS[1]),
    ]
    assert loop.pilot._piloted.rate.of_plan.factor == pytest.approx(0.25)
    assert "0.001 to 0.002" in next(line for line in loop.told if "learning rate changed" in line)
    rows = read_json_lines(tmp_path / CONTROL)
    assert [(row["step"], row["change"], row["undone"]) for row in rows] == [
        (MOMENTS[0], 1.0, False), (MOMENTS[1], -1.0, False), (MOMENTS[2], -2.0, True),
    ]  # fmt: skip
    assert rows[0]["seen"].keys() == set(FEATURES)
    assert [seen["undone"] for seen in script.seen] == [0, 0, 0]
    told = verdict(read_run(tmp_path)).results[-1]
    assert f"x 2 at step {MOMENTS[0]} (to 0.002)" in told
    assert f"x 0.25 at step {MOMENTS[2]} (to 0.00025, restoring the previous adapters)" in told
    (tmp_path / CONTROL).write_text('{"step": "one"}\n')
    assert "learning-rate corrections" in read_run(tmp_path).missing[-1]


def test_other_ranks_make_a_copy_useless(llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, KEEP, UNDO)
    loop = Loop(llama_config, 1e-3).begin().steps(MOMENTS[0] + 2)
    names = [target.name for target in find_target_modules(loop.model)]
    loop.pilot.take(dict.fromkeys(names, 4))
    loop.steps(MOMENTS[1] - MOMENTS[0] - 2)
    loop.steps(1)
    assert {target.rank for target in find_target_modules(loop.model)} == {4}
    assert loop.pilot._piloted.rate.of_plan.factor == pytest.approx(0.25)


def test_the_rule_mends_a_rate_that_is_far_too_low(llama_config: LlamaConfig) -> None:
    loop = Loop(llama_config, 1e-5).begin().steps(STEPS)
    assert loop.pilot._piloted.rate.of_plan.factor >= 8
    loop.pilot.finish()
    assert loop.optimizer.param_groups[0]["lr"] == 1e-5, "between steps the groups show the user's"


@pytest.mark.parametrize("after", [MOMENTS[0] - 2, MOMENTS[1] - 1, MOMENTS[1] + 1])
def test_a_resumed_run_sees_what_the_whole_one_sees_also_with_a_smaller_budget(
    llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: int
) -> None:
    script = scripted(monkeypatch, CHANGES.index(1.0))
    whole = Loop(llama_config, 1e-3, budget="20k params").begin().steps(after)
    save_loop(whole.pilot, whole.run, tmp_path / "checkpoint")
    whole.steps(MOMENTS[2] + 1 - after)
    for budget in ("20k params", "2k params"):
        again = Loop(llama_config, 1e-3, budget=budget)
        now = scripted(monkeypatch, CHANGES.index(1.0) if after < MOMENTS[0] else KEEP)
        again.batches = cycle([next(again.batches) for _ in range(after + len(again.loader))][after:])
        load_loop(again.pilot, again.run, tmp_path / "checkpoint")
        assert again.pilot._piloted.rate.of_plan.factor == pytest.approx(2 if after > MOMENTS[0] else 1)
        if budget == "20k params":
            again.steps(MOMENTS[2] + 1 - after)
            assert now.seen == script.seen[-len(now.seen) :]


def test_the_trainer_logs_the_corrected_rate(
    llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted(monkeypatch, CHANGES.index(1.0))
    args = arguments(tmp_path, max_steps=STEPS, lr_scheduler_type="constant", learning_rate=1e-3)
    trainer = Trainer(adapted(llama_config), args, train_dataset=counting())  # type: ignore[arg-type]
    options: dict[str, Any] = {"budget": "400%", "control": True, "keep_rate": True, **PLAIN}
    rankpilot.attach(trainer, "uniform", **options)
    trainer.train()
    rates = {row["step"]: row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row}
    assert rates[MOMENTS[0]] == pytest.approx(1e-3)
    assert rates[MOMENTS[0] + 1] == pytest.approx(2e-3)


def test_without_control_nothing_is_read(llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripted(monkeypatch, UNDO)
    plain = Loop(llama_config, 1e-3, control=False).begin().steps(MOMENTS[1])
    assert not script.seen
    assert plain.pilot._piloted.rate.of_plan.factor == 1


@pytest.mark.parametrize("control", [None, True])
def test_labels_are_left_alone(
    llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch, control: bool | None
) -> None:
    script = scripted(monkeypatch, CHANGES.index(-1.0))
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    options = {"learning_rate": "auto", "keep_rate": False, "control": control}
    loop = Loop(llama_config, 1e-3, **options).begin().steps(MOMENTS[0] + 1)
    assert not script.seen
    assert loop.rates[-1] == loop.rates[0]
    assert any("not controlled" in line for line in loop.told)
    loop.parameters[0].register_hook(lambda gradient: gradient * torch.nan)
    loop.steps(1)
    assert all(each.isfinite().all() for each in loop.state()), "what is not finite is undone all the same"


@pytest.mark.parametrize(("kind", "labels"), [("TokenClassification", True), ("MaskedLM", False)])
def test_labels_are_known_by_the_output_layer(kind: str, labels: bool) -> None:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    base = getattr(transformers, f"BertFor{kind}")(config)
    run: Any = SimpleNamespace(model=get_peft_model(base, LoraConfig(target_modules=["query"])))
    assert learns_labels(run, None) == labels
    assert learns_labels(run, TYPICAL), "no row has more than a label"


def test_what_cannot_be_controlled(llama_config: LlamaConfig) -> None:
    loop = Loop(deepcopy(llama_config), 1e-3)
    loop.optimizer = torch.optim.SGD(loop.parameters, lr=1e-3)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="control=True corrects the learning rate from the steps of Adam"):
        loop.pilot.begin(loop.run)
    with pytest.raises(ConfigError, match="control must be True or False"):
        rankpilot.PilotOptions(control="yes")  # type: ignore[arg-type]
    short = Loop(llama_config, 1e-3)
    short.pilot.begin(TrainingRun.of_loader(short.model, short.optimizer, short.loader, total_steps=10))
    assert any("not controlled: 10 steps give too little" in line for line in short.told)
