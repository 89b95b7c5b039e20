"""Starts that a user chose for adapters, under the first plan of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from rankpilot import RankPilot, TrainingRun
from rankpilot.agents.settings import ONCE
from rankpilot.lora.targets import find_target_modules
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator, set_seed

ROWS = [{"input_ids": ids, "labels": ids} for ids in ([i * j % 64 for i in range(20)] for j in range(40))]
NAMES = ["q_proj", "v_proj", "down_proj"]


def begun(
    config: LlamaConfig, start: Any, *, pattern: dict[str, int] | None = None, **options: Any
) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
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
    pilot = RankPilot("uniform", "400%", schedule=ONCE, tell=told.append, **options)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=12))
    pilot.finish()
    return told


def kept(model: Any, before: dict[str, torch.Tensor]) -> set[bool]:
    """Whether modules begin with the rows that they had."""
    rows = [(target.weight_a, before[target.name]) for target in find_target_modules(model) if target.rank]
    return {torch.equal(now[: min(map(len, (now, was)))], was[: min(map(len, (now, was)))]) for now, was in rows}


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_evas_directions_stay(llama_config: LlamaConfig, rank: int) -> None:
    model, before, told = begun(llama_config, "eva", bounds=dict.fromkeys(NAMES, rank))
    targets = find_target_modules(model)
    assert {target.rank for target in targets} == {rank}
    assert kept(model, before) == {True}
    assert not any(target.weight_b.any() for target in targets)
    assert not any("init_lora_weights" in line for line in told)


def test_they_do_not_where_all_is_to_begin_anew(llama_config: LlamaConfig) -> None:
    model, before, told = begun(llama_config, "eva", bounds=dict.fromkeys(NAMES, 8), fresh=True)
    assert kept(model, before) == {False}
    assert any("instead of those of init_lora_weights='eva'" in line for line in told)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_other_starts_give_way_and_this_is_told(llama_config: LlamaConfig, start: str) -> None:
    model, before, told = begun(llama_config, start)
    assert kept(model, before) == {False}
    assert [line for line in told if "init_lora_weights" in line] == [
        f"This run begins with PEFT's default directions, instead of those of init_lora_weights='{start}'."
    ]


def test_the_default_is_not_spoken_of(llama_config: LlamaConfig) -> None:
    assert not any("default directions" in line for line in begun(llama_config, True)[2])


def test_that_a_pattern_of_ranks_gives_way_is_told_once(llama_config: LlamaConfig, tmp_path: Path) -> None:
    def lines(told: list[str]) -> int:
        return sum(line.startswith("The rank_pattern of the LoraConfig is where nothing starts") for line in told)

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
