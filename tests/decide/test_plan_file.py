"""A plan as a file that a person edits: what is read, what is refused, and a real fine-tune under it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankpilot
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.agents.policy_file import load_policy, policy_schedule
from rankpilot.common.errors import BudgetError, ConfigError, UnknownNameError
from rankpilot.decide.observation import Observation
from rankpilot.decide.policy import decided_plan
from rankpilot.decide.rules import PlanFile, plan_text, read_plan
from rankpilot.decide.settings import ONCE
from rankpilot.lora.peft_config import adapter_ranks
from rankpilot.lora.targets import find_target_modules
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

RANKS = {
    "embed_tokens": 1,
    "model.layers.0.self_attn.q_proj": 0,
    "model.layers.0.mlp.up_proj": 4,
    "model.layers.10.self_attn.q_proj": 8,
}


def write(path: Path, ranks: Mapping[str, int], **fields: Any) -> Path:
    path.write_text(yaml.safe_dump({**fields, "modules": dict(ranks)}))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.yaml"


# The file -------------------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(plan_text(RANKS, 3 * 2**20, 4 * 2**20, "bytes", "mine.yaml"))
    assert read_plan(path) == RANKS
    lines = path.read_text().splitlines()
    assert "  model.layers.0: {self_attn.q_proj: 0, mlp.up_proj: 4}" in lines, "a line for each layer"
    assert "It is predicted to take 3 MiB; the budget is 4 MiB." in lines[0]
    assert any("Allowed ranks: 0, 1, 2, 4, 8, 12" in line for line in lines)


@pytest.mark.parametrize(
    "text",
    [
        "a.0.q: 4\na.0.v: 0\n",
        "modules:\n  a.0.q: 4\n  a.0.v: 0\n",
        "modules:\n  a:\n    0: {q: 4, v: 0}\n",
        '{"modules": {"a.0": {"q": 4, "v": 0}}}',
    ],
    ids=["flat", "modules", "nested", "json"],
)
def test_forms_that_a_person_may_write(path: Path, text: str) -> None:
    path.write_text(text)
    assert read_plan(path) == {"a.0.q": 4, "a.0.v": 0}
    assert load_policy(str(path)) == PlanFile(path)
    assert policy_schedule(path).fractions == ONCE.fractions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "as YAML"),
        ("", r"plan\.yaml is empty\. A plan needs `modules`\."),
        ("[1, 2]", "is not a mapping"),
        ("modules:\n", "contains no ranks. Under `modules`, set the rank of each target module"),
        ("a: -1", "The rank of 'a' in .* must be a whole number of at least 0; got -1"),
        ("a: 2.5", "must be a whole number of at least 0; got 2.5"),
        ("a: '8'", "got '8'"),
        ("a:\n", "got None"),
        ("a: &x {b: 1}\nc: *x\n", "references .* are not supported"),
    ],
)
def test_files_that_hold_no_plan(path: Path, content: str, message: str) -> None:
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        load_policy(str(path))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_missing_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "plan.yml"
    with pytest.raises(ConfigError, match=r"Plan .*plan\.yml does not exist\. `rankpilot plan .*` writes one"):
        load_policy(path)
    with path.open("wb") as stream:
        stream.truncate(2**31)  # sparse: it takes no room
    with pytest.raises(ConfigError, match=r"exceeds [0-9,]+ bytes"):
        load_policy(path)


def test_when_a_file_is_read(path: Path) -> None:
    write(path, RANKS, read_at=[0, 0.25, 0.5])
    assert policy_schedule(path).fractions == policy_schedule(PlanFile(path)).fractions == (0, 0.25, 0.5)
    for wrong in (0.5, "start", [0.5], [0, 2], ["a"], None):
        write(path, RANKS, read_at=wrong)
        with pytest.raises(
            ConfigError, match=r"read_at in .*plan\.yaml must be an ascending list of shares of the run, from 0"
        ):
            policy_schedule(path)


# Its decision ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def observation(make_observation: Callable[..., Observation]) -> Observation:
    low, high = np.zeros(8, dtype=np.int64), np.full(8, 32)
    high[1], low[2] = 4, 2
    return make_observation(8, low=low, high=high)


def plan_of(observation: Observation, **changed: int) -> dict[str, int]:
    return {**dict.fromkeys(observation.names, 2), **{f"layers.0.{name}": rank for name, rank in changed.items()}}


def test_the_decision_is_exactly_the_file(path: Path, observation: Observation) -> None:
    write(path, ranks := plan_of(observation, m0=0, m3=8))
    policy = PlanFile(path)
    assert policy.name == "plan.yaml"
    decision = policy.decide(observation)
    plan = decided_plan(observation.problem, decision)
    assert dict(zip(observation.names, plan.ranks.tolist(), strict=True)) == ranks, "nothing is spent beside"
    write(path, plan_of(observation, m0=1, m3=8))
    assert policy.decide(observation).ranks[0] == 1, "read anew"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"m3": 5}, r"'layers\.0\.m3' cannot have rank 5\. Allowed: 0, 1, 2, 4, 8, 12, 16, 24, 32\."),
        ({"m3": 64}, r"cannot have rank 64\. Allowed: 0, .*, 32\."),
        ({"m1": 8}, r"'layers\.0\.m1' cannot have rank 8\. Allowed: 0, 1, 2, 4\."),
        ({"m2": 1}, r"'layers\.0\.m2' cannot have rank 1\. Allowed: 2, 4, .*, 32\."),
    ],
)
def test_ranks_that_a_module_cannot_have(path, observation, changed, message):
    policy = PlanFile(write(path, plan_of(observation, **changed)))
    with pytest.raises(ConfigError, match=message):
        policy.decide(observation)


def test_names_that_do_not_match(path: Path, observation: Observation) -> None:
    write(path, plan_of(observation, m9=4))
    with pytest.raises(UnknownNameError, match=r"Unknown target module 'layers.0.m9'\. Did you mean: 'layers.0.m\d'"):
        PlanFile(path).decide(observation)
    write(path, dict.fromkeys(observation.names[1:], 2))
    with pytest.raises(ConfigError, match=r"has no rank for 1 of 8 modules, including 'layers\.0\.m0'"):
        PlanFile(path).decide(observation)


def test_a_plan_above_the_budget(path: Path, observation: Observation) -> None:
    cost = 8.0 * observation.problem.cost.per_rank.sum()
    limit, eights = observation.problem.limit, dict.fromkeys(observation.names, 8)
    free = replace(observation, problem=replace(observation.problem, high=None, low=None))
    policy = PlanFile(write(path, eights))
    words = (
        rf"plan\.yaml is predicted to take {cost:,.0f} parameters, {cost - limit:,.0f} parameters above the budget of "
        rf"{limit:,.0f} parameters\. Lower some ranks, or raise the budget\."
    )
    with pytest.raises(BudgetError, match=words):
        policy.decide(free)


def test_a_later_decision(path: Path, observation: Observation, caplog: pytest.LogCaptureFixture) -> None:
    """A person may move modules as far as they like; what cannot be used does not end a run that has trained."""
    write(path, ranks := plan_of(observation, m3=16))
    far = replace(observation.problem, ranks=np.full(8, 2), max_step=policy_schedule(path).reach(1))
    decision = PlanFile(path).decide(replace(observation, problem=far))
    assert decided_plan(far, decision).ranks.tolist() == [*ranks.values()], "as far as a person wants"
    assert not caplog.records
    policy, later = PlanFile(path), replace(observation, problem=replace(far, max_step=2))
    for text, message in (
        (path.read_text(), "changes a module by more than 2 rungs in one decision. Drop `schedule`"),
        ("modules: {layers.0.m0", "as YAML"),
        ("modules: {layers.0.m9: 1}", "Unknown target module 'layers.0.m9'"),
        (yaml.safe_dump(dict.fromkeys(observation.names, 32)), "'layers.0.m1' cannot have rank 32"),
    ):
        path.write_text(text)
        kept = policy.decide(later)
        assert decided_plan(later.problem, kept).ranks.tolist() == [2] * 8
        assert message in caplog.messages[-1]
        assert "so the ranks are kept" in caplog.messages[-1]


# A run ----------------------------------------------------------------------------------------------------------------

ROWS = Dataset.from_list(
    [{"input_ids": ids, "labels": ids} for ids in [[i * j % 64 for i in range(8)] for j in range(16)]]
)


@pytest.fixture
def make_trainer(llama_config: LlamaConfig, tmp_path: Path) -> Callable[..., Trainer]:
    def make(*callbacks: TrainerCallback) -> Trainer:
        set_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        model = get_peft_model(LlamaForCausalLM(llama_config), config)
        arguments = TrainingArguments(
            tmp_path / "out", max_steps=4, per_device_train_batch_size=4, save_strategy="no", report_to=[],
            use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=ROWS, callbacks=list(callbacks))

    return make


class Person(TrainerCallback):  # type: ignore[misc]
    """Edits the file after the second step."""

    def __init__(self, path: Path, ranks: Mapping[str, int]) -> None:
        self.path, self.ranks = path, ranks

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == 2:
            write(self.path, self.ranks, read_at=[0, 0.5])


def test_a_person_decides_before_a_run_and_within_it(make_trainer, llama_config, tmp_path, path):
    config = rankpilot.allocate(make_trainer(), policy="signal-mean", budget="60%", exact_savers=False, output=path)
    planned = read_plan(path)
    assert config.rank_pattern
    assert max(planned.values()) > 4
    with pytest.raises(ConfigError, match=r"plan\.yaml already exists"):
        rankpilot.allocate(make_trainer(), output=path)

    first = {name: min(rank, 4) for name, rank in planned.items()}
    most = max(planned, key=lambda name: planned[name])
    second = first | {most: 0}
    write(path, first, read_at=[0, 0.5])
    trainer = make_trainer(Person(path, second))
    callback = rankpilot.attach(trainer, path, budget="60%", exact_savers=False)
    trainer.train()
    log = rankpilot.DecisionLog(tmp_path / "out" / "decisions")
    assert [log.logged(number).plan() for number in range(len(log))] == [first, second]
    assert [step for step, _ in callback.predictions] == [0, 2]
    assert all(cost <= callback.limit for _, cost in callback.predictions)
    assert adapter_ranks(find_target_modules(trainer.model)) == second
    trainer.model.save_pretrained(tmp_path / "adapter")
    set_seed(0)
    plain = PeftModel.from_pretrained(LlamaForCausalLM(llama_config), tmp_path / "adapter")
    assert len([name for name, _ in plain.named_parameters() if "lora_A" in name]) == sum(map(bool, second.values()))
