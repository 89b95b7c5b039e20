"""Adapter files: plain PEFT reads them, and models of other ranks take them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.lora import peft_config as checkpoint
from rankpilot.lora.peft_config import adapter_ranks, choose_scaling, make_resizable, sync_config
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from transformers import LlamaForCausalLM

from .training import logits

MIXED = (0, 1, 3, 0, 7, 2, 12)


def mix(targets, pattern=MIXED):
    set_ranks(targets, {t.name: pattern[i % len(pattern)] for i, t in enumerate(targets)}, seed=5)
    with torch.no_grad():
        for index, t in enumerate(targets):
            noise = torch.Generator().manual_seed(index)
            t.weight_b.copy_(0.1 * torch.randn(t.weight_b.shape, generator=noise))
    return adapter_ranks(targets)


def test_unrelated_weights_leave_the_ranks_alone(make_bert):
    model = make_bert()
    targets = find_target_modules(model)
    make_resizable(model, targets)
    ranks = mix(targets)
    weights = [t.weight_a.data_ptr() for t in targets]
    others = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
    model.load_state_dict(others, strict=False)
    model.load_state_dict({}, strict=False)
    model.load_state_dict({k: v for k, v in others.items() if "classifier" in k}, strict=False)
    assert adapter_ranks(targets) == ranks
    assert [t.weight_a.data_ptr() for t in targets] == weights
    assert [t.weight_a.requires_grad for t in targets] == [rank > 0 for rank in ranks.values()]


@pytest.mark.parametrize(
    "user", [["gate_proj", "model.layers.1.self_attn.v_proj"], r".*(gate_proj|layers\.1\.self_attn\.v_proj)"]
)
def test_what_the_user_excluded_stays_excluded(make_llama, llama_config, make_tokens, tmp_path, user):
    options = {"target_modules": r".*_proj", "exclude_modules": user}
    model = make_llama(**options)
    targets = find_target_modules(model)
    assert len(targets) == 11
    original = model.peft_config["default"].exclude_modules
    sync_config(model, targets)
    assert model.peft_config["default"].exclude_modules == original
    make_resizable(model, targets)
    for pattern in (MIXED, (2, 0, 0, 5)):
        ranks = mix(targets, pattern)
        sync_config(model, targets)
        folder = tmp_path / str(len(set(pattern)))
        model.save_pretrained(folder)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(LlamaForCausalLM(llama_config), folder)
        assert adapter_ranks(find_target_modules(again)) == {n: r for n, r in ranks.items() if r}
        assert torch.equal(logits(again, make_tokens()), logits(model, make_tokens()))
    set_ranks(targets, {t.name: 2 for t in targets})
    sync_config(model, targets)
    assert model.peft_config["default"].exclude_modules == original


@pytest.mark.parametrize("many", [256, 3])
@pytest.mark.parametrize("user", ["up_proj", ".*up_proj", "(up_proj|v_proj)"])
def test_no_pattern_of_the_user_gets_in_the_way(
    make_llama, llama_config, make_tokens, tmp_path, monkeypatch, user, many
):
    """PEFT sorts patterns on saving and uses the first that matches; many patterns are grouped by rank."""
    monkeypatch.setattr(checkpoint, "MANY_MODULES", many)
    model = make_llama(rank_pattern={user: 2}, alpha_pattern={user: 6})
    targets = find_target_modules(model)
    make_resizable(model, targets)
    ranks = mix(targets, (0, 1, 6))
    sync_config(model, targets)
    config = model.peft_config["default"]
    assert len(config.rank_pattern) == (2 if many == 3 else sum(rank > 0 for rank in ranks.values()))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(LlamaForCausalLM(llama_config), tmp_path)
    assert adapter_ranks(find_target_modules(again)) == {n: r for n, r in ranks.items() if r}
    assert torch.equal(logits(again, make_tokens()), logits(model, make_tokens()))


def test_a_dropped_module_does_not_take_its_namesake_along(tmp_path):
    """PEFT also matches a name in a list with the end of a longer name."""

    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)
            self.inner = torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 8)})

        def forward(self, x):
            return self.inner["fc"](self.fc(x))

    model = get_peft_model(Nested(), LoraConfig(r=2, target_modules=["fc"]))
    targets = find_target_modules(model)
    set_ranks(targets, {"fc": 0, "inner.fc": 3})
    make_resizable(model, targets)
    sync_config(model, targets)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Nested(), tmp_path)
    assert adapter_ranks(find_target_modules(again)) == {"inner.fc": 3}


@pytest.mark.parametrize("scaling", ["alpha", "constant"])
def test_the_file_tells_each_rank_and_alpha(make_llama, tmp_path, scaling):
    model = make_llama()
    targets = find_target_modules(model)
    choose_scaling(targets, scaling)
    set_ranks(targets, {targets[0].name: 6, targets[1].name: 0})
    make_resizable(model, targets)
    sync_config(model, targets)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    key = "^" + re.escape(targets[0].name)
    assert (config["rank_pattern"][key], config["lora_alpha"]) == (6, 8)
    assert config["alpha_pattern"].get(key) == (None if scaling == "alpha" else 12.0)
    assert bool(config["alpha_pattern"]) == (scaling == "constant"), "one alpha for all says it"
    assert "^" + re.escape(targets[1].name) not in config["rank_pattern"]
