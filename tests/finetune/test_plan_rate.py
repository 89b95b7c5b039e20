"""The learning rate follows the plan: in loops, under schedules, in the Trainer and its log, and after a resume."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
import torch
from rankpilot.common.errors import ConfigError, RunFolderError
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.observation import Observation
from rankpilot.decide.plan.rate import RULE, InitialLoss, RateRange
from rankpilot.decide.plan.worth import KNOWN
from rankpilot.decide.policy import Decision
from rankpilot.decide.rate_control import SHORTEST
from rankpilot.decide.settings import ONCE
from rankpilot.finetune import plan_rate
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.plan_rate import hidden_width, rate_by_rule
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.optimizer_state import unwrap_optimizer
from rankpilot.lora.targets import find_target_modules
from rankpilot.study.run_data import read_run
from rankpilot.study.verdict import verdict
from torch.utils.data import DataLoader
from transformers import LlamaConfig, TrainerCallback, default_data_collator

from .tiny_runs import Run, adapted, counting, load_loop, save_loop, take_step
from .tiny_runs import llama_config as llama_config
from .trainer_kinds import dpo

RATE = 1e-2
ROWS: Any = counting()

QUARTER = 0.25**RULE.of_share
"""The factor of a plan that adapts a quarter of the modules, or fewer."""


@dataclass(frozen=True)
class Gives:
    """The policy that gives some of seven modules rank 8."""

    count: int = 7
    name: str = "gives"

    def decide(self, observation: Observation) -> Decision:
        ranks = np.where(np.arange(len(observation.names)) < self.count, 8, 0).astype(np.int64)
        return Decision(ranks, np.zeros(len(ranks)), exact=True)


class Loop:
    """A loop with a head that trains whole, at a rate of its own, and a schedule."""

    def __init__(self, config: LlamaConfig, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        self.model = adapted(
            config, modules_to_save=["lm_head"], target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
        )
        self.model.train()
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.groups = [[p for name, p in named if ("lora_" in name) is mine] for mine in (True, False)]
        self.optimizer: Any = kind(
            [{"params": self.groups[0]}, {"params": self.groups[1], "lr": 3e-3}],
            lr=RATE,  # type: ignore[call-arg]
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.loader = DataLoader(ROWS, 4, collate_fn=default_data_collator)
        self.real: list[list[float]] = []
        self.optimizer.register_step_pre_hook(
            lambda *_: self.real.append([g["lr"] for g in self.optimizer.param_groups])
        )

    def train(self, policy: Any, **options: Any) -> RankPilot:
        pilot = RankPilot(policy, "400%", schedule=ONCE, **options)
        pilot.begin(TrainingRun.of_loader(self.model, self.optimizer, self.loader, total_steps=3))
        # Ours is the last hook from here on, so that it sees what the step sees.
        self.optimizer.register_step_pre_hook(
            lambda *_: self.real.append([g["lr"] for g in self.optimizer.param_groups])
        )
        self.real.clear()
        for batch, _ in zip(self.loader, range(3), strict=False):
            take_step(pilot, self.optimizer, batch, lambda rows: self.model(**rows).loss)
            assert self.optimizer.param_groups[0]["lr"] == self.schedule.get_last_lr()[0], "the user's, between steps"
            self.schedule.step()
        pilot.finish()
        return pilot


def real_rates(loop: Loop) -> list[list[float]]:
    """The rates of each step as the optimizer saw them."""
    return loop.real[1::2]


def test_a_plan_of_fewer_modules_trains_faster_and_other_groups_as_before(llama_config: LlamaConfig) -> None:
    loop = Loop(llama_config)
    pilot = loop.train(Gives(1))
    factor = pilot._piloted.rate.of_plan.factor
    assert factor == pytest.approx(QUARTER, rel=1e-6), "a quarter of the modules"
    expected = [[RATE * factor / (1 + step), 3e-3 / (1 + step)] for step in range(3)]
    assert real_rates(loop) == [pytest.approx(rates) for rates in expected]
    assert len(loop.optimizer._optimizer_step_pre_hooks) == 2, "ours is gone"


@pytest.mark.parametrize(("policy", "options"), [(Gives(), {}), (Gives(1), {"keep_rate": True})])
def test_plain_lora_and_kept_rates_train_as_without_us(
    llama_config: LlamaConfig, policy: Gives, options: dict[str, Any]
) -> None:
    loop = Loop(llama_config)
    assert loop.train(policy, **options)._piloted.rate.of_plan.factor == 1.0
    assert real_rates(loop) == [pytest.approx([RATE / (1 + step), 3e-3 / (1 + step)]) for step in range(3)]


def test_the_rule_decides_where_it_is_asked_to(llama_config: LlamaConfig) -> None:
    told: list[str] = []
    loop = Loop(llama_config)
    pilot = loop.train(Gives(), learning_rate="auto", tell=told.append)
    assert pilot._piloted.rate.of_plan is not None
    initial = pilot._piloted.rate.of_plan.initial
    assert initial is not None
    assert initial.loss == pytest.approx(math.log(llama_config.vocab_size), rel=0.05), "nothing is learned yet"
    assert initial.tokens == 4 * 12
    rule = rate_by_rule(loop.model, find_target_modules(loop.model), 3, initial)
    assert hidden_width(loop.model) == llama_config.hidden_size
    assert pilot.rates == pytest.approx((rule, rule)), "a run of three steps cannot be controlled"
    assert real_rates(loop)[0] == pytest.approx([rule, 3e-3])
    ends = RateRange.around(rule)
    assert any(all(f"{end:.2g}" in line for end in (rule, ends.low, ends.middle, ends.high)) for line in told)


@pytest.mark.parametrize(
    ("options", "controls"),
    [({}, True), ({"control": True}, True), ({"control": False}, False)],
)
def test_a_rate_by_rule_begins_low_and_is_controlled(
    llama_config: LlamaConfig, options: dict[str, Any], controls: bool
) -> None:
    loop, told = Loop(llama_config), list[str]()
    pilot = RankPilot(Gives(), "400%", schedule=ONCE, learning_rate="auto", tell=told.append, **options)
    pilot.begin(TrainingRun.of_loader(loop.model, loop.optimizer, loop.loader, total_steps=SHORTEST))
    assert pilot._piloted.rate.of_plan is not None
    rule = pilot._piloted.rate.of_plan.rule
    assert rule is not None
    begins = RateRange.around(rule).low if controls else rule
    assert begins <= rule
    assert pilot.rates == pytest.approx((begins, begins))
    assert (pilot._piloted.rate.control is not None) is controls
    assert any("control will raise it" in line for line in told) is controls
    pilot.finish()


@pytest.mark.parametrize("first_rows", [(math.nan, [(11, 12)]), (math.inf, [(11, 12)]), (0.7, [(1, 40)])])
def test_a_loss_that_tells_nothing_counts_as_a_typical_one(
    llama_config: LlamaConfig, first_rows: tuple[float, list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not finite, and one of labels, of which steps tell nothing either: the run begins at the rule."""
    monkeypatch.setattr(TrainingRun, "read_first_rows", lambda *_: first_rows)
    loop = Loop(llama_config)
    pilot = RankPilot(Gives(), "400%", schedule=ONCE, learning_rate="auto")
    pilot.begin(TrainingRun.of_loader(loop.model, loop.optimizer, loop.loader, total_steps=SHORTEST))
    rule = rate_by_rule(loop.model, find_target_modules(loop.model), SHORTEST)
    assert pilot.rates == pytest.approx((rule, rule))
    pilot.finish()


def test_a_loss_of_0_before_training_is_told(llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingRun, "read_first_rows", lambda *_: (0.0, [(11, 12)]))
    loop, told = Loop(llama_config), list[str]()
    loop.train(Gives(), tell=told.append, learning_rate="auto")
    assert any("The loss before training is 0" in line for line in told)


def test_no_plan_of_a_wide_model_trains_faster_than_plain_lora(
    llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KNOWN, "width", (8, 16))
    assert Loop(llama_config).train(Gives(1))._piloted.rate.of_plan.factor == 1, "a quarter, of a wider model"


def test_a_rate_far_from_the_rule_is_told(llama_config: LlamaConfig) -> None:
    told: list[str] = []
    loop = Loop(llama_config)
    for group in loop.optimizer.param_groups:
        group["initial_lr"] = 2e-5
    loop.train(Gives(), tell=told.append)
    assert any("times below the rule's rate" in line for line in told)


def test_what_the_rule_cannot_know_is_refused(llama_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is for Adam"):
        Loop(llama_config, torch.optim.SGD).train(Gives(), learning_rate="auto")
    loop = Loop(llama_config)
    for group in loop.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.0
    with pytest.raises(ConfigError, match="which is 0"):
        loop.train(Gives(), learning_rate="auto")
    for rate, learning_rate in itertools.product((math.nan, math.inf), ("auto", None)):
        loop = Loop(llama_config)
        for group in loop.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = rate
        with pytest.raises(ConfigError, match="so nothing would train"):
            loop.train(Gives(), learning_rate=learning_rate)
    for rate in (math.nan, -1e-3):
        loop = Loop(llama_config)
        last = loop.groups[0].pop()
        loop.optimizer.param_groups[0]["params"] = loop.groups[0]
        loop.optimizer.add_param_group({"params": [last], "lr": rate, "initial_lr": rate})
        with pytest.raises(ConfigError, match=f"is {rate} in group 2"):
            loop.train(Gives())
    with monkeypatch.context() as patched:
        patched.setattr(plan_rate, "_WIDTHS", ("breadth",))
        with pytest.raises(ConfigError, match="none of breadth"):
            Loop(llama_config).train(Gives(), learning_rate="auto")
        assert Loop(llama_config).train(Gives(1))._piloted.rate.of_plan.factor == pytest.approx(QUARTER), (
            "a plan's factor needs no width"
        )
    with pytest.raises(ConfigError, match=r"TrainingArguments.learning_rate"):
        RankPilot(Gives(), learning_rate=1e-3)


@pytest.mark.parametrize("still", [0, 1])
def test_adapters_at_a_rate_of_0_beside_others_are_told(llama_config: LlamaConfig, still: int) -> None:
    model, told = adapted(llama_config), list[str]()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters[:4]}, {"params": parameters[4:]}], lr=RATE)
    optimizer.param_groups[still]["lr"] = 0.0
    loader = DataLoader(ROWS, 4, collate_fn=default_data_collator)
    pilot = RankPilot(Gives(), "400%", schedule=ONCE, learning_rate="auto", tell=told.append)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=3))
    assert any(f"in optimizer group {still} have a learning rate of 0" in line for line in told)
    assert pilot.rates[0] == pytest.approx(RATE * pilot._piloted.rate.of_plan.factor)
    pilot.finish()


@pytest.mark.parametrize("rule", [None, "auto"])
def test_the_trainer_logs_the_real_rate_and_goes_on_with_it(
    llama_config: LlamaConfig, tmp_path: Path, rule: Any
) -> None:
    def new(**options: Any) -> Run:
        options |= {"policy": Gives(1), "save_steps": 2, "learning_rate_option": rule}
        return Run(tmp_path, llama_config, budget="400%", schedule=ONCE, **options)

    whole = new().train()
    factor = whole.pilot.pilot._piloted.rate.of_plan.factor
    assert factor == pytest.approx(QUARTER * (1 if rule is None else whole.pilot.pilot.rates[0] / RATE))
    logged = [row["learning_rate"] for row in whole.trainer.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([factor * RATE * share for share in (1, 0.75, 0.5, 0.25)], rel=1e-6)
    (record,) = DecisionLog(tmp_path / "decisions").read()
    assert record.rates == pytest.approx((whole.pilot.pilot.rates[0], factor * RATE))
    assert "The plan was trained at a peak learning rate of" in " ".join(verdict(read_run(tmp_path)).results)
    again = new().train(2)
    assert again.pilot.pilot._piloted.rate.of_plan.factor == factor
    whole.assert_same_adapter(again)
    other = new(keep_rate=True)
    with pytest.raises(RunFolderError, match="keep_rate"):
        other.train(2)


class Writes(TrainerCallback):
    """Writes a rate at an event of the second step, and notes those that the optimizer's steps have."""

    def __init__(self, event: str) -> None:
        self.event, self.real = event, list[float]()
        setattr(self, event, self.write)

    def on_train_begin(self, *event: Any, **objects: Any) -> None:
        optimizer: Any = unwrap_optimizer(objects["optimizer"])
        optimizer.register_step_pre_hook(lambda *_: self.real.append(optimizer.param_groups[0]["lr"]))

    def write(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == 1:
            objects["optimizer"].param_groups[0]["lr"] = 0.5


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_pre_optimizer_step", "on_epoch_end"])
@pytest.mark.parametrize("rule", [None, "auto"])
def test_a_rate_that_a_callback_writes_is_read_as_any_of_plain_lora(
    llama_config: LlamaConfig, tmp_path: Path, rule: Any, event: str
) -> None:
    """The rule chooses the peak of the schedule, and nothing else."""
    writes = Writes(event)
    options: dict[str, Any] = {"policy": Gives(1), "learning_rate_option": rule, "callbacks": (writes,)}
    run = Run(tmp_path, llama_config, budget="400%", schedule=ONCE, data=counting(4), **options).train()
    peak = run.pilot.pilot.rates[1]
    expected = [peak, 0.5 * QUARTER, peak / 2, peak / 4]
    assert writes.real == pytest.approx(expected, rel=1e-6)
    logged = [row["learning_rate"] for row in run.trainer.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx(expected, rel=1e-6)


def test_a_resumed_loop_that_sets_its_rates_goes_on_at_the_same_factor(
    llama_config: LlamaConfig, tmp_path: Path
) -> None:
    factors = []
    for resumes in (False, True):
        loop = Loop(llama_config)
        for group in loop.optimizer.param_groups:  # as a loop without a scheduler has them
            group.pop("initial_lr")
        pilot = RankPilot(Gives(1), "400%", schedule=ONCE, learning_rate="auto")
        run = TrainingRun.of_loader(loop.model, loop.optimizer, loop.loader, total_steps=9)
        if resumes:
            load_loop(pilot, run, tmp_path / "checkpoint")
        else:
            pilot.begin(run)
            loop.optimizer.param_groups[0]["lr"] = RATE / 10
            save_loop(pilot, run, tmp_path / "checkpoint")
        factors.append(pilot._piloted.rate.of_plan.factor)
        pilot.finish()
    assert factors[0] == factors[1] != 1


def test_losses_that_compare_answers_need_a_rate_of_their_own(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, max_steps=1)
    rankpilot.attach(trainer, Gives(1), budget="400%", schedule=ONCE, learning_rate="auto")
    with pytest.raises(ConfigError, match="preference losses"):
        trainer.train()


def test_a_plan_ahead_tells_its_rate(llama_config: LlamaConfig) -> None:
    model = adapted(llama_config)
    loader = DataLoader(ROWS, 4, collate_fn=default_data_collator)
    plan = rankpilot.static_plan(model, loader, Gives(1), budget="400%", schedule=ONCE, total_steps=200)
    initial = InitialLoss(math.log(llama_config.vocab_size), 4 * 12)
    rule = rate_by_rule(model, find_target_modules(model), 200, initial)
    assert plan.learning_rate == pytest.approx(rule * QUARTER, rel=0.03), "nothing corrects it"
    options: dict[str, Any] = {"budget": "400%", "schedule": ONCE}
    given = rankpilot.static_plan(model, loader, Gives(1), learning_rate=1, **options)
    assert given.learning_rate == pytest.approx(QUARTER)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    given = rankpilot.static_plan(model, loader, Gives(), optimizer=optimizer, **options)
    assert given.learning_rate == pytest.approx(3e-3)
    for wrong in ({"learning_rate": "1e-4"}, {"learning_rate": 0.0}, {"learning_rate": 1e-3, "optimizer": optimizer}):
        with pytest.raises(ConfigError, match="a number above 0, and left out if an optimizer is given"):
            rankpilot.static_plan(model, loader, Gives(1), **options, **wrong)
