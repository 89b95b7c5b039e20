"""Without a policy the user's LoRA stays: ranks, scaling, targets, rate and losses; ranks shrink as a last resort."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from peft import PeftModel
from rankpilot import RankPilot, TrainingRun
from rankpilot.lora.peft_config import fresh_adapters
from rankpilot.lora.targets import find_target_modules
from torch.utils.data import DataLoader
from transformers import LlamaConfig, Trainer, TrainerCallback

from .test_architectures import ARCHITECTURES, random_base
from .tiny_runs import Recorder, adapted, arguments, counting, messages_of, ranks_of

CONFIGURED: dict[str, dict[str, Any]] = {
    "r 16, alpha 32": {"r": 16, "lora_alpha": 32},
    "rsLoRA off the ladder": {"r": 10, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "DoRA on two": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 2}},
    "above the width": {"r": 100, "lora_alpha": 7, "init_lora_weights": "gaussian", "target_modules": ["o_proj"]},
}


class Rates(TrainerCallback):
    """Keeps the learning rate of each step, as the optimizer takes it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        optimizer = getattr(objects["optimizer"], "optimizer", objects["optimizer"])
        optimizer.register_step_pre_hook(lambda *_: self.seen.append(optimizer.param_groups[0]["lr"]))


def train(folder: Path, config: LlamaConfig, lora: dict[str, Any], **options: Any) -> tuple[Any, PeftModel, Any]:
    """Losses and rates of a run, its model, and its pilot, if there is a budget."""
    model, rates, recorder = adapted(config, **lora), Rates(), Recorder(lambda step: None)
    made = arguments(folder, weight_decay=0.1, **options.pop("arguments", {}))
    trainer = Trainer(model, made, train_dataset=counting(), callbacks=[recorder])
    pilot = rankpilot.attach(trainer, **options).pilot if options else None
    trainer.add_callback(rates)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return (recorder.losses, rates.seen), model, pilot


@pytest.mark.parametrize("name", CONFIGURED)
def test_with_room_nothing_of_the_users_changes(name: str, llama_config: LlamaConfig, tmp_path: Path) -> None:
    alone, before, _ = train(tmp_path / "alone", llama_config, CONFIGURED[name])
    under, after, pilot = train(tmp_path / "under", llama_config, CONFIGURED[name], budget="100%", parts="off")
    assert under == alone
    assert pilot.rates == (1e-2, 1e-2)
    assert ranks_of(after) == ranks_of(before)
    for (_, there), (key, here) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(here, there), key
    kept = [json.loads((tmp_path / run / "adapter/adapter_config.json").read_text()) for run in ("alone", "under")]
    modules = [{*each.pop("target_modules")} for each in kept]
    assert modules[0] == modules[1]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["r 16, alpha 32", "rsLoRA off the ladder"])
def test_layers_run_again_before_a_rank_shrinks(
    name: str, llama_config: LlamaConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"parts": "off", "arguments": {"per_device_train_batch_size": 16}}
    alone, before, _ = train(tmp_path / "alone", llama_config, CONFIGURED[name], **options | {"budget": "100%"})
    tight, after, pilot = train(tmp_path / "tight", llama_config, CONFIGURED[name], **options | {"budget": "70%"})
    assert tight == alone
    assert ranks_of(after) == ranks_of(before)
    assert pilot.guard.plan.checkpointed
    assert max(peak for _, peak in pilot.peaks) <= pilot.limit
    assert not messages_of(caplog, "shrinks")


def test_ranks_shrink_where_nothing_else_fits(
    llama_config: LlamaConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (losses, rates), model, pilot = train(tmp_path, llama_config, {"r": 64, "lora_alpha": 64}, budget="25%")
    ranks = [*ranks_of(model).values()]
    assert 0 < min(ranks) <= max(ranks) < 64
    assert max(peak for _, peak in pilot.peaks) <= pilot.limit
    assert messages_of(caplog, "the mean rank shrinks from 64 to")
    assert rates[0] == 1e-2
    assert len(losses) == 4


@pytest.mark.parametrize("option", [{"goal": "quality"}, {"bounds": {"q_proj": 2}}, {"policy": "union"}])
def test_ranks_are_chosen_for_those_who_ask(option: dict[str, Any], llama_config: LlamaConfig, tmp_path: Path) -> None:
    _, model, _ = train(tmp_path, llama_config, {"r": 16}, budget="60%", **option)
    assert {*ranks_of(model).values()} != {16}


def test_a_second_run_has_the_same_reference(llama_config: LlamaConfig, tmp_path: Path) -> None:
    model = adapted(llama_config, r=16)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=counting())
    pilot = rankpilot.attach(trainer, "default", budget="60%", parts="off").pilot
    trainer.train()
    first = pilot.limit
    trainer.train()
    assert pilot.limit == pytest.approx(first, rel=1e-3)


def test_a_run_goes_on_with_what_it_was_measured_against(llama_config: LlamaConfig, tmp_path: Path) -> None:
    lora, saved = {"r": 40, "lora_alpha": 40}, {"save_steps": 2}
    (losses, _), _, pilot = train(tmp_path, llama_config, lora, budget="30%", arguments=saved)
    model, recorder = adapted(llama_config, **lora), Recorder(lambda step: None)
    trainer = Trainer(
        model, arguments(tmp_path, weight_decay=0.1, **saved), train_dataset=counting(), callbacks=[recorder]
    )
    again = rankpilot.attach(trainer, budget="30%").pilot
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert recorder.losses == losses[2:]
    assert again.limit == pilot.limit


FORMS: dict[str, dict[str, Any]] = {
    "r 16, alpha 32": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "rsLoRA off the ladder": {"r": 10, "use_rslora": True, "target_modules": "all-linear"},
    "first module alone": {"r": 6, "lora_alpha": 3},
}


SHORT = {"mixtral": "r 16, alpha 32", "gpt-oss": "rsLoRA off the ladder", "qwen2.5-vl": "first module alone"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[pytest.mark.long] * (form != SHORT.get(name)))
        for name in ARCHITECTURES
        for form in FORMS
    ],
)
def test_the_lora_of_every_architecture_stays(name: str, form: str) -> None:
    base, lora = random_base(name), dict(FORMS[form])
    if "target_modules" not in lora:
        linear = [path for path, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
        lora["target_modules"] = next(path for path in linear if "vis" not in path)
    model = fresh_adapters(base, name, "CAUSAL_LM", new_head=False, **lora).train()
    ranks = ranks_of(model)
    scales = {target.name: target.scaling for target in find_target_modules(model)}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4)
    ids = torch.randint(5, 200, (8, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    pilot = RankPilot(budget="100%", parts="off")
    pilot.begin(TrainingRun.of_loader(model, optimizer, DataLoader(rows, batch_size=4), total_steps=2))
    pilot.finish()
    assert ranks_of(model) == ranks
    assert {target.name: target.scaling for target in find_target_modules(model)} == scales
    assert pilot.rates == (3e-4, 3e-4)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
