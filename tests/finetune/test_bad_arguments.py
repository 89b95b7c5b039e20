"""Arguments that cannot be used: each is one error of rankpilot that shows what was given, before anything changes."""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot import DecisionSchedule, RankPilot, TrainingRun, last_checkpoint, memory_of
from rankpilot.agents.policy_file import GroupNetwork, NetworkConfig, save_policy
from rankpilot.common.errors import ConfigError, RankPilotError, RunFolderError
from rankpilot.common.files import write_text
from rankpilot.data.assets import fetch_asset
from rankpilot.decide.policy import Decision, asked, decision_from_plan
from rankpilot.decide.rules import GivenPlan
from rankpilot.finetune.options import FinetuneConfig, PilotOptions
from rankpilot.finetune.trainer import new_arguments
from transformers import LlamaConfig

from .test_pilot import SCHEDULE, Loop


def of_trainer(setting: str) -> object:
    """The Trainer's arguments with a setting more."""
    return new_arguments(FinetuneConfig("m", "d", trainer=(setting,)), "classification", Path("x"))


LADDER = r"the ladder 0, 1, 2, 4, 8, 12"

CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "a budget of a truth": (
        lambda: PilotOptions(budget=lambda: True).budget_read,
        "budget function returned True. Cannot read",
    ),
    "a budget in a list": (
        lambda: PilotOptions(budget=lambda: [1]).budget_read,
        r"budget function returned \[1\]. Cannot read",
    ),
    "an infinite budget": (
        lambda: PilotOptions(budget=lambda: math.inf).budget_read,
        "budget function returned inf. Cannot read",
    ),
    "a name of no text": (lambda: PilotOptions(bounds={5: 8}), "Bounds must be .* by module name .*; got 5: 8"),
    "a bound of a truth": (lambda: PilotOptions(bounds={"q_proj": True}), "Bounds must be .*; got 'q_proj': True"),
    "a bound below 0": (lambda: PilotOptions(bounds={"q_proj": -1}), "Bounds must be .*; got 'q_proj': -1"),
    "a bound of text": (lambda: PilotOptions(bounds={"q_proj": "8"}), "Bounds must be .*; got 'q_proj': '8'"),
    "a bound that falls": (
        lambda: PilotOptions(bounds={"q_proj": (4, 2)}),
        r"Bounds must be .*; got 'q_proj': \(4, 2\)",
    ),
    "a bound of three": (lambda: PilotOptions(bounds={"v": (1, 2, 3)}), r"Bounds must be .*; got 'v': \(1, 2, 3\)"),
    "a log of a number": (lambda: PilotOptions(log=5), "log must be a folder path or None; got 5"),
    "a log without a name": (lambda: PilotOptions(log=""), "log must be a folder path or None; got ''"),
    "measured at a truth": (lambda: PilotOptions(measure_every=True), "measure_every must be .*; got True"),
    "no model": (
        lambda: TrainingRun.of_loader(None, None, None, total_steps=1),
        "model must be a torch.nn.Module; got None",
    ),
    "no optimizer": (
        lambda: TrainingRun.of_loader(torch.nn.Linear(1, 1), None, None, total_steps=1),
        "optimizer must be a torch.optim.Optimizer; got None",
    ),
    "a card of a number": (lambda: memory_of("qwen3-8b", 5), "A card must be its name or its memory .*; got 5"),
    "a model of a number": (lambda: memory_of(5, "T4"), "model must be .* a transformers configuration; got 5"),
    "an asset of a number": (lambda: fetch_asset(5), "Unknown asset 5"),
    "no folder": (lambda: last_checkpoint(None), "output folder must be a path; got None"),
    "no schedule": (lambda: DecisionSchedule((2.0,)), r"probe_steps, .* whole numbers from 1 to 10,000; got \(2.0,\)"),
    "fractions of a number": (lambda: DecisionSchedule(fractions=0.5), "fractions must be .*; got 0.5"),
    "steps without end": (
        lambda: FinetuneConfig("m", "d", steps=10**30),
        "steps .* 1,000,000,000, .*; got 1000",
    ),
    "epochs without end": (
        lambda: FinetuneConfig("m", "d", epochs=1e300),
        r"epochs must be .* at most 1,000,000,000, .*; got 1e\+300",
    ),
    "accumulation without end": (
        lambda: FinetuneConfig("m", "d", accumulation=10**30),
        "accumulation 1 to 16,777,216 .*; got 0, 1000",
    ),
    "rows without end": (
        lambda: FinetuneConfig("m", "d", eval_batch_size=10**30),
        "eval_batch_size must be .*; got 1000",
    ),
    "a warm-up of text": (
        lambda: of_trainer("warmup_steps=abc"),
        "warmup_steps must be a number, .*; got 'warmup_steps=abc'",
    ),
    "a decay of text": (
        lambda: of_trainer("weight_decay=abc"),
        "weight_decay must be a number, .*; got 'weight_decay=abc'",
    ),
    "a switch of text": (
        lambda: of_trainer("logging_first_step=abc"),
        "logging_first_step must be a number, true or false",
    ),
    "fractions of text": (lambda: DecisionSchedule(fractions=(0.0, "a")), r"fractions must be .*; got \(0.0, 'a'\)"),
}


def test_one_error_that_shows_what_was_given() -> None:
    for call, told in CALLS.values():
        with pytest.raises(RankPilotError, match=told) as error:
            call()
        assert "\n" not in str(error.value)


def wants(*ranks: Any) -> SimpleNamespace:
    """A policy that wants these ranks of the modules in turn."""

    def decide(observation: Any) -> Decision:
        wanted = np.resize(np.asarray(ranks), len(observation.names))
        return Decision(wanted, np.zeros(len(wanted)), exact=True)

    return SimpleNamespace(name="mine", decide=decide)


NO_RANKS = "'mine' decided .*"


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (wants(0), "'mine' decided .* at least one above 0, or nothing would be trained"),
        (wants(8, -1), NO_RANKS + "-1"),
        (wants(8.5), NO_RANKS + r"8\.5"),
        (wants(math.nan), NO_RANKS + "nan"),
        (wants(True), NO_RANKS + "True"),
        (SimpleNamespace(name="mine", decide=lambda seen: 8), "'mine' decided 8. A rankpilot Decision needs"),
        (SimpleNamespace(name="mine", decide=lambda seen: decision_from_plan(np.ones(2))), "for each of 8 modules"),
    ],
)
def test_ranks_that_no_policy_can_want(make_observation: Callable[..., Any], policy: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        asked(policy, make_observation(8))


def test_a_plan_of_zeros_changes_nothing(llama_config: LlamaConfig, tmp_path: Path) -> None:
    loop = Loop(llama_config, tmp_path / "log")
    before = loop.ranks
    with pytest.raises(ConfigError, match="at least one above 0"):
        RankPilot(GivenPlan("mine", dict.fromkeys(before, 0)), "80%", schedule=SCHEDULE).begin(loop.run)
    assert loop.ranks == before


def test_a_rank_that_no_module_can_have_is_rounded_down_with_a_line(llama_config: LlamaConfig, tmp_path: Path) -> None:
    loop, lines = Loop(llama_config, tmp_path / "log"), list[str]()
    RankPilot(wants(7), "400%", schedule=SCHEDULE, tell=lines.append).begin(loop.run)
    assert set(loop.ranks.values()) == {4}
    assert any(line.startswith("mine requests rank 7, rounded down to " + LADDER) for line in lines)


def test_a_loss_that_is_no_number(llama_config: LlamaConfig, tmp_path: Path) -> None:
    loop = Loop(llama_config, tmp_path / "log")
    loop.pilot.begin(loop.run)
    loop.pilot.before_step(loop.batch)
    loop.loss(loop.batch).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(ConfigError, match="loss of a step must be a number or a tensor; got 'x'"):
        loop.pilot.before_optimizer_step("x")  # type: ignore[arg-type]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may have more than 4 KiB."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_cannot_be_written(llama_config: LlamaConfig, tmp_path: Path, request: Any) -> None:
    """Whether Python, safetensors or torch writes it."""
    loop = Loop(llama_config, tmp_path / "log")
    loop.pilot.begin(loop.run)
    loop.train(range(1))
    request.getfixturevalue("small_files")
    for save in (
        lambda: write_text(tmp_path / "text", "x" * 5000),
        lambda: save_policy(tmp_path / "policy", GroupNetwork(NetworkConfig(width=8)), SCHEDULE, {}),
    ):
        with pytest.raises(RunFolderError, match=r"Cannot write .*\. Check the path, .*free disk space\."):
            save()
    assert {path.name for path in tmp_path.iterdir()} <= {"log", "policy"}, "no part of a file is left"
