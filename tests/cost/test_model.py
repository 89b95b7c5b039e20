"""Predicted bytes against real forward passes and steps, exact to the byte without checkpointing."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.common.errors import UnsupportedError
from rankpilot.cost.batch_shape import shape_of
from rankpilot.cost.cost import moment_costs, plan_cost
from rankpilot.cost.model import MemoryModel
from rankpilot.cost.record.calibration import calibrate
from rankpilot.cost.record.peak_meter import PeakMeter
from rankpilot.cost.recording import BatchShape
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from ..cases import first_cases
from ..families import FAMILIES
from .measured import KeepsOnContext, Run, adamw_run, autocast, family_batch, family_model, random_plans

ROWS = {family.name: family for family in FAMILIES}
EXACT = 1e-9
"""Bytes are whole numbers, but costs are sums of floats."""

CALIBRATED = (4, 12)
SHAPES = ((4, 12), (2, 5), (9, 16), (3, 12), (5, 7))

THOROUGH = ("llama", "bert", "gpt2", "t5")
PRECISIONS = ("fp32", "bf16", "autocast")
THIN = tuple(name for name in ROWS if name not in (*THOROUGH, "llama-rslora", "gpt2-rslora", "mixtral"))


def run_of(name: str, precision: str = "fp32", checkpointing: bool | None = None, **options: Any) -> Run:
    """A family's model with a batch of the calibrated shape."""
    model = family_model(ROWS[name], precision, checkpointing, **options)
    return adamw_run(model, family_batch(ROWS[name], model, *CALIBRATED), precision)


@cache
def calibrated(name: str, precision: str = "fp32", checkpointing: bool | None = None) -> tuple[Run, MemoryModel]:
    """A run and its memory model, for tests that look at both; plans and steps leave what is predicted."""
    run = run_of(name, precision, checkpointing)
    return run, run.calibrated()


def errors_of(
    name: str,
    precision: str,
    plans: int,
    shapes: tuple[tuple[int, int], ...],
    checkpointing: bool | None = None,
    *,
    saved: bool = False,
) -> np.ndarray:
    """Relative errors of the predicted peak of a step, or of the bytes that autograd saves, for plans at each shape."""
    run, memory = calibrated(name, precision, checkpointing)
    errors = []
    generator = np.random.default_rng(1)
    for seed, (rows, length) in enumerate(shapes):
        batch = family_batch(ROWS[name], run.model, rows, length, seed)
        shape = shape_of(batch)
        cost = None if saved else memory.cost(shape)
        for ranks in random_plans(run.targets, generator, plans):
            if cost is None:
                errors.append(memory.saved(ranks, shape) / run.saved(ranks, batch) - 1)
            else:
                errors.append(plan_cost(cost, ranks) / run.peak(ranks, batch) - 1)
    return np.array(errors)


# What autograd saves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "precision"), [*itertools.product(THOROUGH, PRECISIONS), ("llama", "bf16-all")])
def test_saved_bytes_are_exact_for_each_architecture_and_precision(name, precision):
    assert np.abs(errors_of(name, precision, 3, SHAPES, saved=True)).max() <= EXACT


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp32") for name in THIN), ("llama-dora", "bf16"), ("bert-dora-dropout", "autocast")],
)
def test_saved_bytes_are_exact_for_the_rest_of_the_matrix(name, precision):
    assert np.abs(errors_of(name, precision, 3, ((4, 12), (3, 7)), saved=True)).max() <= EXACT


def test_a_plan_of_no_ranks_saves_only_what_trains_beside_the_adapters():
    for name, trains_more in (("bert", True), ("llama", False)):
        run, memory = calibrated(name)
        none = np.zeros(len(run.targets), dtype=np.int64)
        assert memory.saved(none) == run.saved(none)
        assert bool(run.saved(none)) is trains_more


# The peak of a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"),
    first_cases(
        7,
        [
            ("llama", "fp32"),
            ("llama", "bf16"),
            ("bert", "autocast"),
            ("gpt2", "fp32"),
            ("t5", "fp32"),
            ("vit", "fp32"),
            ("distilbert", "autocast"),
            ("llama", "autocast"),
            *((name, how) for name in ("bert", "gpt2") for how in PRECISIONS[:2] if (name, how) != ("gpt2", "fp32")),
            ("gpt2", "autocast"),
        ],
    ),
)
def test_peaks_without_checkpointing_are_exact(name, precision):
    assert np.abs(errors_of(name, precision, 3, ((4, 12), (9, 16)))).max() <= EXACT


@pytest.mark.parametrize(
    "name", first_cases(2, ["llama-dora", "bert-dora-dropout", "gpt2-lora-bias", "gpt2-dora", "bert-lora-bias"])
)
def test_biases_and_magnitudes_count_their_gradients_from_the_start(name):
    """On models as small as these, peaks before the end of the backward pass are therefore a little too high."""
    errors = errors_of(name, "fp32", 6, ((9, 16),))
    assert errors.min() >= -EXACT
    assert errors.max() <= 0.008


LOW = {
    ("t5", False, "fp32"): 0.006,
    ("t5", True, "fp32"): 0.003,
    ("t5", True, "autocast"): 0.008,
}
"""The share by which tiny T5s are under-estimated: their relative positions take as much as hidden states."""


QUICK = [("llama", "autocast"), ("bert", "bf16"), ("gpt2", "fp32"), ("gpt2", "bf16"), ("t5", "autocast")]
CHECKPOINTED = [
    *QUICK,
    *(pair for pair in itertools.product(("llama", "bert", "gpt2"), PRECISIONS) if pair not in QUICK),
    ("t5", "fp32"),
]


@pytest.mark.parametrize("reentrant", first_cases(1, [False, True]), ids=["checkpointed", "reentrant"])
@pytest.mark.parametrize(("name", "precision"), first_cases(len(QUICK), CHECKPOINTED))
def test_checkpointed_peaks_are_within_three_percent_and_not_too_low(name, reentrant, precision):
    """On `gpt2` and `t5` an adapted embedding counts twice: as its adapter's graph, and as a leaf."""
    shapes = ((4, 12), (9, 16)) if name != "t5" else ((4, 12),)
    errors = errors_of(name, precision, 3, shapes, reentrant)
    assert errors.min() >= -LOW.get((name, reentrant, precision), EXACT)
    assert errors.max() <= (0.045 if name == "gpt2" else 0.03)
    assert np.quantile(np.abs(errors), 0.95) <= (0.042 if name == "gpt2" else 0.03)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "reentrant"])
def test_checkpointed_peaks_are_the_real_ones_and_the_margin(reentrant):
    run, memory = calibrated("bert", "fp32", reentrant)
    assert 0 < memory.margin <= 0.03
    for ranks in random_plans(run.targets, np.random.default_rng(2), 6):
        assert plan_cost(memory.cost(), ranks) == pytest.approx(run.peak(ranks) * (1 + memory.margin), rel=2e-4)


def test_signal_buffers_have_no_margin():
    """So without them "100%" holds plain LoRA, also where the model checkpoints all its layers."""
    memory, ranks = calibrated("bert", "fp32", False)[1], np.full(12, 8)
    signals = np.arange(12.0) + 1000
    measured = replace(memory, states=replace(memory.states, signals=signals))
    assert plan_cost(measured.cost(), ranks) - signals @ ranks == plan_cost(memory.cost(), ranks)
    assert measured.peak(ranks) - signals @ ranks == memory.peak(ranks)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "reentrant"])
def test_an_unadapted_embedding_passes_on_gradients_that_were_asked_for(reentrant):
    """With `enable_input_require_grads`, autograd saves everything above the embedding under every plan."""
    run = run_of("gpt2", "fp32", reentrant)
    run.model.enable_input_require_grads()
    cost = run.calibrated().cost()
    top, bottom = (np.eye(9, dtype=np.int64)[index] for index in (8, 1))
    assert plan_cost(cost, top) > 0.95 * plan_cost(cost, bottom)
    assert plan_cost(cost, top) == pytest.approx(run.peak(top), rel=0.021)


def test_doras_norms_in_a_second_pass_are_known_to_a_few_percent():
    """They are checkpointed from matrices as large as the layer's weight, which here take as much as activations."""
    errors = errors_of("llama-dora", "fp32", 8, ((9, 16),), False)
    assert errors.min() >= -0.01
    assert errors.max() <= 0.015


# Batches of other shapes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "every"), [("llama", (1, 2, 3, 5, 9)), ("bert", (1, 2, 3, 5, 9)), ("vit", (1, 2, 3, 5, 9)), ("t5", (1, 9))]
)
def test_one_calibration_predicts_fewer_and_more_rows_and_tokens(name, every):
    """With one row, a causal model shifts labels without a copy, so their padding stays: 8 bytes."""
    run, memory = calibrated(name)
    ranks = np.minimum(3, [target.max_rank for target in run.targets])
    for rows, length in itertools.product(every, (5, 16)):
        batch = family_batch(ROWS[name], run.model, rows, length)
        short = 8 if rows == 1 and name == "llama" else 0
        assert memory.saved(ranks, shape_of(batch)) == run.saved(ranks, batch) - short
        predicted, real = plan_cost(memory.cost(shape_of(batch)), ranks), run.peak(ranks, batch)
        assert real - short <= predicted <= real + short, (rows, length)


@pytest.mark.parametrize("calibrated", [(1, 9), (9, 7)])
def test_calibration_on_any_shape_predicts_any_other(calibrated):
    run = run_of("gpt2")
    memory = run.calibrated(family_batch(ROWS["gpt2"], run.model, *calibrated))
    assert memory.shape == BatchShape(*calibrated)
    ranks = np.full(len(run.targets), 2)
    for rows, length in ((2, 5), (4, 12), (8, 16)):
        batch = family_batch(ROWS["gpt2"], run.model, rows, length)
        assert plan_cost(memory.cost(shape_of(batch)), ranks) == pytest.approx(run.peak(ranks, batch), rel=EXACT)


def test_batches_of_three_tokens_are_too_short_to_tell_of_others():
    run = run_of("llama")
    memory = run.calibrated(family_batch(ROWS["llama"], run.model, 4, 3))
    assert memory.saved(np.full(14, 2), BatchShape(9, 3)) > memory.saved(np.full(14, 2))
    with pytest.raises(UnsupportedError, match=r"Batches of 4 x 12 .* batches of \S+ x 3, and a single length"):
        memory.cost(BatchShape(4, 12))


def test_a_mixture_of_experts_is_known_at_the_calibrated_shape_only():
    run, memory = calibrated("mixtral")
    for ranks in random_plans(run.targets, np.random.default_rng(0), 5):
        assert memory.saved(ranks) == pytest.approx(run.saved(ranks), rel=0.03)
        assert plan_cost(memory.cost(), ranks) == pytest.approx(run.peak(ranks), rel=0.01)  # routes follow the adapters
    with pytest.raises(
        UnsupportedError, match=r"Batches of 9 x 12 cannot be predicted.* only the measured shape, 4 x 12,"
    ):
        memory.cost(BatchShape(9, 12))
    with pytest.raises(UnsupportedError, match=r"Batches of 4 x 11 cannot be predicted"):
        memory.saved(np.full(8, 2), BatchShape(4, 11))


def test_batches_with_padding_are_predicted_from_batches_with_padding():
    """Transformers leaves out a mask of ones; one with zeros is one more tensor."""
    run = run_of("bert")
    for rows, length in ((4, 12), (8, 16)):
        batch = family_batch(ROWS["bert"], run.model, rows, length)
        batch["attention_mask"][:, -1] = batch["attention_mask"][:, length // 2 - 1] = 0
        if rows == 4:
            memory = run.calibrated(batch)
        for ranks in random_plans(run.targets, np.random.default_rng(0), 4):
            assert memory.saved(ranks, shape_of(batch)) == run.saved(ranks, batch)


# Costs of single ranks, optimisers and gradients -------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2])
def test_the_optimizer_step_is_the_peak_of_large_ranks_on_a_tiny_batch(rows):
    """AdamW with foreach=True takes a temporary copy of every parameter."""
    model = family_model(ROWS["llama"])
    batch = family_batch(ROWS["llama"], model, rows, 2)
    run = adamw_run(model, batch, foreach=True)
    ranks = np.array([target.max_rank for target in run.targets])
    cost = run.calibrated().cost()
    assert cost.moments[int(moment_costs(cost, ranks).argmax())] == "optimizer step"
    assert plan_cost(cost, ranks) == pytest.approx(run.peak(ranks), rel=0.01)
    assert plan_cost(cost, ranks) >= run.peak(ranks)


@pytest.mark.parametrize("foreach", [True, False])
def test_copies_of_what_trains_beside_the_adapters_count_at_the_step(foreach):
    model = family_model(ROWS["llama"], modules_to_save=["lm_head", "embed_tokens"])
    run = adamw_run(model, family_batch(ROWS["llama"], model, 2, 2), foreach=foreach)
    cost = run.calibrated().cost()
    ranks = np.ones(len(run.targets), dtype=np.int64)
    assert cost.moments[int(moment_costs(cost, ranks).argmax())] == "optimizer step"
    # Without foreach, up to three copies of the largest parameter are counted.
    assert 0 <= plan_cost(cost, ranks) / run.peak(ranks) - 1 <= (0.01 if foreach else 0.1)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adafactor])
def test_peaks_follow_the_optimizer(make):
    run = run_of("llama")
    run.optimizer = make([p for p in run.model.parameters() if p.requires_grad], lr=1e-4)
    cost = run.calibrated().cost()
    for ranks in random_plans(run.targets, np.random.default_rng(3), 4):
        error = plan_cost(cost, ranks) / run.peak(ranks) - 1
        assert -EXACT <= error <= 0.002


def test_gradients_kept_over_micro_batches_are_there_at_every_moment():
    run = run_of("bert")
    once, over_several = run.calibrated().cost(), run.calibrated(accumulates=True).cost()
    for ranks in random_plans(run.targets, np.random.default_rng(0), 8):
        assert plan_cost(over_several, ranks) == pytest.approx(accumulating_peak(run, ranks), rel=EXACT)
        weights = sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad)
        assert 0 <= plan_cost(over_several, ranks) - plan_cost(once, ranks) <= weights


def test_a_new_gradient_beside_that_of_the_micro_batch_before_counts():
    """In a batch of few tokens, gradients are as large as what flows back, and the peak is where one has just come."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(vocab_size=48, num_labels=3, **sizes))
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")).train()
    run = adamw_run(model, family_batch(ROWS["bert"], model, 4, 4), fused=True)
    cost = run.calibrated(accumulates=True).cost()
    for ranks in [*random_plans(run.targets, np.random.default_rng(1), 8), np.full(len(run.targets), 16)]:
        assert plan_cost(cost, ranks) == pytest.approx(accumulating_peak(run, ranks), rel=EXACT)


def accumulating_peak(run: Run, ranks: np.ndarray) -> int:
    """The peak of a second micro-batch under a plan, while gradients of the first exist."""
    run.apply(ranks)
    run.loss().backward()
    assert run.optimizer is not None
    run.optimizer.step()
    meter = PeakMeter()
    meter.begin(run.model, run.optimizer)
    run.loss().backward()
    run.optimizer.step()
    peak = meter.end(0)
    run.optimizer.zero_grad(set_to_none=True)
    assert peak is not None
    return peak


# What calibration leaves behind -----------------------------------------------------------------------------------


def state_of(run: Run) -> dict[str, Any]:
    """Everything that calibration might disturb."""
    model = run.model
    return {
        "storages": [p.untyped_storage()._cdata for p in model.parameters()],
        "objects": [id(p) for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "trains": [p.requires_grad for p in model.parameters()],
        "ranks": [target.rank for target in run.targets],
        "random state": torch.get_rng_state(),
        "training": [module.training for module in model.modules()],
        "hooks": [
            [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks] for module in model.modules()
        ],
        "global hooks": [
            len(nn.modules.module._global_forward_hooks),
            len(nn.modules.module._global_forward_pre_hooks),
        ],
        "checkpointing": [vars(module).get("_gradient_checkpointing_func") for module in model.modules()],
        "gradients enabled": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "batch": {name: tensor.clone() for name, tensor in run.batch.items()},
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name, value in before.items() if not same(value, after[name])]


def disturbed_run(checkpointing: bool | None = False) -> Run:
    """In the middle of a fine-tune: gradients exist, ranks differ, modules are dropped, one is frozen."""
    run = run_of("bert", checkpointing=checkpointing)
    ranks = np.full(len(run.targets), 4)
    ranks[:3] = 0, 7, 1
    run.apply(ranks)
    run.loss().backward()
    run.targets[5].weight_a.requires_grad_(False)
    run.model.base_model.model.bert.encoder.layer[1].eval()
    return run


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_calibration_leaves_everything_as_it_was(checkpointing):
    run = disturbed_run(checkpointing)
    before = state_of(run)
    run.calibrated()
    assert changed(before, state_of(run)) == []


def test_calibration_leaves_everything_as_it_was_after_an_error_in_the_forward_pass():
    run = disturbed_run()
    before = state_of(run)
    head = run.model.base_model.model.classifier
    calls = []

    def fail_later(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) >= 2:
            raise KeyError("in the second step")

    with head.register_forward_hook(fail_later), pytest.raises(KeyError, match="in the second step"):
        run.calibrated()
    assert changed(before, state_of(run)) == []
    run.calibrated()  # and nothing is broken


def test_calibration_leaves_no_graph_of_its_steps_behind():
    """DoRA's norms are on graphs that no backward pass frees."""
    run = run_of("gpt2-dora")
    run.calibrated()
    before = live_tensors()
    run.calibrated()
    assert live_tensors() <= before


def live_tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if isinstance(thing, torch.Tensor))


def test_calibration_does_not_depend_on_the_current_ranks():
    run = run_of("llama")
    plan = np.full(len(run.targets), 3)
    prices = set()
    for rank in (4, 0, 11):
        run.apply(np.full(len(run.targets), rank))
        memory = run.calibrated()
        prices.add((memory.saved(plan), plan_cost(memory.cost(), plan)))
    assert len(prices) == 1


def test_calibration_inside_autocast_is_of_autocast_and_leaves_its_cache_empty():
    """Otherwise the cache would hold copies of weights of other ranks."""
    run = run_of("llama", "autocast")
    plan = np.full(len(run.targets), 3)
    with autocast("autocast"):
        run.apply(np.full(len(run.targets), 5))
        run.loss()
        memory = run.calibrated()
        assert run.loss().isfinite()
        run.apply(plan)
        assert run.loss().isfinite()
    assert memory.saved(plan) == run.saved(plan)
    full = calibrate(run.model, run.targets, run.batch, run.optimizer, signal_bytes=False)
    assert memory.saved(plan) != full.saved(plan)


# Models that cannot be predicted, or hide what they hold -----------------------------------------------------------


def test_a_module_that_takes_no_part_is_named():
    family = replace(ROWS["bert"], options=ROWS["bert"].options | {"exclude_modules": None})
    model = family_model(family)
    model.base_model.model.bert.pooler.forward = lambda hidden: hidden[:, 0]
    run = adamw_run(model, family_batch(family, model, *CALIBRATED))
    with pytest.raises(UnsupportedError, match=r"'bert\.pooler\.dense' took no part in the forward pass"):
        run.calibrated()


def test_a_model_without_loss_is_told_to_take_labels():
    run = run_of("llama")
    del run.batch["labels"]
    before = state_of(run)
    with pytest.raises(UnsupportedError, match=r"returned no loss.*Add labels to its batches"):
        run.calibrated()
    assert changed(before, state_of(run)) == []


def test_a_model_whose_operations_change_from_call_to_call_is_refused():
    run = run_of("llama")
    norm = run.model.base_model.model.model.norm
    calls = iter(range(1000))
    before = state_of(run)
    with (
        norm.register_forward_hook(lambda module, given, output: output * 1 if next(calls) == 4 else output),
        pytest.raises(UnsupportedError, match=r"runs different operations each time.*layer drop"),
    ):
        run.calibrated()
    assert changed(before, state_of(run)) == []


def hooked(run: Run, hook: Any) -> Iterator[nn.Module]:
    """Register on both MLPs."""
    for layer in run.model.base_model.model.model.layers:
        layer.mlp.register_forward_hook(hook)
        yield layer.mlp


def test_tensors_on_the_context_of_a_function_are_seen():
    run = run_of("llama")
    list(hooked(run, lambda module, given, output: KeepsOnContext.apply(output)))
    check_never_low(run, 0.11)


def test_tensors_in_a_list_on_the_module_are_seen():
    run = run_of("llama")
    for layer in hooked(run, lambda module, given, output: module.kept.append(output * 1)):
        layer.kept = []
    run.model.register_forward_pre_hook(
        lambda module, given: [layer.mlp.kept.clear() for layer in run.model.base_model.model.model.layers] and None
    )
    check_never_low(run, 0.12)


def check_never_low(run: Run, allowed: float) -> None:
    cost = run.calibrated().cost()
    for ranks in random_plans(run.targets, np.random.default_rng(0), 12):
        error = plan_cost(cost, ranks) / run.peak(ranks) - 1
        assert -EXACT <= error <= allowed, ranks.tolist()


# As callers use it -------------------------------------------------------------------------------------------------


def test_names_of_moments_tell_where_in_the_model_the_peak_is():
    cost = run_of("llama").calibrated().cost()
    names = {name for name, _ in run_of("llama").model.named_modules()} | {"model"}
    for moment in cost.moments:
        if moment != "optimizer step":
            phase, _, place = moment.partition(": ")
            assert phase in ("forward", "backward", "recomputed")
            assert place in names
            assert re.match(r"^\S+$", place)
