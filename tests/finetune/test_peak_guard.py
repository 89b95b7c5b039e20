"""The guard of the byte budget in real Trainer runs: measured peaks, breaches, batches larger than planned, bounds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rankpilot.agents.log import DecisionLog
from rankpilot.agents.settings import DecisionSchedule
from rankpilot.cost.budget import free_bytes
from rankpilot.cost.calibration import LOOP_BYTES
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.recording import BatchShape
from rankpilot.errors import BudgetError, ConfigError, UnknownNameError, UnsupportedError
from rankpilot.finetune import peak_guard as guard_module
from rankpilot.finetune.callback import attach
from rankpilot.lora.peft_config import adapter_ranks
from rankpilot.lora.targets import find_target_modules
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..cases import first_cases

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


class RanksAtEachStep(TrainerCallback):
    def __init__(self) -> None:
        self.ranks: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.ranks.append(adapter_ranks(find_target_modules(objects["model"])))


class Run:
    def __init__(self, folder: Path, config: LlamaConfig, data: Any, budget: Any, **options: Any) -> None:
        set_seed(0)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        self.model = get_peft_model(LlamaForCausalLM(config), lora)
        prepare = options.pop("prepare", lambda model: None)
        prepare(self.model)
        own = {"measure_every": options.pop("measure_every", 1), "bounds": options.pop("bounds", None)}
        self.steps = RanksAtEachStep()
        resume = options.pop("resume", None)
        settings = {
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS,
            "learning_rate": 1e-3,
            "save_steps": 8,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        } | options
        self.folder = folder
        collate = settings.pop("data_collator", None)
        arguments = TrainingArguments(str(folder), **settings)
        trainer = Trainer(self.model, arguments, collate, data, callbacks=[self.steps])
        self.pilot = attach(trainer, "signal-mean", budget, schedule=SCHEDULE, **own)
        trainer.train(resume_from_checkpoint=resume)

    @property
    def limit(self) -> float:
        assert self.pilot.controller is not None
        return self.pilot.controller.limit

    @property
    def highest(self) -> int:
        return max(peak for _, peak in self.pilot.peaks)

    def log(self) -> Any:
        return DecisionLog(self.folder / "decisions").to_pandas()


@pytest.fixture
def launch(tmp_path: Path, llama_config: LlamaConfig) -> Callable[..., Run]:
    def start(budget: Any = "70%", data: Any = None, name: str = "run", **options: Any) -> Run:
        return Run(tmp_path / name, llama_config, data or Growing(long_at=STEPS), budget, **options)

    return start


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Run:
    """What `launch` makes without options, for tests that only look at it."""
    return Run(tmp_path_factory.mktemp("usual") / "run", llama_config, Growing(long_at=STEPS), "70%")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("rankpilot")]


@pytest.mark.parametrize("checkpointing", first_cases(2, [None, False, True]))
def test_every_step_costs_what_was_predicted(
    usual: Run, launch: Callable[..., Run], checkpointing: bool | None
) -> None:
    options: dict[str, Any] = {}
    if checkpointing is not None:
        reentrant = {"use_reentrant": checkpointing}
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": reentrant}
        options["prepare"] = lambda model: model.enable_input_require_grads()
    run = launch(**options) if options else usual
    assert run.highest <= run.limit
    (_, first), (at, second) = run.pilot.predictions
    margin = {None: 0.0, False: 0.005, True: 0.02}[checkpointing]
    for step, peak in run.pilot.peaks:
        predicted = first if step <= at else second
        assert 0 <= predicted - peak * (1 + margin) <= 1.5 * LOOP_BYTES


def test_low_bit_state_that_is_smaller_than_its_straight_line_is_no_other_step(
    tmp_path: Path, llama_config: LlamaConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """State of few values is fp32, so plans are priced for more bytes than it takes at most ranks."""
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(**llama_config.to_dict() | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16})
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = Run(tmp_path / "run", config, Growing(long_at=STEPS), "80%", optim="adamw_bnb_8bit")
    assert warnings_of(caplog) == []
    for _, predicted, measured in run.pilot.pilot.checks:
        assert measured == pytest.approx(predicted, rel=0.01)


def test_the_cost_of_a_larger_batch_is_known_before_the_model_sees_it(
    launch: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = launch(data=Growing())
    assert run.highest <= run.limit, "not even in the step in which the length doubled"
    assert {step for step, _ in run.pilot.peaks} >= {LONG_AT, LONG_AT + 2}
    (message,) = warnings_of(caplog)
    assert "A batch of 4 x 24 came, larger than the memory was planned for. The plan is shrunk." in message
    before, after = run.steps.ranks[LONG_AT - 1], run.steps.ranks[LONG_AT]
    assert sum(rank > 0 for rank in after.values()) < sum(rank > 0 for rank in before.values())
    last = run.log().iloc[2 * len(after) :]
    assert set(last["step"].tolist()) == {LONG_AT}
    noted = set(last["note"].dropna())
    assert noted == {"shrunk: batch of 4 x 24"}


def test_a_larger_batch_that_fits_changes_nothing(launch: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    quiet = launch("90MB", name="quiet")
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = launch("90MB", data=Growing())
    assert [m for m in warnings_of(caplog) if "The plan still fits." in m]
    assert run.steps.ranks == quiet.steps.ranks


def test_a_larger_batch_that_fits_no_plan_is_an_error(launch: Callable[..., Run]) -> None:
    with pytest.raises(BudgetError, match="fits no adapter at all"):
        launch("100KiB", data=Growing())


class Texts(torch.utils.data.Dataset[Any]):
    """Rows that the collator tokenises; a long one comes last."""

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"size": LONG if index == len(self) - 1 else SHORT}


def tokenised(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    ids = torch.ones(len(rows), max(row["size"] for row in rows), dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


def test_who_has_rows_of_unknown_lengths_is_told_to_put_the_longest_first(launch: Callable[..., Run]) -> None:
    options = {"data_collator": tokenised, "remove_unused_columns": False}
    with pytest.raises(BudgetError, match=r"4 x 24 came.* or whose rows hold no token ids.* put the longest first"):
        launch("25%", data=Texts(), **options)


def test_a_resumed_run_knows_the_largest_batch(launch: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    whole = launch(data=Growing())
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        resumed = launch(data=Growing(), resume=str(whole.folder / "checkpoint-8"))
    assert warnings_of(caplog) == []
    assert resumed.steps.ranks == whole.steps.ranks[8:]
    assert resumed.pilot.peaks == whole.pilot.peaks


def test_a_batch_that_grows_after_a_restart_is_measured_without_a_trace(launch: Callable[..., Run]) -> None:
    """The memory model is not in the checkpoint: it is made anew on the batch that has come."""
    late = 10
    whole = launch(data=Growing(late))
    resumed = launch(data=Growing(late), resume=str(whole.folder / "checkpoint-8"))
    assert resumed.steps.ranks == whole.steps.ranks[8:]
    assert resumed.steps.ranks[-1] != resumed.steps.ranks[0]
    assert resumed.highest <= resumed.limit == whole.limit
    here, there = resumed.log(), whole.log()
    assert here["step"].tolist()[-1] == late
    assert here["loss"].equals(there["loss"]), "losses of measuring do not count"
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_largest_rows_and_length_of_two_batches_count_together(launch: Callable[..., Run]) -> None:
    run = launch(max_steps=2)
    guard = run.pilot.pilot._guard
    few = {name: torch.ones(1, LONG, dtype=torch.long) for name in ("input_ids", "labels")}
    guard._measure_again(few, BatchShape(ROWS, LONG))
    cost = guard._cost_of_shape(BatchShape(ROWS, LONG))
    many = {name: torch.ones(ROWS, LONG, dtype=torch.long) for name in ("input_ids", "labels")}
    guard._measure_again(many, BatchShape(ROWS, LONG))
    expected = guard._cost_of_shape(BatchShape(ROWS, LONG))
    ranks = np.full(len(run.pilot.controller.targets), 4)  # type: ignore[union-attr]
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
    launch: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, excess: int
) -> None:
    """From the second decision on something else takes some bytes."""
    decision = SCHEDULE.steps(STEPS)[1]
    let_steps_take_more(monkeypatch, excess, after=decision)
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = launch()
    before, back = (run.steps.ranks[step] for step in (decision - 1, decision))
    decided = DecisionLog(run.folder / "decisions").logged(1).plan()
    (message,) = warnings_of(caplog)
    assert f"The peak of step {decision + 1} was" in message
    assert "The plan is rolled back." in message
    assert before != decided
    if excess > 10_000:
        assert sum(back.values()) < sum(before.values()), "the plan before does not fit either"
    else:
        nearer = sum(back[name] == before[name] for name in back)
        assert nearer > sum(decided[name] == before[name] for name in back)
    assert run.steps.ranks[-1] == back, "one correction is enough"
    assert all(peak + excess <= run.limit for step, peak in run.pilot.peaks if step > decision + 1)
    table = run.log()
    assert set(table["note"].dropna()) == {"rolled back: peak above the budget"}


def test_a_breach_of_the_first_plan_shrinks_it(
    launch: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no plan before it to go back to."""
    excess = 40_000
    let_steps_take_more(monkeypatch, excess, after=0)
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = launch()
    (message,) = warnings_of(caplog)
    assert "The peak of step 1 was" in message
    assert "The plan is shrunk by the difference." in message
    assert sum(run.steps.ranks[0].values()) < sum(DecisionLog(run.folder / "decisions").logged(0).plan().values())
    assert all(peak + excess <= run.limit for step, peak in run.pilot.peaks if step > 1)
    assert set(run.log()["note"].dropna()) == {"shrunk: peak above the budget"}


@pytest.mark.parametrize("every", first_cases(1, [5, 1, 100]))
def test_steps_are_measured_after_changes_and_now_and_then(launch: Callable[..., Run], every: int) -> None:
    run = launch(measure_every=every)
    second = SCHEDULE.steps(STEPS)[1]
    expected = {1, second + 1} | {step + 1 for step in range(0, STEPS, every)}
    assert {step for step, _ in run.pilot.peaks} == expected


def test_measuring_changes_no_result(usual: Run, launch: Callable[..., Run]) -> None:
    often, seldom = usual, launch(measure_every=100)
    assert often.steps.ranks == seldom.steps.ranks
    for (name, a), (_, b) in zip(often.model.named_parameters(), seldom.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_bounds_hold_at_every_step(launch: Callable[..., Run]) -> None:
    run = launch(bounds={"q_proj": 4, "model.layers.1.mlp.down_proj": (0, 2), "layers.0.self_attn.o_proj": (1, 8)})
    for ranks in run.steps.ranks:
        assert {rank for name, rank in ranks.items() if name.endswith("q_proj")} == {4}
        assert ranks["model.layers.1.mlp.down_proj"] <= 2
        assert 1 <= ranks["model.layers.0.self_attn.o_proj"] <= 8
    assert run.highest <= run.limit


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    first_cases(
        2,
        [
            ({"q_prj": 4}, UnknownNameError, "q_prj"),
            ({"q_proj": (4, 2)}, ConfigError, "from low to high"),
            ({"q_proj": -1}, ConfigError, "from low to high"),
            ({"q_proj": (3, 3)}, ConfigError, "bounds of 'q_proj' leave it no rank: no rank of"),
            ({"q_proj": "8"}, ConfigError, "got '8'"),
            ({"q_proj": (1, 2, 3)}, ConfigError, "from low to high"),
        ],
    ),
)
def test_bounds_that_make_no_sense(
    launch: Callable[..., Run], bounds: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        launch(bounds=bounds)


def test_bounds_above_the_budget_are_named(launch: Callable[..., Run]) -> None:
    with pytest.raises(BudgetError, match=r"lower bound.*smallest that works is"):
        launch("150KiB", bounds={"layers.0.self_attn.q_proj": 8})


def test_a_module_frozen_by_hand_is_refused(launch: Callable[..., Run]) -> None:
    def freeze(model: Any) -> None:
        find_target_modules(model)[3].weight_a.requires_grad_(False)

    with pytest.raises(UnsupportedError, match=r"o_proj' is frozen"):
        launch(prepare=freeze)


def test_auto_takes_most_of_what_is_free(launch: Callable[..., Run]) -> None:
    run = launch("auto", max_steps=2)
    free = free_bytes(torch.device("cpu"))
    assert 0.5 * free < run.limit < free
    assert set(run.steps.ranks[0].values()) <= {t.max_rank for t in find_target_modules(run.model)} | {
        64,
        48,
        32,
        24,
        16,
    }


@pytest.mark.parametrize("lengths", [(LONG, LONG, LONG, LONG, 5, 7), pytest.param((LONG,) * 6, marks=pytest.mark.long)])
def test_padding_in_later_batches_is_planned_for(launch: Callable[..., Run], lengths: tuple[int, ...]) -> None:
    """The longest rows need no mask, and models skip masks that mask nothing; any other batch may need one."""
    rows = [
        {"input_ids": [3] * size + [0] * (LONG - size), "attention_mask": [1] * size + [0] * (LONG - size)}
        for size in lengths * 8
    ]
    data = Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
    run = launch(data=data)
    assert run.highest <= run.limit
    (_, first), (at, second) = run.pilot.predictions
    for step, peak in run.pilot.peaks:
        assert peak <= (first if step <= at else second)


def test_an_evaluation_above_the_budget_gets_smaller_batches(
    tmp_path: Path, llama_config: LlamaConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Measured once, corrected at once: the next evaluations are within the budget."""
    set_seed(0)
    model = get_peft_model(LlamaForCausalLM(llama_config), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    rows = [{"input_ids": [i % 64] * SHORT, "labels": [i % 64] * SHORT} for i in range(128)]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=64,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = Dataset.from_list(rows)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    pilot = attach(trainer, "signal-mean", "70%", schedule=SCHEDULE)
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
    assert len(shares) == 2, "the first batch size, and the corrected one"
    assert shares[0] > 1 >= shares[1]
    (message,) = warnings_of(caplog)
    assert f"with batches of 64 took {100 * shares[0]:.0f} % of the budget" in message
    assert trainer.args.per_device_eval_batch_size == 64, "as its user chose, once the run is over"
    assert {step for step, _ in pilot.peaks} <= set(range(1, 7))
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 3
