"""torch's checkpoint replaced by a program, as ms-swift does: known by what it does, and a budget is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from rankpilot.cost.training_step import CHECKPOINT, is_reentrant, release_inputs, requires_grad_hook
from rankpilot.finetune.callback import attach
from torch import nn
from transformers import LlamaConfig, Trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ..finetune.tiny_runs import adapted, arguments, counting, llama_config

__all__ = ["llama_config"]

pytestmark = pytest.mark.usefixtures("one_thread")


def made(folder: Path, model: Any, **options: Any) -> Trainer:
    return Trainer(model=model, args=arguments(folder, **options), train_dataset=counting())


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces torch's checkpoint: reentrant or not, whatever its caller asks for."""
    own = torch.utils.checkpoint.checkpoint

    def force(reentrant: bool) -> None:
        @wraps(own)
        def replaced(*rest: Any, use_reentrant: bool | None = None, **options: Any) -> Any:
            return own(*rest, use_reentrant=reentrant, **options)

        monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", replaced)
        monkeypatch.setattr(transformers.modeling_utils, "checkpoint", replaced)

    return force


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_a_replaced_checkpoint_is_known_by_what_it_does(
    forced: Callable[..., None], llama_config: LlamaConfig, reentrant: bool, asked: bool
) -> None:
    forced(reentrant)
    model = adapted(llama_config)
    model.gradient_checkpointing_enable({"use_reentrant": asked})
    release_inputs(model)
    functions = {vars(module)[CHECKPOINT] for module in model.modules() if CHECKPOINT in vars(module)}
    assert [is_reentrant(function) for function in functions] == [reentrant] * len(functions)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert any(map(requires_grad_hook, hooks)) is reentrant


def called_around_hooks(self: Any, *rest: Any, **options: Any) -> Any:
    """What a layer does in transformers 5.19: checkpointing is around its hooks, and not in its `forward`."""
    run = partial(nn.Module.__call__, self, **options)
    return (
        self._gradient_checkpointing_func(run, *rest) if self.gradient_checkpointing and self.training else run(*rest)
    )


@pytest.mark.parametrize("case", ["the user's", "the plan's", "the plan's in 5.19"])
def test_a_budget_is_kept_where_checkpoint_is_replaced(
    forced: Callable[..., None],
    llama_config: LlamaConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    forced(True)
    if "5.19" in case:
        forward = LlamaDecoderLayer.forward
        monkeypatch.setattr(LlamaDecoderLayer, "forward", getattr(forward, "__wrapped__", forward))
        monkeypatch.setattr(LlamaDecoderLayer, "__call__", called_around_hooks)
    on, config = case == "the user's", LlamaConfig(**llama_config.to_dict() | {"num_hidden_layers": 4})
    alone = made(tmp_path / "alone", adapted(config), gradient_checkpointing=on)
    alone.train()
    trainer = made(tmp_path / "own", adapted(config), gradient_checkpointing=on)
    callback = attach(trainer, budget="100%" if on else "75%", parts="off")
    trainer.train()
    assert max(peak for _, peak in callback.peaks) <= callback.limit
    assert losses(trainer) == losses(alone)
    chosen = [row["checkpointed_layers"] for row in trainer.state.log_history if "checkpointed_layers" in row]
    assert any(chosen) is not on
