"""The optimiser's state through a change of rank."""

from __future__ import annotations

import pytest
import torch
from rankpilot.errors import UnsupportedError
from rankpilot.lora.optimizer_state import StateMap, check_optimizer, reset_state, state_bytes_of, unwrap_optimizer
from rankpilot.lora.peft_config import choose_scaling
from rankpilot.lora.resize import set_ranks, shrink_maps
from rankpilot.lora.targets import find_target_modules
from transformers.optimization import Adafactor

from .training import train

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=3e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


class Run:
    """A small fine-tune that always sees the same batches."""

    def __init__(self, model, make_tokens, name):
        self.model, self.make_tokens = model, make_tokens
        self.targets = find_target_modules(model)
        choose_scaling(self.targets, "constant")  # what follows another scaling is in test_scaling.py
        self.optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        self.count = 0

    def train(self, steps):
        seeds = range(self.count, self.count + steps)
        self.count += steps
        return train(self.model, self.optimizer, (self.make_tokens(seed=seed) for seed in seeds))

    def set_ranks(self, rank):
        set_ranks(self.targets, {t.name: rank for t in self.targets}, self.optimizer, step=self.count)

    def truncate(self, rank):
        """Cut the newest columns off factors and state: a reference that needs no map."""
        for target in self.targets:
            for weight, axis in ((target.weight_a, 0), (target.weight_b, 1)):
                for key, value in self.optimizer.state[weight].items():
                    if torch.is_tensor(value) and value.shape == weight.shape:
                        self.optimizer.state[weight][key] = value.narrow(axis, 0, rank).clone()
                weight.grad = None
                with torch.no_grad():
                    weight.set_(weight.detach().narrow(axis, 0, rank).clone())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growing_and_dropping_the_new_columns_is_as_if_nothing_happened(make_llama, make_tokens, name):
    plain, resized = (Run(make_llama(), make_tokens, name) for _ in range(2))
    assert plain.train(4) == resized.train(4)
    resized.set_ranks(7)
    resized.truncate(4)
    for old, new in zip(plain.targets, resized.targets, strict=True):
        for weight_old, weight_new in ((old.weight_a, new.weight_a), (old.weight_b, new.weight_b)):
            assert torch.equal(weight_old, weight_new)
            state_old, state_new = plain.optimizer.state[weight_old], resized.optimizer.state[weight_new]
            assert state_old.keys() == state_new.keys()
            for key, value in state_old.items():
                assert value is state_new[key] is None or torch.equal(value, state_new[key]), key
    assert plain.train(6) == pytest.approx(resized.train(6), abs=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growing_and_shrinking_back_keeps_the_function_and_goes_on(make_llama, make_tokens, name):
    """The columns that growth added are zero in the product, so shrinking restores it."""
    plain, resized = (Run(make_llama(), make_tokens, name) for _ in range(2))
    assert plain.train(4) == resized.train(4)
    resized.set_ranks(7)
    resized.set_ranks(4)
    for old, new in zip(plain.targets, resized.targets, strict=True):
        torch.testing.assert_close(new.weight_b @ new.weight_a, old.weight_b @ old.weight_a, rtol=1e-4, atol=1e-6)
    before, after = plain.train(6), resized.train(6)
    # Not identical: the balanced factors parametrise the product in another way, so steps differ slightly.
    assert before == pytest.approx(after, abs=0.03)


def test_sgd_follows_the_same_path_as_the_mapped_gradients(make_llama, make_tokens):
    """With A' = Q A and B' = B P, a history of gradients of (A, B) becomes P^T m_A and m_B Q^T."""
    run = Run(make_llama(dtype=torch.float64), make_tokens, "sgd-momentum")
    run.train(3)
    chosen = run.targets[3]
    momentum_a = run.optimizer.state[chosen.weight_a]["momentum_buffer"].clone()
    momentum_b = run.optimizer.state[chosen.weight_b]["momentum_buffer"].clone()
    p, q, used = shrink_maps([chosen.weight_a.detach()], [chosen.weight_b.detach()], 2)
    assert used.all()
    run.set_ranks(2)
    torch.testing.assert_close(run.optimizer.state[chosen.weight_a]["momentum_buffer"], p[0].T @ momentum_a)
    torch.testing.assert_close(run.optimizer.state[chosen.weight_b]["momentum_buffer"], momentum_b @ q[0].T)


def test_gradients_of_the_new_pair_are_the_mapped_gradients(make_llama, llama_batch):
    """At full numerical rank nothing is lost by a shrink, so both sides can be compared directly."""
    model = make_llama(dtype=torch.float64)
    targets = find_target_modules(model)
    choose_scaling(targets, "constant")
    for target in targets:  # rank 2 in a pair of rank 4
        with torch.no_grad():
            target.weight_b[:, 2:] = target.weight_b[:, :2] @ torch.tensor([[1.0, 2], [0.5, -1]]).double()
    model(**llama_batch).loss.backward()
    maps = [shrink_maps([t.weight_a.detach()], [t.weight_b.detach()], 2) for t in targets]
    old = [(t.weight_a.grad.clone(), t.weight_b.grad.clone()) for t in targets]
    set_ranks(targets, {t.name: 2 for t in targets})
    model(**llama_batch).loss.backward()
    for target, (p, q, _), (grad_a, grad_b) in zip(targets, maps, old, strict=True):
        torch.testing.assert_close(target.weight_a.grad, p[0].T @ grad_a, rtol=1e-6, atol=1e-10)
        torch.testing.assert_close(target.weight_b.grad, grad_b @ q[0].T, rtol=1e-6, atol=1e-10)


def test_state_of_new_and_of_kept_directions(make_llama, make_tokens):
    run = Run(make_llama(), make_tokens, "adamw")
    run.train(3)
    chosen = run.targets[0]
    old = {key: value.clone() for key, value in run.optimizer.state[chosen.weight_b].items()}
    run.set_ranks(6)
    b, a = run.optimizer.state[chosen.weight_b], run.optimizer.state[chosen.weight_a]
    assert int(b["step"]) == int(a["step"]) == 3
    assert torch.equal(b["exp_avg"][:, :4], old["exp_avg"])
    assert not b["exp_avg"][:, 4:].any()
    mean = old["exp_avg_sq"].mean(dim=1, keepdim=True)
    torch.testing.assert_close(b["exp_avg_sq"][:, 4:], mean.expand(-1, 2), rtol=1e-5, atol=0)
    assert not a["exp_avg_sq"][4:].any()
    assert a["exp_avg"].shape == (6, 32)
    assert b["exp_avg"].untyped_storage().nbytes() == 6 * 32 * 4


def test_directions_seeded_anew_by_a_shrink_start_like_those_of_a_growth(make_llama, make_tokens):
    run = Run(make_llama(filled=False), make_tokens, "adamw")
    tokens = make_tokens()
    run.model(input_ids=tokens, labels=tokens).loss.backward()
    run.optimizer.step()
    chosen = run.targets[0]
    with torch.no_grad():
        chosen.weight_b.zero_()
    mean = run.optimizer.state[chosen.weight_b]["exp_avg_sq"].mean(dim=1, keepdim=True)
    assert mean.any()
    set_ranks(run.targets, {chosen.name: 2}, run.optimizer)
    state = run.optimizer.state[chosen.weight_b]
    assert not state["exp_avg"].any()
    torch.testing.assert_close(state["exp_avg_sq"], mean.expand(-1, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("make", "average"),
    [
        (lambda p: torch.optim.Adafactor(p, lr=1e-2), "col_var"),
        (lambda p: Adafactor(p, lr=2e-3, scale_parameter=False, relative_step=False), "exp_avg_sq_col"),
    ],
)
def test_factored_state_of_directions_seeded_anew_is_the_mean_of_the_old_ones(make_llama, make_tokens, make, average):
    model = make_llama(filled=False)
    targets = find_target_modules(model)
    choose_scaling(targets, "constant")
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, [make_tokens()])  # A has no gradient yet, and torch's averages of it are 0
    chosen = targets[0]
    with torch.no_grad():
        chosen.weight_b.zero_()
    mean = optimizer.state[chosen.weight_b][average].mean()
    assert mean > 0
    set_ranks(targets, {chosen.name: 2}, optimizer)
    after = optimizer.state[chosen.weight_b][average]
    assert after.numel() == 2
    torch.testing.assert_close(after, mean.expand(after.shape), rtol=1e-5, atol=0)
    for weight in (chosen.weight_a, chosen.weight_b):
        assert all(torch.isfinite(value).all() for value in optimizer.state[weight].values() if torch.is_tensor(value))
    train(model, optimizer, [make_tokens(seed=1)])
    assert chosen.weight_a.isfinite().all()
    assert chosen.weight_b.isfinite().all()


def test_state_map_keeps_the_dtype_and_squares_for_second_moments():
    matrix = torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    change = StateMap(axis=1, rank=2, matrix=matrix, fresh=torch.tensor([False, True]), fill_second="mean")
    state = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    assert change.apply(state, second=False).tolist() == [[-3, 0], [-5, 0]]
    assert change.apply(state, second=True).tolist() == [[9, 1.5], [19, 3.5]]
    assert change.apply(state, second=True).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [torch.optim.Adamax, torch.optim.Adagrad, torch.optim.Rprop, torch.optim.Adadelta])
def test_an_optimiser_whose_state_is_not_understood_is_refused_before_anything_changes(make_llama, llama_batch, make):
    model = make_llama()
    targets = find_target_modules(model)
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**llama_batch).loss.backward()
    optimizer.step()
    for rank in (2, 6, 0):
        with pytest.raises(UnsupportedError, match=f"{make.__name__} cannot be carried.*AdamW"):
            set_ranks(targets, {t.name: rank for t in targets}, optimizer)
    assert {t.rank for t in targets} == {4}


def test_centred_rmsprop_is_refused():
    with pytest.raises(UnsupportedError, match="centered=False"):
        check_optimizer(torch.optim.RMSprop([torch.nn.Parameter(torch.ones(2))], centered=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_of_state_are_what_the_optimiser_really_keeps(make_llama, make_tokens, name):
    run = Run(make_llama(), make_tokens, name)
    run.train(1)
    weight = run.targets[0].weight_a
    kept = [v for v in run.optimizer.state[weight].values() if torch.is_tensor(v) and v.shape == weight.shape]
    assert state_bytes_of(run.optimizer, weight.detach()) == sum(t.untyped_storage().nbytes() for t in kept)
    check_optimizer(run.optimizer)


def test_the_optimiser_inside_a_wrapper_is_used(make_llama, make_tokens):
    run = Run(make_llama(), make_tokens, "adamw")
    run.train(1)

    class Wrapper:
        optimizer = run.optimizer

    assert unwrap_optimizer(Wrapper()) is run.optimizer
    set_ranks(run.targets, {t.name: 2 for t in run.targets}, Wrapper())
    assert run.optimizer.state[run.targets[0].weight_a]["exp_avg"].shape == (2, 32)
    assert state_bytes_of(None, torch.zeros(3, 5)) == 2 * 3 * 5 * 4
    reset_state(None, [run.targets[0].weight_a])
    assert run.targets[0].weight_a in run.optimizer.state
