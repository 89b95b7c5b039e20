"""Proxy tasks, schedules and episodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.env.bases import PROXY_BASES, find_base, load_base_model
from rankpilot.env.corpora import load_corpus
from rankpilot.env.episode import Baseline, Episode, proxy_probe
from rankpilot.env.schedule import DecisionSchedule
from rankpilot.env.tasks import (
    ProxyTask,
    TaskData,
    adapted_base,
    check_corpora,
    load_task,
    sample_task,
    validation_tasks,
)
from rankpilot.errors import ConfigError, UnknownNameError
from rankpilot.lora.ranks import set_ranks
from torch.nn import functional

MakeTask = Callable[..., ProxyTask]


@pytest.mark.parametrize("kind", ["shift", "planted"])
def test_the_same_task_gives_the_same_data(make_task: MakeTask, kind: str) -> None:
    first = load_task(make_task(kind, 5))
    load_task.cache_clear()
    second = load_task(make_task(kind, 5))
    other = load_task(make_task(kind, 6))
    assert first is not second
    for name in ("train", "held_out", "train_logits", "held_out_logits"):
        a, b, c = (getattr(data, name) for data in (first, second, other))
        assert (a is None) == (kind == "shift" and "logits" in name)
        if a is not None:
            assert torch.equal(a, b)
            assert not torch.equal(a, c)
    assert first.planted == second.planted
    assert first.train.shape == (12, 4, 16)
    assert first.held_out.shape == (16, 16)


def test_held_out_text_is_never_trained_on(make_task: MakeTask) -> None:
    train, held_out = load_corpus("code")
    assert len(held_out) == pytest.approx(0.1 * (len(train) + len(held_out)), abs=1)
    assert np.concatenate([train[-40:], held_out[:40]]).tobytes() in (train.tobytes()[-40:] + held_out.tobytes())
    data = load_task(make_task("shift", 5))
    text = held_out.tobytes()
    assert all(bytes(row.tolist()) in text for row in data.held_out)
    text = train.tobytes()
    assert all(bytes(row.tolist()) in text for row in data.train.view(-1, 16)[:8])


def test_the_teacher_is_taken_out_again(make_task: MakeTask) -> None:
    model, targets = adapted_base("llama-4x64")
    before = {name: value.clone() for name, value in model.get_base_model().state_dict().items() if "lora_" not in name}
    load_task.cache_clear()
    data = load_task(make_task("planted", 11))
    after = model.get_base_model().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert data.train_logits is not None
    with model.disable_adapter():
        divergence = data.held_out_loss(model)
    assert divergence > 0.01, "the teacher differs from the base"
    assert set(data.planted) < {target.name for target in targets}


def test_the_teacher_is_taken_out_after_an_error(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankpilot.env import tasks

    model, _ = adapted_base("llama-4x64")
    before = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "_log_probabilities", fail)
    with pytest.raises(KeyboardInterrupt):
        load_task(make_task("planted", 12))
    after = model.state_dict()
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("placement", "allowed"), [("low", {0, 1}), ("high", {2, 3}), ("spread", {0, 1, 2, 3})])
def test_placement(make_task: MakeTask, placement: str, allowed: set[int]) -> None:
    blocks = {target.name: target.block for target in adapted_base("llama-4x64")[1]}
    seen = set()
    for seed in range(6):
        planted = load_task(make_task("planted", seed, placement=placement, steps=1, batch_size=1, eval_rows=1)).planted
        possible = 28 * len(allowed) // 4
        assert round(0.15 * possible) <= len(planted) <= round(0.5 * possible)
        assert len(set(planted)) == len(planted)
        seen |= {blocks[name] for name in planted}
    assert seen == allowed


def test_validation_tasks_are_never_drawn() -> None:
    fixed = validation_tasks(30)
    assert fixed == validation_tasks(30)
    assert [task.seed for task in fixed] == list(range(30))
    assert fixed[:8] == validation_tasks(8)
    assert {task.kind for task in fixed} == {"planted", "shift"}
    assert {task.placement for task in fixed if task.kind == "planted"} == {"low", "high", "spread"}
    generator = np.random.default_rng(0)
    drawn = [sample_task(generator) for _ in range(300)]
    assert min(task.seed for task in drawn) >= 1_000_000
    assert {task.kind for task in drawn} == {"planted", "shift"}
    assert 0.35 <= min(task.budget for task in drawn) < max(task.budget for task in drawn) <= 1.05
    assert len({task.id for task in drawn}) == 300


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "other"},
        {"placement": "middle"},
        {"steps": 0},
        {"batch_size": 0},
        {"eval_rows": 0},
        {"length": 1},
        {"budget": 0.0},
        {"budget": -1.0},
    ],
)
def test_bad_tasks_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ProxyTask(**{"kind": "shift", "seed": 0, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"probe_steps": 0},
        {"probe_batch": 0},
        {"max_step": 0},
        {"fractions": ()},
        {"fractions": (0.1, 0.5)},
        {"fractions": (0.0, 0.5, 0.5)},
        {"fractions": (0.0, 0.5, 0.3)},
        {"fractions": (0.0, 1.0)},
    ],
)
def test_bad_schedules_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DecisionSchedule(**options)


def test_schedule() -> None:
    schedule = DecisionSchedule()
    assert schedule.steps(100) == (0, 18, 34, 50)
    assert schedule.steps(2) == (0, 1), "decisions that fall together are one"
    assert schedule.steps(1) == (0,)
    assert [schedule.reach(decision) for decision in range(3)] == [None, 2, 2]


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="llama-4x64"):
        find_base("llama-4x46")
    with pytest.raises(UnknownNameError, match="Did you mean: 'code'"):
        check_corpora(("coed",))
    with pytest.raises(ConfigError, match="at least one corpus"):
        check_corpora(())


def test_baseline_measures_in_shares_of_the_uniform_gain() -> None:
    reference = Baseline(initial_loss=3.0, uniform_loss=2.0)
    assert reference.improvement(2.0) == 0
    assert reference.improvement(1.5) == pytest.approx(0.5)
    assert reference.improvement(3.0) == pytest.approx(-1)
    assert Baseline(2.0, 2.5).improvement(2.0) == pytest.approx(0.5 / 0.02), "no division by a gain that is none"


def test_an_episode_is_a_plain_fine_tune(
    make_task: MakeTask, schedule: DecisionSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT and AdamW alone, written out by hand, train exactly as `run_fixed` does."""
    task = make_task("shift", 21)
    ranks = np.array([(3, 5, 0, 2, 8, 1, 4)[i % 7] for i in range(28)], dtype=np.int64)
    episode = Episode(task, schedule)
    names = [target.name for target in episode.targets]
    set_ranks(episode.targets, dict(zip(names, ranks.tolist(), strict=True)), seed=task.seed)
    start = {t.name: (t.weight_a.detach().clone(), t.weight_b.detach().clone()) for t in episode.targets}

    live = {f"^{name.replace('.', '[.]')}$": int(rank) for name, rank in zip(names, ranks, strict=True) if rank}
    dropped = [name for name, rank in zip(names, ranks, strict=True) if rank == 0]
    config = LoraConfig(
        r=1,
        lora_alpha=2,
        target_modules=list(PROXY_BASES[task.base].target_modules),
        exclude_modules="|".join(dropped),
        rank_pattern=live,
        alpha_pattern={name: 2 * rank for name, rank in live.items()},
    )
    plain = get_peft_model(load_base_model(task.base), config)
    with torch.no_grad():
        for name, (a, b) in start.items():
            if len(a):
                layer = plain.get_base_model().get_submodule(name)
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0)
    data, expected = load_task(task), []
    for step in range(task.steps):
        logits = plain(input_ids=data.train[step]).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), data.train[step][:, 1:].flatten())
        expected.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = task.learning_rate * (task.steps - step) / task.steps
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = plain(input_ids=data.held_out).logits
        held_out = float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), data.held_out[:, 1:].flatten()))

    losses = []
    original = TaskData.train_loss

    def recorded(self: TaskData, model: Any, step: int, rows: int | None = None) -> torch.Tensor:
        loss = original(self, model, step, rows)
        losses.append(float(loss.detach()))
        return loss

    episode = Episode(task, schedule)
    monkeypatch.setattr(TaskData, "train_loss", recorded)
    assert episode.run_fixed(ranks) == pytest.approx(held_out, abs=1e-5)
    assert losses == pytest.approx(expected, abs=1e-5)


def test_planted_loss_is_the_divergence_from_the_teacher(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    task = make_task("planted", 3)
    episode = Episode(task, schedule)
    data = episode.data
    assert data.held_out_logits is not None
    with torch.no_grad():
        student = torch.log_softmax(episode.model(input_ids=data.held_out).logits.double(), -1)
    teacher = data.held_out_logits.double()
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert data.held_out_loss(episode.model) == pytest.approx(float(expected), rel=1e-4)


def test_every_episode_of_a_task_starts_alike(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    task = make_task("planted", 3)
    first = Episode(task, schedule)
    start = [(t.weight_a.detach().clone(), t.weight_b.detach().clone()) for t in first.targets]
    observed = first.observe()
    first.apply(np.full(28, 10), np.zeros(28))
    first.advance()
    second = Episode(task, schedule)
    for target, (a, b) in zip(second.targets, start, strict=True):
        assert torch.equal(target.weight_a, a)
        assert torch.equal(target.weight_b, b)
    np.testing.assert_array_equal(second.observe().modules, observed.modules)


def test_the_probe_leaves_its_result_alone(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    """Episodes share the remembered probe, so no run may write into it."""
    task = make_task("shift", 31)
    before = proxy_probe(task, schedule).signals.copy()
    assert np.isfinite(before).all()
    episode = Episode(task, schedule)
    for _ in range(4):
        episode.observe(1.0)
        episode.apply(np.ones(28, dtype=np.int64), np.zeros(28))
        episode.advance()
    np.testing.assert_array_equal(proxy_probe(task, schedule).signals, before)


def test_the_first_plan_has_no_two_equal_directions(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    """A row of A that repeats another one stays equal to it for ever: a rank paid for and not had."""
    episode = Episode(make_task("shift", 41), schedule)
    episode.observe()
    episode.apply(np.full(28, 4), np.zeros(28))
    for target in episode.targets:
        if target.rank > 1:
            assert int(torch.linalg.matrix_rank(target.weight_a.detach())) == target.rank


def test_a_corpus_comes_back_from_the_cache_as_it_was(tmp_path, monkeypatch) -> None:
    from rankpilot.env import corpora

    monkeypatch.setenv("RANKPILOT_CACHE", str(tmp_path))
    corpora.load_corpus.cache_clear()
    first = corpora.load_corpus("code")
    kept = list((tmp_path / "corpora").iterdir())
    assert [path.name.partition("-")[0] for path in kept] == ["code"]
    corpora.load_corpus.cache_clear()
    monkeypatch.setitem(corpora._READERS, "code", lambda: pytest.fail("the text was read again"))
    again = corpora.load_corpus("code")
    corpora.load_corpus.cache_clear()
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
