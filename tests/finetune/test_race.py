"""Races of learning rates: each lane is the run that it would be alone, and the best one goes on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rankpilot.common.errors import ConfigError
from rankpilot.finetune.callback import attach
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.race import RateRace
from rankpilot.finetune.step.run import TrainingRun
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..families import FAMILIES, Family
from .trainer_kinds import classification, sft

RATES = (5e-3, 1e-2, 2e-2)
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


def race_of(pilot: RankPilot) -> RateRace | None:
    assert pilot._piloted is not None
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


@pytest.mark.parametrize("family", OF_SIX, ids=lambda family: family.name)
def test_lanes_of_a_trainer_are_runs_alone(family: Family, tmp_path: Path) -> None:
    compare(partial(trainer_of, family, tmp_path))


def loop(family: Family, rate: float, raced: Any = None) -> tuple[dict[int, list[float]], list[torch.Tensor]]:
    """Losses by lane, and the weights at the end, of a loop with dropout, clipping and a schedule."""
    model = family.model(lora_dropout=0.1).train()
    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    loader: Any = DataLoader(rows_of(family), 4, collate_fn=stacked)  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 4, 1.0))
    pilot = RankPilot(budget="400%", learning_rate=raced)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=STEPS))
    torch.manual_seed(3)
    losses: dict[int, list[float]] = {}
    race = race_of(pilot)
    for step, batch in zip(range(STEPS), repeated(loader), strict=False):
        pilot.before_step(batch)
        for _ in pilot.lanes():
            lane = race.lanes.turn if race and race.lanes else 0
            loss = model(**batch).loss
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


@pytest.mark.parametrize("family", OF_SIX, ids=lambda family: family.name)
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


def test_a_loop_without_turns_is_told(make_llama: Any, llama_batch: Any) -> None:
    model = make_llama().train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    rows = [{name: values[0] for name, values in llama_batch.items()}] * 8
    loader: Any = DataLoader(rows, 4, collate_fn=stacked)  # type: ignore[arg-type]
    pilot = RankPilot(budget="400%", learning_rate="race")
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=STEPS))
    batch = next(iter(loader))
    pilot.before_step(batch)
    loss = model(**batch).loss
    loss.backward()
    pilot.before_optimizer_step(loss)
    optimizer.step()
    with pytest.raises(ConfigError, match=r"for _ in pilot\.lanes"):
        pilot.after_step()
    pilot.break_off()
