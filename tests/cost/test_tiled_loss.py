"""The loss in tiles: the same bits as transformers' loss, and bytes as they are predicted."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rankpilot.common.errors import UnsupportedError
from rankpilot.cost.batch_shape import reshaped
from rankpilot.cost.record.peak_meter import PeakMeter
from rankpilot.cost.recording import BatchShape
from rankpilot.cost.savers import tiled_loss
from rankpilot.cost.savers.checkpointed_layers import LayerCheckpointing
from rankpilot.cost.savers.exact import ExactSavers
from rankpilot.cost.savers.later_logits import tiled_causal_lm_loss, use_tiled_loss
from rankpilot.cost.savers.prices import TILES as TILED
from rankpilot.cost.tile_size import LEAST_TOKENS, TILES
from rankpilot.finetune.before_training import run_memory
from rankpilot.finetune.trainer_step import run_of_trainer
from rankpilot.lora.targets import find_target_modules
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from ..cases import first_cases
from ..finetune.trainer_kinds import word_tokenizer
from .measured import Run, adamw_run
from .test_moments import Rehearsal


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
    with pytest.raises(UnsupportedError, match="The logits were modified"):
        loss.backward()


def large_base(layers: int = 3) -> LlamaForCausalLM:
    """A Llama whose logits take most of the bytes."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_hidden_layers=layers, pad_token_id=0, **sizes))


def large_head(layers: int = 3) -> Any:
    """The same with adapters."""
    return get_peft_model(large_base(layers), LoraConfig(r=4, target_modules="all-linear")).train()


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
    checkpointing = LayerCheckpointing(model)
    names = checkpointing.layers
    run = adamw_run(model, batch_of(rows, length))
    memory = run.calibrated()
    for count in (0, 1, len(names)):
        checkpointing.take(names)
        checkpointing.take(names[:count])
        predicted = memory.with_checkpointed(names[:count]).peak(ranks)
        assert 0 <= predicted / run.peak(ranks) - 1 <= (0.006 if count else 0), "but for the margin of second runs"
        assert predicted < 0.8 * before
    checkpointing.take(())
    other = BatchShape(rows + 3, length + 4)
    larger: Run = adamw_run(model, batch_of(other.rows, other.length))
    assert memory.with_checkpointed(()).peak(ranks, other) == pytest.approx(larger.peak(ranks), rel=0.002)


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


# TRL's tiles ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """TRL's loss, with tiles of so many tokens; it has 4,096 of itself."""
    module = pytest.importorskip("trl.kernels.chunked_logprob")
    tiled_loss._HEADS.clear()  # models of earlier tests may not be freed yet
    while tiled_loss._UNWRAP:
        tiled_loss._UNWRAP.pop()()
    size = getattr(request, "param", 64)
    monkeypatch.setattr(module, "TOKEN_CHUNK_SIZE", size)
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 4096)
    function = module.ChunkedLogProbFunction
    return SimpleNamespace(module=module, size=size, kept=(function.forward, function.backward))


class Step:
    """A step of TRL's SFTTrainer on random rows."""

    def __init__(self, rows: int, length: int, folder: Path) -> None:
        trl, tokens = pytest.importorskip("trl"), torch.randint(20, 2048, (rows, length)).tolist()
        arguments = trl.SFTConfig(
            str(folder), per_device_train_batch_size=rows, max_length=length, optim="sgd", max_steps=1, use_cpu=True,
            bf16=False, report_to=[], gradient_checkpointing=False,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": tokens})
        lora = LoraConfig(r=8, target_modules="all-linear")
        trainer = trl.SFTTrainer(
            large_base(), arguments, train_dataset=data, peft_config=lora, processing_class=word_tokenizer()
        )
        self.model, self.run = trainer.model.train(), run_of_trainer(trainer)
        self.targets, self.batch = find_target_modules(self.model), self.run.largest_batch()

    def peak(self, batch: Any) -> int:
        """The bytes of the second step on a batch, when the optimizer has its state."""
        meter = PeakMeter()
        for number in range(2):
            if number:
                meter.begin(self.model, self.run.optimizer)
            self.run.loss(batch).backward()
            self.run.optimizer.step()
            self.run.optimizer.zero_grad(set_to_none=True)
        peak = meter.end(1)
        assert peak
        return peak


@pytest.mark.parametrize(("fused", "savers"), [(64, ()), (4096, ()), (4096, (TILED,))], indirect=["fused"])
@pytest.mark.parametrize(("rows", "length"), first_cases(2, [(9, 17), (3, 64), (2, 64), (4, 17)]))
def test_the_peak_of_a_step(tmp_path: Path, fused: SimpleNamespace, savers: Any, rows: int, length: int) -> None:
    step = Step(rows, length, tmp_path)
    switched = ExactSavers(step.model, savers)
    memory, ranks = run_memory(step.run, step.targets, step.batch), np.array([target.rank for target in step.targets])
    for shape in (memory.shape, BatchShape(rows // 2, length), BatchShape(rows, length // 2)):
        predicted = memory.at_peak(ranks, shape).total
        assert 0.97 * predicted <= step.peak(reshaped(step.batch, shape)) <= predicted, shape
    switched.put_back()
    function = fused.module.ChunkedLogProbFunction
    assert (function.forward, function.backward) == fused.kept
    assert fused.size == fused.module.TOKEN_CHUNK_SIZE


def fused_model() -> Any:
    """A model with TRL's fused loss, adapted."""
    trl = pytest.importorskip("trl.trainer.utils")
    model = large_base()
    trl.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()


def fused_step(model: Any, kind: torch.dtype) -> list[torch.Tensor]:
    """What the loss gives for each token, and all gradients."""
    batch = batch_of(10, 61)
    batch["labels"] = batch["labels"].where(batch["labels"] >= 20, -100)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        out = model(**batch, fused_lm_head=True)
    out.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return [out.loss.detach(), out.log_probs.detach(), out.entropy.detach(), *gradients]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_our_tiles_give_the_same_bits_as_those_of_trl(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype) -> None:
    model, seen = fused_model(), []
    plain, linear = fused_step(model, kind), torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda rows, *rest, **options: seen.append(len(rows)) or linear(rows, *rest, **options)
    )
    first, second = ExactSavers(model, [TILED]), ExactSavers(fused_model(), [TILED])
    second.put_back()  # another run ends, in any order
    assert all(map(torch.equal, fused_step(model, kind), plain))
    assert max(seen) == LEAST_TOKENS
    seen.clear()
    model.get_output_embeddings().weight.requires_grad_(True)
    fused_step(model, kind)
    assert max(seen) == 600, "the sums of a layer that trains go over all tokens of a tile"
    seen.clear()
    model.get_output_embeddings().weight.requires_grad_(False)
    first.put_back()
    assert all(map(torch.equal, fused_step(model, kind), plain))
    assert max(seen) == 600


def test_other_losses_have_no_tiles(tmp_path: Path, fused: SimpleNamespace) -> None:
    assert Rehearsal("bert", tmp_path, bf16=False, metrics=False).memory.sizes(BatchShape(8, 16))


def test_trl_may_be_imported_after_a_model_got_tiles(fused: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [large_base(), large_base()]
    with monkeypatch.context() as before:
        before.delitem(sys.modules, tiled_loss.MODULE)
        tiled_loss.use_own_tiles(models[0])
    tiled_loss.use_own_tiles(models[1])
    assert fused.module.ChunkedLogProbFunction.forward != fused.kept[0]


def test_tiles_of_a_model_that_is_freed_are_those_of_trl(fused: SimpleNamespace) -> None:
    """As where a configuration is priced again and again: nothing is held, and nothing stays wrapped."""
    model = large_base()
    tiled_loss.use_own_tiles(model)
    assert (fused.module.ChunkedLogProbFunction.forward, fused.module.ChunkedLogProbFunction.backward) != fused.kept
    del model
    gc.collect()
    assert (fused.module.ChunkedLogProbFunction.forward, fused.module.ChunkedLogProbFunction.backward) == fused.kept
    assert not tiled_loss._HEADS
