"""The guard of the byte budget in real Trainer runs: measured peaks, breaches, batches larger than planned, bounds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from rankpilot import RankPilot, TrainingRun
from rankpilot.common.errors import BudgetError, ConfigError, UnknownNameError
from rankpilot.cost import budget as budget_module
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.record.calibration import LOOP_BYTES
from rankpilot.cost.record.peak_meter import StepBatches, likely_cause
from rankpilot.cost.recording import BatchShape
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune import before_training, elastic
from rankpilot.finetune.callback import Evaluations
from rankpilot.finetune.step import peak_guard as guard_module
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, Trainer, default_data_collator

from ..cases import first_cases
from .tiny_runs import Run, adapted, arguments, counting, messages_of, take_step

STEPS, ROWS = 12, 4
SCHEDULE = DecisionSchedule(probe_steps=3, fractions=(0.0, 0.3))
SHORT, LONG, LONG_AT = 12, 24, 6


class Growing(torch.utils.data.IterableDataset):
    """Rows whose length rises in mid-run: nothing tells so beforehand."""

    def __init__(self, long_at: int = LONG_AT) -> None:
        self.long_at = long_at

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        generator = np.random.default_rng(0)
        for index in range(STEPS * ROWS):
            ids = generator.integers(1, 64, LONG if index >= self.long_at * ROWS else SHORT).tolist()
            yield {"input_ids": ids, "labels": ids}


USUAL: dict[str, Any] = {"budget": "70%", "data": Growing(long_at=STEPS), "measure_every": 1, "schedule": SCHEDULE}
USUAL |= {"max_steps": STEPS, "learning_rate": 1e-3, "plain": True}

Launch = Callable[..., Run]


@pytest.fixture
def launch(tmp_path: Path, llama_config: LlamaConfig) -> Launch:
    def start(budget: Any = "70%", name: str = "run", *, resume: int | None = None, **options: Any) -> Run:
        return Run(tmp_path / name, llama_config, **USUAL | {"budget": budget} | options).train(resume)

    return start


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Run:
    """What `launch` makes without options, for tests that only look at it."""
    return Run(tmp_path_factory.mktemp("usual") / "run", llama_config, **USUAL).train()


def checkpointed(*, reentrant: bool) -> dict[str, Any]:
    """Options of a run whose layers run again in the backward pass."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    return options | {"prepare": lambda model: model.enable_input_require_grads()}


@pytest.mark.parametrize(
    ("options", "margin"),
    first_cases(
        3,
        [
            ({}, 0.0),
            (checkpointed(reentrant=False), 0.005),
            ({"plain": False, "exact_savers": True, "budget": "55%"}, 0.005),
            (checkpointed(reentrant=True), 0.02),
        ],
    ),
    ids=["plain", "checkpointing", "savers and layers that run again", "reentrant checkpointing"],
)
def test_every_step_costs_what_was_predicted(
    usual: Run, launch: Launch, options: dict[str, Any], margin: float
) -> None:
    run = launch(**options) if options else usual
    assert run.highest <= run.pilot.limit
    (_, first), (at, second) = run.pilot.predictions
    for step, peak in run.pilot.peaks:
        predicted = first if step <= at else second
        assert 0 <= predicted - peak * (1 + margin) <= 1.5 * LOOP_BYTES


SHORT_ROW: dict[str, Any] = {"policy": "top-down", "budget": "150%", "per_device_train_batch_size": 1}
SHORT_ROW |= {"data": counting(96), "learning_rate": 1e-2}
SHORT_ROW |= {"schedule": DecisionSchedule(probe_steps=2, fractions=(0.0, 0.25, 0.5, 0.75), max_step=10)}


@pytest.mark.parametrize(
    "options",
    [
        SHORT_ROW | {"bf16": True},
        SHORT_ROW | {"lora": {"dtype": torch.bfloat16}},
        {"budget": "80%"} | checkpointed(reentrant=True),
        {"budget": "80%", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["autocast", "bf16 base", "reentrant checkpointing", "accumulation"],
)
def test_other_steps_keep_to_a_budget_of_bytes(
    launch: Launch, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    """One short row, so that low-precision copies of the factors are no small part; a layer counts once, run twice."""
    run = launch(max_steps=8, **options)
    assert messages_of(caplog, "above the budget") == []
    assert run.highest <= run.pilot.limit


def test_low_bit_state_that_is_smaller_than_its_straight_line_is_no_other_step(
    tmp_path: Path, llama_config: LlamaConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """State of few values is fp32, so plans are priced for more bytes than it takes at most ranks."""
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(**llama_config.to_dict() | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16})
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = Run(tmp_path / "run", config, **USUAL | {"budget": "80%", "optim": "adamw_bnb_8bit"}).train()
    assert messages_of(caplog) == []
    for _, predicted, measured in run.pilot.pilot.checks:
        assert measured == pytest.approx(predicted, rel=0.01)


def test_the_cost_of_a_larger_batch_is_known_before_the_model_sees_it(
    launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = launch(data=Growing())
    assert run.highest <= run.pilot.limit, "not even in the step in which the length doubled"
    assert {step for step, _ in run.pilot.peaks} >= {LONG_AT, LONG_AT + 2}
    (message,) = messages_of(caplog)
    assert "A batch of 4 x 24 is larger than any planned for. The plan is shrunk." in message
    before, after = run.recorder.ranks[LONG_AT - 1], run.recorder.ranks[LONG_AT]
    assert sum(rank > 0 for rank in after.values()) < sum(rank > 0 for rank in before.values())
    last = run.log.iloc[2 * len(after) :]
    assert set(last["step"].tolist()) == {LONG_AT}
    noted = set(last["note"].dropna())
    assert noted == {"shrunk: batch of 4 x 24"}


def test_a_larger_batch_that_fits_changes_nothing(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    quiet = launch("90MB step", name="quiet")
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = launch("90MB step", data=Growing())
    assert [m for m in messages_of(caplog) if "The plan still fits." in m]
    assert run.recorder.ranks == quiet.recorder.ranks


def test_a_larger_batch_that_fits_no_plan_is_an_error(launch: Launch) -> None:
    with pytest.raises(BudgetError, match="is too small for any adapter"):
        launch("100KiB step", data=Growing())


class Texts(torch.utils.data.Dataset[Any]):
    """Rows that the collator tokenises; a long one comes last."""

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"size": LONG if index == len(self) - 1 else SHORT}


def tokenised(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    ids = torch.ones(len(rows), max(row["size"] for row in rows), dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


def test_who_has_rows_of_unknown_lengths_is_told_to_put_the_longest_first(launch: Launch) -> None:
    options = {"collate": tokenised, "remove_unused_columns": False}
    with pytest.raises(BudgetError, match=r"4 x 24 is larger.* or without token ids.* put the longest first"):
        launch("25%", data=Texts(), **options)


def test_a_resumed_run_knows_the_largest_batch(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    whole = launch(data=Growing(), save_steps=8)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        resumed = launch(data=Growing(), resume=8)
    assert messages_of(caplog) == []
    assert resumed.recorder.ranks == whole.recorder.ranks[8:]
    assert resumed.pilot.peaks == whole.pilot.peaks


def test_a_batch_that_grows_after_a_restart_is_measured_without_a_trace(launch: Launch) -> None:
    """The memory model is not in the checkpoint: it is made anew on the batch that has come."""
    late = 10
    whole = launch(data=Growing(late), save_steps=8)
    resumed = launch(data=Growing(late), resume=8)
    assert resumed.recorder.ranks == whole.recorder.ranks[8:]
    assert resumed.recorder.ranks[-1] != resumed.recorder.ranks[0]
    assert resumed.highest <= resumed.pilot.limit == whole.pilot.limit
    here, there = resumed.log, whole.log
    assert here["step"].tolist()[-1] == late
    assert here["loss"].equals(there["loss"]), "losses of measuring do not count"
    resumed.assert_same_adapter(whole)


def test_the_largest_rows_and_length_of_two_batches_count_together(launch: Launch) -> None:
    run = launch(max_steps=2)
    guard = run.pilot.pilot._piloted.guard
    keeper = guard.plan
    few = {name: torch.ones(1, LONG, dtype=torch.long) for name in ("input_ids", "labels")}
    guard.costs.measure_again(few, BatchShape(ROWS, LONG))
    cost = keeper.now.cost_of(BatchShape(ROWS, LONG))
    many = {name: torch.ones(ROWS, LONG, dtype=torch.long) for name in ("input_ids", "labels")}
    guard.costs.measure_again(many, BatchShape(ROWS, LONG))
    expected = keeper.now.cost_of(BatchShape(ROWS, LONG))
    ranks = np.full(len(run.pilot.applier.targets), 4)
    assert plan_cost(cost, ranks) == plan_cost(expected, ranks)


def let_steps_take_more(monkeypatch: pytest.MonkeyPatch, excess: int, *, after: int) -> None:
    """Have something else take some bytes in all steps after this one."""
    right = guard_module.PeakMeter.end

    def end(meter: Any, step: int) -> int | None:
        peak = right(meter, step)
        return peak if peak is None or step <= after else peak + excess

    monkeypatch.setattr(guard_module.PeakMeter, "end", end)


@pytest.mark.parametrize("excess", first_cases(1, [40_000, 6_000]))
def test_a_breach_rolls_the_plan_back(
    launch: Launch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, excess: int
) -> None:
    """From the second decision on something else takes some bytes."""
    decision = SCHEDULE.steps(STEPS)[1]
    let_steps_take_more(monkeypatch, excess, after=decision)
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = launch()
    before, back = (run.recorder.ranks[step] for step in (decision - 1, decision))
    decided = DecisionLog(run.folder / "decisions").logged(1).plan()
    (message,) = messages_of(caplog)
    assert f"The peak of step {decision + 1} was" in message
    assert "The plan is rolled back." in message
    assert before != decided
    if excess > 10_000:
        assert sum(back.values()) < sum(before.values()), "the plan before does not fit either"
    else:
        nearer = sum(back[name] == before[name] for name in back)
        assert nearer > sum(decided[name] == before[name] for name in back)
    assert run.recorder.ranks[-1] == back, "one correction is enough"
    assert all(peak + excess <= run.pilot.limit for step, peak in run.pilot.peaks if step > decision + 1)
    table = run.log
    assert set(table["note"].dropna()) == {"rolled back: peak above the budget"}


def test_a_breach_of_the_first_plan_shrinks_it(
    launch: Launch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no plan before it to go back to."""
    excess = 40_000
    let_steps_take_more(monkeypatch, excess, after=0)
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = launch()
    (message,) = messages_of(caplog)
    assert "The peak of step 1 was" in message
    assert "The plan is shrunk by the difference." in message
    assert sum(run.recorder.ranks[0].values()) < sum(DecisionLog(run.folder / "decisions").logged(0).plan().values())
    assert run.decided == [0, 1, SCHEDULE.steps(STEPS)[1]]
    modules = len(run.recorder.ranks[0])
    shrunk = run.log.iloc[modules : 2 * modules]
    assert set(shrunk["step"].tolist()) == {1}
    assert shrunk["rank_wanted"].tolist() == shrunk["rank_before"].tolist() != shrunk["rank_after"].tolist()
    assert shrunk["measured_cost"].tolist()[0] == dict(run.pilot.peaks)[1]
    assert all(peak + excess <= run.pilot.limit for step, peak in run.pilot.peaks if step > 1)
    assert set(run.log["note"].dropna()) == {"shrunk: peak above the budget"}


@pytest.mark.parametrize("every", first_cases(1, [5, 1, 100]))
def test_steps_are_measured_after_changes_and_now_and_then(launch: Launch, every: int) -> None:
    run = launch(measure_every=every)
    second = SCHEDULE.steps(STEPS)[1]
    expected = {1, second + 1} | {step + 1 for step in range(0, STEPS, every)}
    assert {step for step, _ in run.pilot.peaks} == expected


def test_bounds_hold_at_every_step(launch: Launch) -> None:
    run = launch(bounds={"q_proj": 4, "model.layers.1.mlp.down_proj": (0, 2), "layers.0.self_attn.o_proj": (1, 8)})
    for ranks in run.recorder.ranks:
        assert {rank for name, rank in ranks.items() if name.endswith("q_proj")} == {4}
        assert ranks["model.layers.1.mlp.down_proj"] <= 2
        assert 1 <= ranks["model.layers.0.self_attn.o_proj"] <= 8
    assert run.highest <= run.pilot.limit


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ({"q_prj": 4}, UnknownNameError, "'q_prj'. Did you mean: 'q_proj'"),
        ({"q_proj": (3, 3)}, ConfigError, "bounds of 'q_proj' allow no rank: none of"),
    ],
)
def test_bounds_that_make_no_sense(launch: Launch, bounds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        launch(bounds=bounds)


def test_bounds_above_the_budget_are_named(launch: Launch) -> None:
    with pytest.raises(BudgetError, match=r"lower bound.*smallest that works is"):
        launch("150KiB step", bounds={"layers.0.self_attn.q_proj": 8})


def test_auto_takes_most_of_what_is_free(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (budget_module, before_training, elastic):
        monkeypatch.setattr(module, "free_bytes", lambda device: 10**9)
    run = launch("auto", max_steps=2)
    assert run.pilot.limit == pytest.approx(0.9e9, rel=0.1), "and what the run holds itself since it began"
    assert min(run.recorder.ranks[0].values()) >= 16, "each has the highest rank of the ladder that it can have"


def test_padding_in_later_batches_is_planned_for(launch: Launch) -> None:
    """The longest rows need no mask, and models skip masks that mask nothing; any other batch may need one."""
    rows = [
        {"input_ids": [3] * size + [0] * (LONG - size), "attention_mask": [1] * size + [0] * (LONG - size)}
        for size in (LONG, LONG, LONG, LONG, 5, 7) * 8
    ]
    data = Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
    run = launch(data=data)
    assert run.highest <= run.pilot.limit
    (_, first), (at, second) = run.pilot.predictions
    for step, peak in run.pilot.peaks:
        assert peak <= (first if step <= at else second)


def test_an_evaluation_above_the_budget_gets_smaller_batches(
    tmp_path: Path, llama_config: LlamaConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """It is predicted: all evaluations are within the budget."""
    evaluated = {"per_device_eval_batch_size": 64, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    run = Run(tmp_path / "run", llama_config, **USUAL | {"data": counting(128), "eval_data": counting(128)} | evaluated)
    trainer = run.trainer
    shares = []
    measure = guard_module.PeakGuard.evaluation

    with caplog.at_level(logging.WARNING, logger="rankpilot"), pytest.MonkeyPatch.context() as patch:

        @contextmanager
        def noted(guard: Any) -> Iterator[None]:
            with measure(guard):
                yield
            shares.append(guard.evaluation_share)

        patch.setattr(guard_module.PeakGuard, "evaluation", noted)
        trainer.train()
    assert 0.5 < shares[0] <= 1
    assert len(shares) == 1
    (message,) = messages_of(caplog)
    assert "with a batch size of 64 would take" in message
    assert trainer.args.per_device_eval_batch_size == 64, "as its user chose, once the run is over"
    assert {step for step, _ in run.pilot.peaks} <= set(range(1, 7))
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 3


class Budgeted:
    """Stands for a pilot under whose budget evaluations take these shares, one after another."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)
        self.evaluation_share = 0.0
        self.guard = self

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        yield
        self.evaluation_share = self.shares.pop(0)


def test_loaders_that_the_trainer_keeps_have_the_smaller_batches_too(tmp_path: Path) -> None:
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    args = arguments(tmp_path, per_device_eval_batch_size=64, **settings)
    trainer = Trainer(nn.Linear(1, 1), args, eval_dataset=[{"labels": number} for number in range(64)])
    evaluations = Evaluations(trainer, Budgeted(4.0, 2.0, 0.9))  # type: ignore[arg-type]

    def size() -> int | None:
        return evaluations.run(lambda: trainer.get_eval_dataloader().batch_sampler.batch_size)  # type: ignore[union-attr]

    assert [size() for _ in range(4)] == [64, 8, 2, 2]
    evaluations.put_back()
    assert trainer.get_eval_dataloader().batch_sampler.batch_size == 64  # type: ignore[union-attr]


# Why a peak is not the predicted one ----------------------------------------------------------------------------------

IDS = torch.arange(16 * 32).view(16, 32) % 64
PADDED = {"input_ids": IDS, "attention_mask": (IDS > 3).long()}
WHOLE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.mark.parametrize(
    ("peak", "batches", "words"),
    [
        (1020, [WHOLE], None),
        (900, [PADDED], "computes less than"),
        (900, [{"input_ids": IDS}], "computes less than"),
        (1100, [WHOLE], "computes more than"),
        (900, [], "computes less than"),
        (900, [WHOLE], "no row of the step is padded"),
        (900, [WHOLE, PADDED], "ran 2 batches, but accumulation=1 was declared"),
    ],
)
def test_causes(peak: int, batches: list[Any], words: str | None) -> None:
    text = likely_cause(peak, 1000.0, StepBatches.of(batches), 1)
    assert words in text if words else not text


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows of one length, which nothing tells before."""

    def __iter__(self) -> Iterator[Any]:
        yield from ({"input_ids": row, "attention_mask": [1] * 32, "labels": row} for row in IDS.tolist())


def test_rows_without_padding_are_no_other_step(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        launch("80%", data=Stream(), max_steps=2)
    messages = messages_of(caplog, "were predicted")
    assert messages
    assert all("no row of the step is padded" in message and "harmless" in message for message in messages)


def test_a_loop_of_other_accumulation_than_it_said(llama_config: LlamaConfig, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(llama_config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader: DataLoader[Any] = DataLoader(list(Stream()), 4, collate_fn=default_data_collator)  # type: ignore[arg-type]
    pilot = RankPilot("signal-mean", "80%", exact_savers=False)
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=4, accumulation=4))
        for batch in islice(loader, 2):
            take_step(pilot, optimizer, batch, lambda batch: model(**batch).loss)
    assert "ran 1 batch, but accumulation=4 was declared" in messages_of(caplog, "were predicted")[0]
