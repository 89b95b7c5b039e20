"""Trainers of a program under `rankpilot run`: attached to, left as they are, or let go again, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from rankpilot.common.errors import ConfigError
from rankpilot.finetune.allocate import allocate
from rankpilot.finetune.callback import Evaluations, RankPilotCallback, attach
from rankpilot.finetune.step.peak_guard import PeakGuard
from rankpilot.integrations import attempt
from rankpilot.integrations.hook import PREPARED, patch, why_not
from rankpilot.integrations.order import VARIABLE, Order
from transformers import LlamaConfig, Trainer, set_seed

from ..finetune.tiny_runs import adapted, arguments, counting, llama_config, new_base
from ..finetune.trainer_kinds import dpo, rollouts

__all__ = ["llama_config"]

pytestmark = pytest.mark.usefixtures("one_thread")
Start = Callable[..., Order]


@pytest.fixture
def under_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """Patches the Trainer as in a program under `rankpilot run` with these options, until the test ends."""

    def start(*, dry: bool = False, **options: Any) -> Order:
        (tmp_path / "marks").mkdir(exist_ok=True)
        order = Order(str(tmp_path / "marks"), options, dry)
        monkeypatch.setenv(VARIABLE, order.text())
        for name in ("__init__", "train"):
            monkeypatch.setattr(Trainer, name, getattr(Trainer, name))  # to be restored
        patch(Trainer)
        patch(Trainer)  # the second time has no effect
        return order

    return start


class OwnTrain(Trainer):  # type: ignore[misc]
    """Overrides `train`, and counts its calls."""

    calls = 0

    def train(self, *rest: Any, **options: Any) -> Any:
        self.calls += 1
        return super().train(*rest, **options)


def made(folder: Path, model: Any, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    return kind(model=model, args=arguments(folder, **options), train_dataset=counting())


def with_dropout(config: LlamaConfig) -> Any:
    """A model whose losses depend on the random numbers of the run."""
    return adapted(config, lora_dropout=0.1)


def outcome(trainer: Trainer) -> tuple[list[float], list[torch.Tensor]]:
    """The losses and trained weights of a Trainer that has trained."""
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, [each.detach().clone() for each in trainer.model.parameters() if each.requires_grad]


def same(one: Trainer, other: Trainer) -> bool:
    (losses, weights), (others, other_weights) = outcome(one), outcome(other)
    return losses == others and all(map(torch.equal, weights, other_weights))


def trained_again(trainer: Trainer) -> None:
    """Train once more, with the same random numbers at each call."""
    set_seed(1)
    trainer.train()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `rankpilot run` has told."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("rankpilot run: ")]


def callbacks(trainer: Trainer) -> list[RankPilotCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, RankPilotCallback)]


def test_an_ample_budget_changes_no_loss(under_run: Start, llama_config: LlamaConfig, tmp_path: Path) -> None:
    alone = made(tmp_path / "alone", with_dropout(llama_config))
    alone.train()
    order = under_run(parts="off", budget="400%")
    trainer = made(tmp_path / "run", with_dropout(llama_config), OwnTrain)
    trainer.train()
    assert same(trainer, alone)
    assert len(callbacks(trainer)) == trainer.calls == 1
    assert order.events() == {"made", "attached"}


def test_a_subclass_trains_twice_and_resumes(
    under_run: Start, llama_config: LlamaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    under_run(budget="60%", policy="signal-mean", bounds=["q_proj=2"], schedule=[0.0])
    trainer = made(tmp_path, adapted(llama_config), OwnTrain, save_steps=2)
    trainer.train()
    (callback,) = callbacks(trainer)
    assert callback.pilot.options.bounds == {"q_proj": 2}
    assert [at for at, _ in callback.predictions] == [0]
    assert trainer.train(resume_from_checkpoint=True).global_step == 4
    assert trainer.calls == 2
    (told,) = lines(capsys)
    assert "attached to OwnTrain: LlamaForCausalLM, 7 modules with LoRA; --budget 60% --policy signal-mean" in told
    again = made(tmp_path, adapted(llama_config), max_steps=6)
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 6
    assert len(callbacks(again)) == 1


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_trainers_of_trl(
    under_run: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 64)  # the vocabulary is as small
    under_run(budget="85%")
    whole = {"gradient_checkpointing": False}
    trainer = dpo(tmp_path, **whole) if kind == "dpo" else rollouts("GRPO", tmp_path, **whole)
    before = {name: value.shape for name, value in trainer.model.named_parameters()}
    trainer.train()
    (callback,) = callbacks(trainer)
    assert max(peak for _, peak in callback.peaks) <= callback.limit
    (told,) = lines(capsys)
    assert f"attached to {kind.upper()}Trainer" in told
    if kind == "grpo":  # ranks are not changed where answers are generated
        assert before == {name: value.shape for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("kind", ["full", "ia3"])
def test_what_is_no_lora_trains_as_it_is(
    under_run: Start, llama_config: LlamaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    def model() -> Any:
        base = new_base(llama_config)
        return base if kind == "full" else get_peft_model(base, IA3Config(task_type="CAUSAL_LM"))

    alone = made(tmp_path / "alone", model())
    alone.train()
    trained_again(alone)
    order = under_run(budget="24GiB")
    trainer = made(tmp_path / "run", model())
    trainer.train()
    trained_again(trainer)
    assert same(trainer, alone)
    (told,) = lines(capsys)
    assert told.endswith("its model has no PEFT adapter." if kind == "full" else "its adapter is IA3, not LoRA.")
    assert order.events() == {"made", "left"}
    assert not callbacks(trainer)


def test_a_script_that_attaches_keeps_its_options(
    under_run: Start, llama_config: LlamaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = under_run(budget="60%")
    trainer = made(tmp_path, adapted(llama_config), OwnTrain)
    config = allocate(trainer, policy="signal-mean", budget="60%")
    assert order.events() == {"made"}, "planning is not training"
    assert config.rank_pattern
    callback = attach(trainer, "signal-mean", budget="80%", parts="off")
    trainer.train()
    assert callbacks(trainer) == [callback]
    assert callback.limit > 0
    assert order.events() == {"made", "own"}
    assert [line.partition(":")[2] for line in lines(capsys)] == [
        " the program attaches rankpilot to OwnTrain itself: its own options hold."
    ]


def failing_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankpilot.finetune.callback.chosen_checkpoint", _raise)


def failing_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankpilot.finetune.run_rate.RunRate.begin_control", _raise)  # after the first plan


def failing_after_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluations, "expect", _raise)


def failing_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "attach", _raise)


def _raise(*_: Any, **__: Any) -> Any:
    torch.rand(3)  # what fails may have drawn numbers
    raise RuntimeError("it broke")


@pytest.mark.parametrize("failure", [failing_prepare, failing_begin, failing_after_begin, failing_attach])
def test_a_failure_leaves_the_run_as_it_is(
    under_run: Start,
    llama_config: LlamaConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[[pytest.MonkeyPatch], None],
) -> None:
    alone = made(tmp_path / "alone", with_dropout(llama_config), data_seed=3)
    alone.train()
    order = under_run(budget="60%", policy="signal-mean")
    failure(monkeypatch)
    trainer = made(tmp_path / "run", with_dropout(llama_config), data_seed=3)
    trainer.train()
    assert same(trainer, alone)
    assert trainer.model.peft_config["default"].to_dict() == alone.model.peft_config["default"].to_dict()
    assert lines(capsys)[-1].endswith("Trainer trains as it is, without rankpilot: RuntimeError: it broke")
    assert "failed" in order.events()
    assert not callbacks(trainer)
    for each in (trainer, alone):
        vars(each).setdefault(PREPARED, None)  # the other one trains as it is
        trained_again(each)
    assert same(trainer, alone)


def test_a_failure_during_the_run_does_not_end_it(
    under_run: Start,
    llama_config: LlamaConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    under_run(budget="60%", policy="signal-mean", parts="off")
    trainer = made(tmp_path, adapted(llama_config))
    monkeypatch.setattr(PeakGuard, "after_step", lambda self, step: _raise() if step == 2 else None)
    assert trainer.train().global_step == 4
    assert lines(capsys)[-1].endswith("Trainer goes on from step 2, without rankpilot: RuntimeError: it broke")
    assert not callbacks(trainer)
    assert all(map(math.isfinite, outcome(trainer)[0]))


@pytest.mark.parametrize(("options", "words"), [({"budget": "1%"}, "budget"), ({"control": True}, "control")])
def test_an_impossible_wish_leaves_the_run_as_it_is(
    under_run: Start,
    llama_config: LlamaConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    words: str,
) -> None:
    under_run(**options)
    trainer = made(tmp_path, adapted(llama_config), optim="sgd" if "control" in options else "adamw_torch")
    assert trainer.train().global_step == 4
    assert words in lines(capsys)[-1]


@pytest.mark.parametrize("budget", ["40KiB", "1KiB step"])
def test_bytes_that_cannot_be_kept_end_the_process(
    under_run: Start, llama_config: LlamaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str
) -> None:
    under_run(budget=budget)
    with pytest.raises(SystemExit) as end:
        made(tmp_path, adapted(llama_config)).train()
    assert end.value.code == 1
    assert lines(capsys)[-1].startswith("rankpilot run: error: ")


def test_dry_ends_before_training(
    under_run: Start, llama_config: LlamaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path / "run", adapted(llama_config))
    attach(run, budget="60%")
    run.train()
    trained = capsys.readouterr().out
    under_run(dry=True, budget="60%")
    for model in (adapted(llama_config), new_base(llama_config)):
        trainer = made(tmp_path / "dry", model)
        with pytest.raises(SystemExit) as end:
            trainer.train()
        assert end.value.code == 0
        assert trainer.state.global_step == 0
        assert not any((tmp_path / "dry").rglob("*.json*"))
    lora, plan, *remarks, full = lines(capsys)
    assert "would attach to Trainer: LlamaForCausalLM, 7 modules with LoRA; --budget 60%." in lora
    assert len(remarks) < 8
    assert "Trainer trains as it is: its model has no PEFT adapter." in full
    assert plan.removeprefix("rankpilot run: ") in trained


@pytest.mark.parametrize(("budget", "status"), [("40KiB", 1), ("1 params", 0)])
def test_dry_tells_what_fails(
    under_run: Start,
    llama_config: LlamaConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    budget: str,
    status: int,
) -> None:
    under_run(dry=True, budget=budget)
    trainer = made(tmp_path, adapted(llama_config))
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert (end.value.code, trainer.state.global_step) == (status, 0)
    assert lines(capsys)


class Broken(Trainer):  # type: ignore[misc]
    """A Trainer with a mistake of its user."""

    def compute_loss(self, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("mine")


def test_errors_of_the_program_are_its_own(under_run: Start, llama_config: LlamaConfig, tmp_path: Path) -> None:
    under_run()
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        made(tmp_path, adapted(llama_config), Broken).train()
    assert caught.value.__context__ is None


def test_adapters_that_are_lora(llama_config: LlamaConfig, tmp_path: Path) -> None:
    model = adapted(llama_config)
    model.add_adapter("reference", LoraConfig(target_modules=["q_proj"]))
    assert not why_not(made(tmp_path, model))


def test_options_are_those_of_attach() -> None:
    with pytest.raises(ConfigError, match="fractions must ascend"):
        attempt.attach_options({"schedule": [0.5]})
    found = attempt.attach_options({"bounds": ["q_proj=0:4"], "time": "75%"})
    assert found == {"bounds": {"q_proj": (0, 4)}, "time": "75%"}
