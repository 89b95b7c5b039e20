"""What a run leaves as it found it: models, data, Trainers and random numbers, also after an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.common.errors import ConfigError, DataError, RunFolderError, UnsupportedError
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.lora.targets import find_target_modules
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM, Trainer, TrainerCallback

from .tiny_runs import adapted, arguments, counting, logits, new_base, ranks_of

ROWS = counting()
SCHEDULE = DecisionSchedule(probe_steps=3)


@pytest.fixture
def new_model(llama_config: LlamaConfig) -> Callable[..., PeftModel]:
    return partial(adapted, llama_config)


def piloted(trainer: Trainer, budget: str = "60%") -> Trainer:
    rankpilot.attach(trainer, "signal-mean", budget, parts="off", schedule=SCHEDULE)  # each part is a call
    return trainer


class InterruptedProbe(Trainer):
    """Ctrl-C in the second step of the probe: measuring the step takes three."""

    steps = 0

    def compute_loss(self, *inputs: Any, **options: Any) -> Any:
        InterruptedProbe.steps += 1  # an attribute of the Trainer itself would be put back
        if self.steps == 5:
            raise KeyboardInterrupt
        return super().compute_loss(*inputs, **options)


def test_ctrl_c_in_the_probe_leaves_the_adapter_as_it_was(new_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    model, plain = new_model(), new_model()
    InterruptedProbe.steps = 0
    trainer = piloted(InterruptedProbe(model, arguments(tmp_path / "run"), train_dataset=ROWS))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.steps == 5
    assert set(ranks_of(model).values()) == {8}
    assert {target.scaling for target in find_target_modules(model)} == {2.0}
    there = dict(plain.named_parameters())
    assert all(torch.equal(value, there[name]) for name, value in model.named_parameters())
    assert all(value.requires_grad == there[name].requires_grad for name, value in model.named_parameters())
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(new_model().unload(), tmp_path / "adapter")


class Interrupting(TrainerCallback):
    """Ctrl-C in the middle of the second step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_an_interrupted_trainer_is_a_plain_one_again(new_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    interrupting = Interrupting()
    trainer = Trainer(
        new_model(),
        arguments(tmp_path / "run", save_steps=2),
        train_dataset=ROWS,
        callbacks=[interrupting],
    )
    callback = rankpilot.attach(trainer, "signal-mean", "60%", schedule=SCHEDULE)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    followed = {"get_batch_samples", "training_step", "log", "_save_checkpoint", "evaluate"}
    assert not followed & set(vars(trainer))
    for one in (callback, interrupting):
        trainer.remove_callback(one)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


class Logging(Trainer):
    """Writes a metric of its own at each loss."""

    def compute_loss(self, *inputs: Any, **options: Any) -> Any:
        self.log({"mine": 1.0})
        return super().compute_loss(*inputs, **options)


def test_the_probe_writes_nothing_into_the_history(new_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    trainer = piloted(Logging(new_model(), arguments(tmp_path / "run"), train_dataset=ROWS))
    trainer.train()
    assert sum("mine" in entry for entry in trainer.state.log_history) == 4


@pytest.mark.long
def test_models_that_are_made_for_each_run(new_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    """`model_init`: a run that resumes, and a search, whose model is gone between its trials."""

    def new(**options: Any) -> Trainer:
        settings = arguments(tmp_path / "run", **options)
        return piloted(Trainer(model_init=lambda: new_model(), args=settings, train_dataset=ROWS))

    first = new(save_steps=2)
    first.train()
    again = new()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert ranks_of(again.model) == ranks_of(first.model)
    there = dict(first.model.named_parameters())
    assert all(torch.equal(value, there[name]) for name, value in again.model.named_parameters())
    again.model = None  # as `hyperparameter_search` does before each trial
    again.model_wrapped = None
    again.train()
    assert len(set(ranks_of(again.model).values())) > 1


@pytest.mark.long
def test_the_trials_of_a_search_keep_a_log_each(new_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    settings = arguments(tmp_path / "run")
    trainer = Trainer(model_init=lambda trial: new_model(), args=settings, train_dataset=ROWS, eval_dataset=ROWS)
    piloted(trainer, "100%")
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=2, backend="optuna"
    )
    assert [len(DecisionLog(tmp_path / "run" / f"run-{trial}" / "decisions")) for trial in range(2)] == [3, 3]
    assert not (tmp_path / "run" / "decisions").exists()


@pytest.mark.long
def test_a_second_adapter_of_the_same_name(
    new_model: Callable[..., PeftModel], llama_config: LlamaConfig, tmp_path: Path
) -> None:
    model = new_model(target_modules=["q_proj"])
    piloted(Trainer(model, arguments(tmp_path / "run"), train_dataset=ROWS), "100%").train()
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=8, target_modules=["q_proj", "up_proj"]))
    model.set_adapter("default")
    more = arguments(tmp_path / "more", learning_rate=0.1)
    piloted(Trainer(model, more, train_dataset=ROWS), "100%").train()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(new_base(llama_config), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model))


def test_a_deleted_adapter_is_gone(new_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    model = new_model()
    piloted(Trainer(model, arguments(tmp_path / "run"), train_dataset=ROWS), "40%").train()
    assert 0 in ranks_of(model).values()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "adapters")
    assert model.load_adapter(tmp_path / "adapters" / "other", "third") is not None
    assert logits(model).isfinite().all()


def test_rows_without_labels_do_not_end_the_probe(new_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    masked = [row | {"labels": [-100] * 12} for row in ROWS]
    mixed = Dataset.from_list([row for pair in zip(ROWS, masked, strict=True) for row in pair])
    piloted(Trainer(new_model(), arguments(tmp_path / "mixed"), train_dataset=mixed)).train()
    short = Dataset.from_list([{name: values[:1] for name, values in row.items()} for row in ROWS])
    trainer = piloted(Trainer(new_model(), arguments(tmp_path / "short"), train_dataset=short))
    with pytest.raises(DataError, match=r"The loss of rows of 1 token is not finite: a language model needs"):
        trainer.train()
    trainer = piloted(Trainer(new_model(), arguments(tmp_path / "none"), train_dataset=masked))
    with pytest.raises(DataError, match=r"All labels of the \d+ rows tried are masked"):
        trainer.train()


class Once(torch.utils.data.IterableDataset[Any]):
    """Gives its rows once."""

    def __init__(self) -> None:
        self.rows = iter(ROWS)

    def __iter__(self) -> Iterator[Any]:
        return self.rows


def test_rows_that_come_once_are_not_lost(new_model: Callable[..., PeftModel], tmp_path: Path) -> None:
    data = Once()
    trainer = piloted(Trainer(new_model(), arguments(tmp_path / "run"), train_dataset=data))
    with pytest.raises(DataError, match=r"\(Once\) can be read only once"):
        trainer.train()
    assert len(list(data)) == len(ROWS)


def test_layers_that_are_left_out_at_random_are_refused(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    config.layerdrop = 0.1
    model = get_peft_model(OPTForCausalLM(config), LoraConfig(target_modules="all-linear"))
    trainer = piloted(Trainer(model, arguments(tmp_path / "run"), train_dataset=ROWS))
    with pytest.raises(UnsupportedError, match=r"config.layerdrop is 0.1.*Set model.config.layerdrop = 0"):
        trainer.train()


def test_a_log_that_cannot_be_written_is_told_before_the_work(
    new_model: Callable[..., PeftModel], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    InterruptedProbe.steps = 0
    trainer = InterruptedProbe(new_model(), arguments(tmp_path / "run"), train_dataset=ROWS)
    rankpilot.attach(trainer, "signal-mean", "60%", schedule=SCHEDULE, log=tmp_path / "file" / "decisions")
    with pytest.raises(RunFolderError, match="Cannot write the decision log to "):
        trainer.train()
    assert InterruptedProbe.steps == 0


def test_calls_before_the_run() -> None:
    calls: list[Callable[[rankpilot.RankPilot], object]] = [
        lambda pilot: pilot.guard, rankpilot.RankPilot.out_of_memory
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ConfigError, match="has not begun"):
            call(rankpilot.RankPilot("signal-mean"))


class Samples(TrainerCallback):
    """Has the model read far more than a batch after each step, as callbacks that print samples do."""

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        with torch.no_grad():
            model(input_ids=torch.arange(64).repeat(64, 1))


@pytest.mark.long
def test_what_another_callback_computes_after_a_step_is_not_the_steps(
    new_model: Callable[..., PeftModel], tmp_path: Path
) -> None:
    peaks = []
    for others in ([], [Samples()]):
        trainer = Trainer(new_model(), arguments(tmp_path / f"{len(others)}"), train_dataset=ROWS, callbacks=others)
        callback = rankpilot.attach(trainer, "signal-mean", "60%", schedule=SCHEDULE)
        trainer.train()
        peaks.append(callback.pilot.peaks)
    assert peaks[0] == peaks[1] != []
