"""Races of learning rates: each lane is the run that it would be alone, and the best one goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rankpilot.common.errors import ConfigError
from rankpilot.common.text import format_bytes
from rankpilot.decide.rate_control import MOST_TIME
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.callback import attach
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.race import RateRace
from rankpilot.finetune.step.lanes import copy_bytes
from rankpilot.finetune.step.run import TrainingRun
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, get_cosine_schedule_with_warmup

from ..cases import first_cases
from ..families import FAMILIES, Family
from . import ddp_run
from .several import in_processes
from .trainer_kinds import classification, dpo, sft

RATES = (5e-3, 1e-2, 2e-2)
LOW = (2e-4, 4e-4, 8e-4)
"""Of these, the highest wins."""

STEPS = 60
RACED = 12
"""A race of three lanes ends there at the latest: two fifths of the steps, by two more lanes."""

OF_SIX = [family for family in FAMILIES if family.name in ("llama", "bert", "gpt2", "t5", "vit", "mixtral")]


def rows_of(family: Family) -> list[dict[str, torch.Tensor]]:
    batch = family.batch()
    count = len(next(iter(batch.values())))
    return [{name: values[row % count] for name, values in batch.items()} for row in range(24)]


def stacked(rows: Any) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def weights_of(model: Any) -> list[torch.Tensor]:
    return [each.detach().clone() for each in model.parameters() if each.requires_grad]


def race_of(pilot: RankPilot) -> RateRace:
    assert pilot._piloted is not None
    assert pilot._piloted.rate.race is not None
    return pilot._piloted.rate.race


class Weights(TrainerCallback):
    """Keeps the trained weights of all lanes at the end of some step, and may stop the run there."""

    def __init__(self, trainer: Trainer, step: int, pilot: RankPilot | None = None, *, stops: bool = False) -> None:
        self.trainer, self.step, self.pilot, self.stops = trainer, step, pilot, stops
        self.found: list[list[torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step != self.step:
            return
        race = race_of(self.pilot) if self.pilot else None
        control.should_training_stop |= self.stops
        if race is None:
            self.found = [weights_of(objects["model"])]
            return
        assert race.lanes is not None, "the race is still on"
        for lane in race.lanes.numbers:
            race.lanes._put_in(lane)
            self.found.append(weights_of(objects["model"]))
        race.lanes._put_in(race.lanes.live)


def compare(make: Any, *, at: int = 8, **options: Any) -> None:
    """All lanes at a step have the weights of runs alone, each at its rate, and the winner's run ends as that alone."""
    trainer = make(learning_rate=RATES[1])
    pilot = attach(trainer, budget="400%", learning_rate=RATES, **options).pilot
    seen = Weights(trainer, at, pilot)
    trainer.add_callback(seen)
    trainer.train()
    assert len(seen.found) == len(RATES)
    assert pilot.rates is not None
    for rate, own in zip(RATES, seen.found, strict=True):
        alone = make(learning_rate=rate)
        attach(alone, budget="400%", **options)
        wins = pilot.rates[1] == pytest.approx(rate)
        kept = Weights(alone, at, stops=not wins)
        alone.add_callback(kept)
        alone.train()
        assert all(map(torch.equal, own, kept.found[0])), rate
        assert not wins or all(map(torch.equal, weights_of(trainer.model), weights_of(alone.model)))


def trainer_of(family: Family, folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": []}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "cosine", "warmup_steps": 4}
    args = TrainingArguments(str(folder), **settings | options)
    return Trainer(family.model(lora_dropout=0.1), args, train_dataset=rows_of(family), data_collator=stacked)


@pytest.mark.parametrize("family", first_cases(2, OF_SIX), ids=lambda family: family.name)
def test_lanes_of_a_trainer_are_runs_alone(family: Family, tmp_path: Path) -> None:
    compare(partial(trainer_of, family, tmp_path))


def begun_loop(
    rate: float = RATES[1], steps: int = STEPS, family: Family = OF_SIX[0], **options: Any
) -> tuple[RankPilot, Any, Any, Any]:
    """A pilot that has begun, with the model, optimizer and loader of its loop."""
    model = family.model(lora_dropout=0.1).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate)
    loader: Any = DataLoader(rows_of(family), 4, collate_fn=stacked)  # type: ignore[arg-type]
    pilot = RankPilot(**{"budget": "400%", "learning_rate": RATES} | options)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=steps))
    torch.manual_seed(3)
    return pilot, model, optimizer, loader


def loop(family: Family, rate: float, raced: Any = None) -> tuple[dict[int, list[float]], list[torch.Tensor]]:
    """Losses by lane, and the weights at the end, of a loop with dropout, clipping and a schedule."""
    pilot, model, optimizer, loader = begun_loop(rate, family=family, learning_rate=raced)
    weights = [each for each in model.parameters() if each.requires_grad]
    scheduler = get_cosine_schedule_with_warmup(optimizer, 4, STEPS)
    losses: dict[int, list[float]] = {}
    race = race_of(pilot) if raced else None
    for step, batch in zip(range(STEPS), repeated(loader), strict=False):
        pilot.before_step(batch)
        for inputs in pilot.lanes(batch):
            lane = race.lanes.turn if race and race.lanes else 0
            loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 0.5)
            pilot.before_optimizer_step(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step < RACED:
                losses.setdefault(lane, []).append(float(loss.detach()))
        scheduler.step()
        pilot.after_step()
    pilot.finish()
    return losses, weights_of(model)


def repeated(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


@pytest.mark.parametrize("family", first_cases(1, OF_SIX), ids=lambda family: family.name)
def test_lanes_of_a_loop_are_runs_alone(family: Family) -> None:
    raced, ended = loop(family, RATES[1], RATES)
    ends = []
    for lane, rate in enumerate(RATES):
        alone, weights = loop(family, rate)
        assert raced[lane] == alone[0][: len(raced[lane])]
        ends.append(all(map(torch.equal, ended, weights)))
    assert len(raced) == len(RATES)
    assert any(ends)


def test_lanes_of_trl_with_accumulation_and_parts(tmp_path: Path) -> None:
    options = {"max_steps": STEPS, "warmup_steps": 4, "gradient_accumulation_steps": 2}
    compare(partial(sft, tmp_path, **options))


def test_lanes_with_a_new_head(tmp_path: Path) -> None:
    compare(partial(classification, tmp_path, max_steps=STEPS, warmup_steps=4, max_grad_norm=0.1))


def test_a_loop_without_turns_is_told() -> None:
    pilot, model, optimizer, loader = begun_loop(learning_rate="race")
    batch = next(iter(loader))
    pilot.before_step(batch)
    loss = model(**batch).loss
    loss.backward()
    pilot.before_optimizer_step(loss)
    optimizer.step()
    with pytest.raises(ConfigError, match=r"for inputs in pilot\.lanes"):
        pilot.after_step()


# What happens meanwhile -----------------------------------------------------------------------------------------------


def step_of(pilot: RankPilot, model: Any, optimizer: Any, batch: Any, scheduler: Any = None) -> None:
    pilot.before_step(batch)
    for inputs in pilot.lanes(batch):
        loss = model(**inputs).loss
        loss.backward()
        pilot.before_optimizer_step(loss)
        optimizer.step()
        optimizer.zero_grad()
    if scheduler:
        scheduler.step()
    pilot.after_step()


@pytest.mark.parametrize("saved", first_cases(1, [7, 14]))
def test_a_resumed_race_goes_on_as_it_would(saved: int, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": saved, "learning_rate": LOW[1]}
    whole = trainer_of(OF_SIX[1], tmp_path / "whole", **options)
    attach(whole, budget="400%", learning_rate=LOW)
    whole.train()
    again = trainer_of(OF_SIX[1], tmp_path / "again", **options)
    pilot = attach(again, budget="400%", learning_rate=LOW).pilot
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{saved}"))
    assert all(map(torch.equal, weights_of(whole.model), weights_of(again.model)))
    race = race_of(pilot)
    assert race.lanes is None
    assert pilot.rates == (pytest.approx(LOW[2]), pytest.approx(LOW[2]))
    assert saved > RACED or len(race._losses[0]) >= RACED


def test_lanes_of_two_processes_whose_ranks_change_are_those_of_one(tmp_path: Path) -> None:
    schedule = DecisionSchedule(fractions=(0.0, 0.1, 0.15, 0.4, 0.6), max_step=10, probe_steps=2)
    raced = {"learning_rate": (1e-3, 2e-3, 4e-3), "schedule": schedule}
    setting = ddp_run.Setting(tmp_path, STEPS, callback=raced, arguments={"warmup_steps": 4})
    (one,) = in_processes(1, ddp_run.train, replace(setting, folder=tmp_path / "one"))
    several = in_processes(2, ddp_run.train, replace(setting, folder=tmp_path / "several"))
    assert several[0]["digests"] == several[1]["digests"]
    assert several[0]["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert several[0]["ranks"] == one["ranks"]


def test_new_ranks_reach_all_lanes_and_keep_what_they_learned() -> None:
    pilot, model, optimizer, loader = begun_loop()
    batches = repeated(loader)
    for batch, _ in zip(batches, range(5), strict=False):
        step_of(pilot, model, optimizer, batch)
    race, batch = race_of(pilot), next(batches)
    assert race.lanes is not None

    def outputs() -> list[torch.Tensor]:
        assert race.lanes is not None
        found = []
        for lane in race.lanes.numbers:
            race.lanes._put_in(lane)
            with torch.no_grad():
                found.append(model.eval()(**batch).logits)
        race.lanes._put_in(race.lanes.live)
        model.train()
        return found

    before = outputs()
    assert not torch.allclose(before[0], before[2])
    assert pilot.applier is not None
    pilot.take(dict.fromkeys(pilot.applier.names, 8) | dict.fromkeys(pilot.applier.names[:4], 12))
    for old, new in zip(before, outputs(), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-4, atol=1e-5)
    for lane in race.lanes.numbers:
        race.lanes._put_in(lane)
        assert [target.rank for target in pilot.applier.targets][:5] == [12, 12, 12, 12, 8]
    race.lanes._put_in(race.lanes.live)
    for batch, _ in zip(batches, range(RACED), strict=False):
        step_of(pilot, model, optimizer, batch)
    assert race.lanes is None
    pilot.finish()


def test_lanes_take_the_bytes_that_were_told_and_give_them_back() -> None:
    lines: list[str] = []
    pilot, model, optimizer, loader = begun_loop(tell=lines.append)
    race = race_of(pilot)
    assert race.lanes is not None
    told = 2 * copy_bytes(race._run, race._targets) + copy_bytes(race._run, race._targets, steps=False)
    assert any(f"{format_bytes(told)} of main memory" in line for line in lines)
    for batch, _ in zip(repeated(loader), range(3), strict=False):
        step_of(pilot, model, optimizer, batch)
    kept = [*race.lanes._parked.values(), race.lanes.start]
    tensors = [tensor for parked in kept if parked for tensor in parked.values]
    states = [state for parked in kept if parked for state in parked.state._before.values() if state]
    tensors += [value for state in states for value, _ in state.values()]
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(told, rel=0.005)
    for batch, _ in zip(repeated(loader), range(RACED), strict=False):
        step_of(pilot, model, optimizer, batch)
    assert race.lanes is None
    assert pilot._piloted is not None
    assert pilot._piloted.finite.control is None, "after the race no step waits for the device"
    for step, predicted, measured in pilot.checks:
        assert measured <= predicted * 1.03, f"step {step}: lanes do not count in a step"
    pilot.finish()


def test_a_lane_out_of_memory_is_repeated() -> None:
    pilot, model, optimizer, loader = begun_loop()
    batches = repeated(loader)
    for batch, _ in zip(batches, range(3), strict=False):
        step_of(pilot, model, optimizer, batch)
    batch, failed = next(batches), False
    pilot.before_step(batch)
    turns = []
    while True:
        try:
            for inputs in pilot.lanes(batch):
                if len(turns) == 1 and not failed:
                    failed = True
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                loss = model(**inputs).loss
                loss.backward()
                pilot.before_optimizer_step(loss)
                optimizer.step()
                optimizer.zero_grad()
                turns.append(pilot.beside)
            break
        except torch.OutOfMemoryError as error:
            pilot.out_of_memory(error)
    pilot.after_step()
    assert turns == [True, True, False], "the first lane is not trained twice"
    for batch, _ in zip(batches, range(RACED), strict=False):
        step_of(pilot, model, optimizer, batch)
    pilot.finish()


def test_each_lane_keeps_the_state_of_the_scaler() -> None:
    pilot, model, optimizer, loader = begun_loop()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    scales = []
    for batch, _ in zip(repeated(loader), range(6), strict=False):
        pilot.before_step(batch)
        for inputs in pilot.lanes(batch, scaler):
            loss = model(**inputs).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            pilot.before_optimizer_step(loss)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        pilot.after_step()
    assert scales == [scale for scale in (4.0, 8.0, 8.0, 16.0, 16.0, 32.0) for _ in range(3)]
    pilot.break_off()


@pytest.mark.parametrize("rates", [(1e-3, 1e20), (1e-3, 1e20, 1e21)])
def test_a_lane_that_diverges_leaves_even_if_it_is_the_run(rates: tuple[float, ...]) -> None:
    pilot, model, optimizer, loader = begun_loop(learning_rate=rates)
    for batch, _ in zip(repeated(loader), range(STEPS - 1), strict=False):
        step_of(pilot, model, optimizer, batch)
    pilot.finish()
    assert pilot.rates == (pytest.approx(1e-3), pytest.approx(1e-3))


# What is refused, or steps aside --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("fast", '"race 5" for more rates'),
        ("race 1", '"race 5" for more rates'),
        ((1e-4,), "2 to 7 different rates"),
        ((1e-4, 1e-4), "2 to 7 different rates"),
        ((1e-4, -1.0), "2 to 7 different rates"),
        ((1e-4, "2e-4"), "2 to 7 different rates"),
    ],
)
def test_other_values_are_refused(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RankPilot(learning_rate=given)
    with pytest.raises(ConfigError, match="Drop one of the two"):
        RankPilot(learning_rate="race", control=True)


def test_preferences_are_refused(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, max_steps=STEPS)
    attach(trainer, learning_rate="race")
    with pytest.raises(ConfigError, match="compare or generate answers"):
        trainer.train()


def test_a_policy_that_steers_is_refused() -> None:
    with pytest.raises(ConfigError, match="policies that steer the rate"):
        begun_loop(policy="rate", budget="100%")


def test_without_room_the_run_trains_at_the_middle_of_its_rates() -> None:
    pilot, *_ = begun_loop(rate=1.0)
    race = race_of(pilot)
    alone = RateRace(race._run, race._targets, race._rate, [0.001, 0.002, 0.004], 0.0, 0, race._journal)
    pilot.break_off()
    alone.begin(None)
    assert alone.lanes is None
    assert race._rate.moved == 0.002
    state = alone.state()
    race._rate.move(1.0)
    alone.begin(state)
    assert race._rate.moved == 0.002, "also after a resume"


def test_ranks_that_change_before_a_lane_joins_end_the_race() -> None:
    """It could not repeat the steps at the ranks that they had."""
    length = 240
    pilot, model, optimizer, loader = begun_loop(learning_rate=LOW, rate=LOW[1], steps=length)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 16, length)
    race, batches = race_of(pilot), repeated(loader)
    while race._called is None:
        step_of(pilot, model, optimizer, next(batches), scheduler=scheduler)
    assert pilot.applier is not None
    pilot.take(dict.fromkeys(pilot.applier.names, 8))
    step_of(pilot, model, optimizer, next(batches), scheduler=scheduler)
    assert race.lanes is None
    assert pilot.rates is not None
    assert pilot.rates[0] == pytest.approx(LOW[2])
    pilot.break_off()


def test_batches_too_large_to_keep_are_not_kept() -> None:
    pilot, model, optimizer, loader = begun_loop()
    race, batches = race_of(pilot), repeated(loader)
    assert race.lanes is not None
    race._spare = 2 * sum(tensor.nbytes for tensor in next(batches).values())
    for kept in (1, 2, 3, 0):
        step_of(pilot, model, optimizer, next(batches))
        assert len(race._past) == kept
    assert race.lanes.start is None
    pilot.break_off()


def test_a_short_run_does_not_race(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = classification(tmp_path, max_steps=4)
    pilot = attach(trainer, learning_rate=(1e-3, 2e-3, 4e-3)).pilot
    trainer.train()
    assert "Learning rates do not race: 4 steps are too few. The run trains at 0.002." in capsys.readouterr().out
    assert pilot.rates is not None
    assert pilot.rates[1] == pytest.approx(2e-3)


def test_lanes_fit_a_budget_of_the_whole_device(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    pilot, *_ = begun_loop(tell=lines.append)
    race = race_of(pilot)
    one = copy_bytes(race._run, race._targets)
    pilot.break_off()
    taken = pilot.predictions[0][1]
    frozen = 4 * sum(each.numel() for each in race._run.model.parameters() if not each.requires_grad)
    for further, told in ((1.5, "no main memory for all 3"), (0.5, "no main memory for a second copy")):
        lines.clear()
        pilot, *_ = begun_loop(tell=lines.append, budget=f"{int(frozen + taken + further * one)}B")
        assert any(told in line for line in lines), lines
        pilot.break_off()


@pytest.mark.parametrize(
    ("kind", "rates", "lane", "won"),
    first_cases(1, [("loop", LOW, 3, 16e-4), ("trainer", (0.8, 1.6, 3.2), -1, 0.8), ("trainer", LOW, 3, 16e-4)]),
)
def test_a_lane_beyond_the_outermost_is_the_run_it_would_be_alone(
    kind: str, rates: tuple[float, ...], lane: int, won: float, tmp_path: Path
) -> None:
    """With a new warm-up as long as that of the schedule, so that the first look comes while there is time for more."""
    length = 240

    def trained(rate: float, raced: Any) -> tuple[Any, list[torch.Tensor]]:
        own: dict[str, Any] = {"max_steps": length, "learning_rate": rate, "warmup_steps": 16}
        if kind == "trainer":
            trainer = trainer_of(OF_SIX[0], tmp_path, **own)
            pilot = attach(trainer, budget="400%", learning_rate=raced).pilot
            trainer.train()
            return pilot, weights_of(trainer.model)
        pilot, model, optimizer, loader = begun_loop(learning_rate=raced, rate=rate, steps=length)
        scheduler = get_cosine_schedule_with_warmup(optimizer, 16, length)
        for batch, _ in zip(repeated(loader), range(length), strict=False):
            step_of(pilot, model, optimizer, batch, scheduler=scheduler)
        pilot.finish()
        return pilot, weights_of(model)

    pilot, ended = trained(rates[1], rates)
    race = race_of(pilot)
    assert set(race._factors) == {0, 1, 2, lane}
    assert pilot.rates is not None
    assert pilot.rates[1] == pytest.approx(won)
    assert race._further <= MOST_TIME * length
    assert all(map(torch.equal, ended, trained(won, None)[1]))
