"""An agent in a real run: its folder is taken everywhere, ranks and rate change on the way, and the log tells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.agents.policy_file import GroupNetwork, NetworkConfig, load_policy, policy_of, read_card, save_policy
from rankpilot.cli import main as cli
from rankpilot.common.errors import ConfigError
from rankpilot.decide.groups import DOUBLE, GO_BACK, STEERING, GroupView, Steering
from rankpilot.decide.log import CONTROL, POLICY, DecisionLog
from rankpilot.decide.rate_control import CHANGES
from rankpilot.study.replay import replay
from rankpilot.study.why import explanations
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

STEPS = 60


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    """The folder of an agent that has learned nothing, and so does this and that."""
    torch.manual_seed(3)
    network = GroupNetwork(NetworkConfig(width=16))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4.0)
    return save_policy(tmp_path / "agent", network, STEERING, {})


def trainer(folder: Path, optim: str = "adamw_torch", **options: Any) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes))
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [{"input_ids": row, "labels": row} for row in np.random.default_rng(0).integers(0, 8, (64, 12)).tolist()]
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], use_cpu=True,
        optim=optim, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(get_peft_model(model, config), arguments, train_dataset=rows)


def steered(tmp_path: Path, policy: Any, **options: Any) -> DecisionLog:
    run = trainer(tmp_path / "run", **options)
    rankpilot.attach(run, policy=policy, budget="800 params", log=tmp_path / "log")
    run.train()
    return DecisionLog(tmp_path / "log")


def test_ranks_and_rate_change_on_the_way_and_the_log_says_so(agent: Path, tmp_path: Path) -> None:
    log = steered(tmp_path, str(agent), save_strategy="no")
    records = log.read()
    assert [record.step for record in records if not record.correction] == list(STEERING.steps(STEPS))
    assert all(record.predicted_cost <= 800 for record in records)
    later = records[1:]
    assert any((record.rank_after != record.rank_before).any() for record in later)
    moves = [json.loads(line) for line in (log.folder / CONTROL).read_text().splitlines()]
    assert [move["change"] for move in moves] == [CHANGES[record.decision.change] for record in later]
    assert any(move["change"] for move in moves)
    assert (log.folder / POLICY / "card.json").is_file()
    again = policy_of(log)
    assert again is not None
    assert all(each.same == len(each.other) for each in replay(log, again).agreements)
    told = explanations(log, again)
    assert "learning rate" in json.dumps(told)
    assert cli.run(["replay", str(log.folder)]) == 0
    assert cli.run(["study", str(log.folder), "--output", str(tmp_path / "page.html")]) == 0


def test_the_agent_that_ships_steers_a_run(tmp_path: Path) -> None:
    log = steered(tmp_path, "agent", save_strategy="no")
    moves = [json.loads(line) for line in (log.folder / CONTROL).read_text().splitlines()]
    grown = [(record.rank_after != record.rank_before).any() for record in log.read()[1:]]
    assert any(grown) or any(move["change"] for move in moves), "something changes in mid-run"
    assert read_card(log.folder / POLICY)["training"]["rule"] == "union"


class Doubles:
    """Doubles the rate at the third moment, and goes back at the fifth and, if it may, the seventh."""

    def act(self, view: GroupView) -> int:
        turn = STEERING.steps(STEPS).index(round(STEPS * view.run_feature("progress")))
        return {2: DOUBLE, 4: GO_BACK, 6: GO_BACK}.get(turn, 0)


def test_going_back_once_in_a_run_puts_adapters_back_at_a_quarter_of_the_rate(tmp_path: Path) -> None:
    log = steered(tmp_path, Steering("doubles", Doubles()), save_strategy="no")
    moves = [json.loads(line) for line in (log.folder / CONTROL).read_text().splitlines()]
    assert [move["change"] for move in moves][:4] == [0, 1, 0, -2]
    assert [move["undone"] for move in moves] == [at == 3 for at in range(len(moves))]
    assert moves[1]["rate"] == pytest.approx(2 * moves[0]["rate"], rel=1e-6)
    assert moves[3]["rate"] == pytest.approx(moves[0]["rate"] / 2, rel=1e-6)


def test_a_run_that_is_resumed_is_steered_as_the_whole_one(tmp_path: Path) -> None:
    whole = steered(tmp_path / "whole", "union", save_strategy="no")
    parts = trainer(tmp_path / "parts", save_strategy="steps", save_steps=11)
    rankpilot.attach(parts, policy="union", budget="800 params", log=tmp_path / "parts_log")

    class Stop(Exception):
        pass

    step = parts.training_step

    def stopping(*arguments: Any, **named: Any) -> Any:
        if parts.state.global_step > 25:
            raise Stop
        return step(*arguments, **named)

    parts.training_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stop):
        parts.train()
    rest = trainer(tmp_path / "parts", save_strategy="no")
    rankpilot.attach(rest, policy="union", budget="800 params", log=tmp_path / "parts_log")
    rest.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-22"))
    for one, two in zip(whole.read(), DecisionLog(tmp_path / "parts_log").read(), strict=True):
        assert one.step == two.step
        assert one.decision.change == two.decision.change
        np.testing.assert_array_equal(one.rank_after, two.rank_after)
        np.testing.assert_allclose(one.observation.run, two.observation.run, atol=1e-4)
        np.testing.assert_allclose(one.observation.modules, two.observation.modules, atol=1e-4)


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_other_optimizers_are_refused_before_anything_is_measured(agent: Path, tmp_path: Path, optim: str) -> None:
    with pytest.raises(ConfigError, match="policy 'agent' corrects the learning rate from the steps of Adam"):
        steered(tmp_path, load_policy(agent), optim=optim, save_strategy="no")
    assert not (tmp_path / "log").exists()
