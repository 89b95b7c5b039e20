"""What runs do to the optimiser's state, to the user's LoraConfig and modes, and from where they take their rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.common.errors import BudgetError
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.targets import find_target_modules
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator, get_cosine_schedule_with_warmup

from ..cases import first_cases
from .tiny_runs import Run, counting, load_loop, ranks_of, save_loop
from .tiny_runs import llama_config as llama_config

ROWS = counting()
ONCE = DecisionSchedule(probe_steps=3, fractions=(0.0,))


class Loop:
    """A model, its optimiser with a state of two steps, and a run."""

    def __init__(self, config: LlamaConfig, **adapters: Any) -> None:
        torch.manual_seed(0)
        self.lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **adapters)
        self.model: PeftModel = get_peft_model(LlamaForCausalLM(config), self.lora).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-2)
        self.loader: DataLoader[Any] = DataLoader(ROWS, 4, collate_fn=default_data_collator)  # type: ignore[arg-type]
        self.step()

    def step(self) -> None:
        self.model(**next(iter(self.loader))).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def run(self) -> TrainingRun:
        return TrainingRun.of_loader(self.model, self.optimizer, self.loader, total_steps=8)

    def states(self) -> dict[str, torch.Tensor]:
        return {
            name: self.optimizer.state[p]["exp_avg"].clone()
            for name, p in self.model.named_parameters()
            if p in self.optimizer.state
        }


def pilot_of(budget: str = "60%", policy: Any = "signal-mean", **options: Any) -> rankpilot.RankPilot:
    return rankpilot.RankPilot(policy, budget, **{"schedule": ONCE, "exact_savers": False} | options)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_allocating_leaves_the_optimisers_state(llama_config: LlamaConfig) -> None:
    loop = Loop(llama_config)
    before = loop.states()
    rankpilot.allocate(
        loop.model, loop.loader, budget="60%", policy="signal-mean", optimizer=loop.optimizer, schedule=ONCE
    )
    assert_same(loop.states(), before)
    loop.step()


def test_an_error_before_the_first_step_leaves_the_optimisers_state(llama_config: LlamaConfig) -> None:
    loop = Loop(llama_config)
    before = loop.states()
    with pytest.raises(BudgetError):
        rankpilot.RankPilot("signal-mean", "20kB", fresh=True).begin(loop.run)
    assert_same(loop.states(), before)

    class Stops:
        name = "stops"

        def decide(self, observation: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pilot_of(policy=Stops(), fresh=True).begin(loop.run)
    assert_same(loop.states(), before)
    loop.step()


@pytest.mark.long
@pytest.mark.parametrize("name", first_cases(2, ["adamw_torch_fused", "rmsprop", "adamw_torch"]))
def test_training_again_after_a_checkpoint_of_other_ranks_was_loaded(
    llama_config: LlamaConfig, tmp_path: Path, name: str
) -> None:
    """Transformers keeps the optimiser, whose moments are those of the last step, and not of the best one."""
    run = Run(tmp_path, llama_config, budget="60%", schedule=ONCE, optim=name, max_steps=2).train()
    trainer, model = run.trainer, run.model
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in state.items():  # as if the best checkpoint had had fewer ranks
        if "lora_A" in key:
            state[key] = value[: max(1, len(value) // 2)]
        if "lora_B" in key:
            state[key] = value[:, : max(1, value.shape[1] // 2)]
    ranks = ranks_of(model)
    model.load_state_dict(state, strict=False)
    assert ranks_of(model) != ranks
    trainer.train()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    moments = [(p, value) for p, kept in inner.state.items() for value in kept.values() if getattr(value, "ndim", 0)]
    assert moments
    assert all(value.shape == p.shape for p, value in moments)


def test_one_lora_config_serves_several_models(llama_config: LlamaConfig) -> None:
    loop = Loop(llama_config)
    pilot = pilot_of()
    pilot.begin(loop.run)
    pilot.finish()
    assert set(ranks_of(loop.model).values()) != {8}
    again = get_peft_model(LlamaForCausalLM(llama_config), loop.lora)
    assert set(ranks_of(again).values()) == {8}
    assert len(find_target_modules(again)) == len(find_target_modules(loop.model))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_another_share_on_resuming_is_one_of_the_same_whole(
    llama_config: LlamaConfig, tmp_path: Path, checkpoint: bool
) -> None:
    checkpointing = "auto" if checkpoint else False
    first = Loop(llama_config)
    whole = pilot_of("80%", gradient_checkpointing=checkpointing)
    whole.begin(first.run)
    save_loop(whole, first.run, tmp_path / "checkpoint")
    second = Loop(llama_config)
    resumed = pilot_of("90%", gradient_checkpointing=checkpointing)
    load_loop(resumed, second.run, tmp_path / "checkpoint")
    assert resumed.limit == pytest.approx(whole.limit * 90 / 80)


def test_the_probe_has_the_adapters_rate(llama_config: LlamaConfig) -> None:
    loop = Loop(llama_config)
    assert loop.run.learning_rate == 1e-2
    get_cosine_schedule_with_warmup(loop.optimizer, 4, 8)
    assert loop.optimizer.param_groups[0]["lr"] == 0
    assert loop.run.learning_rate == 1e-2, "the one that it warms up to"
    head = torch.nn.Linear(2, 2)
    groups = [
        {"params": head.parameters(), "lr": 0.5},
        {"params": [p for p in loop.model.parameters() if p.requires_grad]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    assert TrainingRun.of_loader(loop.model, optimizer, loop.loader, total_steps=1).learning_rate == 1e-4
    torch.optim.lr_scheduler.OneCycleLR(loop.optimizer, 5e-2, total_steps=10)
    assert loop.run.learning_rate == 5e-2, "the one that it rises to"


def test_parts_in_evaluation_mode_stay_so(llama_config: LlamaConfig) -> None:
    loop = Loop(llama_config)
    layer = loop.model.get_base_model().model.layers[0].eval()
    before = {name: module.training for name, module in loop.model.named_modules()}
    pilot_of().begin(loop.run)
    assert {name: module.training for name, module in loop.model.named_modules()} == before
    assert not layer.training


def test_frozen_adapters_stay_frozen_when_weights_are_loaded(llama_config: LlamaConfig) -> None:
    loop = Loop(llama_config)
    pilot = pilot_of(schedule=DecisionSchedule(probe_steps=3, fractions=(0.0, 0.5)))
    pilot.begin(loop.run)
    pilot.finish()
    state = loop.model.state_dict()
    loop.model.requires_grad_(False)
    loop.model.load_state_dict(state)
    assert not any(parameter.requires_grad for parameter in loop.model.parameters())
