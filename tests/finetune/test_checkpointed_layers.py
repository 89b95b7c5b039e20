"""Runs in which as few layers as the plan needs run again in the backward pass."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.common.errors import BudgetError, UnsupportedError
from rankpilot.cost.savers.checkpointed_layers import LayerCheckpointing, all_running_again, could_checkpoint
from rankpilot.decide.chooser import PlanChooser
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.observation import Observation
from rankpilot.decide.plan.problem import Bounds
from rankpilot.decide.plan.worth import FEATURES, PlanWorth
from rankpilot.decide.policy import Decision
from rankpilot.finetune.options import PilotOptions
from rankpilot.finetune.step.plan_keeper import GOOD_STEPS
from rankpilot.study.replay import redecide
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainerCallback,
    XLNetConfig,
    XLNetForSequenceClassification,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from ..cases import first_cases
from .tiny_runs import arguments, counting, ranks_of, take_step

LAYERS, STEPS = 3, 4
SCHEDULE = rankpilot.DecisionSchedule(probe_steps=2, fractions=(0.0, 0.5))


BOUNDS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 4)
"""One plan for all runs: what differs is the layers that run again."""


def trainer_of(folder: Path, kind: Any = Trainer, *, layers: int = LAYERS, dropout: float = 0.1, **options: Any) -> Any:
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear"))
    args = arguments(folder, dataloader_pin_memory=False, **options)
    return kind(model, args, train_dataset=counting(41, 32)[1:], callbacks=[Layers()])


SAVED = {"save_steps": 1}
"""For runs that are gone on with: the first checkpoint comes before the second decision, the third one after it."""


def attached(folder: Path, budget: str | int, *, checkpoint: bool = True, **options: Any) -> tuple[Trainer, Any]:
    trainer = trainer_of(folder, **options)
    callback = rankpilot.attach(
        trainer,
        "signal-mean",
        budget=budget,
        parts="off",  # in parts, a plan needs the layers of one row alone
        bounds=BOUNDS,
        exact_savers=False,
        gradient_checkpointing="auto" if checkpoint else False,
        measure_every=1,
        schedule=SCHEDULE,
    )
    return trainer, callback


Run = tuple[Path, Trainer, Any]
"""The folder, the Trainer and the callback of a run."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of a budget, which has ended; tests that go on from it take a copy of the folder."""

    @cache
    def run(budget: str) -> Run:
        folder = tmp_path_factory.mktemp("run")
        trainer, callback = attached(folder, budget, **SAVED)
        trainer.train()
        return folder, trainer, callback

    return run


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def flags(model: Any) -> list[bool]:
    return [m.gradient_checkpointing for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


class Layers(TrainerCallback):  # type: ignore[misc]
    """Which layers run again in the latest step; none are known before the first."""

    def __init__(self) -> None:
        self.flags: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.flags = flags(objects["model"])


def checkpointed(trainer: Trainer) -> list[bool]:
    (layers,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, Layers)]
    return layers.flags


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run in which all layers run again."""
    trainer, _ = attached(tmp_path_factory.mktemp("all"), "120%", checkpoint=False, gradient_checkpointing=True)
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize(("budget", "layers"), first_cases(1, [("85%", 1), ("60%", 2), ("110%", 0), ("45%", 2)]))
def test_as_few_layers_run_again_as_the_budget_needs(
    ended: Callable[[str], Run], everything: list[float], budget: str, layers: int
) -> None:
    _, trainer, callback = ended(budget)
    assert checkpointed(trainer) == [True] * layers + [False] * (LAYERS - layers)
    assert losses(trainer) == everything, "dropout draws the same numbers"
    assert len(callback.peaks) == STEPS
    assert max(peak for _, peak in callback.peaks) <= callback.limit
    for _, predicted, peak in callback.pilot.checks:
        assert peak <= predicted <= 1.01 * peak
    rows = [row for row in trainer.state.log_history if "checkpointed_layers" in row]
    assert {row["checkpointed_layers"] for row in rows} == {layers}
    assert not any(flags(trainer.model))
    assert not any(hasattr(module, "_gradient_checkpointing_func") for module in trainer.model.modules())


def test_a_resumed_run_goes_on_with_the_same_layers(
    ended: Callable[[str], Run], tmp_path: Path, everything: list[float]
) -> None:
    folder, trainer, _ = ended("85%")
    shutil.copytree(folder, tmp_path / "run")
    resumed, callback = attached(tmp_path / "run", "85%")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert checkpointed(resumed) == checkpointed(trainer)
    assert losses(resumed) == everything
    assert max(peak for _, peak in callback.peaks) <= callback.limit


class OneStep(TrainerCallback):  # type: ignore[misc]
    """Ends a run after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        control.should_training_stop = True


def test_another_budget_changes_the_layers_and_not_the_ranks(tmp_path: Path, everything: list[float]) -> None:
    trainer, _ = attached(tmp_path, "110%", **SAVED)
    trainer.add_callback(OneStep())
    trainer.train()
    resumed, callback = attached(tmp_path, "60%")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert sum(checkpointed(trainer)) == 0
    assert sum(checkpointed(resumed)) == 2
    assert set(callback.applier.ranks) == {4}
    assert losses(resumed) == everything


class Broken(Trainer):  # type: ignore[misc]
    """Breaks in its second step."""

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        if self.state.global_step == 1:
            raise RuntimeError("broken")
        loss: torch.Tensor = super().training_step(*arguments, **options)
        return loss


@pytest.mark.parametrize(
    ("budget", "kind", "error"),
    first_cases(2, [("60%", Trainer, None), ("2KiB step", Trainer, BudgetError), ("60%", Broken, RuntimeError)]),
)
def test_a_run_leaves_the_layers_and_the_cache_as_they_were(
    tmp_path: Path, budget: str, kind: Any, error: type[Exception] | None
) -> None:
    trainer, _ = attached(tmp_path, budget, kind=kind, max_steps=2)
    model = trainer.model
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_disable()
    model.config.use_cache = True
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    with pytest.raises(error) if error else nullcontext():
        trainer.train()
    assert any(checkpointed(trainer)) is (error is not BudgetError)
    assert not any(flags(model))
    assert [layer._gradient_checkpointing_func for layer in layers] == functions
    assert model.config.use_cache


def test_a_model_that_checkpoints_already_is_left_as_it_is(tmp_path: Path) -> None:
    """Its user has said which layers run again, so the plan chooses none, and a share is one of that step."""
    trainer, callback = attached(tmp_path, "100%", max_steps=2)
    model = trainer.model
    model.gradient_checkpointing_enable({"use_reentrant": True})
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    layers[1].gradient_checkpointing = False
    functions = [layer._gradient_checkpointing_func for layer in layers]
    trainer.train()
    assert checkpointed(trainer) == flags(model) == [True, False, True]
    assert [layer._gradient_checkpointing_func for layer in layers] == functions
    assert callback.pilot._piloted.guard.plan.checkpointed == ()
    assert max(peak for _, peak in callback.peaks) <= callback.limit
    assert not any("checkpointed_layers" in row for row in trainer.state.log_history)


@pytest.mark.parametrize("ended", [True, False])
def test_a_pilot_begins_another_run(tmp_path: Path, ended: bool) -> None:
    """Also where the first run was left in the middle of a step that is measured."""
    trainer = trainer_of(tmp_path)
    model, rows = trainer.model, trainer.get_train_dataloader()
    optimizer = trainer.create_optimizer()
    pilot = rankpilot.RankPilot("signal-mean", "60%", bounds=BOUNDS, exact_savers=False, schedule=SCHEDULE)
    batch = next(iter(rows))
    pilot.begin(rankpilot.TrainingRun.of_loader(model, optimizer, rows, total_steps=STEPS))
    pilot.before_step(batch)
    limit, layers = pilot.limit, flags(model)
    assert any(layers)
    if ended:
        pilot.finish()
        assert not any(flags(model))
    pilot.begin(rankpilot.TrainingRun.of_loader(model, optimizer, rows, total_steps=STEPS))
    assert (pilot.limit, flags(model)) == (limit, layers)
    take_step(pilot, optimizer, batch, lambda batch: model(**batch).loss)
    assert len(pilot.peaks) == 1
    pilot.finish()
    assert not any(flags(model))
    assert not any("_loss_function" in vars(module) for module in model.modules())


class OutOfMemory(Trainer):  # type: ignore[misc]
    """Runs out of memory in its second step, for good or once; `layers` tells which ran again in the last attempt."""

    once = False
    layers: list[bool] | None = None

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*arguments, **options)
        real = self.accelerator.backward.__name__ == "backward"  # and not one that is measured
        if real and self.state.global_step == 1 and not (self.once and self.layers):
            self.layers = flags(self.model)
            raise torch.OutOfMemoryError
        return loss


class OutOfMemoryOnce(OutOfMemory):
    once = True


def test_more_layers_run_again_for_a_while_before_a_rank_falls(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, callback = attached(tmp_path, "110%", kind=OutOfMemoryOnce, max_steps=GOOD_STEPS + 2)
    seen: list[int] = []
    watch = TrainerCallback()
    watch.on_step_end = lambda *_, **__: seen.append(sum(flags(trainer.model)))  # type: ignore[method-assign]
    trainer.add_callback(watch)
    trainer.train()
    assert trainer.layers == [False] * LAYERS
    assert seen[0] == seen[-1] == 0 < seen[1] < LAYERS
    assert set(callback.applier.ranks) == {4}
    assert len(callback.predictions) == 2, "no correction of ranks was needed"
    assert "Step 2 ran out of memory and is retried. Now 1 of 3 layers use gradient checkpointing" in caplog.text


def test_layers_are_as_before_where_more_of_them_are_no_help(tmp_path: Path) -> None:
    trainer, callback = attached(tmp_path, "110%", kind=OutOfMemory)
    limit: list[float] = []
    watch = TrainerCallback()
    watch.on_step_end = lambda *_, **__: limit.append(callback.limit)  # type: ignore[method-assign]
    trainer.add_callback(watch)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    assert any(trainer.layers), "the last try had layers run again"
    assert callback.pilot._piloted.guard.plan.checkpointed == ()
    assert [callback.limit] == limit
    assert [step for step, _ in callback.predictions] == [0]
    assert "Ranks, adapters and optimizer are restored to before step 2." in caught.value.__notes__[0]


def test_a_layer_that_drops_numbers_itself_does_not_in_a_loop_in_evaluation_mode() -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "ffn_dim": 32}
    base = OPTForCausalLM(OPTConfig(**sizes, vocab_size=64, word_embed_proj_dim=16, dropout=0.5, use_cache=False))
    model, ids = get_peft_model(base, LoraConfig(target_modules=["q_proj"])).eval(), torch.arange(8)[None]
    plain = model(input_ids=ids, labels=ids).loss
    checkpointing = LayerCheckpointing(model)
    checkpointing.before_step()
    assert torch.equal(model(input_ids=ids, labels=ids).loss, plain)
    checkpointing.put_back()


def test_what_cannot_checkpoint_is_refused() -> None:
    config = XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=16)
    model = get_peft_model(XLNetForSequenceClassification(config), LoraConfig(target_modules=["layer_1"]))
    with pytest.raises(UnsupportedError, match="does not support gradient checkpointing"):
        LayerCheckpointing(model)
    with pytest.raises(UnsupportedError, match="does not support gradient checkpointing"):
        all_running_again(model)
    assert not could_checkpoint(model), "so a plan chooses no layers of it"
    assert not PilotOptions(budget="300k params").chooses_layers


@pytest.mark.long
def test_what_holds_without_layers_run_again_is_not_refused_with_them(tmp_path: Path) -> None:
    """One layer that runs again is there as a whole in the backward pass, beside its input."""

    def begin(budget: str, again: Any) -> Any:
        trainer = trainer_of(tmp_path, layers=1, max_steps=2)
        options = {"gradient_checkpointing": again, "measure_every": 1, "schedule": SCHEDULE}
        callback = rankpilot.attach(trainer, "signal-mean", budget, **options)
        trainer.train()
        assert not any(checkpointed(trainer))
        assert max(peak for _, peak in callback.peaks) <= callback.limit

    def least(again: Any) -> float:
        with pytest.raises(BudgetError, match="smallest that works is") as caught:
            begin("2KiB step", again)
        number, unit = caught.value.args[0].partition("works is '")[2].split()[:2]
        assert unit == "KiB"
        return float(number)

    assert least("auto") <= least(False), "activations may run again"
    for factor in (1.0, 1.05):
        begin(f"{factor * least(False)} KiB step", "auto")


# Where it is expected to pay ------------------------------------------------------------------------------------------

MANY = 6


def run(
    folder: Path, worth: float, budget: str, *, checkpoint: bool = True, bounds: Bounds | None = None
) -> tuple[rankpilot.RankPilotCallback, dict[str, int]]:
    effects = np.array([worth if "without adapter" in name else 0.0 for name in FEATURES])
    policy = PlanChooser("likes depth", worth=PlanWorth(effects, np.zeros((len(effects), len(effects))), 0.0))
    schedule = rankpilot.DecisionSchedule(probe_steps=3, fractions=(0.0,))
    trainer = trainer_of(folder, layers=MANY, dropout=0.0)
    options = {"gradient_checkpointing": "auto" if checkpoint else False, "exact_savers": False, "bounds": bounds}
    options |= {"schedule": schedule, "measure_every": 1}
    callback = rankpilot.attach(trainer, policy, budget, parts="off", **options)
    trainer.train()
    assert max(peak for _, peak in callback.peaks) <= callback.limit
    return callback, ranks_of(trainer.model)


@pytest.mark.parametrize("worth", first_cases(1, [0.3, 0.005]))
def test_a_budget_is_kept_by_layers_that_run_again(
    tmp_path: Path, worth: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        callback, ranks = run(tmp_path / "run", worth, "50%")
    (layers,) = [row.message for row in caplog.records if row.message.startswith("step 0: ")]
    assert f"0 of {MANY} layers use gradient checkpointing" not in layers
    assert 0 not in ranks.values()
    logged = DecisionLog(tmp_path / "run" / "decisions").logged(0)
    assert redecide(logged, callback.pilot.policy).differences == (), "it is logged as it was priced"
    assert [*ranks.values()] == logged.rank_after.tolist()


def test_where_plain_lora_fits_no_layer_runs_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        run(tmp_path / "may", 0.3, "105%")
    (line,) = [row.message for row in caplog.records if row.message.startswith("step 0: ")]
    assert f"0 of {MANY} layers use gradient checkpointing" in line


class Exactly:
    """Wants one rank on all modules, no more and no less, at each decision."""

    name = "exactly"

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def decide(self, observation: Observation) -> Decision:
        count = len(observation.names)
        return Decision(np.full(count, self.rank), np.zeros(count), exact=True)


def told_of(folder: Path, policy: Any, budget: str, **options: Any) -> tuple[Any, list[str]]:
    """A run of `STEPS` steps, and what it told of its decisions."""
    trainer, told = trainer_of(folder, **options), list[str]()
    callback = rankpilot.attach(trainer, policy, budget, parts="off", exact_savers=False, schedule=SCHEDULE)
    callback.pilot.journal.tell = told.append
    trainer.train()
    return callback, told


@pytest.mark.parametrize(("layers", "budget"), first_cases(2, [(4, "100%"), (2, "75%"), (2, "102%"), (3, "130%")]))
def test_an_exact_decision_that_fits_is_taken_as_it_is(tmp_path: Path, layers: int, budget: str) -> None:
    callback, told = told_of(tmp_path, Exactly(8), budget, layers=layers)
    assert all(set(record.rank_after.tolist()) == {8} for record in DecisionLog(tmp_path / "decisions").read())
    assert callback.predictions[-1][1] <= callback.limit
    assert not any("could not get exactly" in line for line in told)


def test_an_exact_decision_that_does_not_fit_is_only_lowered_and_told(tmp_path: Path) -> None:
    _, told = told_of(tmp_path, Exactly(24), "100%", layers=2)
    records = DecisionLog(tmp_path / "decisions").read()
    assert all(0 < record.rank_after.max() <= 24 for record in records)
    lowered = [int((record.rank_after < 24).sum()) for record in records]
    assert all(lowered)
    assert [line for line in told if "could not get exactly" in line] == [
        f"step {record.step}: {count} modules could not get exactly the decided rank within the budget, "
        "the bounds and the largest rank change; the nearest plan is used."
        for record, count in zip(records, lowered, strict=True)
    ]


@pytest.mark.parametrize("rule", ["uniform", "top-down"])
def test_rules_that_read_no_signals_leave_layers_alone_where_plain_lora_fits(tmp_path: Path, rule: str) -> None:
    callback, told = told_of(tmp_path, rule, "100%")
    lines = [line for line in told if "use gradient checkpointing" in line]
    assert len(lines) == len(SCHEDULE.fractions)
    assert all(f"0 of {LAYERS} layers use gradient checkpointing" in line for line in lines)
    assert callback.applier.adapters.meter.age.min() > 0, "no signal is measured"


@pytest.mark.long
def test_where_nothing_fits_without_layers_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bounds ask for adapters in all layers, though nothing is expected of them."""
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        _, ranks = run(tmp_path / "run", 0.0, "45%", bounds={"q_proj": (1, 8)})
    (line,) = [row.message for row in caplog.records if row.message.startswith("step 0: ")]
    assert f"0 of {MANY} layers use gradient checkpointing" not in line
    assert all(rank > 0 for name, rank in ranks.items() if name.endswith("q_proj"))
    with pytest.raises(BudgetError, match="is too small for"):
        run(tmp_path / "cannot", 0.0, "45%", checkpoint=False, bounds={"q_proj": (1, 8)})


@pytest.mark.long
def test_the_fewest_bytes_need_all_layers_run_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The budget is the same share of plain LoRA's bytes; losses stay, and the line tells what is given for it."""
    costs = {}
    for checkpointing in ("auto", False):
        trainer = trainer_of(tmp_path / str(checkpointing), layers=MANY, dropout=0.0)
        options = {"gradient_checkpointing": checkpointing, "exact_savers": False, "measure_every": 1, "parts": "off"}
        callback = rankpilot.attach(trainer, budget="120%", goal="bytes", **options)
        with caplog.at_level(logging.INFO, logger="rankpilot"):
            trainer.train()
        peaks, limit = [peak for _, peak in callback.peaks], callback.limit
        costs[checkpointing] = (
            callback.pilot.predictions[0][1],
            max(peaks),
            limit,
            trainer.state.log_history[0]["loss"],
        )
    again, none = costs["auto"], costs[False]
    assert (again[2], again[3]) == (none[2], pytest.approx(none[3], rel=1e-6))
    assert again[0] < 0.8 * none[0]
    assert again[1] == pytest.approx(again[0], rel=0.02)
    assert caplog.text.count("gradient_checkpointing=False takes less time, but more memory.") == 1
