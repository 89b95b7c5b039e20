"""The Trainer callback on a tiny Llama: budgets, logs, adapters, resuming, and what is refused."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.agents.learned.networks import RankNetwork
from rankpilot.agents.learned.policy_file import save_policy
from rankpilot.agents.log import DecisionLog
from rankpilot.agents.settings import DecisionSchedule
from rankpilot.errors import BudgetError, NonFiniteError, RunFolderError, UnsupportedError
from rankpilot.finetune import before_training as before_module
from rankpilot.finetune.callback import attach
from rankpilot.lora.peft_config import adapter_ranks
from rankpilot.lora.targets import find_target_modules
from rankpilot.plan.plan import project
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..cases import first_cases

STEPS, LENGTH = 12, 20
SCHEDULE = DecisionSchedule(probe_steps=4)
DECISIONS = (0, 2, 4, 6)


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Counting in strides, of different lengths, padded to one."""
    generator = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        stride, length = int(generator.integers(1, 5)), int(generator.integers(6, LENGTH + 1))
        ids = [stride * i % 64 for i in range(length)] + [0] * (LENGTH - length)
        examples.append({"input_ids": ids, "labels": ids})
    return examples


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Dataset.from_list(rows(120))


class Recorder(TrainerCallback):
    """Losses and ranks after each step; stops the run after a given step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.losses: list[float] = []
        self.ranks: list[dict[str, int]] = []
        self.stop_at = stop_at

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.ranks.append(adapter_ranks(find_target_modules(objects["model"])))
        if state.global_step == self.stop_at:
            control.should_training_stop = True


class Run:
    """One Trainer run, with everything that tests look at."""

    def __init__(
        self,
        folder: Path,
        config: LlamaConfig,
        data: Any,
        *,
        pilot: dict[str, Any] | None = None,
        stop_at: int | None = None,
        trainer: type[Trainer] = Trainer,
        eval_data: Any = None,
        dropout: float = 0.1,
        resume: Path | None = None,
        adapted: bool = True,
        **options: Any,
    ) -> None:
        set_seed(0)
        model: Any = LlamaForCausalLM(config)
        self.base_state = {name: value.clone() for name, value in model.state_dict().items()}
        if adapted:
            lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=dropout)
            model = get_peft_model(model, lora)
        arguments = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 3,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        } | options
        self.folder, self.model = folder, model
        self.recorder = Recorder(stop_at)
        self.trainer = trainer(
            model=model,
            args=TrainingArguments(str(folder), **arguments),
            train_dataset=data,
            eval_dataset=eval_data,
            callbacks=[self.recorder],
        )
        self.pilot = attach(self.trainer, **pilot) if pilot else None
        self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)

    @property
    def controller(self) -> Any:
        assert self.pilot is not None
        assert self.pilot.controller is not None
        return self.pilot.controller

    def log(self) -> Any:
        return DecisionLog(self.folder / "decisions").to_pandas()


@pytest.fixture
def launch(tmp_path: Path, llama_config: LlamaConfig, data: Dataset) -> Callable[..., Run]:
    def start(name: str = "run", *, policy: Any = "signal-mean", budget: Any = "80%", **options: Any) -> Run:
        options.setdefault("data", data)
        every = options.pop("measure_every", 1)
        pilot = {"policy": policy, "budget": budget, "schedule": SCHEDULE, "measure_every": every}
        return Run(tmp_path / name, llama_config, pilot=pilot, **options)

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig, data: Dataset) -> Run:
    """An uninterrupted run that several tests look at."""
    pilot = {"policy": "signal-mean", "budget": "80%", "schedule": SCHEDULE, "measure_every": 1}
    return Run(tmp_path_factory.mktemp("whole") / "run", llama_config, data, pilot=pilot)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def assert_reloads(run: Run, adapter: Path, config: LlamaConfig) -> PeftModel:
    """Plain PEFT makes the same logits of the saved adapter."""
    base = LlamaForCausalLM(config)
    base.load_state_dict(run.base_state)
    plain = PeftModel.from_pretrained(base, str(adapter)).eval()
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=tokens).logits, run.model.eval()(input_ids=tokens).logits)
    return plain


def test_decisions_fall_at_the_steps_of_the_schedule(whole: Run) -> None:
    assert tuple(step for step, _ in whole.pilot.predictions) == DECISIONS  # type: ignore[union-attr]
    changes = [
        step
        for step, (before, after) in enumerate(zip(whole.recorder.ranks, whole.recorder.ranks[1:], strict=False), 1)
        if before != after
    ]
    # The recorder sees a new plan at the end of the first step under it.
    assert set(changes) <= set(DECISIONS)
    assert changes, "ranks move in the middle of the run"
    assert np.mean(whole.recorder.losses[-8:]) < np.mean(whole.recorder.losses[:4]) - 0.1


def test_the_budget_is_never_exceeded_and_the_prediction_is_right(whole: Run) -> None:
    pilot, limit = whole.pilot, whole.controller.limit
    assert pilot is not None
    assert [step for step, _ in pilot.peaks] == list(range(1, STEPS + 1))
    assert max(peak for _, peak in pilot.peaks) <= limit
    assert all(cost <= limit for _, cost in pilot.predictions)
    assert all(cost > 0.97 * limit for _, cost in pilot.predictions), "the budget is spent"
    for (start, cost), (end, _) in zip(pilot.predictions, pilot.predictions[1:], strict=False):
        measured = [peak for step, peak in pilot.peaks if start < step <= end]
        assert max(measured) == pytest.approx(cost, rel=0.01)
    last = [peak for step, peak in pilot.peaks if step > DECISIONS[-1]]
    assert 0.95 * pilot.predictions[-1][1] <= max(last) <= pilot.predictions[-1][1], "no signals are taken any more"


def test_ranks_peak_and_budget_stand_in_the_trainers_log(whole: Run) -> None:
    rows = [row for row in whole.trainer.state.log_history if "loss" in row]
    assert len(rows) == STEPS
    names = len(find_target_modules(whole.model))
    for row, ranks in zip(rows, whole.recorder.ranks, strict=True):
        assert row["rank_mean"] == pytest.approx(sum(ranks.values()) / names)
        assert row["rank_modules"] == sum(rank > 0 for rank in ranks.values())
        assert row["peak_bytes"] == dict(whole.pilot.peaks)[row["step"]] <= row["budget_bytes"]  # type: ignore[union-attr]
    assert {row["budget_bytes"] for row in rows} == {whole.controller.limit}
    assert rows[-1]["plan_bytes"] == whole.pilot.predictions[-1][1]  # type: ignore[union-attr]
    assert rows[-1]["rank_decisions"] == len(DECISIONS)


def test_the_decision_log(whole: Run) -> None:
    table = whole.log()
    names = [target.name for target in find_target_modules(whole.model)]
    assert len(table) == len(DECISIONS) * len(names)
    assert table["module"].tolist() == names * len(DECISIONS)
    assert table["step"].tolist() == np.repeat(DECISIONS, len(names)).tolist()
    for index, step in enumerate(DECISIONS[1:], start=1):
        here = table.iloc[index * len(names) : (index + 1) * len(names)]
        before = [whole.recorder.ranks[step - 1][name] for name in names]
        after = [whole.recorder.ranks[step][name] for name in names]
        assert here["rank_before"].tolist() == before
        assert here["rank_after"].tolist() == after
        losses = whole.recorder.losses[DECISIONS[index - 1] : step]
        assert here["loss"].tolist()[0] == pytest.approx(np.mean(losses), rel=1e-3)
        assert here["measured_cost"].tolist()[0] == dict(whole.pilot.peaks)[step]  # type: ignore[union-attr]
    first = table.iloc[: len(names)]
    assert first["rank_before"].tolist() == [1] * len(names)
    assert first["loss"].isna().sum() == len(names)
    assert set(table["policy"].tolist()) == {"signal-mean"}
    assert set(table["unit"].tolist()) == {"bytes"}
    assert set(table["limit"].tolist()) == {whole.controller.limit}
    assert set(table["max_step"].tolist()[len(names) :]) == {whole.pilot.pilot.schedule.max_step}  # type: ignore[union-attr]


def test_logged_decisions_can_be_taken_again(whole: Run) -> None:
    log, table = DecisionLog(whole.folder / "decisions"), whole.log()
    modules = len(table) // len(DECISIONS)
    for number in range(len(DECISIONS)):
        here = table.iloc[number * modules : (number + 1) * modules]
        wanted, scores = (here[name].to_numpy() for name in ("rank_wanted", "score"))
        plan = project(log.logged(number).problem, wanted, scores)
        assert plan.clipped.tolist() == here["rank_clipped"].tolist()
        assert plan.ranks.tolist() == here["rank_after"].tolist()
        assert plan.cost == here["predicted_cost"].iloc[0]
    of_a_rank = [record.problem.cost.per_rank for record in log.read()]
    same = [np.array_equal(one, other) for one, other in pairwise(of_a_rank)]
    assert same == [*[True] * (len(DECISIONS) - 2), False], "no signals at last"


def test_the_adapter_loads_in_plain_peft(whole: Run, tmp_path: Path, llama_config: LlamaConfig) -> None:
    whole.model.save_pretrained(tmp_path / "adapter")
    plain = assert_reloads(whole, tmp_path / "adapter", llama_config)
    live = {name: rank for name, rank in whole.recorder.ranks[-1].items() if rank}
    assert {t.name: t.rank for t in find_target_modules(plain)} == live
    assert len(live) < len(whole.recorder.ranks[-1]), "80 % leaves modules out"
    assert_reloads(whole, whole.folder / f"checkpoint-{STEPS}", llama_config)


@pytest.mark.parametrize("stop_at", first_cases(1, [7, 4]))
def test_resumed_is_as_if_nothing_had_happened(whole: Run, launch: Callable[..., Run], stop_at: int) -> None:
    cut = launch(stop_at=stop_at)
    saved = stop_at // 3 * 3
    assert cut.recorder.losses == whole.recorder.losses[:stop_at]
    resumed = launch(resume=cut.folder / f"checkpoint-{saved}")
    assert resumed.recorder.losses == whole.recorder.losses[saved:]
    assert resumed.recorder.ranks == whole.recorder.ranks[saved:]
    for name, value in tensors(whole.model).items():
        assert torch.equal(tensors(resumed.model)[name], value), name
    assert resumed.log().equals(whole.log())
    assert resumed.pilot.predictions == whole.pilot.predictions  # type: ignore[union-attr]
    assert resumed.pilot.peaks == whole.pilot.peaks  # type: ignore[union-attr]


def test_no_decision_follows_the_last_step(launch: Callable[..., Run]) -> None:
    """What it changed would never train: where a callback stops the run, and where a run goes on with fewer steps."""
    stopped = launch(
        "stopped", budget="3500 params", stop_at=DECISIONS[2], save_steps=DECISIONS[1], measure_every=STEPS
    )
    assert tuple(step for step, _ in stopped.pilot.predictions) == DECISIONS[:2]  # type: ignore[union-attr]
    assert adapter_ranks(find_target_modules(stopped.model)) == stopped.recorder.ranks[-1]
    fewer = launch(
        "fewer",
        budget="3500 params",
        resume=stopped.folder / f"checkpoint-{DECISIONS[1]}",
        max_steps=DECISIONS[2],
        measure_every=STEPS,
    )
    assert tuple(step for step, _ in fewer.pilot.predictions) == DECISIONS[:2]  # type: ignore[union-attr]
    assert adapter_ranks(find_target_modules(fewer.model)) == fewer.recorder.ranks[-1]


def test_the_same_seed_gives_the_same_run(whole: Run, launch: Callable[..., Run]) -> None:
    again = launch(measure_every=10, save_strategy="no")  # measuring must not disturb
    assert again.recorder.losses == whole.recorder.losses
    assert again.recorder.ranks == whole.recorder.ranks


class Watching(Trainer):
    """Keeps each step's batch and the state of every generator."""

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
        if not hasattr(self, "seen"):
            self.seen = []
        numpy_state = np.random.get_state()[1].tobytes()  # noqa: NPY002
        states = (torch.get_rng_state().numpy().tobytes(), numpy_state, random.getstate())
        self.seen.append((inputs["input_ids"].tolist(), hash(states)))
        return super().training_step(model, inputs, *rest)


def test_batches_and_random_states_are_those_of_a_plain_run(
    launch: Callable[..., Run], tmp_path: Path, llama_config: LlamaConfig, data: Dataset
) -> None:
    options = {"trainer": Watching, "dropout": 0.0, "max_steps": 8}
    piloted = launch(measure_every=3, **options)
    plain = Run(tmp_path / "plain", llama_config, data, **options)  # type: ignore[arg-type]
    assert piloted.trainer.seen == plain.trainer.seen
    assert len(piloted.trainer.seen) == 8
    assert len({str(batch) for batch, _ in plain.trainer.seen}) == 8
    assert piloted.recorder.losses != plain.recorder.losses


class Scripted(Trainer):
    """The evaluation loss is least at step 3, before the ranks have settled."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        return {"eval_loss": abs(self.state.global_step - 3) + 1.0}


def test_the_best_model_comes_back_with_its_ranks(
    launch: Callable[..., Run], data: Dataset, llama_config: LlamaConfig, tmp_path: Path
) -> None:
    run = launch(
        trainer=Scripted,
        budget="3500 params",
        measure_every=STEPS,
        eval_data=data,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    best, last = run.recorder.ranks[2], run.recorder.ranks[-1]
    assert best != last
    assert run.trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    targets = find_target_modules(run.model)
    assert adapter_ranks(targets) == best
    saved = load_file(run.folder / "checkpoint-3" / "adapter_model.safetensors")
    for target in targets:
        key = f"base_model.model.{target.name}.lora_A.weight"
        assert (key in saved) == (best[target.name] > 0)
        if key in saved:
            assert torch.equal(saved[key], target.weight_a)
    pattern = run.model.peft_config["default"].rank_pattern
    assert sorted(pattern.values()) == sorted(rank for rank in best.values() if rank)
    run.model.save_pretrained(tmp_path / "adapter")
    assert_reloads(run, tmp_path / "adapter", llama_config)


def test_gradient_accumulation(launch: Callable[..., Run], whole: Run) -> None:
    run = launch(gradient_accumulation_steps=2, per_device_train_batch_size=2, save_strategy="no")
    assert tuple(step for step, _ in run.pilot.predictions) == DECISIONS  # type: ignore[union-attr]
    assert len(run.pilot.peaks) == STEPS  # type: ignore[union-attr]
    assert max(peak for _, peak in run.pilot.peaks) <= run.controller.limit  # type: ignore[union-attr]
    for (start, cost), (end, _) in zip(run.pilot.predictions, run.pilot.predictions[1:], strict=False):  # type: ignore[union-attr]
        measured = [peak for step, peak in run.pilot.peaks if start < step <= end]  # type: ignore[union-attr]
        assert max(measured) == pytest.approx(cost, rel=0.01)
    assert run.controller.limit < whole.controller.limit, "two rows are saved at a time, not four"


@pytest.mark.parametrize("share", first_cases(1, [0.2, 0.02]))
def test_the_guard_corrects_a_prediction_that_was_too_low(
    launch: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    right = before_module.plan_costs

    def low(*arguments: Any, **options: Any) -> Any:
        prices = right(*arguments, **options)
        cheaper = replace(prices.cost, constant=prices.cost.constant - share * prices.limit.value)
        return replace(prices, cost=cheaper)

    monkeypatch.setattr(before_module, "plan_costs", low)
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = launch(save_strategy="no")
    limit = run.controller.limit
    over = [step for step, peak in run.pilot.peaks if peak > limit]  # type: ignore[union-attr]
    assert over == [1], "found at once, and only once"
    warnings = [record.message for record in caplog.records if record.name.startswith("rankpilot")]
    assert len(warnings) == 1
    assert "The peak of step 1 was" in warnings[0]
    steps = [step for step, _ in run.pilot.predictions]  # type: ignore[union-attr]
    assert steps == [0, 1, 2, 4, 6]
    table = run.log()
    modules = len(table) // 5
    shrunk = table.iloc[modules : 2 * modules]
    assert set(shrunk["step"].tolist()) == {1}
    before, after = (np.array(shrunk[name].tolist()) for name in ("rank_before", "rank_after"))
    assert not np.array_equal(before, after)
    assert shrunk["rank_wanted"].tolist() == before.tolist()
    assert shrunk["measured_cost"].tolist()[0] > limit


def test_a_resumed_run_logs_each_peak_once(launch: Callable[..., Run]) -> None:
    whole = launch("whole", measure_every=5)
    resumed = launch("whole", measure_every=5, resume=whole.folder / "checkpoint-6")
    shown = [
        [(row["step"], row.get("peak_bytes")) for row in run.trainer.state.log_history if "loss" in row]
        for run in (whole, resumed)
    ]
    assert shown[0] == shown[1]
    assert sum(peak is not None for _, peak in shown[0]) == len(whole.pilot.peaks)  # type: ignore[union-attr]


def test_a_budget_of_parameters(launch: Callable[..., Run]) -> None:
    run = launch(budget="3500 params", measure_every=STEPS)
    per_rank = {t.name: t.d_in + t.d_out for t in find_target_modules(run.model)}
    for ranks in run.recorder.ranks:
        count = sum(rank * per_rank[name] for name, rank in ranks.items())
        assert 3500 - max(per_rank.values()) <= count <= 3500
    table = run.log()
    assert set(table["unit"].tolist()) == {"parameters"}
    assert table["measured_cost"].isna().sum() == len(table)
    assert run.pilot.predictions[-1][1] == count  # type: ignore[union-attr]
    resumed = launch(budget="3500 params", measure_every=STEPS, resume=run.folder / "checkpoint-3")
    assert resumed.recorder.losses == run.recorder.losses[3:]


def test_a_trained_policy_flies_by_its_own_schedule(tmp_path: Path, llama_config: LlamaConfig, data: Dataset) -> None:
    schedule = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.5))
    save_policy(tmp_path / "pilot", RankNetwork(), schedule, {"name": "mine"})
    pilot = {"policy": tmp_path / "pilot", "budget": "80%", "measure_every": 1}
    run = Run(tmp_path / "run", llama_config, data, pilot=pilot, max_steps=4)
    assert run.pilot is not None
    assert [step for step, _ in run.pilot.predictions] == [0, 2]
    assert set(run.log()["policy"].tolist()) == {"mine"}
    assert max(peak for _, peak in run.pilot.peaks) <= run.controller.limit


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(rows(60))


def test_a_data_set_without_a_length(launch: Callable[..., Run]) -> None:
    run = launch(data=Stream(), max_steps=4)
    assert len(run.recorder.losses) == 4
    assert max(peak for _, peak in run.pilot.peaks) <= run.controller.limit  # type: ignore[union-attr]


def test_a_data_set_smaller_than_a_batch(launch: Callable[..., Run]) -> None:
    run = launch(data=Dataset.from_list(rows(2)), max_steps=2)
    assert len(run.recorder.losses) == 2


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_model_without_an_adapter(launch: Callable[..., Run]) -> None:
    with pytest.raises(UnsupportedError, match=r"is not a PEFT model. Wrap it first"):
        launch(adapted=False)


def test_an_optimiser_whose_state_is_not_understood(launch: Callable[..., Run]) -> None:
    with pytest.raises(UnsupportedError, match="Adagrad cannot be carried"):
        launch(optim="adagrad")


def test_the_smallest_budget_is_named_and_works(launch: Callable[..., Run]) -> None:
    with pytest.raises(BudgetError, match="fits no adapter at all") as caught:
        launch("small", budget="10KiB")
    smallest = str(caught.value).split("smallest that works is ")[1].split(" (")[0]
    assert smallest.endswith("KiB")
    run = launch("enough", budget=smallest, max_steps=3)
    assert sum(rank > 0 for rank in run.recorder.ranks[-1].values()) == 1
    assert max(peak for _, peak in run.pilot.peaks) <= run.controller.limit  # type: ignore[union-attr]
    with pytest.raises(BudgetError, match="The smallest that works is 48 parameters"):
        launch("none", budget="5 params")


def test_the_smallest_share_is_named_and_works(launch: Callable[..., Run]) -> None:
    with pytest.raises(BudgetError, match=r"a share of \d+%") as caught:
        launch("small", budget="5%")
    assert "gradient checkpointing" not in str(caught.value), "it would lower what the share is of, too"
    smallest = str(caught.value).split("a share of ")[1].split(" (")[0]
    run = launch("enough", budget=smallest, max_steps=3)
    assert any(run.recorder.ranks[-1].values())


def test_an_empty_data_set(launch: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match=r"(?i)empty|num_samples=0"):
        launch(data=Dataset.from_list(rows(1)).select([]))


def test_a_loss_that_is_not_finite(launch: Callable[..., Run]) -> None:
    with pytest.raises(NonFiniteError, match="probe step"):
        launch(budget="3k params", learning_rate=1e30)


@pytest.mark.parametrize("missing", first_cases(1, ["rankpilot.json", "rankpilot.safetensors"]))
def test_a_checkpoint_that_is_not_whole(launch: Callable[..., Run], missing: str) -> None:
    run = launch(budget="3k params", max_steps=2)
    folder = run.folder / "checkpoint-2"
    (folder / missing).unlink()
    with pytest.raises(RunFolderError, match=rf"checkpoint-2.*{missing}"):
        launch(budget="3k params", resume=folder)


def test_the_state_of_a_checkpoint_is_plain_data(whole: Run) -> None:
    state = json.loads((whole.folder / "checkpoint-3" / "rankpilot.json").read_text())
    assert state["controller"]["decision"] == 2
    assert state["controller"]["limit"] == whole.controller.limit
    assert load_file(whole.folder / "checkpoint-3" / "rankpilot.safetensors")


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_lines_without_a_progress_bar_are_logged_or_printed(
    launch: Callable[..., Run], level: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(level, "rankpilot.finetune.callback")
    launch(budget="3k params", max_steps=1)
    printed, logged = "rankpilot: step 0: " in capsys.readouterr().out, "step 0: " in caplog.text
    assert (printed, logged) == (level > logging.INFO, level == logging.INFO)
