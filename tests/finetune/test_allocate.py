"""Static allocations: the plan before training is the first plan of a run, and nothing else changes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rankpilot import RankPilot, TrainingRun, allocate, attach
from rankpilot.agents.learned.policy_file import load_policy
from rankpilot.agents.log import DecisionLog
from rankpilot.agents.rules import find_rule
from rankpilot.agents.settings import DecisionSchedule
from rankpilot.errors import BudgetError, ConfigError, DataError
from rankpilot.finetune.allocate import static_plan
from rankpilot.lora.peft_config import adapter_ranks
from rankpilot.lora.targets import find_target_modules
from rankpilot.study.replay import redecide
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from .one_layer import llama_config as llama_config

TEXTS = [[i * j % 64 for i in range(20)] for j in range(40)]
ROWS = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in TEXTS])
SCHEDULE = DecisionSchedule(probe_steps=3)


def adapted(config: LlamaConfig) -> Any:
    set_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(LlamaForCausalLM(config), lora)


def trainer_of(model: Any, folder: Path, **options: Any) -> Trainer:
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    settings |= {"report_to": [], "disable_tqdm": True, "use_cpu": True} | options
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=ROWS)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("budget", ["80%", "3k params"])
def test_the_plan_is_the_first_of_a_run(llama_config: LlamaConfig, tmp_path: Path, budget: str) -> None:
    trainer = trainer_of(adapted(llama_config), tmp_path / "run")
    before, attributes, settings = weights(trainer.model), dict(vars(trainer)), vars(trainer.args).copy()
    plan = static_plan(trainer, budget=budget, policy="signal-mean", schedule=SCHEDULE)
    assert vars(trainer) == attributes
    assert vars(trainer.args) == settings
    assert not (tmp_path / "run" / "decisions").exists()
    for name, value in weights(trainer.model).items():
        assert torch.equal(value, before[name]), name
    assert trainer.model.peft_config["default"].rank_pattern == {}
    attach(trainer, "signal-mean", budget, schedule=SCHEDULE)
    trainer.train()
    first = DecisionLog(tmp_path / "run" / "decisions").to_pandas().iloc[: len(plan.ranks)]
    assert dict(zip(first["module"].tolist(), first["rank_after"].tolist(), strict=True)) == plan.ranks
    assert first["predicted_cost"][0] == plan.cost <= plan.limit == first["limit"][0]


def test_plain_peft_makes_an_adapter_of_the_plan(llama_config: LlamaConfig, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(llama_config), tmp_path / "run")
    plan = static_plan(trainer, budget="70%", policy="signal-mean", schedule=SCHEDULE)
    assert 0 in plan.ranks.values()
    plan.config.save_pretrained(str(tmp_path / "config"))
    config = LoraConfig.from_pretrained(str(tmp_path / "config"))
    model = get_peft_model(LlamaForCausalLM(llama_config), config)
    targets = find_target_modules(model)
    assert adapter_ranks(targets) == {name: rank for name, rank in plan.ranks.items() if rank}
    assert all(target.scaling == 16 / target.rank for target in targets)
    assert not config.alpha_pattern, "one alpha for all"
    assert plan.line().endswith(f"mean rank {sum(plan.ranks.values()) / len(plan.ranks):.1f}")


def test_a_name_is_no_model() -> None:
    with pytest.raises(
        ConfigError, match=r"a model that is loaded, .*; got 'gpt2'\. .*the command `rankpilot allocate`"
    ):
        allocate("gpt2", DataLoader(ROWS))  # type: ignore[arg-type]


def test_a_model_and_a_loader(llama_config: LlamaConfig) -> None:
    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}

    loader = DataLoader(ROWS, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    set_seed(0)
    base = LlamaForCausalLM(llama_config)
    names = list(base.state_dict())
    base.eval()
    base.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    random_state = torch.get_rng_state()
    config = allocate(base, loader, budget="80%", policy="signal-mean", schedule=SCHEDULE, learning_rate=1e-2)
    assert list(base.state_dict()) == names, "the base model has no adapter afterwards"
    assert not hasattr(base, "peft_config")
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before
    assert {True, False} == set(before.values())
    assert not any(module.training for module in base.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    model = adapted(llama_config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pilot = RankPilot("signal-mean", "80%", schedule=SCHEDULE)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=1000))
    assert config.rank_pattern == model.peft_config["default"].rank_pattern
    with pytest.raises(ConfigError, match="pass a DataLoader, or a Trainer"):
        allocate(base)
    with pytest.raises(ConfigError, match=r"are a torch\.utils\.data\.DataLoader, .*; got list"):
        allocate(base, [ROWS[0]], policy="signal-mean")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="The training set is empty"):
        allocate(base, DataLoader([], batch_size=4), policy="signal-mean")  # type: ignore[arg-type]


def test_a_budget_that_nothing_fits_changes_nothing(llama_config: LlamaConfig, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(llama_config), tmp_path / "run", neftune_noise_alpha=5.0)
    before = weights(trainer.model)
    hooks = len(trainer.model.get_input_embeddings()._forward_hooks)
    with pytest.raises(BudgetError, match="smallest that works"):
        allocate(trainer, budget="10KiB", policy="signal-mean", schedule=SCHEDULE)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.model).items())
    assert len(trainer.model.get_input_embeddings()._forward_hooks) == hooks


def test_a_trainers_layers_and_inputs_are_as_they_were(llama_config: LlamaConfig, tmp_path: Path) -> None:
    """A Trainer switches checkpointing on when it begins, and rankpilot lets inputs require no gradients."""
    config = deepcopy(llama_config)
    config.num_hidden_layers = 2
    model = adapted(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    layers[0].gradient_checkpointing = False
    trainer = trainer_of(model, tmp_path / "run", gradient_checkpointing=True)
    model.config.use_cache = True
    allocate(trainer, budget="80%", policy="signal-mean", schedule=SCHEDULE, recompute=True)
    assert hooks
    assert dict(model.get_input_embeddings()._forward_hooks) == hooks
    assert [layer.gradient_checkpointing for layer in layers] == [False] + [True] * (len(layers) - 1)
    assert [layer._gradient_checkpointing_func for layer in layers] == functions
    assert model.config.use_cache


def test_what_was_frozen_stays_frozen(llama_config: LlamaConfig, tmp_path: Path) -> None:
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], use_dora=True)
    model = get_peft_model(LlamaForCausalLM(llama_config), lora)
    for target in find_target_modules(model):
        target.layer.lora_magnitude_vector.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    allocate(trainer_of(model, tmp_path / "run"), budget="80%", policy="signal-mean", schedule=SCHEDULE)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_models_inputs_are_as_they_were(llama_config: LlamaConfig) -> None:
    model = adapted(llama_config)
    model.enable_input_require_grads()
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    loader = DataLoader(ROWS.with_format("torch"), batch_size=4)  # type: ignore[arg-type]
    allocate(model, loader, budget="80%", policy="signal-mean", schedule=SCHEDULE)
    assert hooks
    assert dict(model.get_input_embeddings()._forward_hooks) == hooks


@pytest.mark.parametrize("explore", [None, 0.5])
def test_a_logged_plan_is_made_again_bit_for_bit(
    llama_config: LlamaConfig, tmp_path: Path, explore: float | None
) -> None:
    trainer = trainer_of(adapted(llama_config), tmp_path / "run")
    plan = static_plan(trainer, budget="70%", explore=explore, log=tmp_path / "log")
    logged = DecisionLog(tmp_path / "log").logged(0)
    assert dict(zip(logged.observation.names, logged.rank_after.tolist(), strict=True)) == plan.ranks
    again = redecide(logged, load_policy("default"))
    assert again.differences == ()
    assert again.ranks.tolist() == [*plan.ranks.values()]
    assert (logged.decision.log_prob is None) is (explore is None)
    other = redecide(logged, find_rule("uniform"))
    assert "deliberation" in other.differences  # a rule has none; its scores may be those of the policy's choice


def test_decisions_of_a_run_are_made_again_bit_for_bit(llama_config: LlamaConfig, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(llama_config), tmp_path / "run")
    attach(trainer, budget="70%", explore=0.5, schedule=SCHEDULE)
    trainer.train()
    log = DecisionLog(tmp_path / "run" / "decisions")
    assert len(log) >= 4
    for number in range(len(log)):
        logged = log.logged(number)
        if not logged.correction:
            assert redecide(logged, load_policy("default")).differences == ()
            assert logged.deliberation is not None
            assert logged.deliberation.seed == trainer.args.seed != 0
            chance = logged.deliberation.probabilities[logged.deliberation.plan]
            assert logged.decision.log_prob == pytest.approx(float(np.log(chance)))
    assert set(log.to_pandas()["policy"].tolist()) == {"default exploring at 0.5"}


def test_a_new_head_trains_under_the_configuration(bert_config: BertConfig) -> None:
    """PEFT freezes it where the configuration tells no task."""
    model = BertForSequenceClassification(bert_config)
    rows = [{"input_ids": ids, "labels": number % 3} for number, ids in enumerate(TEXTS)]
    loader: DataLoader[Any] = DataLoader(rows, 4, collate_fn=default_data_collator)  # type: ignore[arg-type]
    config = allocate(model, loader, budget="80%", policy="signal-mean", schedule=SCHEDULE, total_steps=12)
    assert config.task_type == "SEQ_CLS"
    again = get_peft_model(BertForSequenceClassification(bert_config), config)
    assert any("classifier" in name for name, p in again.named_parameters() if p.requires_grad)
