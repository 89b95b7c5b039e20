"""Plugins of axolotl and ms-swift, on stubs of what these offer; `scripts/test-trainers` runs the real ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from rankpilot.common.errors import ConfigError, RankPilotError
from rankpilot.cost.training_step import CHECKPOINT, is_reentrant, release_inputs, requires_grad_hook
from rankpilot.finetune.callback import RankPilotCallback
from rankpilot.integrations import attempt
from rankpilot.integrations.plugin import attach_when_it_trains, checked_options
from torch import nn
from transformers import LlamaConfig, Trainer, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ..finetune.tiny_runs import adapted, arguments, counting, llama_config, new_base

__all__ = ["llama_config"]

pytestmark = pytest.mark.usefixtures("one_thread")


class OfSwift(TrainerCallback):  # type: ignore[misc]
    def __init__(self, args: Any, trainer: Any) -> None:
        self.args, self.trainer = args, trainer


@pytest.fixture
def plugin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of a plugin, imported where its program is a stub."""
    offered = {
        "axolotl": ("axolotl.integrations.base", {"BasePlugin": object}),
        "ms_swift": ("swift.callbacks", {"TrainerCallback": OfSwift, "callbacks_map": {}}),
    }
    path, names = offered[request.param]
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    vars(sys.modules[path]).update(names)
    name = f"rankpilot.integrations.{request.param}"
    yield import_module(name)
    del sys.modules[name]


of_axolotl = pytest.mark.parametrize("plugin", ["axolotl"], indirect=True)
of_swift = pytest.mark.parametrize("plugin", ["ms_swift"], indirect=True)


class Swift(Trainer):  # type: ignore[misc]
    """Makes its callbacks from their names, as ms-swift does."""

    def __init__(self, *rest: Any, kinds: dict[str, Any], **options: Any) -> None:
        callbacks = [kinds["rankpilot"](options["args"], self)]
        super().__init__(*rest, callbacks=callbacks, **options)


def made(folder: Path, model: Any, kind: Callable[..., Trainer] = Trainer, **options: Any) -> Trainer:
    return kind(model=model, args=arguments(folder, **options), train_dataset=counting())


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def attached(trainer: Trainer) -> list[Any]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, RankPilotCallback)]


@of_axolotl
def test_axolotl_attaches_and_turns_fused_kernels_off(plugin: Any, llama_config: LlamaConfig, tmp_path: Path) -> None:
    ours, cfg = plugin.RankpilotPlugin(), {"adapter": "lora", "lora_o_kernel": False}
    ours.register(cfg)
    assert cfg == {"adapter": "lora"} | dict.fromkeys(plugin.KERNELS, False)
    ours.register(cfg)  # axolotl does so twice
    with pytest.raises(ConfigError, match="lora_qkv_kernel: true does not go with rankpilot"):
        ours.register({"adapter": "qlora", "lora_qkv_kernel": True})
    full = {"lora_mlp_kernel": True}
    ours.register(full)
    assert full == {"lora_mlp_kernel": True}, "no LoRA is none of its business"
    assert ours.get_input_args() == "rankpilot.integrations.axolotl.RankpilotArgs"

    trainer = made(tmp_path, adapted(llama_config))
    ours.post_trainer_create(SimpleNamespace(rankpilot={"budget": "60%", "parts": "off"}), trainer)
    assert not attached(trainer), "later plugins may still change the Trainer"
    trainer.train()
    (callback,) = attached(trainer)
    assert max(peak for _, peak in callback.peaks) <= callback.limit
    assert trainer.train().global_step == 4
    assert len(attached(trainer)) == 1


@of_axolotl
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budgte": "80%"}, "Unknown option 'budgte'. Did you mean: 'budget'"),
        ({"budget": "much"}, "much"),
        ({"bounds": {"q_proj": "x"}}, "A bound must have the form"),
        ({"schedule": 3}, "cannot read its options"),
        ({"policy": "no-such"}, "no-such"),
        ("80%", "options by name"),
    ],
)
def test_axolotl_refuses_a_wrong_option_when_it_validates(plugin: Any, given: Any, words: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as caught:
        plugin.RankpilotArgs(rankpilot=given)
    assert words in str(caught.value)


@of_axolotl
def test_axolotl_takes_options_as_python_does(plugin: Any) -> None:
    options = {
        "budget": "6GiB step",
        "bounds": {"q_proj": 8, "down_proj": [0, 4]},
        "schedule": [0.0, 0.5],
        "time": None,
    }
    assert plugin.RankpilotArgs(rankpilot=options).rankpilot == options
    assert plugin.RankpilotArgs().rankpilot is None
    assert checked_options(options) == {
        "budget": "6GiB step", "bounds": ["q_proj=8", "down_proj=0:4"], "schedule": [0, 0.5],
    }  # fmt: skip


@of_swift
def test_swift_attaches_once_when_it_trains(
    plugin: Any, llama_config: LlamaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankPilotError, match="Unknown option"):
        plugin.register(budgte="80%")
    plugin.register(budget="60%", parts="off")
    plugin._tell_if_unused()
    assert "no Trainer was made with the setting callbacks: [rankpilot]" in capsys.readouterr().err
    trainer = made(tmp_path, adapted(llama_config), partial(Swift, kinds=plugin.callbacks_map))
    assert not attached(trainer)
    trainer.train()
    assert len(attached(trainer)) == 1
    plugin._tell_if_unused()
    assert "no Trainer was made" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["breaks", "full"])
def test_a_run_goes_on_as_it_is(
    llama_config: LlamaConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("it broke")

    model = new_base if kind == "full" else adapted
    alone, trainer = made(tmp_path / "alone", model(llama_config)), made(tmp_path / "own", model(llama_config))
    alone.train()
    monkeypatch.setattr(attempt, "attach", broken)
    attach_when_it_trains(trainer, {"budget": "60%"})
    trainer.train()
    assert losses(trainer) == losses(alone)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rankpilot run: ")]
    assert ("it broke" if kind == "breaks" else "has no PEFT adapter") in told


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces torch's checkpoint as ms-swift does: reentrant or not, whatever its caller asks for."""
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
    attach_when_it_trains(trainer, {"budget": "100%" if on else "75%", "parts": "off"})
    trainer.train()
    (callback,) = attached(trainer)
    assert max(peak for _, peak in callback.peaks) <= callback.limit
    assert losses(trainer) == losses(alone)
    chosen = [row["checkpointed_layers"] for row in trainer.state.log_history if "checkpointed_layers" in row]
    assert any(chosen) is not on
