"""Fine-tunes of a user's own model in the environment."""

from __future__ import annotations

import gc
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import gymnasium as gym
import numpy as np
import pytest
import rankpilot
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.cost.budget import reference_cost
from rankpilot.cost.cost import ByteCost, ParameterCost
from rankpilot.decide.policy import Decision
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.episode import Episode, probe_task, reference_of, rule_losses
from rankpilot.env.own_task import START_RANK, OwnTask
from rankpilot.env.proxy_task import ProxyTask, Reference
from rankpilot.env.rank_allocation import RankAllocationEnv
from rankpilot.errors import BudgetError, ConfigError, UnsupportedError
from rankpilot.plan.plan import uniform_ranks
from stable_baselines3.common.env_checker import check_env as sb3_check
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

MakeModel = Callable[..., PeftModel]
Rollout = Callable[..., list[tuple[Any, ...]]]
Rows = list[dict[str, Any]]
MODULES = 14
"""Two layers of seven linear ones."""


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Texts that count upwards, as lists: what a tokenizer gives."""
    starts = range(40)
    return [
        {"input_ids": [(start + i) % 64 for i in range(8)], "labels": [(start + i) % 64 for i in range(8)]}
        for start in starts
    ]


@pytest.fixture
def make_own(llama_config: LlamaConfig, rows: Rows) -> Callable[..., OwnTask]:
    def make(**options: Any) -> OwnTask:
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "model": options.pop("model", None) or LlamaForCausalLM(llama_config),
            "train": rows[:32],
            "held_out": rows[32:],
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
        }
        return OwnTask(**{**settings, **options})

    return make


@pytest.fixture
def quick() -> DecisionSchedule:
    return DecisionSchedule(probe_steps=2)


def test_checks_have_nothing_to_complain_of(make_own: Callable[..., OwnTask], quick: DecisionSchedule) -> None:
    env = gym.make(rankpilot.ENV_ID, task=make_own(), schedule=quick)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        sb3_check(env, warn=True)
        gymnasium_check(env.unwrapped, skip_render_check=True)


def test_an_episode_of_a_plain_model(
    make_own: Callable[..., OwnTask], quick: DecisionSchedule, rollout: Rollout, assert_same: Callable[..., None],
    info_keys: set[str], llama_config: LlamaConfig,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = make_own(model=model, name="mine", seed=3)
    env = RankAllocationEnv(task=task, schedule=quick, render_mode="ansi")
    assert env.max_modules == MODULES
    seen = rollout(env, seed=0)
    last = seen[-1][4]
    assert {row[4]["task"] for row in seen} == {"mine/3"}
    assert all(set(row[4]) == info_keys for row in seen)
    assert all(row[4]["cost"] <= row[4]["limit"] for row in seen[1:])
    assert last["step"] == 6
    assert np.isfinite(last["held_out_loss"])
    assert last["held_out_loss"] < np.log(64), "it learns"
    assert env.render().startswith("mine/3\nstep 6 of 6")
    assert_same(seen, rollout(env, seed=0))
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "the model's own weights stay"
    adapted, targets = task.adapted()
    assert len(targets) == MODULES
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert adapted is task.adapted()[0]


def test_an_episode_of_a_peft_model(
    make_own: Callable[..., OwnTask], make_bert: MakeModel, quick: DecisionSchedule, rollout: Rollout
) -> None:
    """With dropout, a classifier beside the adapter, and a target module of its own choice."""
    rows = [{"input_ids": [i % 64, (3 * i) % 64, 5, 7], "label": i % 3} for i in range(24)]
    model = make_bert()
    task = make_own(model=model, train=rows[:16], held_out=rows[16:], budget="60%")
    assert task.adapted()[0] is model
    frozen = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    env = RankAllocationEnv(task=task, schedule=quick)
    first, second = rollout(env, seed=1), rollout(env, seed=1)
    assert first[-1][4] == second[-1][4], "no dropout, and no trace of the episode before"
    assert any("modules_to_save" in name for name in frozen)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())


def test_its_own_modules_collator_and_loss(make_own: Callable[..., OwnTask], quick: DecisionSchedule) -> None:
    calls = []

    def collate(batch: Sequence[Any]) -> Mapping[str, torch.Tensor]:
        calls.append(len(batch))
        tokens = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": tokens, "labels": tokens.clone()}

    task = make_own(target_modules=("q_proj", "v_proj"), collate=collate)
    assert [target.name.rsplit(".", 1)[-1] for target in task.adapted()[1]] == ["q_proj", "v_proj"] * 2
    assert all(target.rank == START_RANK for target in task.adapted()[1])
    episode = Episode(task, quick)
    episode.apply(Decision(episode.observe().problem.ranks, np.zeros(4)))
    episode.advance()
    assert set(calls) == {2, 4}, "batches, and smaller ones of the probe"
    with torch.no_grad():
        expected = [float(task.model(**collate([row])).loss) for row in task.held_out]
    assert episode.held_out_loss() == pytest.approx(np.mean(expected), rel=1e-5), "whatever the last batch's size is"


def test_batches_go_through_the_data_in_passes(make_own: Callable[..., OwnTask]) -> None:
    seen: list[int] = []

    def collate(batch: Sequence[Any]) -> Mapping[str, torch.Tensor]:
        seen.extend(row["input_ids"][0] for row in batch)
        tokens = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": tokens, "labels": tokens}

    def batches(**options: Any) -> list[int]:
        task = make_own(collate=collate, steps=20, batch_size=3, **options)
        seen.clear()
        for step in range(20):
            task.train_loss(task.model, step)
        return list(seen)

    first = batches()
    assert sorted(first[:32]) == list(range(32)), "a whole pass before any row comes again"
    assert len(set(first[32:])) == 28
    assert batches() == first
    assert batches(seed=1) != first


@pytest.mark.parametrize(
    ("budget", "kind"), [("60%", "bytes"), (0.6, "bytes"), ("300KiB step", "bytes"), ("2k params", "parameters")]
)
def test_budgets(make_own: Callable[..., OwnTask], quick: DecisionSchedule, budget: Any, kind: str) -> None:
    task = make_own(budget=budget)
    cost = task.cost()
    assert isinstance(cost, ByteCost if kind == "bytes" else ParameterCost)
    assert task.cost() is cost
    problem = Episode(task, quick).applier.problem()
    share = 0.6 * reference_cost(cost, problem.max_ranks)
    expected = {"300KiB step": 300 * 1024, "2k params": 2000}.get(budget, share)
    assert problem.limit == pytest.approx(expected)
    assert problem.fits(uniform_ranks(problem))


def test_a_known_reference_is_not_measured(make_own: Callable[..., OwnTask], quick: DecisionSchedule) -> None:
    known = Reference(4.0, 3.0, 2.0)
    assert reference_of(make_own(reference=known), quick) is known
    measured = reference_of(make_own(), quick)
    assert measured.best is None
    assert measured.uniform < measured.initial


def test_failed_runs_of_an_own_model(
    make_own: Callable[..., OwnTask], quick: DecisionSchedule, rollout: Rollout
) -> None:
    env = RankAllocationEnv(task=make_own(learning_rate=1e30), schedule=quick)
    last = rollout(env, seed=0)[-1]
    assert last[1] == -3.0
    assert last[4]["non_finite"]
    assert np.isfinite(last[4]["uniform_loss"])


def test_it_takes_turns_with_proxies(
    make_own: Callable[..., OwnTask], make_task: Callable[..., ProxyTask], quick: DecisionSchedule, rollout: Rollout
) -> None:
    users_task, proxy = make_own(), make_task()
    env = RankAllocationEnv(task=users_task, schedule=quick, max_modules=28)
    alone = rollout(env, seed=0)[-1][4]
    assert env.reset(options={"task": proxy})[1]["task"] == proxy.id
    assert env.step(np.full(28, 10))[0]["mask"].sum() == 28
    assert rollout(env, seed=0)[-1][4] == alone
    with pytest.raises(ConfigError, match=r"budget is for proxy tasks; give task own/0 its budget"):
        env.reset(options={"budget": 0.5})


def test_pickling(make_own: Callable[..., OwnTask], quick: DecisionSchedule, rollout: Rollout) -> None:
    env = RankAllocationEnv(task=make_own(), schedule=quick)
    twin = pickle.loads(pickle.dumps(env))  # noqa: S301
    assert rollout(env, seed=2)[-1][4] == rollout(twin, seed=2)[-1][4]


NUMBERS = "steps and batch_size are whole numbers of at least 1 and learning_rate is above 0"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ConfigError, f"{NUMBERS}; got 0, 4"),
        ({"steps": True}, ConfigError, f"{NUMBERS}; got True, 4"),
        ({"steps": 8.5}, ConfigError, NUMBERS),
        ({"batch_size": 0}, ConfigError, NUMBERS),
        ({"learning_rate": 0.0}, ConfigError, NUMBERS),
        ({"learning_rate": float("nan")}, ConfigError, NUMBERS),
        ({"learning_rate": float("inf")}, ConfigError, NUMBERS),
        ({"learning_rate": "1e-3"}, ConfigError, f"{NUMBERS}; got 6, 4 and '1e-3'"),
        ({"seed": -1}, ConfigError, "seed is a whole number"),
        ({"seed": None}, ConfigError, "seed is a whole number"),
        (
            {"train": (row for row in range(8))},
            ConfigError,
            "train has a length, .* got <generator .*Make a list of it",
        ),
        ({"held_out": None}, ConfigError, "held_out has a length, .* got None"),
        ({"model": "llama"}, ConfigError, "model is a torch model, plain or with adapters of PEFT; got 'llama'"),
        ({"model": nn.Sequential(nn.ReLU())}, ConfigError, "No adapter can be put on"),
        ({"collate": None}, ConfigError, "collate is a function that makes a batch of a list of rows; got None"),
        (
            {"reference": 3.0},
            ConfigError,
            "reference is a Reference with finite losses, or None to measure it; got 3.0",
        ),
        ({"batch_size": 33}, ConfigError, "at least one batch of 33 rows.*got 32 and 8. Lower batch_size or add data"),
        ({"train": []}, ConfigError, "at least one batch of 4 rows"),
        ({"held_out": []}, ConfigError, "at least one row; got 32 and 0"),
        ({"budget": "plenty"}, BudgetError, "Cannot read the budget 'plenty'"),
        ({"budget": 0.0}, BudgetError, "Cannot read the budget 0.0"),
        ({"target_modules": ("w_proj",)}, ConfigError, r"No adapter can be put on \('w_proj',\) of LlamaForCausalLM"),
    ],
)
def test_bad_own_tasks_are_refused(
    make_own: Callable[..., OwnTask], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_own(**options)


def test_an_adapter_whose_rank_cannot_change_is_refused(
    make_own: Callable[..., OwnTask], llama_config: LlamaConfig
) -> None:
    model = LlamaForCausalLM(llama_config)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(UnsupportedError):
        make_own(model=get_peft_model(model, config))


def test_a_model_without_a_loss_is_refused(bert_config: BertConfig, quick: DecisionSchedule) -> None:
    rows = [{"input_ids": [1, 2, 3, 4]} for _ in range(8)]
    task = OwnTask(BertForSequenceClassification(bert_config), rows, rows, batch_size=2)
    with pytest.raises(UnsupportedError, match=r"returns no loss for a batch with \['input_ids'\]"):
        RankAllocationEnv(task=task, schedule=quick).reset()


def test_tasks_of_one_model_take_turns(
    make_own: Callable[..., OwnTask], quick: DecisionSchedule, llama_config: LlamaConfig
) -> None:
    """The second one finds the adapter of the first, and no episode notices one of another task."""

    def end(env: RankAllocationEnv) -> dict[str, Any]:
        while True:
            _, _, terminated, _, info = env.step(np.zeros(env.action_space.shape, dtype=np.float32))
            if terminated:
                return info

    def started(task: OwnTask) -> RankAllocationEnv:
        env = RankAllocationEnv(task, schedule=quick)
        env.reset(seed=0)
        return env

    expected = [end(started(make_own(budget=budget))) for budget in ("60%", "50%")]
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config)
    first, second = [started(make_own(model=model, budget=budget)) for budget in ("60%", "50%")]
    assert [end(second), end(first)] == expected[::-1]


def test_a_model_with_adapters_on_other_modules_is_refused(
    make_own: Callable[..., OwnTask], llama_config: LlamaConfig
) -> None:
    model = LlamaForCausalLM(llama_config)
    assert len(make_own(model=model).adapted()[1]) == MODULES
    assert len(make_own(model=model, seed=1).adapted()[1]) == MODULES
    with pytest.raises(ConfigError, match=r"has adapters already, on other modules than .*pass another copy"):
        make_own(model=model, target_modules=("q_proj",))
    adapted = get_peft_model(LlamaForCausalLM(llama_config), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="or the PeftModel that holds them"):
        make_own(model=adapted.get_base_model())
    with pytest.raises(ConfigError, match="Names of modules are a tuple"):
        make_own(target_modules="q_proj")


def test_a_held_out_loss_that_is_not_finite_is_refused(
    make_own: Callable[..., OwnTask], quick: DecisionSchedule, rows: Rows
) -> None:
    """Else every reward would be 0, since nothing is better or worse than NaN."""
    unlabelled = [{**row, "labels": [-100] * len(row["labels"])} for row in rows[32:]]
    env = RankAllocationEnv(task=make_own(held_out=unlabelled), schedule=quick)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"held-out loss of task own/0 is nan before training.*not all of them"):
            env.reset()
    known = make_own(held_out=unlabelled, reference=Reference(4.0, 3.0))
    with pytest.raises(ConfigError, match="is nan before training"):
        RankAllocationEnv(task=known, schedule=quick, against="signal-mean").reset()
    with pytest.raises(ConfigError, match="reference is a Reference with finite losses"):
        make_own(reference=Reference(float("nan"), 3.0))


def test_held_out_batches_without_a_label_that_counts_are_left_out(
    make_own: Callable[..., OwnTask], rows: Rows
) -> None:
    last = [{**row, "labels": [-100] * len(row["labels"])} for row in rows[:3]]
    labelled, both = make_own(held_out=rows[32:]), make_own(held_out=[*rows[32:], *last])
    assert both.held_out_loss(both.adapted()[0]) == labelled.held_out_loss(labelled.adapted()[0])


def test_results_are_remembered_and_a_deleted_task_frees_its_model(
    make_own: Callable[..., OwnTask], quick: DecisionSchedule, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_own(steps=4)
    env = RankAllocationEnv(task=task, schedule=quick, against="signal-mean")
    rollout(env, seed=0)
    counted: list[int] = []
    monkeypatch.setattr(OwnTask, "held_out_loss", lambda *given: counted.append(1))
    probe, reference = probe_task(task, quick), reference_of(task, quick)
    gc.collect()
    assert probe_task(task, quick) is probe
    assert reference_of(task, quick) is reference
    assert rule_losses(task, quick, "signal-mean")[1] == reference.initial
    assert not counted, "all is remembered for as long as the task lives"
    model, adapted = ref(task.model), ref(task.adapted()[0])
    del task, env
    gc.collect()
    assert model() is adapted() is None


def test_the_model_is_left_without_dropout_and_frozen(make_own: Callable[..., OwnTask], make_bert: MakeModel) -> None:
    model = make_bert().train()
    make_own(model=model, train=[{"input_ids": [1, 2], "label": 0}] * 4, held_out=[{"input_ids": [1, 2], "label": 0}])
    assert not model.training
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == set()


@pytest.mark.parametrize(
    ("collate", "words"),
    [
        (
            lambda rows: {"input_ids": torch.zeros(1, 2), "texts": ["a"]},
            r"got \['a'\] for 'texts'\. Make a tensor of it",
        ),
        (lambda rows: torch.zeros(1, 2), "collate makes a dictionary of tensors, .* got tensor.* for 'batch'"),
    ],
)
def test_collators_that_make_no_tensors(make_own: Callable[..., OwnTask], collate: Any, words: str) -> None:
    task = make_own(collate=collate)
    with pytest.raises(ConfigError, match=words):
        task.train_loss(task.adapted()[0], 0)


def test_rows_of_unequal_length_need_a_collator(make_own: Callable[..., OwnTask], rows: Rows) -> None:
    cut = [{key: value[: 4 + index % 3] for key, value in row.items()} for index, row in enumerate(rows)]
    task = make_own(train=cut[:32], held_out=cut[32:])
    with pytest.raises(ConfigError, match=r"default_data_collator cannot make a batch .*Pass another `collate`"):
        task.cost()
