"""Runs whose base streams: the same losses and plans, and a budget that decides how many layers stay on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from peft import PeftModel
from rankpilot.common.errors import BudgetError, ConfigError, UnsupportedError
from rankpilot.cost.record.calibration import resident_bytes
from rankpilot.cost.record.model_states import frozen_bytes
from rankpilot.cost.savers import streamed_base
from rankpilot.cost.savers.streamed_base import streaming_of
from rankpilot.finetune import streaming
from rankpilot.finetune.options import PlanOptions
from transformers import LlamaConfig, Trainer

from ..cases import first_cases
from .tiny_runs import PLAIN, Recorder, adapted, arguments, counting, messages_of, ranks_of

LAYERS = 6


@pytest.fixture(autouse=True)
def _small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers count, and main memory stands for a card."""
    monkeypatch.setattr(streamed_base, "LEAST_BYTES", 1)
    monkeypatch.setattr(streamed_base, "DEVICES", frozenset({"cpu"}))


def new_model() -> PeftModel:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
    return adapted(config)


def broken_off() -> None:
    raise KeyboardInterrupt


def run(folder: Path, model: PeftModel | None = None, *, resume: bool = False, ends: int = 0, **options: Any) -> Any:
    """Losses, final ranks, and the pilot of a run, which may end before its last step."""
    model, settings = model or new_model(), options.pop("arguments", {})
    made = arguments(folder, **{"eval_strategy": "steps", "eval_steps": 2} | settings)
    rows, seen = counting(), Recorder(lambda step: broken_off() if step == ends else None)
    trainer = Trainer(model, made, train_dataset=rows, eval_dataset=rows[:8], callbacks=[seen])
    policy = "default" if "goal" in options else "signal-mean"
    callback = rankpilot.attach(trainer, policy, **{"budget": "80%"} | options)
    trainer.train(resume_from_checkpoint=resume)
    losses = [row.get("loss", row.get("eval_loss")) for row in trainer.state.log_history]
    return losses[:-1], ranks_of(model), callback.pilot


@pytest.mark.parametrize(
    "options",
    first_cases(
        3,
        [
            {},
            PLAIN,
            {"parts": "off"},
            {"goal": "bytes"},
            {"budget": "50%"},
            {"arguments": {"gradient_accumulation_steps": 2}},
            {"arguments": {"bf16": True}},
        ],
    ),
    ids=["parts", "plain", "whole", "bytes", "half", "accumulation", "bf16"],
)
def test_losses_and_plans_are_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    model = new_model()
    weights = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses, ranks, pilot = run(tmp_path / "streamed", model, stream=4, **options)
    assert (losses, ranks) == run(tmp_path / "whole", stream="off", **options)[:2]
    assert streaming_of(model) is None
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    for _, predicted, measured in pilot.checks:
        assert 0.95 < measured / predicted < 1.01


def test_a_resumed_run_streams_on(tmp_path: Path) -> None:
    saving = {"arguments": {"save_steps": 2, "eval_strategy": "no"}}
    whole = run(tmp_path / "whole", stream=4, **saving)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "half", ends=3, stream=4, **saving)
    assert run(tmp_path / "half", resume=True, stream=4, **saving)[:2] == whole[:2]


def test_a_budget_that_does_not_hold_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where plain LoRA fits beside the base, nothing streams; below, layers make room for it."""
    base, plain = frozen_bytes(new_model()), run(tmp_path / "plain", budget="100%", parts="off")[2].limit
    told = []
    for budget in (int(base + 1.01 * plain), int(base + 0.4 * plain), int(0.9 * base)):
        capsys.readouterr()
        model = new_model()
        losses, _, pilot = run(tmp_path / str(budget), model, budget=f"{budget}B", parts="off")
        told.append(capsys.readouterr().out)
        assert all(loss > 0 for loss in losses)
        assert streaming_of(model) is None
        assert pilot.limit <= budget
    assert "stream" not in told[0]
    assert all(f"The frozen weights of {LAYERS} layers stream" in text for text in told[1:])
    with pytest.raises(BudgetError, match="less than the frozen model"):
        run(tmp_path / "off", budget=f"{int(0.9 * base)}B", stream="off")


def test_a_model_that_streamed_before(tmp_path: Path) -> None:
    """`stream_base` before the Trainer; the run keeps on the device what the budget holds, and leaves the rest."""
    expected = run(tmp_path / "whole", stream="off")
    model = new_model()
    found = rankpilot.stream_base(model, "cpu")
    assert resident_bytes(model) == frozen_bytes(model) - found.away_bytes
    assert run(tmp_path / "streamed", model)[:2] == expected[:2]
    assert streaming_of(model) is found
    assert len(found.layers) == LAYERS
    with pytest.raises(ConfigError, match='stream="off"'):
        run(tmp_path / "off", model, stream="off", fresh=True)
    run(tmp_path / "four", model, stream=4, fresh=True)
    assert len(found.layers) == 4


def test_on_a_cpu_nothing_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its memory holds all weights, and two layers twice: a budget for everything counts them."""
    monkeypatch.setattr(streamed_base, "DEVICES", frozenset({"cuda"}))
    model = new_model()
    found = rankpilot.stream_base(model, "cpu")
    twice = found.main_memory_bytes - found.away_bytes
    assert resident_bytes(model) == frozen_bytes(model) + twice > frozen_bytes(model)
    found.put_back()
    run(tmp_path, model, stream=4, **PLAIN, arguments={"max_steps": 1, "eval_strategy": "no"})
    assert "the same losses, nothing freed, as there is no GPU." in capsys.readouterr().out


def test_a_base_too_large_for_the_device_never_moves_there(monkeypatch: pytest.MonkeyPatch) -> None:
    base, free = frozen_bytes(new_model()), 10**9
    monkeypatch.setattr(streaming, "free_bytes", lambda device: free)

    def streams(budget: str, stream: Any = "auto") -> bool:
        model = new_model()
        streaming.stream_what_is_too_large(model, torch.device("cpu"), PlanOptions(budget=budget, stream=stream))
        return streaming_of(model) is not None

    assert streams(f"{base - 1}B")
    assert streams(f"{base - 1}B", 3)
    assert not streams(f"{base - 1}B", "off")
    assert not streams(f"{base}B")
    assert not streams("80%")
    free = base - 1
    assert streams("80%")
    monkeypatch.setattr(streamed_base, "DEVICES", frozenset({"cuda"}))
    assert not streams("80%")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_ends_the_streaming(tmp_path: Path, error: type[BaseException]) -> None:
    model = new_model()
    weights = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}

    def fail(step: int) -> None:
        if step == 2:
            raise error

    made = arguments(tmp_path)
    trainer = Trainer(model, made, train_dataset=counting(), callbacks=[Recorder(fail)])
    rankpilot.attach(trainer, "signal-mean", budget="80%", stream=5)
    with pytest.raises(error):
        trainer.train()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    assert not any(p.untyped_storage().nbytes() == 0 for p in model.parameters() if p.numel())


def test_weights_that_are_read_outside_of_their_layer(tmp_path: Path) -> None:
    """A layer that a stranger's code runs without calling it: the streamed weights would be stale."""
    model = new_model()
    inner = model.get_base_model().model
    first, norm = inner.layers[0].mlp.down_proj, inner.norm
    weight, forward = first.base_layer.weight.data, norm.forward  # kept, as fused kernels keep pointers
    norm.forward = lambda hidden: forward(hidden + (weight.sum() if weight.untyped_storage().nbytes() else 1.0))
    with pytest.raises(UnsupportedError, match=r'reads frozen weights outside .* Pass stream="off"'):
        run(tmp_path, model, stream=4)
    assert streaming_of(model) is None
    assert all(p.untyped_storage().nbytes() for p in model.parameters() if p.numel())


def test_wrong_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for wrong in (0, -1, 2.5, "on", True):
        with pytest.raises(ConfigError, match='stream is "auto", "off" or a number of layers'):
            rankpilot.PilotOptions(stream=wrong)
    with pytest.raises(ConfigError, match="this model has 6 layers"):
        run(tmp_path, stream=7)
    assert not messages_of(caplog, "stream")
