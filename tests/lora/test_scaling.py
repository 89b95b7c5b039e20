"""What stays when a rank changes, and that a change under constant alpha is exact."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel
from rankpilot.common.errors import ConfigError
from rankpilot.lora.peft_config import choose_scaling, make_resizable, reference_scaling, sync_config
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.spec import check_scaling
from rankpilot.lora.targets import find_target_modules
from transformers.optimization import Adafactor

from ..cases import first_cases
from .training import train

TINY = {"eps": 1e-30}
ABSOLUTE = {"scale_parameter": False, "relative_step": False}
PLANS = ((12, 3, 8, 1), (5, 9, 0, 16), (16, 2, 4, 8))
"""Ranks by module, from 8 on: grown, shrunk, dropped and revived."""

OPTIMIZERS = {
    # How a rate of B's own depends on the ratio of the scalings: for sign-like steps as the ratio, for steps that are
    # proportional to the gradient as its square, for steps that are relative to the weight not at all.
    "adam": (lambda p: torch.optim.Adam(p, lr=2e-3, **TINY), 1),
    "amsgrad": (lambda p: torch.optim.AdamW(p, lr=2e-3, amsgrad=True, weight_decay=0, **TINY), 1),
    "nadam": (lambda p: torch.optim.NAdam(p, lr=2e-3, **TINY), 1),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=5e-4, momentum=0.8, **TINY), 1),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), 2),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(1e-60, 1e-9), weight_decay=0), 0),
    "hf-adafactor": (lambda p: Adafactor(p, lr=2e-3, beta1=0.9, **ABSOLUTE, eps=(1e-60, 1e-9)), 1),
    "lion": (lambda p: pytest.importorskip("lion_pytorch").Lion(p, lr=5e-4), 1),
}


class Run:
    """A small fine-tune in fp64 that always sees the same batches, with a rate of its own for each B."""

    def __init__(self, model, make, make_tokens):
        self.model, self.make_tokens, self.count = model, make_tokens, 0
        self.targets = find_target_modules(model)
        own = [p for t in self.targets for key, p in t.parameters.items() if p is not t.weight_a]
        others = [{"params": [t.weight_a for t in self.targets]}]
        self.optimizer = make([*others, *({"params": [p]} for p in own)])
        self.groups = {id(group["params"][0]): group for group in self.optimizer.param_groups}
        self.rate = self.optimizer.defaults["lr"]

    def train(self, steps):
        train(self.model, self.optimizer, (self.make_tokens(seed=self.count + step) for step in range(steps)))
        self.count += steps

    def logits(self):
        with torch.no_grad():
            return self.model(input_ids=self.make_tokens(seed=99)).logits


@pytest.mark.parametrize(
    ("name", "options"),
    first_cases(
        len(OPTIMIZERS) + 2,
        [
            *((name, {}) for name in OPTIMIZERS),
            *((name, options) for name in OPTIMIZERS for options in ({"use_rslora": True}, {"lora_bias": True})),
        ],
    ),
)
def test_constant_alpha_is_a_constant_scaling_with_a_rate_of_its_own_for_b(make_llama, make_tokens, name, options):
    make, power = OPTIMIZERS[name]
    modules = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 8, "lora_alpha": 16}
    if name == "adafactor" and "lora_bias" in options:
        pytest.skip("a bias that starts at zero moves by a floor, in absolute terms")
    runs = [Run(make_llama(dtype=torch.float64, **modules, **options), make, make_tokens) for _ in range(2)]
    alpha, constant = runs
    choose_scaling(constant.targets, "constant")
    for run in runs:
        run.train(3)
    for plan in PLANS:
        ranks = {t.name: plan[i % len(plan)] for i, t in enumerate(alpha.targets)}
        for run in runs:
            before = run.logits() if 0 not in plan and 1 not in plan else None
            set_ranks(run.targets, ranks, run.optimizer, step=run.count)
            assert before is None or (run.logits() - before).abs().max() < 1
        for mine, other in zip(alpha.targets, constant.targets, strict=True):
            ratio = mine.scaling / other.scaling
            for key, parameter in other.parameters.items():
                if parameter is not other.weight_a:
                    constant.groups[id(parameter)]["lr"] = constant.rate * ratio**power
                    torch.testing.assert_close(mine.parameters[key] * ratio, parameter, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(mine.weight_a, other.weight_a, rtol=1e-7, atol=1e-9)
        for run in runs:
            run.train(4)
        torch.testing.assert_close(alpha.logits(), constant.logits(), rtol=0, atol=1e-7)
    assert {t.scaling for t in constant.targets} != {t.scaling for t in alpha.targets}


def test_alphas_of_single_modules_stay_and_a_scale_moves_into_b(make_llama, tmp_path):
    model = make_llama(r=4, lora_alpha=8, alpha_pattern={"q_proj": 20}, rank_pattern={"v_proj": 2})
    targets = find_target_modules(model)
    q, k, v = targets[:3]
    assert (q.scaling, k.scaling, v.scaling) == (5, 2, 4)
    k.layer.set_scale("default", 3.0)
    make_resizable(model, targets)
    before = 6 * k.weight_b @ k.weight_a
    set_ranks(targets, {t.name: 8 for t in targets})
    assert (q.scaling, k.scaling, v.scaling) == (2.5, 1, 1)
    torch.testing.assert_close(k.weight_b @ k.weight_a, before)
    sync_config(model, targets)
    model.save_pretrained(tmp_path)
    again = find_target_modules(PeftModel.from_pretrained(make_llama(filled=False).unload(), tmp_path))
    assert [t.scaling for t in again] == [t.scaling for t in targets]
    assert LoraConfig.from_pretrained(tmp_path).alpha_pattern, "modules differ in alpha"


def test_a_probe_has_one_scaling_at_any_rank(make_llama):
    targets = find_target_modules(make_llama(r=4, lora_alpha=16))
    set_ranks(targets, {t.name: 1 + i % 3 for i, t in enumerate(targets)})
    before = [t.scaling for t in targets]
    with reference_scaling(targets):
        assert {t.scaling for t in targets} == {t.scaling_at(8) for t in targets} == {2.0}
    assert [t.scaling for t in targets] == before
    choose_scaling(targets, "constant")
    with reference_scaling(targets):
        assert [t.scaling for t in targets] == before


def test_a_layer_has_adapters_of_both_kinds(make_llama):
    model = make_llama()
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    first = find_target_modules(model)
    model.set_adapter("other")
    other = find_target_modules(model)
    choose_scaling(other, "constant")
    for targets in (first, other):
        set_ranks(targets, {t.name: 8 for t in targets})
    assert ({t.scaling for t in first}, {t.scaling for t in other}) == ({1.0}, {2.0})
    choose_scaling(other, "alpha")
    set_ranks(other, {t.name: 4 for t in other})
    assert {t.scaling for t in other} == {4.0}


@pytest.mark.parametrize("wrong", ["rslora", 2.0, None])
def test_what_may_stay(wrong):
    check_scaling("alpha")
    check_scaling("constant")
    with pytest.raises(ConfigError, match=f"scaling must be 'alpha' .*got {wrong!r}"):
        check_scaling(wrong)
