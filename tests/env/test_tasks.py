"""Tasks: their data, what is drawn, and the bases that they train."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.common.errors import AssetError, ConfigError, RankPilotError, UnknownNameError
from rankpilot.data.corpora import load_corpus, load_labelled, sample_windows
from rankpilot.env.bases import BASES_FOLDER, PROXY_BASES, adapted_base, find_base, load_base_model
from rankpilot.env.task_data import FIRST_CLASS, language_inputs, load_task, loss_terms, mean_loss
from rankpilot.env.tasks import REGIMES, SPLITS, FineTuneTask, draw_task

MakeTask = Callable[..., FineTuneTask]


@pytest.mark.parametrize(
    ("kind", "corpus"), [("text", "code"), ("planted", "code"), ("labels", "sentiment"), ("labels", "code+tables")]
)
def test_the_same_task_gives_the_same_data(make_task: MakeTask, kind: str, corpus: str) -> None:
    first = load_task(make_task(kind, 5, corpus=corpus))
    load_task.cache_clear()
    second, other = (load_task(make_task(kind, seed, corpus=corpus)) for seed in (5, 6))
    shapes = {"inputs": (25, 4, 16), "labels": (25, 4, 16), "held_out_inputs": (16, 16), "held_out_labels": (16, 16)}
    teachers = {"teacher": (25, 4, 16, 256), "held_out_teacher": (16, 16, 256)}
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
    data = load_task(make_task("text", 5))
    text = held_out.tobytes()
    assert all(bytes(row.tolist()) in text for row in data.held_out_inputs)
    text = train.tobytes()
    assert all(bytes(row.tolist()) in text for row in data.inputs.view(-1, 16)[:8])


def test_held_out_texts_of_a_classification_are_never_trained_on(make_task: MakeTask) -> None:
    """Each window without its last byte, the question, is of a text of the right half, and the label is its class."""
    data = load_task(make_task("labels", 5, corpus="sentiment"))
    halves = load_labelled("sentiment")
    drawn = ((data.inputs.view(-1, 16), data.labels.view(-1, 16)), (data.held_out_inputs, data.held_out_labels))
    for texts, (inputs, labels) in zip(halves, drawn, strict=True):
        assert set(labels[:, -1].tolist()) == {FIRST_CLASS, FIRST_CLASS + 1}
        for row, label in zip(inputs[:12].tolist(), labels[:12, -1].tolist(), strict=True):
            assert row[-1] == ord("\n")
            window = bytes(row[:-1])
            assert any(window in text for text, index in texts if index == label - FIRST_CLASS)
    assert not {text for text, _ in halves[0]} & {text for text, _ in halves[1]}


def test_texts_as_classes_are_those_of_their_split(make_task: MakeTask) -> None:
    data = load_task(make_task("labels", 5, corpus="code+german+tables"))
    texts = [[half.tobytes() for half in load_corpus(name)] for name in ("code", "german", "tables")]
    drawn = ((data.inputs.view(-1, 16), data.labels.view(-1, 16)), (data.held_out_inputs, data.held_out_labels))
    for half, (inputs, labels) in enumerate(drawn):
        assert set(labels[:, -1].tolist()) == {FIRST_CLASS, FIRST_CLASS + 1, FIRST_CLASS + 2}
        for row, label in zip(inputs[:12].tolist(), labels[:12, -1].tolist(), strict=True):
            assert bytes(row[:-1]) in texts[label - FIRST_CLASS][half]
    for name, split in SPLITS.items():
        drawing = (draw_task(np.random.default_rng(seed), name) for seed in range(200))
        mixed = [task.corpus.split("+") for task in drawing if "+" in task.corpus]
        assert len(mixed) > 5
        assert all(len(set(names)) == 4 and set(names) <= set(split.texts) for names in mixed)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        *(("kind", ["other"]), ("placement", ["middle"]), ("turn", [1.0, -0.1]), ("moves", [((1.0, 1),), ((0.1, 0),)])),
        *(("steps", [0, 2.5, True]), ("batch_size", [0, 2.0]), ("eval_rows", [0, 2.5]), ("length", [1, 129, 31.5])),
        *(("mean_rank", [0.0, -1.0, math.nan, math.inf, True]), ("offset", [math.nan, "1"])),
        ("learning_rate", [0.0, -1e-3, math.nan, math.inf, "1e-3"]),
    ],
)
def test_bad_tasks_are_refused(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RankPilotError, match=r"of a task|Budget factors"):
            FineTuneTask(**{"kind": "text", "seed": 0, field: value})
    with pytest.raises(ConfigError, match="Only a text can change"):
        FineTuneTask("planted", 0, then="code")


@pytest.mark.parametrize("seed", [-1, 1.5, "1", None, True, 2**32])
def test_seeds_that_no_task_can_have(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed must be a whole number from 0"):
        FineTuneTask("text", seed)


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
        loss = float(mean_loss(loss_terms(model(input_ids=inputs).logits, labels), labels))
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
    with pytest.raises(AssetError, match="do not match its architecture"):
        load_base_model("llama-4x32")


# What is drawn --------------------------------------------------------------------------------------------------------


def test_splits_share_no_base_no_text_and_no_seed() -> None:
    train, test = SPLITS["train"], SPLITS["test"]
    for name in ("bases", "texts", "labels"):
        assert not {*getattr(train, name)} & {*getattr(test, name)}
    assert train.first_seed + 2**30 <= test.first_seed


@pytest.mark.parametrize("split", SPLITS)
def test_each_regime_has_what_is_wrong_with_it(split: str) -> None:
    generator = np.random.default_rng(0)
    for regime in REGIMES:
        tasks = [draw_task(generator, split, regime=regime) for _ in range(40)]
        assert {task.base for task in tasks} == {*SPLITS[split].bases}
        assert all((abs(task.offset) <= 0.5) == (regime != "rate") for task in tasks if abs(task.offset) > 0.5)
        assert any(task.moves for task in tasks) == (regime == "moving") == any(task.then for task in tasks)
        assert (max(task.mean_rank for task in tasks) <= 2) == (regime == "scarce")
    assert draw_task(np.random.default_rng(3)) == draw_task(np.random.default_rng(3))
    with pytest.raises(UnknownNameError, match="split"):
        draw_task(generator, "tset")
    with pytest.raises(UnknownNameError, match="regime"):
        draw_task(generator, regime="rates")  # type: ignore[arg-type]


def test_the_text_changes_at_its_turn(make_task: MakeTask) -> None:
    plain, changing = make_task("text", 5), make_task("text", 5, then="german", turn=0.5)
    before, after = load_task(plain), load_task(changing)
    assert changing.changes_at == 12
    assert torch.equal(before.inputs[:12], after.inputs[:12])
    german = load_corpus("german")
    assert all(bytes(row.tolist()) in german[0].tobytes() for row in after.inputs[12:].view(-1, 16)[:8])
    assert all(bytes(row.tolist()) in german[1].tobytes() for row in after.held_out_inputs[:8])


def test_schedule_and_budget_of_a_task(make_task: MakeTask) -> None:
    task = make_task(steps=100, warm_up=0.1, moves=((0.2, 0.5), (0.6, 1.0)))
    rates = [task.schedule(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(1 / 90)
    assert [task.budget_factor(step) for step in (0, 19, 20, 59, 60, 99)] == [1, 1, 0.5, 0.5, 1, 1]
    assert replace(task, warm_up=0.0).schedule(0) == 1.0
