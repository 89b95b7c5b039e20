"""Quantised frozen weights: rank changes, adapter files, norms, and the repacking of 4-bit weights on the CPU."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from rankpilot.common.errors import UnsupportedError
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.savers.exact import SAVERS, ExactSavers
from rankpilot.cost.savers.prices import CACHE, COPIES
from rankpilot.lora.adapters import SignalMeter
from rankpilot.lora.peft_config import adapter_ranks, make_resizable, sync_config
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import TargetModule, base_norm, find_target_modules, guard_base, real_weight

from ..cost.measured import adamw_run
from . import training


def _nf4(**options: Any) -> hf.BitsAndBytesConfig:
    return hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def _torchao() -> hf.TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return hf.TorchAoConfig(Int8WeightOnlyConfig())


@dataclass(frozen=True)
class Base:
    """One way to quantise.

    Attributes:
        library: the module that must be installed.
        config: makes transformers' own setting.
        norm_error: the largest relative error of a weight's norm.
        dtype: the dtype of all that is not quantised.
    """

    name: str
    library: str
    config: Callable[[], Any]
    norm_error: float
    dtype: torch.dtype = torch.float32

    def load(self, folder: Path, *, guarded: bool = True) -> hf.PreTrainedModel:
        """The quantised model; the same weights at every call."""
        pytest.importorskip(self.library)
        model = hf.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=self.config(), device_map="cpu", dtype=self.dtype
        )
        if guarded:
            guard_base(model)
        return model


NF4_DOUBLE = Base("bnb-nf4-double", "bitsandbytes", lambda: _nf4(bnb_4bit_use_double_quant=True), 0.10)
HALF = {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": torch.bfloat16}
BASES = (
    Base("bnb-int8", "bitsandbytes", lambda: hf.BitsAndBytesConfig(load_in_8bit=True), 0.01),
    Base("bnb-nf4", "bitsandbytes", _nf4, 0.10),
    NF4_DOUBLE,
    # As in QLoRA's scripts: bfloat16 throughout, and packed bytes stored as bfloat16.
    Base("bnb-nf4-bf16", "bitsandbytes", lambda: _nf4(**HALF), 0.10, torch.bfloat16),
    Base("torchao-int8", "torchao", _torchao, 0.01),
    Base("quanto-int8", "optimum.quanto", lambda: hf.QuantoConfig(weights="int8"), 0.01),
)


CHECKPOINTED = ("bnb-int8", "bnb-nf4-double", "torchao-int8")
"""Bases of which `make test` has prepared models and checkpointed steps too."""


@pytest.fixture(params=BASES, ids=lambda base: base.name)
def base(request: pytest.FixtureRequest) -> Base:
    """Every way to quantise in turn."""
    chosen: Base = request.param
    return chosen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama on disk whose widths are multiples of 64, a block of nf4."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    hf.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Ignore the warning that bitsandbytes gives at every int8 matrix product."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def adapt(model: hf.PreTrainedModel, **options: Any) -> tuple[PeftModel, list[TargetModule]]:
    """The model with fresh adapters, always the same ones."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options))
    return adapted, find_target_modules(adapted)


def adamw(model: PeftModel) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


def train(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    return training.train(model.train(), optimizer, [tokens()] * steps)


def logits(model: PeftModel) -> torch.Tensor:
    return training.logits(model, tokens())


def mix(targets: list[TargetModule], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Ranks by module that grow, shrink and drop."""
    ranks = (8, 2, 4, 0, 7, 1, 3)
    set_ranks(targets, {t.name: ranks[i % len(ranks)] for i, t in enumerate(targets)}, optimizer, step=step)


def save(model: PeftModel, targets: list[TargetModule], path: Path) -> None:
    make_resizable(model, targets)
    sync_config(model, targets)
    model.save_pretrained(path)


@pytest.mark.parametrize(
    ("base", "prepared"),
    [
        pytest.param(
            base, prepared, marks=pytest.mark.long if prepared and base.name not in CHECKPOINTED else (),
            id=f"{base.name}-{'prepared' if prepared else 'plain'}",
        )
        for base in BASES
        for prepared in (False, True)
    ],
)  # fmt: skip
def test_train_resize_save_and_reload_in_plain_peft(base, folder, tmp_path, prepared):
    def fresh() -> hf.PreTrainedModel:
        return prepare_model_for_kbit_training(base.load(folder)) if prepared else base.load(folder)

    model, targets = adapt(fresh())
    optimizer = adamw(model)
    losses = train(model, optimizer)
    mix(targets, optimizer, step=4)  # grow, shrink, drop
    losses += train(model, optimizer)
    set_ranks(targets, {t.name: 5 for t in targets}, optimizer, step=8)  # and revive
    losses += train(model, optimizer)
    mix(targets, optimizer, step=12)
    losses += train(model, optimizer)
    assert all(map(math.isfinite, losses))
    assert losses[4] < losses[0] - 0.2
    assert losses[8] < losses[4] - 0.2
    assert losses[12] < losses[8] - 0.2
    assert losses[15] < losses[12] - 0.1
    live = [t for t in targets if t.rank]
    assert len(live) < len(targets)
    assert all(t.weight_a.grad is not None and t.weight_b.grad.any() for t in live)

    save(model, targets, tmp_path)
    again = PeftModel.from_pretrained(fresh(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert adapter_ranks(find_target_modules(again)) == {t.name: t.rank for t in live}


def test_exact_savers_leave_losses_and_gradients_as_they_are(base: Base, folder: Path) -> None:
    model, _ = adapt(base.load(folder), init_lora_weights=False)
    found = []
    for savers in ([], [CACHE, COPIES], SAVERS):
        ExactSavers(model, savers)
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append([loss.detach(), *torch.autograd.grad(loss, trained)])
    tolerance = 1e-6 if base.dtype == torch.float32 else 0.01
    for plain, shared, tiled in zip(*found, strict=True):
        assert torch.equal(plain, shared)
        assert (plain - tiled).norm() <= tolerance * plain.norm()


# Not DoRA on int8 of bitsandbytes: on the CPU, plain PEFT fails there in its second forward pass.
@pytest.mark.parametrize(
    ("base", "dora"),
    [*((base, False) for base in BASES), *((base, True) for base in BASES[1:])],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_growth_keeps_the_function_and_no_rank_gives_the_frozen_one(base, folder, dora):
    model, targets = adapt(base.load(folder), use_dora=dora)
    optimizer = adamw(model)
    losses = train(model, optimizer)
    before = logits(model)
    set_ranks(targets, {t.name: 16 for t in targets}, optimizer, step=4)
    assert {t.rank for t in targets} == {16}
    # The same sums in another order: rounding. int8 products of bitsandbytes round the activations to 8 bits, where
    # such a difference can move one to the next of 127 levels.
    allowed = {torch.bfloat16: 2**-7}.get(base.dtype, 1e-2 if base.name == "bnb-int8" else 1e-5)
    assert (logits(model) - before).abs().max() <= allowed * before.abs().max()
    set_ranks(targets, {t.name: 0 for t in targets}, optimizer, step=4)
    frozen = logits(base.load(folder))
    assert torch.equal(logits(model), frozen)
    assert not torch.equal(frozen, before)
    set_ranks(targets, {t.name: 4 for t in targets}, optimizer, step=4)
    losses += train(model, optimizer)
    assert losses[-1] < losses[4] - 0.1


def test_reading_norms_leaves_training_alone(base, folder):
    """Before the first forward pass and after it: bitsandbytes moves its int8 scales in between."""
    results = []
    for reading in (False, True):
        model, targets = adapt(base.load(folder))
        weights = [t.layer.get_base_layer().weight for t in targets]
        optimizer = adamw(model)
        losses = []
        for _ in range(3):
            if reading:
                norms = [base_norm(t.layer) for t in targets]
            losses += train(model, optimizer, 1)
        if reading:
            assert norms == [base_norm(t.layer) for t in targets]
        assert all(t.layer.get_base_layer().weight is w for t, w in zip(targets, weights, strict=True))
        results.append((losses, logits(model), sorted(model.state_dict())))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_signals_compare_the_change_with_the_real_weight(base, folder):
    model, targets = adapt(base.load(folder))
    meter = SignalMeter(targets)
    optimizer = adamw(model)
    train(model, optimizer)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    meter.accumulate()
    values = meter.read()
    plain = hf.LlamaForCausalLM.from_pretrained(folder)
    for row, target in zip(values, targets, strict=True):
        change = target.scaling * (target.weight_b.float() @ target.weight_a.float()).norm()
        expected = change.item() / plain.get_submodule(target.name).weight.norm().item()
        assert row[2] == pytest.approx(expected, rel=base.norm_error + (0.02 if base.dtype == torch.bfloat16 else 0))


@pytest.mark.parametrize("four_bit", [False, True], ids=["int8", "nf4"])
def test_quantised_conv1d(four_bit, tmp_path):
    """GPT-2 keeps its matrices transposed."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1)
    plain = hf.GPT2LMHeadModel(config)
    plain.save_pretrained(tmp_path / "base")
    chosen = Base("", "bitsandbytes", _nf4 if four_bit else BASES[0].config, 0.10 if four_bit else 0.01)
    names = ["c_attn", "c_proj", "c_fc"]
    model, targets = adapt(chosen.load(tmp_path / "base"), target_modules=names, fan_in_fan_out=True)
    optimizer = adamw(model)
    losses = train(model, optimizer)
    mix(targets, optimizer, step=4)
    losses += train(model, optimizer)
    assert losses[-1] < losses[4] < losses[0]
    for target in targets:
        truth = plain.get_submodule(target.name).weight.norm().item()
        assert base_norm(target.layer) == pytest.approx(truth, rel=chosen.norm_error)
    save(model, targets, tmp_path / "adapter")
    again = PeftModel.from_pretrained(chosen.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_norm_of_half_precision_does_not_overflow(make_llama):
    target = find_target_modules(make_llama(dtype=torch.float16))[0]
    with torch.no_grad():
        target.layer.get_base_layer().weight.fill_(1000)
    assert base_norm(target.layer) == pytest.approx(32_000, rel=1e-6)


def test_weights_that_cannot_be_read_are_refused(make_llama):
    first, second = find_target_modules(make_llama())[:2]
    base = first.layer.get_base_layer()
    base.weight = torch.nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"Linear has a weight of torch.float8_e4m3fn.*bitsandbytes, torchao"):
        base_norm(first.layer)
    del second.layer.get_base_layer().weight
    with pytest.raises(UnsupportedError, match=r"Linear has no weight\."):
        base_norm(second.layer)


class TestGuard:
    """Behave as on a CPU with AVX512-BF16; on others, `_inference_kernel` replaces the kernel."""

    @pytest.fixture(autouse=True)
    def _cpu_with_avx512_bf16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        modules = pytest.importorskip("bitsandbytes.nn.modules")
        if functional.has_avx512bf16():
            return
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
        monkeypatch.setattr(functional, "gemv_4bit", _inference_kernel)

    @staticmethod
    def _below(model: PeftModel) -> list[bool]:
        """Whether the adapters whose output passes through further 4-bit layers get gradients."""
        model.zero_grad()
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n and ("v_proj" in n or "up_proj" in n)]
        assert len(gradients) == 4
        return [grad is not None and bool(grad.any()) for grad in gradients]

    @pytest.fixture(params=[NF4_DOUBLE, BASES[1]], ids=["double", "single"])
    def four_bit(self, request: pytest.FixtureRequest, folder: Path) -> PeftModel:
        model = get_peft_model(request.param.load(folder, guarded=False), LoraConfig(r=4, target_modules="all-linear"))
        assert model.base_model.model.model.layers[0].mlp.up_proj.base_layer.support_avx512bf16_for_cpu
        return model

    def test_without_it_an_evaluation_stops_the_gradients_and_changes_the_weights(self, four_bit):
        """A bug of bitsandbytes: when this test fails, it is mended and `guard_base` can go."""
        layer = four_bit.base_model.model.model.layers[0].mlp.down_proj
        before = real_weight(layer).clone()
        training = four_bit.train()(input_ids=tokens()).logits
        assert self._below(four_bit) == [True] * 4
        torch.testing.assert_close(logits(four_bit), training, rtol=0, atol=0.1)  # the evaluation itself is right
        assert self._below(four_bit) == [False] * 4
        four_bit.state_dict()
        assert not torch.equal(real_weight(layer), before)

    def test_with_it_nothing_changes(self, four_bit):
        guard_base(four_bit)
        layer = four_bit.base_model.model.model.layers[0].mlp.down_proj
        before = real_weight(layer).clone()
        training = four_bit.train()(input_ids=tokens()).logits
        torch.testing.assert_close(logits(four_bit), training, rtol=1e-5, atol=1e-5)
        assert self._below(four_bit) == [True] * 4
        four_bit.state_dict()
        assert torch.equal(real_weight(layer), before)
        guard_base(four_bit)

    @pytest.mark.parametrize("unpacked", [False, True])
    def test_a_base_that_was_evaluated_before_is_refused(self, four_bit, unpacked):
        logits(four_bit)
        if unpacked:
            four_bit.state_dict()
        with pytest.raises(UnsupportedError, match=r"q_proj.*repacked.*Reload the model.*guard_base"):
            guard_base(four_bit)

    def test_other_models_are_left_alone(self, make_llama):
        model = make_llama()
        before = {name: id(value) for name, value in model.named_parameters()}
        guard_base(model)
        assert {name: id(value) for name, value in model.named_parameters()} == before


def _inference_kernel(inputs: torch.Tensor, packed: torch.Tensor, out: Any = None, *, state: Any) -> torch.Tensor:
    """Compute what bitsandbytes' kernel computes from repacked weights; like the kernel, without autograd."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    state = copy.copy(state)
    state.original_nested = False  # the scales are plain numbers now
    codes, state = _convert_weight_packed_for_cpu_inverse(packed.detach().clone(), state)
    state.absmax = state.absmax.T.float().reshape(-1)
    with torch.no_grad():
        weight = dequantize_4bit(codes, state)
        return torch.nn.functional.linear(inputs, weight.to(inputs.dtype))


@pytest.mark.parametrize(
    ("base", "checkpointing"),
    [
        pytest.param(
            base, kind, marks=() if kind is None or base.name in CHECKPOINTED else pytest.mark.long,
            id=f"{base.name}-{kind}",
        )
        for base in BASES
        for kind in (None, False, True)
    ],
)  # fmt: skip
def test_the_peak_of_a_step_is_predicted(base, folder, checkpointing):
    model, targets = adapt(base.load(folder))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    run = adamw_run(model.train(), {"input_ids": tokens(), "labels": tokens()})
    cost = run.calibrated().cost()
    over = []
    generator = np.random.default_rng(0)
    for density in (1.0, 0.5, 0.3, 0.1):
        ranks = generator.choice([1, 2, 4, 8], size=len(targets)) * (generator.random(len(targets)) < density)
        ranks[-1] = 2
        over.append(plan_cost(cost, ranks) / run.peak(ranks) - 1)
    margin = {None: 0.0, False: 0.005, True: 0.02}[checkpointing]
    if base.name == "bnb-int8" and checkpointing is False:
        margin = 0.08  # its functions keep tensors on their contexts, which such a checkpoint does not free
    assert min(over) >= 0
    assert max(over) <= margin + 2e-4
