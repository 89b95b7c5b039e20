"""Stacked adapters: each run computes what it would on a PEFT model, whatever the other runs do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from rankpilot.common.arrays import IntArray
from rankpilot.common.errors import UnsupportedError
from rankpilot.env.stack.adapters import StackedAdapters
from rankpilot.env.stack.runs import Move, StackedMeter, StackedRun, accumulate_all, reset_runs, set_stacked_ranks
from rankpilot.lora.adapters import SIGNALS, SignalMeter, base_norms
from rankpilot.lora.resize import reset_adapters, set_ranks
from rankpilot.lora.targets import TargetModule, find_target_modules
from torch import nn

from ...cases import first_cases

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_NORM = 1.0
DECISIONS = (20, 40, 60)
HELD = ("weights", "first", "second")
SIDES = (*HELD, "gradients")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        seed: decides its fresh directions.
        rate: its learning rate at the start; it decays linearly.
        data: decides its batches.
        moves: new ranks by step, one after another.
        reads: further steps before which the signals are read.
    """

    seed: int
    rate: float
    data: int
    moves: Mapping[int, Sequence[IntArray]] = field(default_factory=dict)
    reads: Sequence[int] = ()

    def rate_at(self, step: int) -> float:
        return self.rate * (1 - step / 100)


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        losses: the loss of each step.
        pairs: A (rank, d_in) and B^T (rank, d_out) of each module, under each name in SIDES.
        ages: Adam's steps of each module.
        signals: values and ages, at each reading.
    """

    losses: list[float] = field(default_factory=list)
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    ages: list[int] = field(default_factory=list)
    signals: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Tiny:
    """A tiny model twice: plain, and with a LoRA pair on every target module."""

    plain: nn.Module
    peft: PeftModel
    targets: list[TargetModule]
    classes: int = 0
    rows: int = 2

    @property
    def max_ranks(self) -> IntArray:
        return np.array([target.max_rank for target in self.targets], dtype=np.int64)

    def stacked(self, runs: int, *, device: str = "cpu") -> StackedAdapters:
        return StackedAdapters(copy.deepcopy(self.plain).to(device), self.targets, runs)

    def all_at(self, rank: int) -> IntArray:
        return np.full(len(self.targets), rank, dtype=np.int64)

    def batch(self, run: Run, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, and labels in line with the logits."""
        generator = torch.Generator().manual_seed(100 * run.data + step % 5)
        tokens = torch.randint(1, 48, (self.rows, 8), generator=generator)
        labels = torch.randint(0, self.classes or 48, tokens.shape[: 1 if self.classes else 2], generator=generator)
        return tokens, labels

    def random_moves(self, seed: int, steps: Sequence[int] = DECISIONS) -> dict[int, list[IntArray]]:
        """Random ranks of all modules, rank 0 among them."""
        random = np.random.default_rng(seed)
        moves = {step: random.integers(1, self.max_ranks + 1) for step in steps}
        return {step: [np.where(random.random(len(ranks)) < 0.3, 0, ranks)] for step, ranks in moves.items()}

    def runs(self, steps: Sequence[int] = DECISIONS, *, later: int = 0) -> list[Run]:
        """Runs with different seeds, rates, data and moves; the last two move some steps `later` than the others."""
        rates = (1e-2, 3e-3, 1e-3, 5e-3)
        times = [[step + later * (i // 2) for step in steps] for i in range(len(rates))]
        return [Run(10 + i, rate, i, self.random_moves(i, times[i]), (1, 9)) for i, rate in enumerate(rates)]


MakeTiny = Callable[..., Tiny]


@pytest.fixture
def make_tiny(named_family: Callable[[str], Any]) -> MakeTiny:
    """Builds both models of a family, without dropout."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float64, rows: int = 2) -> Tiny:
        family = named_family(name)
        options = {"target_modules": ["c_attn", "c_proj", "c_fc"]} if name.startswith("gpt2") else {}
        peft = family.model(dtype, **options).eval()
        return Tiny(family.base().to(dtype).eval(), peft, find_target_modules(peft), 3 if name == "bert" else 0, rows)

    return make


def losses_of(logits: torch.Tensor, labels: torch.Tensor, runs: int = 1) -> torch.Tensor:
    """The mean loss of each run in a batch."""
    each = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return each.view(runs, -1).mean(dim=1)


def peft_outcome(targets: Sequence[TargetModule], optimizer: torch.optim.Optimizer, outcome: Outcome) -> Outcome:
    """Note the factors, gradients and moments of a PEFT model."""
    for side in SIDES:
        outcome.pairs[side] = []
    for target in targets:
        by_side: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
        for weight, turned in ((target.weight_a, False), (target.weight_b, True)):
            state, zeros = optimizer.state.get(weight, {}), torch.zeros_like(weight)
            gradient = zeros if weight.grad is None else weight.grad
            values = (weight.detach(), state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros), gradient)
            for side, value in zip(SIDES, values, strict=True):
                by_side[side].append((value.mT if turned else value).detach().clone())
        for side, (a, b) in by_side.items():
            outcome.pairs[side].append((a, b))
        outcome.ages.append(int(optimizer.state.get(target.weight_a, {}).get("step", 0)))
    return outcome


def train_peft(tiny: Tiny, run: Run, steps: int) -> Outcome:
    """A run on a PEFT model, from fresh adapters of rank 1."""
    reset_adapters(tiny.targets, 1, run.seed)
    parameters = [weight for target in tiny.targets for weight in (target.weight_a, target.weight_b)]
    optimizer = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=0.0, fused=True)
    meter, outcome = SignalMeter(tiny.targets), Outcome()
    for step in range(steps):
        if step in run.moves or step in run.reads:
            outcome.signals.append((meter.read().copy(), meter.age.copy()))
        for ranks in run.moves.get(step, ()):
            plan = {target.name: rank for target, rank in zip(tiny.targets, ranks.tolist(), strict=True)}
            set_ranks(tiny.targets, plan, optimizer, seed=run.seed, step=step)
            meter.restart()
        tokens, labels = tiny.batch(run, step)
        optimizer.zero_grad(set_to_none=True)
        loss = losses_of(tiny.peft(input_ids=tokens).logits, labels)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        outcome.losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        meter.accumulate()
        for group in optimizer.param_groups:
            group["lr"] = run.rate_at(step)
        optimizer.step()
    return peft_outcome(tiny.targets, optimizer, outcome)


def outcome_of(adapters: StackedAdapters, row: int, sides: Sequence[str] = HELD) -> Outcome:
    """The factors and moments of a row, which must be zero above its ranks."""
    outcome = Outcome()
    for side in sides:
        outcome.pairs[side] = []
        pairs = adapters.layout.pairs(getattr(adapters, side))
        for (a, b), rank in zip(pairs, adapters.ranks[row].tolist(), strict=True):
            assert not a[row, rank:].any()
            assert not b[row, rank:].any()
            outcome.pairs[side].append((a[row, :rank].cpu().clone(), b[row, :rank].cpu().clone()))
    outcome.ages = np.where(adapters.ranks[row] > 0, adapters.ages[row], 0).tolist()
    return outcome


def train_stacked(tiny, adapters, runs: Mapping[int, Run], steps, *, start=0, broken=()) -> dict[int, Outcome]:
    """Runs by row, in this order in the batch; from fresh adapters of rank 1 if they start at step 0.

    The final state of `broken` rows is ignored.
    """
    if start == 0:
        reset_runs(adapters, {row: run.seed for row, run in runs.items()})
    norms = base_norms(tiny.targets)
    meters = {row: StackedMeter(adapters, row, norms) for row in runs}
    outcomes = {row: Outcome() for row in runs}
    rows = list(runs)
    for step in range(start, steps):
        for row, run in runs.items():
            if step in run.moves or step in run.reads:
                meter = meters[row]
                outcomes[row].signals.append((meter.read().copy(), meter.age.copy()))
        changes = {row: run.moves[step] for row, run in runs.items() if step in run.moves}
        for turn in range(max(map(len, changes.values()), default=0)):
            moves = [
                Move(row, ranks[turn], runs[row].seed, step) for row, ranks in changes.items() if turn < len(ranks)
            ]
            set_stacked_ranks(adapters, moves)
        for row in changes:
            meters[row].restart()
        one_step(tiny, adapters, runs, step, outcomes)
        for row, squares in zip(rows, adapters.clip(rows, MAX_NORM), strict=True):
            accumulate_all([meters[row]], squares[None])
        adapters.step(rows, [run.rate_at(step) for run in runs.values()])
    for row in set(runs) - set(broken):
        end = outcome_of(adapters, row, SIDES)
        outcomes[row].pairs, outcomes[row].ages = end.pairs, end.ages
    return outcomes


def one_step(tiny, adapters, runs: Mapping[int, Run], step: int, outcomes: Mapping[int, Outcome]) -> None:
    """Compute losses and gradients of a step."""
    batches = [tiny.batch(run, step) for run in runs.values()]
    tokens, labels = (torch.cat(parts).to(adapters.device) for parts in zip(*batches, strict=True))
    with adapters.running(list(runs)) as model:
        losses = losses_of(model(input_ids=tokens).logits, labels, len(runs))
        adapters.backward(losses)
    for outcome, loss in zip(outcomes.values(), losses.tolist(), strict=True):
        outcome.losses.append(loss)


def assert_same(actual: Outcome, expected: Outcome, tolerance: float) -> None:
    """Compare all but the signs of the components, which a singular value decomposition leaves open."""
    assert actual.ages == expected.ages
    np.testing.assert_allclose(actual.losses, expected.losses, rtol=0, atol=tolerance)
    for side in SIDES:
        for mine, theirs in zip(actual.pairs[side], expected.pairs[side], strict=True):
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one.abs(), other.abs(), rtol=tolerance, atol=tolerance)
    for (a, b), (c, d) in zip(actual.pairs["weights"], expected.pairs["weights"], strict=True):
        torch.testing.assert_close(b.mT @ a, d.mT @ c, rtol=tolerance, atol=tolerance)
    grads = zip(actual.pairs["weights"], actual.pairs["gradients"], strict=True)
    others = zip(expected.pairs["weights"], expected.pairs["gradients"], strict=True)
    for ((a, b), (ga, gb)), ((c, d), (gc, gd)) in zip(grads, others, strict=True):
        torch.testing.assert_close(gb.mT @ a, gd.mT @ c, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(b.mT @ ga, d.mT @ gc, rtol=tolerance, atol=tolerance)


def assert_equal(actual: Outcome, expected: Outcome) -> None:
    """Compare bit for bit."""
    assert actual.losses == expected.losses
    assert actual.ages == expected.ages
    for side in SIDES:
        for mine, theirs in zip(actual.pairs[side], expected.pairs[side], strict=True):
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1], theirs[1])


# The same as PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    first_cases(
        4,
        [
            *(
                ("llama-rslora", torch.float64),
                ("bert", torch.float32),
                ("gpt2", torch.float64),
                ("bert", torch.float64),
            ),
            *(("llama", torch.float64), ("llama", torch.float32), ("gpt2", torch.float32)),
        ],
    ),
)
def test_stacked_runs_are_the_runs_of_peft_models(make_tiny: MakeTiny, name: str, dtype: torch.dtype) -> None:
    """Two runs move at once, and a third in the middle of the intervals of their signals."""
    tiny = make_tiny(name, dtype)
    runs = tiny.runs(later=4)[:3]
    outcomes = train_stacked(tiny, tiny.stacked(len(runs)), dict(enumerate(runs)), 75)
    for row, run in enumerate(runs):
        expected = train_peft(tiny, run, 75)
        assert min(expected.losses) < expected.losses[0] - 0.02  # it did learn
        if dtype == torch.float32:
            np.testing.assert_allclose(outcomes[row].losses, expected.losses, rtol=0, atol=1e-4)
            continue
        assert_same(outcomes[row], expected, 1e-8)
        assert len(set(outcomes[row].ages)) > 1, "modules were dropped and revived"
        assert len(expected.signals) == 5
        for (values, age), (their_values, their_age) in zip(outcomes[row].signals, expected.signals, strict=True):
            np.testing.assert_allclose(values, their_values, rtol=1e-7, atol=1e-10)
            np.testing.assert_array_equal(age, their_age)
        assert max(age.max() for _, age in outcomes[row].signals) > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_directions_without_function_are_seeded_anew_as_on_a_peft_model(make_tiny: MakeTiny, name: str) -> None:
    """Growing and then shrinking leaves directions that are zero in the product."""
    tiny = make_tiny(name)
    moves = {0: [tiny.all_at(7), tiny.all_at(5)], 8: [tiny.all_at(11), tiny.all_at(8)]}
    run, still = Run(1, 1e-2, 1, moves), Run(2, 0.0, 2, moves)
    outcomes = train_stacked(tiny, tiny.stacked(2), {0: still, 1: run}, 16)
    assert_same(outcomes[1], train_peft(tiny, run, 16), 1e-8)
    assert_same(outcomes[0], train_peft(tiny, still, 16), 1e-8)
    assert not any(b.any() for _, b in outcomes[0].pairs["weights"])  # at rate 0 every B stays zero


def test_a_run_without_any_adapter_keeps_its_signals(make_tiny: MakeTiny) -> None:
    tiny = make_tiny()
    runs = {0: Run(0, 1e-2, 0, {4: [tiny.all_at(0)]}, reads=(8,)), 1: Run(1, 1e-2, 1)}
    (first, _), (second, age) = train_stacked(tiny, tiny.stacked(2), runs, 9)[0].signals
    np.testing.assert_array_equal(first, second)
    assert (age == 1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_are_left_out_of_the_signals(make_tiny: MakeTiny, value: float) -> None:
    tiny = make_tiny()
    adapters = tiny.stacked(2)
    reset_runs(adapters, {0: 1, 1: 1})
    meters = [StackedMeter(adapters, row, base_norms(tiny.targets)) for row in range(2)]
    one_step(tiny, adapters, {0: Run(0, 0, 0), 1: Run(0, 0, 0)}, 0, {0: Outcome(), 1: Outcome()})
    for meter, squares in zip(meters, adapters.clip([0, 1], MAX_NORM), strict=True):
        accumulate_all([meter], squares[None])
    adapters.gradients[0, -1] = value
    accumulate_all(meters[:1], adapters.clip([0], MAX_NORM))
    values, clean = (meter.read() for meter in meters)
    assert values.shape == (14, len(SIGNALS))
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values, clean)


# Independence ----------------------------------------------------------------------------------------------------


def test_training_some_rows_leaves_the_others_alone(make_tiny: MakeTiny) -> None:
    """The trained rows are bit for bit what they are if all rows train."""
    tiny = make_tiny(dtype=torch.float32)
    runs = dict(enumerate(tiny.runs((2, 5))))
    part, whole = tiny.stacked(4), tiny.stacked(4)
    train_stacked(tiny, part, runs, 10)
    train_stacked(tiny, whole, runs, 10)
    before = [outcome_of(part, row) for row in range(4)]
    buffers = [buffer.clone() for buffer in (part.weights, part.first, part.second)]
    outcomes = train_stacked(tiny, part, {3: runs[3], 1: runs[1]}, 20, start=10)
    everyone = train_stacked(tiny, whole, runs, 20, start=10)
    for row in (0, 2):
        assert outcome_of(part, row).ages == before[row].ages
        for buffer, old in zip((part.weights, part.first, part.second), buffers, strict=True):
            assert torch.equal(buffer[row], old[row])
    for row in (1, 3):
        assert_equal(outcomes[row], everyone[row])
        assert outcomes[row].ages != before[row].ages


def test_a_run_that_breaks_harms_no_other(make_tiny: MakeTiny) -> None:
    tiny = make_tiny(dtype=torch.float32)
    runs = dict(enumerate(tiny.runs((2, 12))[:3]))
    broken, sound = tiny.stacked(3), tiny.stacked(3)
    for adapters in (broken, sound):
        train_stacked(tiny, adapters, runs, 8)
    broken.weights[1] = torch.where(broken.weights[1] != 0, float("nan"), 0.0)
    adapted = [target.name for target, rank in zip(tiny.targets, broken.ranks[1], strict=True) if rank]
    told = [StackedRun(broken, row, base_norms(tiny.targets)).non_finite(None) for row in (0, 1)]
    assert told == [[], adapted]
    calm = {0: runs[0], 1: Run(5, 1e-2, 5, reads=(19,)), 2: runs[2]}  # a run that broke takes no decision
    outcomes = train_stacked(tiny, broken, calm, 20, start=8, broken=[1])
    expected = train_stacked(tiny, sound, calm, 20, start=8)
    assert np.isnan(outcomes[1].losses).all()
    assert np.isnan(outcomes[1].signals[0][0]).all()
    for row in (0, 2):
        assert_equal(outcomes[row], expected[row])
    before = [outcome_of(broken, row).pairs["weights"] for row in (0, 2)]
    again = train_stacked(tiny, broken, {1: Run(6, 1e-2, 6)}, 10)[1]  # a reset row works like a new one
    for row, pairs in zip((0, 2), before, strict=True):
        now = outcome_of(broken, row).pairs["weights"]
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(now, pairs, strict=True))
    assert_equal(again, train_stacked(tiny, tiny.stacked(1), {0: Run(6, 1e-2, 6)}, 10)[0])


# Layout ----------------------------------------------------------------------------------------------------------


def test_memory_is_linear_in_the_runs_and_the_model_is_not_copied(make_tiny: MakeTiny) -> None:
    tiny = make_tiny()
    model = copy.deepcopy(tiny.plain)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    elements = sum(target.d_in + target.d_out for target in tiny.targets) * 32
    for count in (2, 4, 8):
        adapters = StackedAdapters(model, tiny.targets, count)
        runs = {row: Run(row, 1e-2, row, {1: [tiny.all_at(17)]}) for row in range(count)}
        train_stacked(tiny, adapters, runs, 2)
        buffers = [value for value in vars(adapters).values() if isinstance(value, torch.Tensor) and value.dim() == 2]
        sizes = {buffer.data_ptr(): buffer.numel() for buffer in buffers}
        assert sum(sizes.values()) == 5 * count * elements
        for module in model.modules():  # another number of runs, on the same model
            module._forward_hooks.clear()
    assert adapters.model is model
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses
    for parameter, before in zip(model.parameters(), tiny.plain.parameters(), strict=True):
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before)


# Moves -----------------------------------------------------------------------------------------------------------


# Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("gpt2", "transformer.wte"),
        ("llama-tied-embedding", "model.embed_tokens"),
        ("llama-dora", "model.layers.0.self_attn.q_proj"),
        ("bert-lora-bias", "bert.encoder.layer.0.attention.self.query"),
    ],
)
def test_what_is_no_plain_pair_on_a_linear_layer_is_refused(named_family, name, module):
    family = named_family(name)
    with pytest.raises(UnsupportedError, match=f"'{module}' cannot be stacked"):
        StackedAdapters(family.base(), find_target_modules(family.model()), 2)


# On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_gpu_gives_the_same_losses(make_tiny: MakeTiny, name: str) -> None:
    tiny = make_tiny(name, torch.float32)
    extra = {0: [tiny.all_at(7), tiny.all_at(5)]}  # some directions are seeded anew
    runs = {i: Run(i, run.rate, i, extra | dict(run.moves)) for i, run in enumerate(tiny.runs((8, 16)))}
    outcomes = train_stacked(tiny, tiny.stacked(4, device="cuda"), runs, 24)
    expected = train_stacked(tiny, tiny.stacked(4), runs, 24)
    for row in runs:
        np.testing.assert_allclose(outcomes[row].losses, expected[row].losses, rtol=0, atol=1e-3)
        values = zip(outcomes[row].signals[1:], expected[row].signals[1:], strict=True)
        for (mine, age), (theirs, their_age) in values:
            np.testing.assert_allclose(mine, theirs, rtol=0.05, atol=1e-3)
            np.testing.assert_array_equal(age, their_age)
