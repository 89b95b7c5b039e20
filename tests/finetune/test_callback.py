"""The Trainer callback on a tiny Llama: budgets, logs, adapters, resuming, and what is refused."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.agents.policy_file import GroupNetwork, NetworkConfig, save_policy
from rankpilot.cli import main as cli
from rankpilot.common.errors import BudgetError, NonFiniteError, RankPilotError, UnsupportedError
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.plan.plan import project
from rankpilot.decide.settings import ONCE, DecisionSchedule
from rankpilot.finetune.callback import attach
from rankpilot.lora.targets import find_target_modules
from torch.optim import LBFGS, Adamax
from transformers import LlamaConfig, Trainer, TrainerCallback

from ..cases import first_cases
from .tiny_runs import Run, arguments, counting, logits, new_base, ranks_of

STEPS, LENGTH = 12, 20
DECISIONS = (0, 2, 4, 6)
STRIDES = [
    [stride * i % 64 if i < length else 0 for i in range(LENGTH)] for stride in range(1, 5) for length in range(6, 21)
]
ROWS = [{"input_ids": ids, "labels": ids} for ids in STRIDES] * 2
"""Counting in strides, of different lengths, padded to one."""

USUAL: dict[str, Any] = {"schedule": DecisionSchedule(probe_steps=4), "max_steps": STEPS, "measure_every": 1}
USUAL |= {"save_steps": 3, "data": ROWS, "exact_savers": True}

Launch = Callable[..., Run]


@pytest.fixture
def launch(tmp_path: Path, llama_config: LlamaConfig) -> Launch:
    def start(name: str = "run", *, resume: int | None = None, dropout: float = 0.1, **options: Any) -> Run:
        return Run(tmp_path / name, llama_config, lora={"lora_dropout": dropout}, **USUAL | options).train(resume)

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Run:
    """An uninterrupted run that several tests look at."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return Run(folder, llama_config, lora={"lora_dropout": 0.1}, **USUAL).train()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Run:
    """As `whole`, but no layer runs again: a plan is priced for a decision as it is for its steps."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return Run(folder, llama_config, lora={"lora_dropout": 0.1}, **USUAL | {"plain": True}).train()


def stop_at(step: int) -> dict[str, Any]:
    """Options of a run that a callback stops after a step."""

    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            control.should_training_stop |= state.global_step == step

    return {"callbacks": (Stops(),)}


def test_decisions_fall_at_the_steps_of_the_schedule(whole: Run) -> None:
    assert tuple(whole.decided) == DECISIONS
    changes = [
        step
        for step, (before, after) in enumerate(zip(whole.recorder.ranks, whole.recorder.ranks[1:], strict=False), 1)
        if before != after
    ]
    # The recorder sees a new plan at the end of the first step under it.
    assert set(changes) <= set(DECISIONS)
    assert changes, "ranks move in the middle of the run"
    assert np.mean(whole.recorder.losses[-8:]) < np.mean(whole.recorder.losses[:4]) - 0.1


def test_the_budget_is_never_exceeded_and_the_prediction_is_right(plain: Run) -> None:
    pilot, limit = plain.pilot, plain.pilot.limit
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
        assert row["peak_bytes"] == dict(whole.pilot.peaks)[row["step"]] <= row["budget_bytes"]
    assert {row["budget_bytes"] for row in rows} == {whole.pilot.limit}
    assert rows[-1]["plan_bytes"] == whole.pilot.predictions[-1][1]
    assert rows[-1]["rank_decisions"] == len(DECISIONS)


def test_the_decision_log(whole: Run) -> None:
    table = whole.log
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
        assert here["measured_cost"].tolist()[0] == dict(whole.pilot.peaks)[step]
    first = table.iloc[: len(names)]
    assert first["rank_before"].tolist() == [1] * len(names)
    assert first["loss"].isna().sum() == len(names)
    assert set(table["policy"].tolist()) == {"signal-mean"}
    assert set(table["unit"].tolist()) == {"bytes"}
    assert set(table["limit"].tolist()) == {whole.pilot.limit}
    assert set(table["max_step"].tolist()[len(names) :]) == {whole.pilot.pilot.schedule.max_step}


@pytest.mark.parametrize("kind", ["whole", "plain"])
def test_logged_decisions_can_be_taken_again(kind: str, request: pytest.FixtureRequest) -> None:
    """Where layers may run again, a plan is priced for the decision; afterwards only as many do as its steps need."""
    run: Run = request.getfixturevalue(kind)
    log, table = DecisionLog(run.folder / "decisions"), run.log
    modules = len(table) // len(DECISIONS)
    for number in range(len(DECISIONS)):
        here = table.iloc[number * modules : (number + 1) * modules]
        wanted, scores = (here[name].to_numpy() for name in ("rank_wanted", "score"))
        plan = project(log.logged(number).problem, wanted, scores)
        assert plan.clipped.tolist() == here["rank_clipped"].tolist()
        assert plan.ranks.tolist() == here["rank_after"].tolist()
        assert here["predicted_cost"].iloc[0] <= here["limit"].iloc[0]
        assert kind == "whole" or plan.cost == here["predicted_cost"].iloc[0]
    of_a_rank = [record.problem.cost.per_rank for record in log.read()]
    same = [np.array_equal(one, other) for one, other in pairwise(of_a_rank)]
    if kind == "plain":  # where layers may run again, the ranks in place count too
        assert same == [*[True] * (len(DECISIONS) - 2), False], "no signals at last"


def test_the_adapter_loads_in_plain_peft(plain: Run, tmp_path: Path) -> None:
    plain.model.save_pretrained(tmp_path / "adapter")
    live = {name: rank for name, rank in plain.recorder.ranks[-1].items() if rank}
    assert len(live) < len(plain.recorder.ranks[-1]), "80 % leaves modules out"
    for folder in (tmp_path / "adapter", plain.checkpoint(STEPS)):
        loaded = plain.plain(folder)
        assert ranks_of(loaded) == live
        assert torch.equal(logits(loaded), logits(plain.model))


def test_no_decision_follows_the_last_step(launch: Launch) -> None:
    """What it changed would never train: where a callback stops the run, and where a run goes on with fewer steps."""
    first, second, last = DECISIONS[:3]
    options = {"budget": "3500 params", "measure_every": STEPS}
    stopped = launch(save_steps=second, **options, **stop_at(last))
    fewer = launch(resume=second, max_steps=last, **options)
    for run in (stopped, fewer):
        assert run.decided == [first, second]
        assert ranks_of(run.model) == run.recorder.ranks[-1]


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
    launch: Launch, tmp_path: Path, llama_config: LlamaConfig
) -> None:
    options: dict[str, Any] = {"trainer": Watching, "max_steps": 8, "data": ROWS}
    piloted = launch(measure_every=3, dropout=0.0, **options)
    plain = Run(tmp_path / "plain", llama_config, budget=None, **options).train()
    assert piloted.trainer.seen == plain.trainer.seen
    assert len(piloted.trainer.seen) == 8
    assert len({str(batch) for batch, _ in plain.trainer.seen}) == 8
    assert piloted.recorder.losses != plain.recorder.losses


def test_the_same_seed_gives_the_same_run_and_a_resumed_one_logs_each_peak_once(whole: Run, launch: Launch) -> None:
    again = launch(measure_every=5)  # measuring must not disturb
    assert again.recorder.losses == whole.recorder.losses
    assert again.recorder.ranks == whole.recorder.ranks
    resumed = launch(measure_every=5, resume=6)
    shown = [
        [(row["step"], row.get("peak_bytes")) for row in run.trainer.state.log_history if "loss" in row]
        for run in (again, resumed)
    ]
    assert shown[0] == shown[1]
    assert sum(peak is not None for _, peak in shown[0]) == len(again.pilot.peaks)


def test_a_budget_of_parameters(launch: Launch) -> None:
    run = launch(budget="3500 params", measure_every=STEPS)
    per_rank = {t.name: t.d_in + t.d_out for t in find_target_modules(run.model)}
    for ranks in run.recorder.ranks:
        count = sum(rank * per_rank[name] for name, rank in ranks.items())
        assert 3500 - max(per_rank.values()) <= count <= 3500
    table = run.log
    assert set(table["unit"].tolist()) == {"parameters"}
    assert table["measured_cost"].isna().sum() == len(table)
    assert run.pilot.predictions[-1][1] == count
    resumed = launch(budget="3500 params", measure_every=STEPS, resume=3)
    assert resumed.recorder.losses == run.recorder.losses[3:]


def test_a_trained_policy_flies_by_its_own_schedule(tmp_path: Path, launch: Launch) -> None:
    schedule = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.5))
    save_policy(tmp_path / "pilot", GroupNetwork(NetworkConfig(width=8)), schedule, {})
    run = launch(policy=tmp_path / "pilot", schedule=None, max_steps=4)
    assert run.decided == [0, 2]
    assert set(run.log["policy"].tolist()) == {"pilot"}
    assert run.highest <= run.pilot.limit


def test_the_study_of_a_run_finds_its_trained_policy_wherever_that_has_gone(
    tmp_path: Path, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = save_policy(tmp_path / "pilot", GroupNetwork(NetworkConfig(width=8)), ONCE, {})
    kept = launch(policy=policy, schedule=None, max_steps=2).pilot.pilot.journal.log.folder / "policy"
    shutil.rmtree(policy)
    capsys.readouterr()
    assert cli.run(["study", str(kept.parent), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["decisions"][0]["explanation"]["what_ifs"]
    (kept / "policy.safetensors").write_bytes(b"damaged")
    assert cli.run(["study", str(kept.parent), "--json"]) == 0
    assert "The policy pilot is not available, so there are no what-ifs." in capsys.readouterr().out


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(counting(60, LENGTH))


@pytest.mark.long
@pytest.mark.parametrize("data", [Stream(), counting(2)], ids=["without a length", "smaller than a batch"])
def test_other_data_sets(launch: Launch, data: Any) -> None:
    run = launch(data=data, max_steps=4)
    assert len(run.recorder.losses) == 4
    assert run.highest <= run.pilot.limit


def test_an_optimizer_of_unknown_state_decides_resumes_and_is_told(
    launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"optimizer": partial(Adamax, lr=1e-2), "exact_savers": False, "plain": True}
    run = launch(**options)
    assert capsys.readouterr().out.count("The optimizer Adamax has unknown state") == 1
    assert len(run.decided) == len(DECISIONS)
    assert run.highest <= run.pilot.limit
    assert run.highest == pytest.approx(max(cost for _, cost in run.pilot.predictions), rel=0.01)
    again = launch(resume=9, **options)
    run.assert_same_adapter(again)


@pytest.mark.parametrize("bias", first_cases(1, ["lora_only", "all"]))
def test_biases_that_train_are_counted_resumed_and_saved_where_a_module_is_dropped(
    tmp_path: Path, llama_config: LlamaConfig, bias: str
) -> None:
    config = deepcopy(llama_config)
    config.attention_bias = config.mlp_bias = True
    options = USUAL | {"lora": {"bias": bias}, "budget": "60%", "max_steps": 6, "plain": True}
    run = Run(tmp_path / "run", config, **options).train()
    assert 0 in run.recorder.ranks[-1].values()
    assert run.highest <= run.pilot.limit
    assert run.highest == pytest.approx(max(cost for _, cost in run.pilot.predictions), rel=0.01)
    run.assert_same_adapter(Run(tmp_path / "run", config, **options).train(3))
    assert torch.equal(logits(run.plain(run.checkpoint(6))), logits(run.model))


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"optimizer": LBFGS}, UnsupportedError, "LBFGS cannot step on a parameter without state"),
        ({"budget": "5 params"}, BudgetError, "The smallest that works is 48 parameters"),
        ({"budget": "3k params", "learning_rate": 1e30}, NonFiniteError, "probe step"),
    ],
)
def test_what_cannot_train(launch: Launch, options: dict[str, Any], error: type[RankPilotError], words: str) -> None:
    with pytest.raises(error, match=words):
        launch(**options)


def test_a_model_without_an_adapter(tmp_path: Path, llama_config: LlamaConfig) -> None:
    trainer = Trainer(new_base(llama_config), arguments(tmp_path), train_dataset=counting())
    with pytest.raises(UnsupportedError, match=r"is not a PEFT model. Wrap it first"):
        attach(trainer, "signal-mean", "80%")


@pytest.mark.long
@pytest.mark.parametrize(("budget", "words"), [("10KiB step", "smallest that works is "), ("5%", "a share of ")])
def test_the_smallest_budget_is_named_and_works(launch: Launch, budget: str, words: str) -> None:
    with pytest.raises(BudgetError, match=words) as caught:
        launch("small", budget=budget)
    told, share = str(caught.value), budget.endswith("%")
    assert not (share and "gradient checkpointing" in told), "it would lower what the share is of, too"
    run = launch("enough", budget=told.split(words)[1].split(" (")[0].split(",")[0].strip("'"), max_steps=3)
    adapted = sum(rank > 0 for rank in run.recorder.ranks[-1].values())
    assert adapted >= 1 if share else adapted == 1
    assert run.highest <= run.pilot.limit


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_lines_without_a_progress_bar_are_logged_or_printed(
    launch: Launch, level: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(level, "rankpilot.finetune.callback")
    launch(budget="3k params", max_steps=1)
    printed, logged = "rankpilot: step 0: " in capsys.readouterr().out, "step 0: " in caplog.text
    assert (printed, logged) == (level > logging.INFO, level == logging.INFO)
