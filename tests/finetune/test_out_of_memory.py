"""Steps that run out of memory: at once and for good, in passing, with a batch that grows, or in an evaluation.

Each kind under a budget of bytes, of parameters, and where the Trainer looks for its batch size. Afterwards all is as
before the first error, or the run has the plan that fits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.settings import ONCE
from rankpilot.finetune.step.plan_keeper import GOOD_STEPS
from rankpilot.finetune.step.shortage import MOST_TRIES, PLAN_SHARE, Shortage, saving_of_a_try
from rankpilot.lora.targets import find_target_modules
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ..cases import first_cases
from .tiny_runs import Run, messages_of

ROWS, SHORT, LONG, LONG_AT = 8, 6, 12, 4

pytestmark = pytest.mark.usefixtures("one_thread")


class Growing(torch.utils.data.IterableDataset):
    """Rows whose length rises in mid-run: nothing tells so beforehand."""

    def __init__(self, long_at: int) -> None:
        self.long_at = long_at

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        generator = np.random.default_rng(0)
        for row in range(1000):
            ids = generator.integers(1, 64, LONG if row >= self.long_at * ROWS else SHORT).tolist()
            yield {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Asked:
    """A real step, or an evaluation, that asks for memory: its number from 1, and the rows and tokens of its batch."""

    number: int
    rows: int
    length: int


Lacks = Callable[[Asked], bool]


class Short(Trainer):  # type: ignore[misc]
    """A Trainer without memory for some real steps and evaluations; steps that are measured never lack it."""

    lacks: Lacks = staticmethod(lambda asked: False)
    in_evaluation: Lacks = staticmethod(lambda asked: False)
    asked: list[Asked]

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
        loss = super().training_step(model, inputs, *rest)
        if self.accelerator.backward.__name__ == "backward":
            self._ask(self.lacks, inputs)
        return loss

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        self._ask(self.in_evaluation, inputs)
        return super().prediction_step(model, inputs, *rest, **options)

    def _ask(self, lacks: Lacks, inputs: Any) -> None:
        self.asked.append(Asked(len(self.asked) + 1, *inputs["input_ids"].shape))
        if lacks(self.asked[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@dataclass(frozen=True, eq=False)
class Moment:
    """What training has made so far, and the plan."""

    ranks: list[int]
    tensors: dict[str, torch.Tensor]
    limit: float
    decisions: int

    @classmethod
    def of(cls, trainer: Trainer, pilot: rankpilot.RankPilotCallback) -> Moment:
        names = {parameter: name for name, parameter in trainer.model.named_parameters() if "lora_" in name}
        tensors = {name: parameter.detach().clone() for parameter, name in names.items()}
        inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        for parameter, state in inner.state.items():
            tensors |= {f"{names[parameter]} {key}": value.clone() for key, value in state.items()}
        ranks = [target.rank for target in find_target_modules(trainer.model)]
        return cls(ranks, tensors, pilot.limit, len(DecisionLog(pilot.pilot.journal.log.folder)))

    def assert_is(self, other: Moment) -> None:
        assert self.ranks == other.ranks
        assert self.tensors.keys() == other.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), name
        assert self.limit == other.limit
        assert self.decisions == other.decisions


class Moments(TrainerCallback):
    """The run at its begin and after each step; `begins` counts the begins."""

    run: ShortRun

    def __init__(self) -> None:
        self.seen: list[Moment] = []
        self.begins = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begins += 1
        self.seen = [Moment.of(self.run.trainer, self.run.pilot)]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(Moment.of(self.run.trainer, self.run.pilot))


class ShortRun(Run):
    """A run on a tiny Llama under a budget, whose memory runs out; by default no layer runs again to make room."""

    trainer: Short

    def __init__(
        self,
        folder: Path,
        config: LlamaConfig,
        budget: str | None,
        *,
        lacks: Lacks = Short.lacks,
        in_evaluation: Lacks = Short.in_evaluation,
        long_at: int = 1000,
        steps: int = 6,
        **options: Any,
    ) -> None:
        self.moments = Moments()
        self.moments.run = self
        data = Growing(long_at)
        options = {"per_device_train_batch_size": ROWS, "max_steps": steps, "data": data, "plain": True} | options
        options |= {"eval_data": list(data)[:ROWS], "trainer": Short, "schedule": ONCE}
        if budget == "auto_find":
            options["auto_find_batch_size"], budget = True, "100%"
        super().__init__(folder, config, budget=budget, callbacks=(self.moments,) if budget else (), **options)
        self.trainer.asked, self.trainer.lacks, self.trainer.in_evaluation = [], lacks, in_evaluation

    @property
    def now(self) -> Moment:
        return Moment.of(self.trainer, self.pilot)

    @property
    def notes(self) -> list[str]:
        return list(dict.fromkeys(self.log["note"].dropna()))


Launch = Callable[..., ShortRun]


@pytest.fixture
def make(tmp_path: Path, llama_config: LlamaConfig) -> Launch:
    return lambda budget, **options: ShortRun(tmp_path / options.pop("name", "run"), llama_config, budget, **options)


BUDGETS = ("80%", "6k params")
FAILS_AT = 3
STAYS = "Ranks, adapters and optimizer are restored to before step"


def test_a_plan_that_rounding_puts_above_its_limit_is_tried(tmp_path: Path) -> None:
    """Ranks are halved while three layers are checkpointed, and then two do: that takes one byte more."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    )
    rows = [{"input_ids": list(range(1, 61)), "labels": list(range(1, 61))}] * 64
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Short(model, arguments, train_dataset=rows)
    trainer.asked, trainer.lacks = [], lambda asked: asked.number == 1  # type: ignore[method-assign]
    rankpilot.attach(trainer, budget="60%", parts="off")
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("first", "accumulation"), first_cases(2, [(FAILS_AT, 1), (1, 1), (FAILS_AT, 2)]))
def test_an_error_that_no_plan_relieves_changes_nothing(
    make: Launch, budget: str, first: int, accumulation: int
) -> None:
    run = make(
        budget, lacks=lambda asked: asked.number > (first - 1) * accumulation, gradient_accumulation_steps=accumulation
    )
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2") as caught:
        run.train()
    assert caught.value.__traceback__ is not None
    (note,) = caught.value.__notes__
    assert f"{STAYS} {first}." in note
    assert len(run.trainer.asked) <= (first - 1) * accumulation + 1 + MOST_TRIES
    run.now.assert_is(run.moments.seen[-1])
    assert len(run.moments.seen) == first
    assert run.notes == []


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_a_passing_error_took_comes_back(make: Launch, budget: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = make(budget, lacks=lambda asked: asked.number == FAILS_AT, steps=FAILS_AT + GOOD_STEPS + 2).train()
    before, shrunk, *_, last = run.moments.seen[FAILS_AT - 1 :]
    assert sum(shrunk.ranks) < sum(before.ranks)
    assert sum(shrunk.ranks) >= (1 - 1.5 * PLAN_SHARE) * sum(before.ranks)
    assert shrunk.limit < before.limit
    assert (last.ranks, last.limit) == (before.ranks, before.limit)
    assert run.notes == ["shrunk: out of memory", "restored: memory is free again"]
    assert "Step 3 ran out of memory. The plan shrinks to" in caplog.text
    back = next(at for at, moment in enumerate(run.moments.seen) if at >= FAILS_AT and moment.ranks == before.ranks)
    assert back == FAILS_AT - 1 + GOOD_STEPS


@pytest.mark.parametrize(("times", "accumulation"), first_cases(1, [(2, 3), (1, 1), (1, 3), (2, 1)]))
def test_a_step_is_taken_again_as_if_the_plan_had_been_smaller(
    make: Launch, caplog: pytest.LogCaptureFixture, times: int, accumulation: int
) -> None:
    """Gradients of its earlier batches are none of the step's: all is as where the plan shrinks before it."""
    first = (FAILS_AT - 1) * accumulation + max(accumulation - 1, 1)  # the second of three batches
    options = {"gradient_accumulation_steps": accumulation}

    def lacks(asked: Asked) -> bool:
        return first <= asked.number < first + times

    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run = make("80%", lacks=lacks, **options).train()
    assert len(messages_of(caplog, f"Step {FAILS_AT} ran out of memory. The plan shrinks to")) == times
    costs = [cost for step, cost in run.pilot.predictions if step == FAILS_AT - 1]
    assert len(costs) == times
    assert run.pilot.predictions[0][1] > costs[0] >= costs[-1]

    def shrink(step: int) -> None:
        if step == FAILS_AT - 1:
            other.pilot.pilot._piloted.guard.plan.step = step
            for _ in range(times):
                other.pilot.pilot.out_of_memory()

    other = make("80%", at_step=shrink, name="between", **options)
    other.train()
    for moment, expected in zip(run.moments.seen[FAILS_AT:], other.moments.seen[FAILS_AT:], strict=True):
        moment.assert_is(expected)
    # With accumulation the Trainer counts the loss of a first batch that ran under the larger plan.
    assert run.recorder.losses[FAILS_AT:] == other.recorder.losses[FAILS_AT:]


def test_what_comes_back_changes_no_function_and_no_moment(make: Launch) -> None:
    """The plan comes back at the end of a step, in which a batch is computed and the moments are read."""
    run = make("80%", lacks=lambda asked: asked.number == FAILS_AT, steps=FAILS_AT + GOOD_STEPS)
    pilot, batch = run.pilot.pilot, {"input_ids": torch.arange(1, 9)[None]}
    seen: list[tuple[torch.Tensor, dict[Any, torch.Tensor], list[int]]] = []

    def look() -> None:
        assert pilot.applier is not None
        targets = pilot.applier.targets
        state = run.trainer.optimizer.state
        with torch.no_grad():
            logits = run.model.eval()(**batch).logits
        moments = {t.name: state[t.weight_a]["exp_avg"].clone() for t in targets if t.rank}
        seen.append((logits, moments, [target.rank for target in targets]))
        run.model.train()

    give_back = Shortage._give_back

    def watched(*given: Any) -> None:
        look()
        give_back(*given)
        look()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shortage, "_give_back", watched)
        run.train()
    (before, moments, fewer), (after, others, more) = seen
    assert sum(more) > sum(fewer)
    assert torch.allclose(before, after, atol=1e-6)
    for name, moment in moments.items():
        assert torch.equal(others[name][: len(moment)], moment)
        assert not others[name][len(moment) :].any()


@pytest.mark.parametrize("budget", BUDGETS)
def test_twenty_passing_errors_leave_most_of_the_rank(make: Launch, budget: str) -> None:
    """Every other attempt from the third on fails, twenty times."""
    failing = {FAILS_AT + 2 * time for time in range(20)}
    run = make(budget, lacks=lambda asked: asked.number in failing, steps=FAILS_AT + 20 + GOOD_STEPS).train()
    begun = run.moments.seen[0]
    least = min(sum(moment.ranks) for moment in run.moments.seen)
    assert least >= (1 - 1.5 * PLAN_SHARE) * sum(begun.ranks)
    assert run.moments.seen[-1].ranks == begun.ranks
    assert run.now.decisions == 3


def test_a_plan_comes_back_less_often_where_that_was_no_use(make: Launch) -> None:
    """There is never memory for the first plan."""
    steps = 3 * GOOD_STEPS - 1
    run = make("6k params", steps=steps)
    whole: list[int] = []

    def lacks(asked: Asked) -> bool:
        ranks = sum(target.rank for target in find_target_modules(run.model))
        whole.append(ranks)
        return ranks == whole[0]

    run.trainer.lacks = lacks
    run.train()
    assert len(run.trainer.asked) == steps + 2, "one error at first, and one when the plan came back"
    assert run.notes == ["shrunk: out of memory", "restored: memory is free again"]


@pytest.mark.parametrize("fits", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_batch_that_grows(make: Launch, budget: str, fits: bool) -> None:
    """Either no plan has the memory for it, or the first smaller one has."""
    failed: list[Asked] = []

    def lacks(asked: Asked) -> bool:
        lacking = asked.length == LONG and not (fits and failed)
        failed.extend([asked] * lacking)
        return lacking

    run = make(budget, lacks=lacks, long_at=LONG_AT)
    if fits:
        run.train()
        assert len(failed) == 1
        assert run.trainer.state.global_step == 6
        assert sum(run.now.ranks) < sum(run.moments.seen[LONG_AT].ranks)
        return
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    assert len(failed) <= 1 + MOST_TRIES
    run.now.assert_is(run.moments.seen[LONG_AT])


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_evaluation_that_runs_out_of_memory_changes_nothing(make: Launch, budget: str) -> None:
    run = make(budget, in_evaluation=lambda asked: True, eval_strategy="steps", eval_steps=2)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run.train()
    assert not hasattr(caught.value, "__notes__")
    assert len(run.trainer.asked) == 3
    run.now.assert_is(run.moments.seen[2])


# The Trainer looks for its batch size ---------------------------------------------------------------------------------


FITTING = 6


def test_at_once_the_trainer_goes_first(make: Launch) -> None:
    """As without rankpilot; and afterwards all is as in a run that had that batch size from the start."""

    def lacks(asked: Asked) -> bool:
        return asked.rows > FITTING

    run = make("auto_find", lacks=lacks).train()
    other = make(None, lacks=lacks, auto_find_batch_size=True, name="plain").train()
    assert [asked.rows for asked in run.trainer.asked] == [asked.rows for asked in other.trainer.asked]
    assert run.trainer.state.train_batch_size == other.trainer.state.train_batch_size == FITTING
    assert run.moments.begins == 3
    assert run.notes == []
    fresh = make("100%", per_device_train_batch_size=FITTING, name="fresh").train()
    for moment, expected in zip(run.moments.seen, fresh.moments.seen, strict=True):
        moment.assert_is(expected)
    assert run.pilot.peaks == fresh.pilot.peaks


def train_watched(run: ShortRun, look: Callable[[], Any]) -> list[Any]:
    """Train, and return what a function gives before the run begins with each batch size."""
    begin, found = run.pilot.pilot.begin, []

    def watched(*arguments: Any, **options: Any) -> None:
        found.append(look())
        begin(*arguments, **options)

    run.pilot.pilot.begin = watched
    run.train()
    return found


@pytest.mark.parametrize("plain", [True, False])
def test_each_batch_size_begins_with_the_adapters_as_they_were(make: Launch, plain: bool) -> None:
    """They are trained already, and the budget of the first batch size would take some of their rank."""

    def trained(model: Any) -> None:
        with torch.no_grad():
            for target in find_target_modules(model):
                target.weight_b.normal_()

    run = make("auto_find", lacks=lambda asked: asked.rows > FITTING, prepare=trained, plain=plain)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if "lora_" in name}
    run.pilot.pilot.set_budget("3k params")

    def same() -> None:
        for name, value in before.items():
            assert torch.equal(run.model.get_parameter(name), value), name

    assert len(train_watched(run, same)) == 3
    assert sum(run.now.ranks) < 8 * len(run.now.ranks)


def test_the_trainer_ends_a_run_whose_evaluation_lacks_memory(make: Launch) -> None:
    run = make("auto_find", in_evaluation=lambda asked: True, eval_strategy="steps", eval_steps=2)
    with pytest.raises(RuntimeError, match="Evaluation hit an out-of-memory error"):
        run.train()
    run.now.assert_is(run.moments.seen[2])
    assert run.moments.begins == 1


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("kind", ["passing", "growing"])
def test_the_next_batch_size_keeps_what_was_trained(make: Launch, kind: str, plain: bool) -> None:
    """An error after some steps: the plain Trainer begins again with the weights of that time, and so does this one."""
    options: dict[str, Any] = {
        "passing": {"lacks": lambda asked: asked.number == FAILS_AT},
        "growing": {
            "lacks": lambda asked: (asked.rows, asked.length) == (ROWS, LONG),
            "long_at": ROWS - 1,  # the next size has whole batches of short rows too
            "steps": ROWS + 2,
        },
    }[kind]
    run = make("auto_find", plain=plain, **options)
    _, (left, last) = train_watched(run, lambda: run.moments.seen and (run.now, run.moments.seen[-1]))
    left.assert_is(last)
    begun = run.moments.seen[0]
    assert all(now >= before for now, before in zip(begun.ranks, last.ranks, strict=True))
    assert run.trainer.state.train_batch_size == ROWS - 1
    assert run.trainer.state.global_step == run.trainer.args.max_steps


# Factors that hold NaN, and arithmetic --------------------------------------------------------------------------------


def test_factors_that_cannot_shrink_change_nothing(make: Launch) -> None:
    """Modules that hold NaN keep their ranks as long as they fit."""

    def break_all(step: int) -> None:
        for target in find_target_modules(run.model):
            target.weight_b.data.fill_(torch.nan)

    run = make("80%", lacks=lambda asked: asked.number > 1, at_step=break_all)
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    assert run.now.ranks == run.moments.seen[1].ranks
    assert run.now.decisions == 1


def test_a_smaller_plan_saves_a_tenth_of_the_step_or_a_quarter_of_the_plan() -> None:
    for whole, reducible, expected in ((1000, 1000, 100), (1000, 200, 50), (1000, 30, 0), (None, 200, 50)):
        assert saving_of_a_try(whole, reducible) == pytest.approx(expected)
