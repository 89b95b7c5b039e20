"""Rank changes: the function, PEFT's records, memory, and what is refused."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from rankpilot.common.errors import ConfigError, UnknownNameError
from rankpilot.lora import resize as ranks_module
from rankpilot.lora.resize import (
    growth_generator,
    non_finite,
    set_ranks,
    update_peft_records,
)
from rankpilot.lora.targets import TargetModule, find_target_modules
from torch import nn

from .training import product


def lone_pair(d_in: int, d_out: int, rank: int, dtype: torch.dtype = torch.float32, **options: object) -> TargetModule:
    """A LoRA pair on one linear layer, in a tiny model."""
    base = nn.Sequential(OrderedDict(layer=nn.Linear(d_in, d_out)))
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["layer"]} | options
    return find_target_modules(get_peft_model(base, LoraConfig(**settings)).to(dtype))[0]


def fill(target: TargetModule, used: int, generator: torch.Generator, spread: float = 1.0) -> None:
    """Random factors whose product has rank `used`, with singular values spread over decades."""
    rank, dtype = target.rank, target.weight_a.dtype
    mix = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, target.d_in, generator=generator, dtype=torch.float64)
    b = torch.randn(target.d_out, rank, generator=generator, dtype=torch.float64)
    b[:, used:] = 0
    b = b * 10 ** (-spread * torch.arange(rank) / rank)
    with torch.no_grad():
        target.weight_a.copy_((torch.linalg.inv(mix) @ a).to(dtype))
        target.weight_b.copy_((b @ mix).to(dtype))


@given(data=st.data())
def test_shrinking_is_the_best_approximation_of_that_rank(data):
    d_in, d_out = data.draw(st.integers(2, 24), "d_in"), data.draw(st.integers(2, 24), "d_out")
    # PEFT also allows ranks above the width, which add nothing.
    rank = data.draw(st.integers(2, min(d_in, d_out) + 2), "rank")
    after = data.draw(st.integers(1, min(rank - 1, d_in, d_out)), "after")
    used = data.draw(st.integers(0, rank), "used")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype")
    target = lone_pair(d_in, d_out, rank, dtype)
    fill(target, used, torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed")))
    old = product(target)
    set_ranks([target], {"layer": after})

    singular = torch.linalg.svdvals(old)
    best = float(singular[after:].square().sum().sqrt())
    error = float(torch.linalg.matrix_norm(product(target) - old))
    assert target.rank == after
    assert error - best <= 1e-5 * float(torch.linalg.matrix_norm(old)) + 1e-12


@given(st.integers(0, 99))
def test_the_kept_factors_are_balanced(seed):
    """Each side takes the root of the singular values, so neither side's gradient vanishes."""
    target = lone_pair(12, 20, 6, torch.float64)
    fill(target, 6, torch.Generator().manual_seed(seed))
    set_ranks([target], {"layer": 4})
    a, b = target.weight_a.detach(), target.weight_b.detach() * target.scaling / target.scaling_at(8)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("used", "after", "unused"), [(0, 3, 3), (1, 3, 2), (2, 3, 1), (5, 3, 0)])
def test_directions_without_function_are_seeded_anew_and_train_again(used, after, unused):
    target = lone_pair(10, 14, 6)
    fill(target, used, torch.Generator().manual_seed(3))
    set_ranks([target], {"layer": after}, seed=1, step=7)
    empty = (target.weight_b == 0).all(dim=0)
    assert int(empty.sum()) == unused
    assert (target.weight_a.norm(dim=1) > 1e-3).all()

    inputs = torch.randn(32, 10)
    goal = torch.randn(32, 14)
    before = target.weight_b.detach().clone()
    optimizer = torch.optim.AdamW([target.weight_a, target.weight_b], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (target.layer(inputs) - goal).square().mean().backward()
        optimizer.step()
    assert ((target.weight_b - before).abs().amax(dim=0) > 1e-3).all()


def test_changing_ranks_while_an_old_loss_is_alive(make_llama, llama_batch):
    """A loop may keep the last loss, whose graph must not stop the next step."""
    model = make_llama()
    targets = find_target_modules(model)
    loss = model(**llama_batch).loss
    loss.backward()
    set_ranks(targets, {t.name: 6 for t in targets})
    assert targets[0].weight_a.grad is None
    model(**llama_batch).loss.backward()
    assert targets[0].weight_a.grad.shape == (6, 32)
    assert loss.isfinite()


def test_shrinks_come_before_grows_so_that_storage_never_peaks(make_llama, monkeypatch):
    targets = find_target_modules(make_llama())
    ranks = {t.name: (1 if i % 2 else 7) for i, t in enumerate(targets)}

    def stored():
        return sum(w.untyped_storage().nbytes() for t in targets for w in (t.weight_a, t.weight_b))

    seen = []
    monkeypatch.setattr(
        ranks_module,
        "update_peft_records",
        lambda target, rank: (update_peft_records(target, rank), seen.append(stored())),
    )
    before = stored()
    set_ranks(targets, ranks)
    assert max(seen) <= max(before, stored())


def test_modules_that_keep_their_rank_are_left_alone(make_llama):
    targets = find_target_modules(make_llama())
    storages = [t.weight_a.data_ptr() for t in targets]
    set_ranks(targets, {targets[0].name: 4, targets[1].name: 2})
    assert [t.weight_a.data_ptr() for t in targets if t is not targets[1]] == storages[:1] + storages[2:]


def test_new_rows_depend_on_seed_step_and_module_alone(make_llama):
    def grown(seed, step, names=None, noise=0):
        targets = find_target_modules(make_llama())
        torch.manual_seed(noise)
        torch.rand(noise)
        wanted = [t for t in targets if names is None or t.name in names]
        set_ranks(targets, {t.name: 6 for t in wanted}, seed=seed, step=step)
        return {t.name: t.weight_a.detach()[4:].clone() for t in wanted}

    one = grown(1, 10)
    key = "model.layers.1.mlp.up_proj"
    assert torch.equal(grown(1, 10, names={key}, noise=5)[key], one[key])
    assert not torch.equal(grown(2, 10)[key], one[key])
    assert not torch.equal(grown(1, 11)[key], one[key])
    assert not torch.equal(one["model.layers.0.mlp.up_proj"], one[key])
    assert one[key].abs().max() <= 1 / math.sqrt(32)
    assert growth_generator(1, 2, "x").initial_seed() != growth_generator(12, 2, "x").initial_seed()


def test_global_random_state_is_left_alone(make_llama):
    targets = find_target_modules(make_llama())
    state = torch.get_rng_state()
    set_ranks(targets, {t.name: 8 for t in targets})
    set_ranks(targets, {t.name: 1 for t in targets})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "rank", "error", "words"),
    [
        ("q_prj", 2, UnknownNameError, r"Did you mean: 'model\.layers\.0\.self_attn\.q_proj'"),
        ("q_proj", -1, ConfigError, "Rank -1"),
    ],
)
def test_a_bad_plan_changes_nothing(make_llama, name, rank, error, words):
    targets = find_target_modules(make_llama())
    with pytest.raises(error, match=words):
        set_ranks(targets, {targets[2].name: 1, f"model.layers.0.self_attn.{name}": rank})
    assert {t.rank for t in targets} == {4}


def test_a_rank_above_the_width_is_clipped_and_reported(make_llama, caplog):
    targets = find_target_modules(make_llama())
    key, query = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"
    set_ranks(targets, {key: 99, query: 20})
    assert {t.name: t.rank for t in targets if t.rank != 4} == {key: 16, query: 20}
    assert [r.getMessage() for r in caplog.records] == [
        f"Ranks that could not be set as requested: {key} has rank 16 (requested 99, above min(d_in, d_out) = 16)."
    ]


@pytest.mark.parametrize(("value", "rank"), [(math.nan, 2), (math.inf, 6)])
@pytest.mark.parametrize("where", ["weight_a", "weight_b", "gradient", "state"])
def test_a_module_that_is_not_finite_is_left_alone_and_reported(make_llama, llama_batch, caplog, value, where, rank):
    model = make_llama()
    targets = find_target_modules(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**llama_batch).loss.backward()
    optimizer.step()
    broken = targets[5]
    gradient, state = broken.weight_b.grad, optimizer.state[broken.weight_a]["exp_avg"]
    place = {"gradient": gradient, "state": state}.get(where, getattr(broken, where, None))
    with torch.no_grad():
        place[0, 0] = value
    kept = broken.weight_b.detach().clone()
    assert non_finite(targets, optimizer) == [broken.name]
    set_ranks(targets, {t.name: rank for t in targets}, optimizer)
    note = f"not set to {rank}: its factors, gradients or optimizer state contain NaN or infinity"
    assert f"{broken.name} has rank 4 ({note})" in caplog.text
    assert [t.rank for t in targets] == [4 if t is broken else rank for t in targets]
    torch.testing.assert_close(broken.weight_b, kept, rtol=0, atol=0, equal_nan=True)
    assert len(caplog.records) == 1
    # Dropping it altogether is a way out.
    set_ranks(targets, {broken.name: 0}, optimizer)
    assert broken.rank == 0
    assert non_finite(targets, optimizer) == []
