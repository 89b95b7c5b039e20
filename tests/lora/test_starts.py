"""Starts that a user chose for adapters, under the first plan of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from rankpilot import RankPilot, TrainingRun
from rankpilot.decide.settings import ONCE
from rankpilot.lora.targets import find_target_modules
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator, set_seed

ROWS = [{"input_ids": ids, "labels": ids} for ids in ([i * j % 64 for i in range(20)] for j in range(40))]
NAMES = ["q_proj", "v_proj", "down_proj"]


def begun(config: LlamaConfig, start: Any, *, pattern: dict[str, int] | None = None, **options: Any) -> Any:
    """A model under its first plan, the factors A with which it began, and what was told."""
    set_seed(0)
    eva = {"eva_config": EvaConfig(rho=1.0)} if start == "eva" else {}
    lora = LoraConfig(r=8, target_modules=NAMES, task_type="CAUSAL_LM", init_lora_weights=start, **eva)
    lora.rank_pattern = pattern or {}
    model = get_peft_model(LlamaForCausalLM(config), lora)
    if start == "eva":
        loader: DataLoader[Any] = DataLoader(ROWS, 8, collate_fn=default_data_collator)  # type: ignore[arg-type]
        initialize_lora_eva_weights(model, list(loader), show_progress_bar=False)
    before = {target.name: target.weight_a.detach().clone() for target in find_target_modules(model)}
    return model, before, begin(model, **options)


def begin(model: Any, **options: Any) -> list[str]:
    """Begin a run on a model; what was told."""
    told: list[str] = []
    loader: DataLoader[Any] = DataLoader(ROWS, 8, collate_fn=default_data_collator)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    pilot = RankPilot("uniform", "400%", schedule=ONCE, exact_savers=False, tell=told.append, **options)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=12))
    pilot.finish()
    return told


def kept(model: Any, before: dict[str, torch.Tensor]) -> set[bool]:
    """Whether modules begin with the rows that they had."""
    rows = [(target.weight_a, before[target.name]) for target in find_target_modules(model) if target.rank]
    return {torch.equal(now[: min(map(len, (now, was)))], was[: min(map(len, (now, was)))]) for now, was in rows}


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("start", [True, "gaussian", "eva"])
def test_directions_that_were_drawn_stay(llama_config: LlamaConfig, start: Any, rank: int) -> None:
    model, before, told = begun(llama_config, start, bounds=dict.fromkeys(NAMES, rank))
    targets = find_target_modules(model)
    assert {target.rank for target in targets} == {rank}
    assert kept(model, before) == {True}
    assert not any(target.weight_b.any() for target in targets)
    assert not any("init_lora_weights" in line for line in told)


def test_they_do_not_where_all_is_to_begin_anew(llama_config: LlamaConfig) -> None:
    model, before, told = begun(llama_config, "eva", bounds=dict.fromkeys(NAMES, 8), fresh=True)
    assert kept(model, before) == {False}
    assert any("instead of init_lora_weights='eva'" in line for line in told)


def trained(config: LlamaConfig, *, pilots: bool) -> list[torch.Tensor]:
    """The factors of adapters of rank 8 after an epoch, with rankpilot or without."""
    set_seed(0)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=NAMES))
    loader: DataLoader[Any] = DataLoader(ROWS, 8, collate_fn=default_data_collator)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pilot = RankPilot("uniform", "400%", schedule=ONCE, bounds=dict.fromkeys(NAMES, 8), tell=lambda line: None)
    if pilots:
        pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=len(loader)))
    for batch in loader:
        if pilots:
            pilot.before_step(batch)
        loss = model(**batch).loss
        loss.backward()
        if pilots:
            pilot.before_optimizer_step(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if pilots:
            pilot.after_step()
    return [factor for target in find_target_modules(model) for factor in (target.weight_a, target.weight_b)]


def test_a_plan_that_is_the_configs_trains_as_without_rankpilot(llama_config: LlamaConfig) -> None:
    ours, plain = trained(llama_config, pilots=True), trained(llama_config, pilots=False)
    assert all(bool(factor.any()) for factor in plain)
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


def test_a_start_in_both_factors_gives_way_and_this_is_told(llama_config: LlamaConfig) -> None:
    model, before, told = begun(llama_config, "orthogonal")
    assert kept(model, before) == {False}
    assert [line for line in told if "init_lora_weights" in line] == [
        "This run starts with PEFT's default initialization instead of init_lora_weights='orthogonal'."
    ]


def test_embeddings_keep_theirs(llama_config: LlamaConfig) -> None:
    set_seed(0)
    model = get_peft_model(LlamaForCausalLM(llama_config), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    before = {target.name: target.weight_b.detach().clone() for target in find_target_modules(model)}
    begin(model, bounds={"embed_tokens": 8, "q_proj": 4})
    (embedding,) = (target for target in find_target_modules(model) if target.embedding)
    assert embedding.rank == 8
    assert torch.equal(embedding.weight_b[:, :4], before[embedding.name])
    assert not embedding.weight_a.any()


def test_that_a_pattern_of_ranks_gives_way_is_told_once(llama_config: LlamaConfig, tmp_path: Path) -> None:
    def lines(told: list[str]) -> int:
        return sum(line.startswith("LoraConfig's rank_pattern is ignored") for line in told)

    model, _, told = begun(llama_config, True, pattern={"q_proj": 2})
    assert lines(told) == 1
    assert model.peft_config["default"].rank_pattern.keys() != {"q_proj"}
    assert lines(begin(model)) == 0, "this one is ours"
    with torch.no_grad():
        for target in find_target_modules(model):
            target.weight_b.fill_(0.01)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(LlamaForCausalLM(llama_config), tmp_path, is_trainable=True)
    assert lines(begin(again)) == 0, "its ranks are kept"
    assert lines(begun(llama_config, True)[2]) == 0
