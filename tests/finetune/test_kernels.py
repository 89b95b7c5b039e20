"""Runs whose model computes with other kernels: Liger's, or a stand-in that replaces the forward pass as Liger does."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import rankpilot
import torch
from rankpilot.common.errors import UnsupportedError
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .tiny_runs import Run, counting, messages_of


class FusedLoss(torch.autograd.Function):
    """The product with the output layer and its loss in one: gradients of hidden states are made chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, count: Any) -> torch.Tensor:
        tokens, width = hidden.shape
        share = -(-len(weight) // width)
        chunk = 1 << (-(-tokens // share) - 1).bit_length()  # the power of two that Liger takes
        losses, gradient = hidden.new_zeros(tokens), torch.zeros_like(hidden)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            logits, kept = hidden[rows] @ weight.T, target[rows] >= 0
            place = target[rows].clamp(min=0)[:, None]
            total = logits.logsumexp(1, keepdim=True)
            losses[rows] = (total - logits.gather(1, place))[:, 0] * kept
            logits.sub_(total).exp_().scatter_add_(1, place, -torch.ones_like(place, dtype=logits.dtype))
            gradient[rows] = logits.mul_(kept[:, None]) @ weight
            del logits
        ctx.save_for_backward(gradient.div_(count))
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.saved_tensors[0].mul_(gradient), None, None, None


def fused_forward(
    self: Any, input_ids: Any, labels: Any = None, num_items_in_batch: Any = None, **rest: Any
) -> CausalLMOutputWithPast:
    """A causal language model's forward pass as Liger has it: in training it returns no logits."""
    hidden = self.model(input_ids=input_ids, **rest)[0]
    if not self.training or labels is None:
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
    target = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    count = (target >= 0).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutputWithPast(loss=FusedLoss.apply(hidden.flatten(0, 1), self.lm_head.weight, target, count))


def fuse(model: Any) -> None:
    base = model.get_base_model()
    base.forward = MethodType(fused_forward, base)


@pytest.fixture
def config() -> LlamaConfig:
    """A Llama of one layer, whose logits take more than all else."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    return LlamaConfig(vocab_size=1024, **sizes)


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels need a GPU")]


@pytest.mark.parametrize(("kernels", "most"), [("stand-in", 1.005), pytest.param("liger_kernel", 1.1, marks=GPU)])
def test_a_trainer_with_liger(
    kernels: str,
    most: float,
    tmp_path: Path,
    config: LlamaConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps are recorded as they run, and no saver that is about logits stays on."""
    caplog.set_level("INFO", "rankpilot")
    if kernels == "stand-in":
        monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, settings: fuse(model))
    else:
        pytest.importorskip(kernels)
    common: dict[str, Any] = {"max_steps": 2, "use_cpu": kernels == "stand-in", "data": counting(96, length=48)}
    plain = Run(tmp_path / "plain", config, budget=None, **common).train()
    tiled: list[bool] = []
    common |= {"at_step": lambda step: tiled.append("forward" in vars(run.model.get_base_model().lm_head))}
    options = {"policy": "uniform", "budget": "90%", "exact_savers": True, "use_liger_kernel": True}
    run = Run(tmp_path / "run", config, **options, **common)
    run.train()
    for (_, cost), (_, peak) in zip(run.pilot.predictions, run.pilot.peaks, strict=True):
        assert 1 <= cost / peak <= most
    assert run.highest <= run.pilot.limit
    assert run.recorder.losses[0] == pytest.approx(plain.recorder.losses[0], rel=1e-5), "B begins at zero"
    assert run.recorder.ranks[-1] != plain.recorder.ranks[-1], "ranks change"
    assert tiled == [False, False]
    assert len(messages_of(caplog, "Liger")) == 1


def test_a_configuration_after_liger_says_why(config: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger replaces transformers' classes, so models that are made later have its kernels, which need numbers."""
    patched: dict[str, Any] = {"__name__": "liger_kernel.transformers.rms_norm"}
    exec("def forward(*_): raise ValueError('Pointer argument (at 0) cannot be accessed from Triton')", patched)
    monkeypatch.setattr(LlamaRMSNorm, "forward", patched["forward"])
    with pytest.raises(UnsupportedError, match=r"Liger has replaced parts of 'llama'.* in another process"):
        assert rankpilot.memory_of(config, "24GiB", batch_size=2, max_length=16).as_asked
