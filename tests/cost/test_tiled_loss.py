"""The loss in tiles: the same bits as transformers' loss, and bytes as they are predicted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.cost.later_logits import tiled_causal_lm_loss, use_tiled_loss
from rankpilot.cost.recording import BatchShape, reshaped
from rankpilot.cost.savers import ExactSavers
from rankpilot.cost.loss_tiles import loss_tokens
from rankpilot.cost.tiled_loss import TILES
from rankpilot.errors import UnsupportedError
from rankpilot.finetune.before_training import run_memory
from rankpilot.finetune.left_as_found import Recomputation
from rankpilot.study.memory_config import MemoryConfig
from rankpilot.study.memory_here import StepSetup, measure_step, set_up
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from ..cases import first_cases
from ..data.small_models import save
from .measured import Run, adamw_run


def loss_and_gradient(loss: Any, rows: int, length: int, kind: torch.dtype, items: Any, held: bool) -> Any:
    """Loss, gradient of the hidden states, and the logits afterwards if something holds them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, length, 8, generator=generator).to(kind).requires_grad_()
    head = torch.randn(33, 8, generator=generator).to(kind)
    labels = torch.randint(33, (rows, length), generator=generator)
    labels[0, : length // 2] = -100
    logits = hidden @ head.T
    keeps = [logits] if held else []
    value = loss(logits=logits, labels=labels, vocab_size=33, num_items_in_batch=items)
    del logits
    value.backward()
    return value.detach(), hidden.grad, *(tensor.detach() for tensor in keeps)


@pytest.mark.parametrize(("rows", "length"), [(1, 2), (1, TILES + 1), (3, 5), (4, TILES)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(9)])
@pytest.mark.parametrize("held", [False, True])
def test_the_same_bits(rows: int, length: int, kind: torch.dtype, items: Any, held: bool) -> None:
    expected = loss_and_gradient(ForCausalLMLoss, rows, length, kind, items, held)
    found = loss_and_gradient(tiled_causal_lm_loss, rows, length, kind, items, held)
    assert all(map(torch.equal, found, expected)), "logits that are held are as they were, too"


def test_a_loss_that_ignores_the_number_of_a_class() -> None:
    """As where the padding token has number 0."""
    logits, labels = torch.randn(3, 5, 7), torch.tensor([[0, 1, 2, 0, 3]] * 3)
    given = {"logits": logits, "labels": labels, "vocab_size": 7, "ignore_index": 0}
    assert torch.equal(tiled_causal_lm_loss(**given), ForCausalLMLoss(**given))


def test_nothing_but_padding() -> None:
    logits = torch.randn(1, 4, 5, requires_grad=True)
    values = [
        loss(logits=logits, labels=torch.full((1, 4), -100), vocab_size=5)
        for loss in (ForCausalLMLoss, tiled_causal_lm_loss)
    ]
    assert all(value.isnan() for value in values)


def test_a_second_backward_pass_is_refused() -> None:
    logits = torch.randn(2, 4, 5, requires_grad=True) * 1
    loss = tiled_causal_lm_loss(logits, torch.ones(2, 4, dtype=torch.long), 5)
    del logits
    loss.backward(retain_graph=True)
    with pytest.raises(UnsupportedError, match="or the backward pass ran twice"):
        loss.backward()


def test_logits_that_were_changed_are_refused() -> None:
    logits = torch.randn(2, 4, 5, requires_grad=True) * 1
    loss = tiled_causal_lm_loss(logits, torch.ones(2, 4, dtype=torch.long), 5)
    logits.detach().mul_(2)
    with pytest.raises(UnsupportedError, match="The logits were changed"):
        loss.backward()


def large_head(layers: int = 3) -> Any:
    """A Llama whose logits take most of the bytes."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_hidden_layers=layers, **sizes))
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).train()


def batch_of(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * length).reshape(rows, length) % 2048
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(("rows", "length"), first_cases(2, [(8, 32), (5, 9), (6, 13), (4, 25)]))
def test_bytes_are_predicted(rows: int, length: int) -> None:
    model = large_head()
    plain = adamw_run(model, batch_of(rows, length))
    ranks = np.full(len(plain.targets), 4)
    before = plain.peak(ranks)
    ExactSavers(model)
    recomputation = Recomputation(model)
    names = recomputation.layers
    run = adamw_run(model, batch_of(rows, length))
    memory = run.calibrated()
    for count in (0, 1, len(names)):
        recomputation.take(names)
        recomputation.take(names[:count])
        predicted = memory.recomputing(names[:count]).peak(ranks)
        assert 0 <= predicted / run.peak(ranks) - 1 <= (0.006 if count else 0), "but for the margin of second runs"
        assert predicted < 0.8 * before
    recomputation.take(())
    other = BatchShape(rows + 3, length + 4)
    larger: Run = adamw_run(model, batch_of(other.rows, other.length))
    assert memory.recomputing(()).peak(ranks, other) == pytest.approx(larger.peak(ranks), rel=0.002)


def test_a_run_puts_the_loss_back() -> None:
    model = large_head(1)
    base = model.get_base_model()
    savers = ExactSavers(model)
    assert base.loss_function is tiled_causal_lm_loss
    savers.put_back()
    assert base.loss_function is ForCausalLMLoss
    assert not [module for module in model.modules() if {"forward", "_cast_input_dtype"} & {*vars(module)}]


def test_a_loss_of_the_users_own_stays() -> None:
    model = large_head(1)
    model.get_base_model().loss_function = torch.nn.functional.cross_entropy
    use_tiled_loss(model)
    assert model.get_base_model().loss_function is torch.nn.functional.cross_entropy


SIZE = 64


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """TRL's loss, with small tiles."""
    module = pytest.importorskip("trl.kernels.chunked_logprob")
    monkeypatch.setattr(module, "TOKEN_CHUNK_SIZE", SIZE)
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 4096)
    return SimpleNamespace(module=module, forward=module.ChunkedLogProbFunction.forward)


def step_of(model: str, rows: int, length: int) -> StepSetup:
    return set_up(MemoryConfig(model, batch_size=rows, max_length=length, optimizer="sgd"), lambda text: None)


@pytest.mark.parametrize(("rows", "length"), first_cases(2, [(8, 17), (9, 17), (2, 64), (4, 17), (16, 17)]))
def test_the_peak_of_a_step(tmp_path: Path, fused: SimpleNamespace, rows: int, length: int) -> None:
    setup = step_of(save("llama", tmp_path / "llama"), rows, length)
    memory = setup.measure_memory(lambda text: None)
    assert fused.module.TOKEN_CHUNK_SIZE == SIZE
    assert fused.module.ChunkedLogProbFunction.forward is fused.forward
    predicted = memory.at_peak(np.array([target.rank for target in setup.targets])).total
    assert 0.97 * predicted <= measure_step(setup).peak_bytes <= predicted
    for shape in (BatchShape(rows // 2, length), BatchShape(2 * rows, length)):
        if max(loss_tokens(shape), loss_tokens(memory.shape)) <= SIZE:
            assert memory.sizes(shape)
        else:
            with pytest.raises(UnsupportedError, match=f"cannot be predicted: .*tiles of {SIZE}|cannot be .* its data"):
                memory.sizes(shape)


def test_other_losses_have_no_tiles(tmp_path: Path, fused: SimpleNamespace) -> None:
    setup = set_up(MemoryConfig(save("bert", tmp_path / "bert"), batch_size=8, max_length=16), lambda text: None)
    assert run_memory(setup.run, setup.targets, reshaped(setup.batch, BatchShape(4, 16))).sizes(BatchShape(8, 16))
