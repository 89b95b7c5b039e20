"""A budget that moves while a run goes on: plans shrink before a step that would not fit, and come back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from rankpilot.common.errors import BudgetError, ConfigError
from rankpilot.cost.record.peak_meter import PeakMeter
from rankpilot.finetune import elastic
from rankpilot.finetune.step.plan_keeper import GOOD_STEPS
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.finetune.step.shortage import Shortage
from torch.utils.data import DataLoader
from transformers import LlamaConfig, Trainer, default_data_collator

from benchmarks.elastic import ON_CUDA, Other, other_process

from ..cases import first_cases
from .tiny_runs import (
    PLAIN,
    Recorder,
    adapted,
    arguments,
    counting,
    load_loop,
    logits,
    ranks_of,
    save_loop,
    take_step,
)

MIB, CPU = 2**20, torch.device("cpu")


class Loop:
    """A loop of one's own on a Llama of three layers, with its pilot."""

    def __init__(
        self, config: LlamaConfig, budget: Any, *, rows: int = 8, device: torch.device = CPU, **options: Any
    ) -> None:
        layers = deepcopy(config)
        layers.num_hidden_layers = 3
        self.model, self.told, self.device = adapted(layers).to(device), list[str](), device
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-3)
        data = counting(5 * rows)
        loader = DataLoader(data, batch_size=rows, collate_fn=default_data_collator)  # type: ignore[arg-type]
        self.batches = cycle(list(loader))
        options |= {"budget": budget, "tell": self.told.append, "measure_every": 1, "exact_savers": False}
        self.pilot = rankpilot.RankPilot(**options)
        self.run = TrainingRun.of_loader(self.model, self.optimizer, loader, total_steps=100)
        self.pilot.begin(self.run)

    def steps(self, count: int) -> list[float]:
        """Losses of so many steps; each is within the limit of its moment."""
        losses = []
        for _ in range(count):
            batch = {name: values.to(self.device) for name, values in next(self.batches).items()}
            losses.append(take_step(self.pilot, self.optimizer, batch, lambda batch: self.model(**batch).loss))
            assert self.pilot.peaks[-1][1] <= self.pilot.limit
        return losses

    @property
    def checkpointed(self) -> int:
        return int(self.pilot.figures().get("checkpointed_layers", 0))


@pytest.fixture
def loop(llama_config: LlamaConfig) -> Iterator[Callable[..., Loop]]:
    loops: list[Loop] = []

    def make(budget: Any = "100%", **options: Any) -> Loop:
        loops.append(Loop(llama_config, budget, **options))
        return loops[-1]

    yield make
    for each in loops:
        each.pilot.finish()


def test_a_lower_budget_counts_from_the_next_step_on_and_all_comes_back(
    loop: Callable[..., Loop], caplog: pytest.LogCaptureFixture
) -> None:
    run = loop()
    first = next(line for line in run.told if line.startswith("The budget is "))
    assert "100% of" in first
    before, at_first = run.pilot.limit, ranks_of(run.model)
    run.steps(2)
    run.pilot.set_budget("60%")
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        run.steps(2)
    assert run.pilot.limit == pytest.approx(0.6 * before)
    assert run.checkpointed > 0
    assert ranks_of(run.model) == at_first, "layers run again before ranks fall"
    assert "there is room for" in caplog.text
    run.pilot.set_budget("22%")
    run.steps(1)
    assert sum(ranks_of(run.model).values()) < sum(at_first.values())
    run.pilot.set_budget("100%")
    run.steps(GOOD_STEPS + 1)
    assert ranks_of(run.model) == at_first
    assert run.checkpointed == 0


def test_ranks_that_fall_for_memory_leave_the_function(loop: Callable[..., Loop]) -> None:
    """The loss of the step after a change goes on from where it was."""
    run, other = loop(gradient_checkpointing=False), loop(gradient_checkpointing=False)
    ends = run.steps(30)[-1], other.steps(12)[-1]
    other.pilot.set_budget("60%")
    assert other.steps(18)[-1] == pytest.approx(ends[0], rel=0.05)
    assert sum(ranks_of(other.model).values()) < sum(ranks_of(run.model).values())


@pytest.mark.parametrize(
    ("shares", "decides", "lost"),
    first_cases(1, [((0.9,), False, 1e-3), ((0.9, 0.8), False, 0.5), ((0.9,), True, 1.0)]),
    ids=["one fall", "a second moves ranks between modules", "ranks were given by hand since"],
)
def test_what_is_cut_from_ranks_comes_back(
    loop: Callable[..., Loop],
    monkeypatch: pytest.MonkeyPatch,
    shares: tuple[float, ...],
    decides: bool,
    lost: float,
) -> None:
    """As on a GPU, in two parts. Nothing is learned in between, so that what comes back is what was cut."""
    monkeypatch.setattr(Shortage, "_keeps_cuts", True)
    run = loop(gradient_checkpointing=False)
    run.steps(8)
    learned, limit = logits(run.model.train()), run.pilot.limit
    run.optimizer.param_groups[0]["lr"] = 0.0
    for share in shares:
        run.pilot.set_budget(share)
        run.steps(1)
        assert run.pilot.limit == pytest.approx(share * limit)
    short = logits(run.model.train())
    if decides:
        run.pilot.take(ranks_of(run.model))
    off = [(short - learned).norm()]
    for share in (0.95, 1.0):
        run.pilot.set_budget(share)
        run.steps(GOOD_STEPS + 1)
        back = logits(run.model.train())
        off.append((back - learned).norm())
    assert (min(ranks_of(run.model).values()) < 8) == decides
    assert off[2] <= (1 + 1e-3) * lost * off[0]
    assert (off[1] < 0.95 * off[0]) != decides, "a part comes back where there is room for that"
    assert torch.allclose(back, short, atol=1e-5) == decides


def test_shares_are_those_of_the_first_plan_whatever_came_between(loop: Callable[..., Loop]) -> None:
    """Layers that are checkpointed since, and what an error took, play no part."""
    run = loop()
    run.steps(2)
    first = run.pilot.limit
    run.pilot.set_budget(f"{int(0.6 * first)} bytes step")
    run.steps(1)
    assert run.checkpointed > 0
    lacking = next(run.batches)
    run.pilot.before_step(lacking)
    run.pilot.out_of_memory(torch.OutOfMemoryError("as on a GPU"))
    take_step(run.pilot, run.optimizer, lacking, lambda batch: run.model(**batch).loss)
    run.pilot.set_budget("90%")
    run.steps(2 * GOOD_STEPS + 2)
    assert run.pilot.limit == pytest.approx(0.9 * first)
    of_bytes = loop("1MiB step")
    of_bytes.pilot.set_budget("90%")
    of_bytes.steps(1)
    assert of_bytes.pilot.limit == pytest.approx(0.9 * first)


def test_a_lower_limit_under_which_the_plan_fits_counts(loop: Callable[..., Loop]) -> None:
    """Also where a plan waits to grow: a larger batch shrinks it."""
    run = loop(gradient_checkpointing=False)
    run.steps(1)
    run.pilot.set_budget(0.6)
    run.steps(1)
    lower = run.pilot.predictions[-1][1] + 1
    assert lower < run.pilot.limit
    run.pilot.set_budget(f"{lower:.0f} bytes step")
    run.steps(1)
    assert run.pilot.limit == int(f"{lower:.0f}")


def test_a_resumed_run_does_not_count_what_it_holds_as_taken(
    loop: Callable[..., Loop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device whose free bytes are what the adapters and the optimizer's state leave."""
    runs: list[Loop] = []

    def held(device: torch.device) -> int:
        states = runs[-1].optimizer.state.values() if runs else ()
        return sum(value.nbytes for state in states for value in state.values())

    monkeypatch.setattr(elastic, "held_bytes", held)
    for module in ("finetune.elastic", "cost.budget", "finetune.before_training"):
        monkeypatch.setattr(f"rankpilot.{module}.free_bytes", lambda device: 3_000_000 - held(device))
    runs.append(loop("auto"))
    runs[-1].steps(3)
    limit, folder = runs[-1].pilot.limit, tmp_path / "checkpoint"
    save_loop(runs[-1].pilot, runs[-1].run, folder)
    runs.append(loop("auto"))
    load_loop(runs[-1].pilot, runs[-1].run, folder)
    runs[-1].steps(2)
    assert runs[-1].pilot.limit == limit


def test_a_function_is_asked_before_each_step(loop: Callable[..., Loop]) -> None:
    given = iter(["100%", "100%", *["100%"] * 3, *["50%"] * 30])
    budgets: list[str] = []

    def budget() -> str:
        budgets.append(next(given, "50%"))
        return budgets[-1]

    run = loop(budget)
    first = run.pilot.limit
    while budgets[-1] == "100%":
        run.steps(1)
    assert run.pilot.limit == pytest.approx(0.5 * first)


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (lambda: 1 / 0, ConfigError, r"failed with ZeroDivisionError: division by zero\. It must take no argument"),
        (lambda: "much", BudgetError, "returned 'much'. Cannot read the budget 'much'"),
        ("300k params", BudgetError, "Pass a budget in bytes"),
        ("1KiB step", BudgetError, "The smallest that works is"),
    ],
)
def test_budgets_that_cannot_be(loop: Callable[..., Loop], budget: Any, error: type[Exception], message: str) -> None:
    run = loop()
    with pytest.raises(error, match=message):  # noqa: PT012  (a function fails where it is given, a budget where it counts)
        run.pilot.set_budget(budget)
        run.steps(1)


def check_auto_follows(loop: Callable[..., Loop], other: Other, room: int, **options: Any) -> None:
    """Another process takes memory in mid-run and gives it back, of a device that leaves a run and it so many bytes."""
    device, taken = options.get("device", CPU), 0
    own_before = elastic.held_bytes(device)

    def leave(size: float) -> None:
        nonlocal taken
        if device.type == "cuda":
            torch.cuda.empty_cache()
        taken += int(elastic.free_bytes(device) + elastic.held_bytes(device) - own_before - size)
        other.take(taken)

    leave(room)
    run = loop("auto", **options)
    run.steps(3)
    ranks, cost = ranks_of(run.model), run.pilot.predictions[-1][1]
    leave(0.6 * cost / 0.9)
    run.steps(3)
    assert run.pilot.limit < cost
    assert run.checkpointed > 0 or ranks_of(run.model) != ranks
    leave(room)
    run.steps(GOOD_STEPS + 1)
    assert ranks_of(run.model) == ranks
    assert run.checkpointed == 0


def test_auto_follows_what_another_process_takes_and_gives_back(
    loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device of 64 MiB, which both processes share."""
    room = 64 * MIB
    for _ in range(2):  # what the first runs of a process load and allocate stays
        loop("auto", rows=128).steps(3)
    with other_process() as other:
        own_before = elastic.held_bytes(CPU)

        def free(device: torch.device) -> int:
            return room - (elastic.held_bytes(device) - own_before) - other.held()

        for module in ("finetune.elastic", "cost.budget", "finetune.before_training"):
            monkeypatch.setattr(f"rankpilot.{module}.free_bytes", free)
        check_auto_follows(loop, other, room, rows=128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, of which others leave 6 GiB")
def test_auto_follows_the_memory_of_a_gpu(loop: Callable[..., Loop]) -> None:
    """The other process leaves 4 GiB at first; a step takes 0.8, so that the allocator's blocks are small beside it."""
    device = torch.device("cuda", torch.cuda.current_device())
    with other_process(ON_CUDA) as other:
        check_auto_follows(loop, other, 4 * 2**30, rows=8192, device=device)


def test_what_a_function_took_comes_back_in_a_resumed_run(
    llama_config: LlamaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankpilot.finetune.step.plan_keeper.GOOD_STEPS", 1)

    def train(budget: Callable[[int], str], stops_at: int, **options: Any) -> list[int]:
        made = Trainer(adapted(llama_config), arguments(tmp_path / "run", save_steps=2), train_dataset=counting())
        sums: list[int] = []

        def ended(step: int) -> None:
            sums.append(sum(ranks_of(made.model).values()))
            if step == stops_at:
                raise KeyboardInterrupt

        rankpilot.attach(made, budget=lambda: budget(len(sums)), **PLAIN)
        made.add_callback(Recorder(ended))
        with suppress(KeyboardInterrupt):
            made.train(**options)
        return sums

    first, second, _ = train(lambda step: "50%" if step else "100%", stops_at=3)
    assert second < first
    assert train(lambda step: "100%", stops_at=0, resume_from_checkpoint=True) == [first, first]


def test_a_run_whose_step_leaves_no_plan_is_saved(
    llama_config: LlamaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeakMeter, "end", lambda self, step: 2**40 if step == 2 else None)
    made = Trainer(adapted(llama_config), arguments(tmp_path / "run"), train_dataset=counting())
    rankpilot.attach(made, budget="100%")
    with pytest.raises(BudgetError, match=r"no adapter fits.*Step 2 is saved in .*run\. Pass resume"):
        made.train()
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        (lambda: "1KiB step", BudgetError, "room for 1 KiB.*smallest that works"),
        (lambda: 1 / 0, ConfigError, "by zero"),
    ],
    ids=["no plan fits", "the function fails"],
)
def test_a_run_for_which_no_memory_is_left_is_saved(
    llama_config: LlamaConfig, tmp_path: Path, last: Callable[[], Any], error: type[Exception], message: str
) -> None:
    def trainer(budget: Any) -> Trainer:
        made = Trainer(adapted(llama_config), arguments(tmp_path / "run"), train_dataset=counting())
        rankpilot.attach(made, budget=budget, exact_savers=False)
        return made

    steps: list[int] = []
    short = trainer(lambda: "100%" if len(steps) < 2 else last())
    short.add_callback(Recorder(lambda now: steps.append(now)))
    with pytest.raises(error, match=rf"{message}.*Step 2 is saved in .*run\. Pass resume"):
        short.train()
    again = trainer("100%")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
