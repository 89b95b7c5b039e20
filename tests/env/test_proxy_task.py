"""Proxy tasks, schedules and episodes."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rankpilot.cost.budget import Budget
from rankpilot.cost.calibration import calibrate
from rankpilot.cost.cost import ByteCost, ParameterCost, plan_cost
from rankpilot.data.corpora import load_corpus, load_labelled, sample_windows
from rankpilot.decide.observation import RUN_FEATURES
from rankpilot.decide.policy import Decision
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.env.bases import BASES_FOLDER, adapted_base, load_base_model, proxy_cost, proxy_memory
from rankpilot.env.episode import Episode
from rankpilot.env.proxy_finetune import (
    FIRST_CLASS,
    MASK_SHARE,
    ProxyFineTune,
    TaskData,
    check_texts,
    label_loss,
    language_inputs,
    load_task,
)
from rankpilot.env.proxy_task import PROXY_BASES, ProxyTask, Reference, find_base
from rankpilot.errors import AssetError, ConfigError, UnknownNameError
from rankpilot.lora.resize import set_ranks
from rankpilot.lora.targets import find_target_modules
from torch.nn import functional

from ..cases import first_cases

MakeTask = Callable[..., ProxyTask]


@pytest.mark.parametrize(
    ("kind", "base", "share"),
    [
        ("shift", "llama-4x32", 1.0),
        ("planted", "bert-4x32", 1.0),
        ("shift", "bert-4x32", MASK_SHARE),
        ("classify", "llama-4x32", 1 / 16),
    ],
)
def test_the_share_of_the_bytes_that_is_predicted(make_task: MakeTask, kind: str, base: str, share: float) -> None:
    task = make_task(kind, 5, base=base, corpus="sentiment" if kind == "classify" else "code")
    assert ProxyFineTune(task).predicted == pytest.approx(share, rel=0.2)
    observation = Episode(ProxyFineTune(task), DecisionSchedule(probe_steps=1)).applier.observe(0)
    seen = float(observation.run[RUN_FEATURES.index("predicted")])
    assert seen == pytest.approx(np.log2(ProxyFineTune(task).predicted) / 4)


@pytest.mark.parametrize(("kind", "corpus"), [("shift", "code"), ("planted", "code"), ("classify", "sentiment")])
def test_the_same_task_gives_the_same_data(make_task: MakeTask, kind: str, corpus: str) -> None:
    first = load_task(make_task(kind, 5, corpus=corpus))
    load_task.cache_clear()
    second, other = (load_task(make_task(kind, seed, corpus=corpus)) for seed in (5, 6))
    shapes = {"inputs": (12, 4, 16), "labels": (12, 4, 16), "held_out_inputs": (16, 16), "held_out_labels": (16, 16)}
    teachers = {"teacher": (12, 4, 16, 256), "held_out_teacher": (16, 16, 256)}
    for name, shape in (shapes | teachers).items():
        a, b, c = (getattr(data, name) for data in (first, second, other))
        assert (a is None) == (kind != "planted" and name in teachers)
        if a is not None:
            assert a.shape == shape
            assert torch.equal(a, b)
            assert not torch.equal(a, c)
    for one, two in zip(first.changes, second.changes, strict=True):
        assert one.name == two.name
        assert torch.equal(one.left, two.left)
        assert torch.equal(one.right, two.right)
    assert bool(first.changes) == (kind == "planted")


def test_held_out_text_is_never_trained_on(make_task: MakeTask) -> None:
    train, held_out = load_corpus("code")
    assert len(held_out) == pytest.approx(0.1 * (len(train) + len(held_out)), abs=1)
    assert np.concatenate([train[-40:], held_out[:40]]).tobytes() in (train.tobytes()[-40:] + held_out.tobytes())
    data = load_task(make_task("shift", 5))
    text = held_out.tobytes()
    assert all(bytes(row.tolist()) in text for row in data.held_out_inputs)
    text = train.tobytes()
    assert all(bytes(row.tolist()) in text for row in data.inputs.view(-1, 16)[:8])


def test_held_out_texts_of_a_classification_are_never_trained_on(make_task: MakeTask) -> None:
    """Each window without its last byte, the question, is of a text of the right half, and the label is its class."""
    data = load_task(make_task("classify", 5, corpus="sentiment"))
    halves = load_labelled("sentiment")
    drawn = ((data.inputs.view(-1, 16), data.labels.view(-1, 16)), (data.held_out_inputs, data.held_out_labels))
    for texts, (inputs, labels) in zip(halves, drawn, strict=True):
        assert set(labels[:, -1].tolist()) == {FIRST_CLASS, FIRST_CLASS + 1}
        for row, label in zip(inputs[:12].tolist(), labels[:12, -1].tolist(), strict=True):
            assert row[-1] == ord("\n")
            window = bytes(row[:-1])
            assert any(window in text for text, index in texts if index == label - FIRST_CLASS)
    assert not {text for text, _ in halves[0]} & {text for text, _ in halves[1]}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        *(("kind", ["other"]), ("placement", ["middle"]), ("unit", ["bits"])),
        *(("steps", [0, 2.5, True]), ("batch_size", [0, 2.0]), ("eval_rows", [0, 2.5])),
        *(("length", [1, 129, 31.5]), ("priced_rows", [0, 4, 8.5])),
        ("budget", [0.0, -1.0, math.nan, math.inf, True]),
        ("learning_rate", [0.0, -1e-3, math.nan, math.inf, "1e-3"]),
    ],
)
def test_bad_tasks_are_refused(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=r"of a task (is|are)"):
            ProxyTask(**{"kind": "shift", "seed": 0, field: value})


@pytest.mark.parametrize("seed", [-1, 1.5, "1", None, True, 2**32])
def test_seeds_that_no_task_can_have(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed is a whole number from 0"):
        ProxyTask("shift", seed)


@pytest.mark.parametrize(
    "options",
    [
        *({name: 0} for name in ("probe_steps", "probe_batch", "max_step")),
        *({"fractions": each} for each in ((), (0.1, 0.5), (0.0, 0.5, 0.5), (0.0, 0.5, 0.3), (0.0, 1.0))),
    ],
)
def test_bad_schedules_are_refused(options: dict[str, Any]) -> None:
    words = "fractions rise from 0" if "fractions" in options else "are whole numbers from 1 to 10,000; got"
    with pytest.raises(ConfigError, match=words):
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
    with pytest.raises(UnknownNameError, match="llama-4x64"):
        ProxyTask("shift", 0, base="llama-4x46")
    with pytest.raises(UnknownNameError, match=r"corpus 'coed'. Did you mean: 'code'"):
        check_texts([ProxyTask("shift", 0), ProxyTask("shift", 1, corpus="coed")])
    with pytest.raises(UnknownNameError, match=r"labelled text 'topcis'. Did you mean: 'topics'"):
        check_texts([ProxyTask("classify", 0, corpus="topcis")])
    with pytest.raises(UnknownNameError, match="labelled text 'code'"):
        check_texts([ProxyTask("classify", 0, corpus="code")])
    check_texts([ProxyTask("shift", 0), ProxyTask("classify", 0, corpus="sentiment")])


def test_ids_tell_tasks_apart() -> None:
    tasks = [
        ProxyTask("shift", 1),
        ProxyTask("shift", 2),
        ProxyTask("shift", 1, corpus="news"),
        ProxyTask("shift", 1, base="llama-4x32"),
        ProxyTask("shift", 1, budget=0.71),
        ProxyTask("shift", 1, unit="parameters"),
        ProxyTask("shift", 1, checkpointing=True),
        ProxyTask("shift", 1, priced_rows=16),
        ProxyTask("shift", 1, priced_rows=32),
        ProxyTask("classify", 1, corpus="topics"),
        *(ProxyTask("planted", 1, placement=place) for place in ("low", "high", "spread")),  # type: ignore[arg-type]
    ]
    assert len({task.id for task in tasks}) == len(tasks)
    assert tasks[0].id == "llama-4x64/shift-code/0.7 bytes/1"
    prices = ["bytes", "parameters", "checkpointed", "large batch", "large batch"]
    assert [task.cost_kind for task in (tasks[0], *tasks[5:9])] == prices
    assert ProxyTask("shift", 1, unit="parameters", priced_rows=16).cost_kind == "parameters"


def test_the_gain_of_the_uniform_run_can_be_divided_by() -> None:
    assert Reference(initial=3.0, uniform=2.0).gain == 1.0
    assert Reference(2.0, 2.5).gain == pytest.approx(0.02), "it lost something"
    assert Reference(0.0, 0.0).gain > 0


def test_headroom_is_what_a_better_allocation_could_gain() -> None:
    assert Reference(3.0, 2.0, 1.7).headroom == pytest.approx(0.3)
    assert Reference(3.0, 2.0, 1.99).headroom == pytest.approx(0.05), "at least 5 % of the gain"
    assert Reference(3.0, 2.0, 2.5).headroom == pytest.approx(0.05)
    assert Reference(3.0, 2.0).headroom == pytest.approx(0.1), "without a best one, a tenth of the gain"
    assert Reference(2.0, 2.5).headroom == pytest.approx(0.1 * 0.02)
    assert Reference(0.0, 0.0, 0.0).headroom > 0


def test_an_episode_is_a_plain_fine_tune(
    make_task: MakeTask, schedule: DecisionSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT and AdamW alone, written out by hand, train exactly as `run_fixed` does."""
    task = make_task("shift", 21)
    ranks = np.array([(3, 5, 0, 2, 8, 1, 4)[i % 7] for i in range(28)], dtype=np.int64)
    episode = Episode(ProxyFineTune(task), schedule)
    names = [target.name for target in episode.targets]
    set_ranks(episode.targets, dict(zip(names, ranks.tolist(), strict=True)), seed=task.seed)
    start = {t.name: (t.weight_a.detach().clone(), t.weight_b.detach().clone()) for t in episode.targets}

    live = {f"^{name.replace('.', '[.]')}$": int(rank) for name, rank in zip(names, ranks, strict=True) if rank}
    dropped = [name for name, rank in zip(names, ranks, strict=True) if rank == 0]
    config = LoraConfig(
        r=1,
        lora_alpha=16,
        target_modules=list(PROXY_BASES[task.base].target_modules),
        exclude_modules="|".join(dropped),
        rank_pattern=live,
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
        logits = plain(input_ids=data.inputs[step]).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), data.inputs[step][:, 1:].flatten())
        expected.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = task.learning_rate * (task.steps - step) / task.steps
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = plain(input_ids=data.held_out_inputs).logits
        predicted, text = logits[:, :-1].flatten(0, 1), data.held_out_inputs[:, 1:].flatten()
        held_out = float(functional.cross_entropy(predicted, text))

    losses = []
    original = TaskData.train_loss

    def recorded(self: TaskData, model: Any, step: int, rows: int | None = None) -> torch.Tensor:
        loss = original(self, model, step, rows)
        losses.append(float(loss.detach()))
        return loss

    episode = Episode(ProxyFineTune(task), schedule)
    monkeypatch.setattr(TaskData, "train_loss", recorded)
    assert episode.run_fixed(ranks) == pytest.approx(held_out, abs=1e-5)
    assert losses == pytest.approx(expected, abs=1e-5)


def test_planted_loss_is_the_divergence_from_the_teacher(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    task = make_task("planted", 3)
    episode = Episode(ProxyFineTune(task), schedule)
    data = load_task(task)
    assert data.held_out_teacher is not None
    with torch.no_grad():
        student = torch.log_softmax(episode.model(input_ids=data.held_out_inputs).logits.double(), -1)
    teacher = data.held_out_teacher.double()
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert data.held_out_loss(episode.model) == pytest.approx(float(expected), rel=1e-4)


def test_the_first_plan_has_no_two_equal_directions(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    """A row of A that repeats another one stays equal to it for ever: a rank paid for and not had."""
    episode = Episode(ProxyFineTune(make_task("shift", 41)), schedule)
    problem = episode.observe().problem
    episode.apply(Decision(problem.ladder.step(problem.ranks, 4), np.zeros(28)))
    for target in episode.targets:
        if target.rank > 1:
            assert int(torch.linalg.matrix_rank(target.weight_a.detach())) == target.rank


def test_a_corpus_comes_back_from_the_cache_as_it_was(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankpilot.data import corpora

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


# Bases ----------------------------------------------------------------------------------------------------------------

ON_DISK = sorted(name for name in PROXY_BASES if (BASES_FOLDER / name / "model.safetensors").is_file())


@pytest.mark.parametrize("name", ON_DISK)
def test_a_base_knows_more_than_how_often_bytes_occur(name: str) -> None:
    base, (train, held_out) = find_base(name), load_corpus("documentation")
    shares = np.bincount(train, minlength=256) / len(train)
    entropy = -float((shares[shares > 0] * np.log(shares[shares > 0])).sum())
    generator = np.random.default_rng(0)
    windows = sample_windows(held_out, 48, 32, generator)
    inputs, labels = language_inputs(base, windows, generator)
    model = load_base_model(name)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    with torch.no_grad():
        loss = float(label_loss(model(input_ids=inputs).logits, labels))
    assert 0 < loss < entropy < 3.6
    blocks = {target.block for target in adapted_base(name)[1]}
    assert blocks == set(range(base.depth))


def test_bases_are_small_and_tell_what_is_missing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankpilot.env import bases

    assert {"llama-4x32", "llama-4x64", "bert-4x64", "gpt2-4x32"} <= set(ON_DISK)
    assert sum(path.stat().st_size for path in BASES_FOLDER.rglob("*") if path.is_file()) <= 5_000_000
    monkeypatch.setattr(bases, "BASES_FOLDER", tmp_path)
    bases._weights.cache_clear()
    with pytest.raises(AssetError, match=r"'llama-4x32' are missing .*git checkout a1dc0e36 -- env/weights/llama-4x32"):
        load_base_model("llama-4x32")


def test_weights_of_another_architecture_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankpilot.env import bases

    monkeypatch.setattr(bases, "_weights", lambda name: {"stranger": torch.zeros(1)})
    with pytest.raises(AssetError, match="do not fit its architecture"):
        load_base_model("llama-4x32")


# Prices ---------------------------------------------------------------------------------------------------------------


def forget_costs() -> None:
    for cached in (proxy_cost, proxy_memory):
        cached.cache_clear()


@pytest.mark.parametrize("base", first_cases(2, ["llama-4x32", "bert-4x64", "gpt2-4x32"]))
def test_checkpointing_lowers_the_price_to_that_of_a_model_that_checkpoints(make_task: MakeTask, base: str) -> None:
    forget_costs()  # a cost from before may be of a model that is gone
    plain, checkpointed = (
        ProxyFineTune(make_task(base=base, length=32, checkpointing=on)).cost() for on in (False, True)
    )
    model, targets = adapted_base(base)
    uniform = np.array([min(8, target.max_rank) for target in targets], dtype=np.int64)
    assert plan_cost(checkpointed, uniform) < plan_cost(plain, uniform)

    kind = find_base(base)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=list(kind.target_modules), fan_in_fan_out=kind.family == "gpt2"
    )
    fresh_model = get_peft_model(load_base_model(base), config).train()
    fresh_model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    real = calibrate(fresh_model, find_target_modules(fresh_model), {"input_ids": tokens, "labels": tokens}).cost()
    generator = np.random.default_rng(0)
    for _ in range(4):
        ranks = generator.integers(0, 9, len(targets))
        assert plan_cost(checkpointed, ranks) == plan_cost(real, ranks)
    assert not model.training
    assert not model.get_base_model().is_gradient_checkpointing
    forget_costs()
    after = ProxyFineTune(make_task(base=base, length=32)).cost()
    assert plan_cost(after, uniform) == plan_cost(plain, uniform), "pricing with checkpointing leaves no trace"


def test_the_price_is_that_of_the_rows_asked_for(make_task: MakeTask) -> None:
    priced, task = ProxyFineTune(make_task(priced_rows=12)).cost(), make_task(batch_size=12)
    model, targets = adapted_base(task.base)
    tokens = torch.zeros(12, task.length, dtype=torch.int64)
    measured = calibrate(model, targets, {"input_ids": tokens, "labels": tokens}).cost()
    generator = np.random.default_rng(0)
    for _ in range(4):
        ranks = generator.integers(0, 9, 28)
        assert plan_cost(priced, ranks) == plan_cost(measured, ranks) == plan_cost(ProxyFineTune(task).cost(), ranks)
        assert plan_cost(priced, ranks) > plan_cost(ProxyFineTune(make_task()).cost(), ranks)


def test_losses_do_not_depend_on_what_is_priced(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    ranks = np.full(28, 2, dtype=np.int64)
    options: list[dict[str, Any]] = [{}, {"checkpointing": True}, {"priced_rows": 12}]
    losses = {Episode(ProxyFineTune(make_task(budget=2.0, **each)), schedule).run_fixed(ranks) for each in options}
    assert len(losses) == 1


def test_a_budget_of_parameters(make_task: MakeTask, schedule: DecisionSchedule) -> None:
    task = make_task(unit="parameters", budget=0.25)
    cost, targets = ProxyFineTune(task).cost(), adapted_base(task.base)[1]
    assert isinstance(cost, ParameterCost)
    assert isinstance(ProxyFineTune(make_task()).cost(), ByteCost)
    assert ProxyFineTune(task).limit == Budget("share", 0.25)
    problem = Episode(ProxyFineTune(task), schedule).applier.problem()
    assert problem.limit == sum(2 * (target.d_in + target.d_out) for target in targets)
    assert plan_cost(problem.cost, np.full(28, 2)) == problem.limit == plan_cost(cost, np.full(28, 2))
    assert ProxyFineTune(task).cost() is cost, "prices are remembered"


def test_a_description_loads_neither_torch_nor_peft() -> None:
    program = (
        "import sys; from rankpilot.env.proxy_task import ProxyTask; ProxyTask('shift', 1); "
        "print([name for name in ('torch', 'peft', 'transformers') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
