"""The optimiser's state through a change of rank, in the form in which each optimiser stores it."""

from __future__ import annotations

import copy
import io
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.common.errors import UnsupportedError
from rankpilot.lora import optimizer_state
from rankpilot.lora.peft_config import choose_scaling
from rankpilot.lora.resize import set_ranks, shrink_maps
from rankpilot.lora.targets import TargetModule, find_target_modules
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.optimization import Adafactor

from ..cases import first_cases
from .training import train

BLOCK = 256
"""Number of values that share a scale in 8-bit state."""
SMALLEST = 4096
"""A parameter with fewer values has ordinary state in every library."""
FIRST = ("exp_avg", "state1", "momentum_buffer")
"""Keys of averages that are not of squares."""


Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def _bitsandbytes(name: str, **options: Any) -> Make:
    return lambda params: getattr(pytest.importorskip("bitsandbytes").optim, name)(params, **{"lr": 1e-3} | options)


def _torchao(name: str) -> Make:
    return lambda params: getattr(pytest.importorskip("torchao.optim"), name)(params, lr=1e-3)


@dataclass(frozen=True)
class Row:
    """One optimiser.

    Attributes:
        make: builds it; skips the test if its library is missing.
        rounding: largest error of one quantisation of a moment, as a share of its largest value; 0 for fp32.
    """

    name: str
    make: Make
    rounding: float = 0.0


_8BIT = {"rounding": 0.01}
# Half the widest gap between the 16 codes, and half of the last of three bits.
_4BIT = {"rounding": 0.1126}
_FP8 = {"rounding": 2**-4}
_ABSOLUTE = {"scale_parameter": False, "relative_step": False, "lr": 2e-3}

ROWS = (
    Row("torch-AdamW", lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True)),
    Row("torch-AdamW-fused", lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True)),
    Row("torch-AdamW-amsgrad", lambda params: torch.optim.AdamW(params, lr=1e-3, amsgrad=True)),
    Row("torch-NAdam", lambda params: torch.optim.NAdam(params, lr=1e-3)),
    Row("torch-RMSprop", lambda params: torch.optim.RMSprop(params, lr=3e-4, momentum=0.5)),
    Row("torch-SGD", lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9)),
    *(Row(f"bnb-{name}", _bitsandbytes(name), **_8BIT) for name in ("Adam8bit", "AdamW8bit", "PagedAdamW8bit")),
    *(Row(f"bnb-{name}", _bitsandbytes(name)) for name in ("AdamW32bit", "PagedAdamW32bit")),
    # As the Trainer builds them for optim="adamw_bnb_8bit" and "paged_adamw_32bit".
    Row("bnb-AdamW-of-8-bits", _bitsandbytes("AdamW", optim_bits=8), **_8BIT),
    Row("bnb-AdamW-paged", _bitsandbytes("AdamW", optim_bits=32, is_paged=True)),
    *(Row(f"bnb-{name}", _bitsandbytes(name, lr=3e-4), **_8BIT) for name in ("Lion8bit", "PagedLion8bit")),
    Row("bnb-Lion32bit", _bitsandbytes("Lion32bit", lr=3e-4)),
    Row("torchao-AdamW8bit", _torchao("AdamW8bit"), **_8BIT),
    Row("torchao-AdamW4bit", _torchao("AdamW4bit"), **_4BIT),
    Row("torchao-AdamWFp8", _torchao("AdamWFp8"), **_FP8),
    Row("lion", lambda params: pytest.importorskip("lion_pytorch").Lion(params, lr=3e-4)),
    Row("torch-Adafactor", lambda params: torch.optim.Adafactor(params, lr=1e-2)),
    Row("hf-Adafactor", lambda params: Adafactor(params, **_ABSOLUTE)),
    Row("hf-Adafactor-beta1", lambda params: Adafactor(params, beta1=0.9, **_ABSOLUTE)),
    Row("hf-Adafactor-relative", Adafactor),
)


OTHERS_STAND_FOR = ("bnb-Adam8bit", "bnb-PagedAdamW8bit", "bnb-AdamW-paged", "bnb-PagedLion8bit")
"""Optimisers whose state is laid out as that of another row; they are left to `make test-long`."""


@pytest.fixture(
    params=[
        pytest.param(row, marks=pytest.mark.long if row.name in OTHERS_STAND_FOR else (), id=row.name) for row in ROWS
    ]
)
def row(request: pytest.FixtureRequest) -> Row:
    """Every optimiser in turn."""
    chosen: Row = request.param
    return chosen


@pytest.fixture
def _eager() -> Iterator[None]:
    """Run torchao uncompiled: a step compiles for seconds at every new shape, and computes the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(seed))


class Run:
    """A small fine-tune that always sees the same batches.

    At rank 16 all factors have at least 4096 values, but for B of k and v.
    """

    def __init__(self, make: Make, **options: Any) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=256, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.05, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        settings = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"} | options
        self.model = get_peft_model(LlamaForCausalLM(config), LoraConfig(**settings)).train()
        self.targets = find_target_modules(self.model)
        choose_scaling(self.targets, "constant")  # what follows another scaling is in test_scaling.py
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad])
        self.count = 0

    @property
    def weights(self) -> list[tuple[nn.Parameter, int]]:
        """Every factor and its rank axis."""
        return [pair for t in self.targets for pair in ((t.weight_a, 0), (t.weight_b, 1))]

    def train(self, steps: int) -> list[float]:
        seeds = range(self.count, self.count + steps)
        self.count += steps
        return train(self.model, self.optimizer, (make_tokens(seed % 2) for seed in seeds))

    def set_ranks(self, rank: int, targets: list[TargetModule] | None = None) -> None:
        chosen = self.targets if targets is None else targets
        set_ranks(self.targets, {t.name: rank for t in chosen}, self.optimizer, step=self.count)


def moments(run: Run, weight: nn.Parameter) -> dict[str, torch.Tensor]:
    """The optimiser's state of a parameter as ordinary tensors, read by the library's functions."""
    state = run.optimizer.state[weight]
    moments = {}
    for key, value in state.items():
        if not torch.is_tensor(value) or value.dim() == 0 or key.startswith(("qmap", "absmax")):
            continue
        if value.dtype == torch.uint8:
            functional = pytest.importorskip("bitsandbytes.functional")
            scales, codes = state[f"absmax{key[-1]}"], state[f"qmap{key[-1]}"]
            moments[key] = functional.dequantize_blockwise(value, absmax=scales, code=codes, blocksize=BLOCK)
        else:
            moments[key] = value.dequantize() if hasattr(value, "codes") else value
    return moments


def check_form(run: Run, row: Row) -> None:
    """Check that state has its parameter's shape and the form that the library would give it."""
    for weight, _ in run.weights:
        state = run.optimizer.state[weight]
        for key, value in moments(run, weight).items():
            if "row" in key or "col" in key:
                assert value.numel() == weight.shape["col" in key], key
                continue
            assert value.shape == weight.shape, key
            large = row.rounding > 0 and weight.numel() >= SMALLEST
            if row.name.startswith("bnb"):
                _check_bitsandbytes(state, key, weight.numel(), large)
            elif row.name.startswith("torchao"):
                _check_torchao(state[key], key, weight.numel(), large, 4 if "4bit" in row.name else 8)


def _check_bitsandbytes(state: dict[str, Any], key: str, count: int, large: bool) -> None:
    assert state[key].dtype == (torch.uint8 if large else torch.float32), key
    assert state[key].is_contiguous()
    scales, codes = f"absmax{key[-1]}", f"qmap{key[-1]}"
    assert (scales in state) == (codes in state) == large
    if large:
        assert state[scales].shape == (math.ceil(count / BLOCK),)


def _check_torchao(stored: Any, key: str, count: int, large: bool, bits: int) -> None:
    block = BLOCK * bits // 8
    assert hasattr(stored, "codes") == (large and count % block == 0), key
    if hasattr(stored, "codes"):
        assert stored.scale.shape == (count // block,)
        assert stored.codes.numel() == count * bits // 8
        assert getattr(stored, "signed", key == "exp_avg") == (key == "exp_avg")  # fp8 has a sign in any case


@pytest.mark.usefixtures("_eager")
class TestEveryOptimiser:
    def test_shrinking_to_half_goes_on(self, row):
        run = Run(row.make)
        losses = run.train(8)
        run.set_ranks(8)
        check_form(run, row)
        losses += run.train(8)
        check_form(run, row)
        run.set_ranks(20)
        check_form(run, row)
        losses += run.train(8)
        assert all(map(math.isfinite, losses))
        # Two batches alternate, and each is compared with itself.
        assert losses[6] < losses[0]
        assert losses[14] < losses[8] < losses[0]
        assert losses[22] < losses[16] < losses[8]

    def test_dropping_and_reviving_goes_on(self, row):
        run = Run(row.make)
        losses = run.train(4)
        chosen = run.targets[::2]
        run.set_ranks(0, chosen)
        assert not any(weight in run.optimizer.state for t in chosen for weight in (t.weight_a, t.weight_b))
        losses += run.train(4)
        run.set_ranks(16, chosen)
        losses += run.train(4)
        check_form(run, row)
        assert all(map(math.isfinite, losses))
        assert losses[10] < losses[4] < losses[0]
        assert all(t.weight_b.any() for t in chosen)

    def test_saved_state_of_changed_ranks_goes_on_as_if_never_stopped(self, row):
        run = Run(row.make)
        run.train(4)
        run.set_ranks(24, run.targets[::2])
        run.set_ranks(8, run.targets[1::2])
        run.train(2)
        file = io.BytesIO()
        torch.save(run.optimizer.state_dict(), file)
        file.seek(0)

        again = Run(row.make)
        set_ranks(again.targets, {t.name: t.rank for t in run.targets})
        again.model.load_state_dict(run.model.state_dict())
        again.optimizer.load_state_dict(torch.load(file, weights_only=True))
        again.count = run.count
        check_form(again, row)
        assert again.train(2) == run.train(2)
        again.set_ranks(16)
        run.set_ranks(16)
        assert again.train(2) == run.train(2)

    def test_state_follows_a_parameter_that_is_divided(self, row):
        """The gradient grows by the factor: first moments by it, second ones by its square, changes shrink by it."""
        run = Run(row.make)
        run.train(3)
        for weight, axis in run.weights:
            if axis == 0:
                continue
            before = moments(run, weight)
            optimizer_state.scale_state(run.optimizer, weight, 4.0)
            after = moments(run, weight)
            assert after.keys() == before.keys()
            for key, value in after.items():
                factor = 4 if key in FIRST else 16
                if row.name == "hf-Adafactor-beta1" and key == "exp_avg":
                    factor = 1 / 4  # an average of changes of the parameter
                if row.name == "torch-RMSprop" and key == "momentum_buffer":
                    factor = 1  # one of gradients without their size
                # Codes stay, but torchao's are not all their own nearest ones.
                error = row.rounding * factor * before[key].abs().max().item() if "torchao" in row.name else 0
                torch.testing.assert_close(value, factor * before[key], rtol=1e-6, atol=error)
        check_form(run, row)

    @pytest.mark.parametrize("rank", first_cases(1, [17, 24]))
    def test_new_directions_start_without_a_past_and_old_ones_keep_theirs(self, row, rank):
        """At rank 17 some sizes are not multiples of a block, for which some libraries have no low-bit form."""
        run = Run(row.make)
        run.train(4)
        old = [moments(run, weight) for weight, _ in run.weights]
        run.set_ranks(rank)
        check_form(run, row)
        for (weight, axis), before in zip(run.weights, old, strict=True):
            after = moments(run, weight)
            assert after.keys() == before.keys()
            for key, value in after.items():
                if value.shape != weight.shape:
                    continue  # a factored average
                kept, new = value.narrow(axis, 0, 16), value.narrow(axis, 16, rank - 16)
                # Block boundaries move with the change, so low-bit values are quantised once more.
                error = row.rounding * before[key].abs().max().item()
                torch.testing.assert_close(kept, before[key], rtol=0, atol=error)
                if key in FIRST:
                    assert not new.any()
                elif axis == 1:
                    mean = before[key].mean(dim=1, keepdim=True).expand_as(new)
                    torch.testing.assert_close(new, mean, rtol=1e-5, atol=error)
                elif "4bit" not in row.name:  # its map of squares has no zero
                    assert not new.any()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_torchao_compiles_its_step_for_the_new_shapes():
    run = Run(_torchao("AdamW8bit"), target_modules=["q_proj"])
    losses = run.train(2)
    run.set_ranks(24)
    losses += run.train(4)
    assert all(map(math.isfinite, losses))
    assert losses[4] < losses[0]


def test_an_override_of_bitsandbytes_goes_on():
    """GlobalOptimManager can ask for 32-bit state of single parameters."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    run = Run(_bitsandbytes("AdamW8bit"))
    chosen = run.targets[0].weight_a
    manager.register_parameters(run.model.parameters())
    manager.override_config(chosen, "optim_bits", 32)
    try:
        run.train(2)
        assert run.optimizer.state[chosen]["state1"].dtype == torch.float32
        run.set_ranks(24)
        assert run.optimizer.state[chosen]["state1"].dtype == torch.float32
        assert run.optimizer.state[run.targets[0].weight_b]["state1"].dtype == torch.uint8
        run.train(1)
    finally:
        manager.initialize()


class HomeMade(torch.optim.Optimizer):
    """One that nobody knows."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1e-2})


class Around(torch.optim.Optimizer):
    """One that leaves the step to another one, as wrappers do."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.inner = torch.optim.AdamW(params, lr=1e-2)
        super().__init__(self.inner.param_groups, {"lr": 1e-2})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)


class ReshapedAdamW(torch.optim.AdamW):
    """A subclass of a supported optimiser that defines `step` itself."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)


UNKNOWN: dict[str, Make] = {
    **{name: getattr(torch.optim, name) for name in ("Adagrad", "Adamax", "Rprop", "Adadelta")},
    "centred RMSprop": lambda params: torch.optim.RMSprop(params, lr=3e-4, centered=True),
    "AdamWScheduleFree": lambda params: pytest.importorskip("schedulefree").AdamWScheduleFree(params, lr=1e-3),
    "Prodigy": lambda params: pytest.importorskip("prodigyopt").Prodigy(params),
    "Muon": lambda params: torch.optim.Muon(params, lr=1e-3),
    "ReshapedAdamW": lambda params: ReshapedAdamW(params, lr=1e-3),
    "AdEMAMix8bit": _bitsandbytes("AdEMAMix8bit"),
}
"""Those whose layout is not in the table."""


@pytest.mark.parametrize("name", UNKNOWN)
def test_state_of_unknown_form_begins_anew_where_a_rank_changes(name):
    run = Run(UNKNOWN[name])
    if name == "AdamWScheduleFree":
        run.optimizer.train()
    losses = run.train(8)
    state = run.optimizer.state
    for weight, _ in run.weights:
        real = sum(v.nbytes for v in state[weight].values() if torch.is_tensor(v) and v.dim())
        spared = weight.nbytes if name == "Prodigy" and "p0" in state[weight] and not state[weight]["p0"].dim() else 0
        assert optimizer_state.state_bytes_of(run.optimizer, weight.detach()) == real + spared  # of a start at zero
    chosen, others = run.targets[::2], run.targets[1::2]
    before = {w: copy.deepcopy(state[w]) for t in others for w in (t.weight_a, t.weight_b)}
    for rank in (8, 24, 0, 16):
        run.set_ranks(rank, chosen)
        assert not any(state.get(weight) for t in chosen for weight in (t.weight_a, t.weight_b))
    assert all(str(state[weight]) == str(kept) for weight, kept in before.items())
    losses += run.train(8)
    assert all(map(math.isfinite, losses))
    assert losses[14] < losses[8] or name == "Prodigy"  # which has hardly begun
    assert all(t.weight_b.any() for t in chosen)


@pytest.mark.parametrize("make", [torch.optim.LBFGS, HomeMade, Around])
def test_those_that_cannot_begin_anew_are_refused_before_anything_changes(make):
    run = Run(make, r=4)
    for weight, _ in run.weights:  # which a step would take
        weight.grad = torch.ones_like(weight)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    for rank in (2, 8, 0):
        with pytest.raises(UnsupportedError, match=make.__name__):
            run.set_ranks(rank)
    assert {t.rank for t in run.targets} == {4}
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="paged memory needs CUDA")
@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdamW32bit"])
def test_paged_state_on_a_gpu_goes_on(name):
    """Only state of at least 100,000 values is paged."""

    def make() -> Run:
        run = Run(_bitsandbytes(name), r=4, target_modules=["q_proj"])
        run.model.cuda()
        set_ranks(run.targets, {t.name: 256 for t in run.targets})
        return run

    def train_run(run: Run, steps: int) -> list[float]:
        return train(run.model, run.optimizer, [make_tokens(0).cuda()] * steps)

    plain, resized = make(), make()
    assert train_run(plain, 3) == pytest.approx(train_run(resized, 3), abs=1e-4)
    weight = resized.targets[0].weight_a
    assert resized.optimizer.state[weight]["state1"].is_paged
    resized.set_ranks(128)
    state = resized.optimizer.state[weight]["state1"]
    assert state.device == weight.device
    assert state.shape == weight.shape
    paged = resized.optimizer.page_mng.paged_tensors
    assert not any(tensor.shape == (256, 256) and tensor is state for tensor in paged)
    losses = train_run(resized, 5)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


def test_paged_state_comes_back_to_where_its_weight_is():
    """It lies in memory of both, and says that it is the CPU's."""
    weight = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    paged = torch.zeros(4, 3)
    paged.is_paged = True
    optimizer.state[weight] = {"state1": paged}
    optimizer_state.OptimizerSnapshot(optimizer, [weight], steps=True).put_back()
    assert optimizer.state[weight]["state1"].device == weight.device


def test_sgd_follows_the_same_path_as_the_mapped_gradients():
    """With A' = Q A and B' = B P, a history of gradients of (A, B) becomes P^T m_A and m_B Q^T."""
    run = Run(lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9), r=4)
    run.train(3)
    chosen = run.targets[3]
    momentum_a, momentum_b = (run.optimizer.state[w]["momentum_buffer"] for w in (chosen.weight_a, chosen.weight_b))
    p, q, used = shrink_maps([chosen.weight_a.detach()], [chosen.weight_b.detach()], 2)
    assert used.all()
    run.set_ranks(2)
    torch.testing.assert_close(run.optimizer.state[chosen.weight_a]["momentum_buffer"], p[0].T.float() @ momentum_a)
    torch.testing.assert_close(run.optimizer.state[chosen.weight_b]["momentum_buffer"], momentum_b @ q[0].T.float())


@pytest.mark.parametrize(
    ("make", "average"),
    [
        (lambda params: torch.optim.AdamW(params, lr=1e-2), "exp_avg_sq"),
        (lambda params: torch.optim.Adafactor(params, lr=1e-2), "col_var"),
        (lambda params: Adafactor(params, **_ABSOLUTE), "exp_avg_sq_col"),
    ],
)
def test_directions_seeded_anew_by_a_shrink_start_at_the_mean_of_the_old_ones(make, average):
    run = Run(make, r=4)
    run.train(1)  # A has no gradient yet, and torch's averages of it are 0
    chosen = run.targets[0]
    with torch.no_grad():
        chosen.weight_b.zero_()
    mean = run.optimizer.state[chosen.weight_b][average].mean(dim=-1, keepdim=True)
    assert (mean > 0).all()
    run.set_ranks(2, [chosen])
    state = run.optimizer.state[chosen.weight_b]
    assert state[average].shape[-1] == 2
    torch.testing.assert_close(state[average], mean.expand(state[average].shape), rtol=1e-5, atol=0)
    assert average != "exp_avg_sq" or not state["exp_avg"].any()
    for weight in (chosen.weight_a, chosen.weight_b):
        assert all(
            torch.isfinite(value).all() for value in run.optimizer.state[weight].values() if torch.is_tensor(value)
        )
    run.train(1)
    assert chosen.weight_a.isfinite().all()
    assert chosen.weight_b.isfinite().all()


def test_the_optimiser_inside_a_wrapper_is_used():
    run = Run(torch.optim.AdamW)
    run.train(1)
    wrapper = SimpleNamespace(optimizer=run.optimizer)
    assert optimizer_state.unwrap_optimizer(wrapper) is run.optimizer
    chosen = run.targets[0].weight_a
    set_ranks(run.targets, {t.name: 2 for t in run.targets}, wrapper)
    assert run.optimizer.state[chosen]["exp_avg"].shape == (2, 256)
    assert optimizer_state.state_bytes_of(None, torch.zeros(3, 5)) == 2 * 3 * 5 * 4
    optimizer_state.reset_state(None, [chosen])
    assert chosen in run.optimizer.state
