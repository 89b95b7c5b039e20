"""Adapters that are trained already when a run begins: they are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.callback import attach
from rankpilot.lora.resize import is_trained, set_ranks
from rankpilot.lora.targets import find_target_modules
from transformers import LlamaConfig, Trainer

from .tiny_runs import adapted, arguments, counting, logits, messages_of, new_base
from .tiny_runs import llama_config as llama_config


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory: pytest.TempPathFactory, llama_config: LlamaConfig) -> Path:
    """An adapter that plain PEFT has trained."""
    folder = tmp_path_factory.mktemp("stage_1")
    model = adapted(llama_config, r=4, lora_alpha=8)
    trainer_of(model, folder / "run", learning_rate=1e-2, max_steps=20).train()
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def trainer_of(model: Any, folder: Path, **options: Any) -> Trainer:
    settings = {"max_steps": 6, "learning_rate": 0.0} | options
    return Trainer(model, arguments(folder, **settings), train_dataset=counting(40, 20))


def go_on(
    stage_1: Path, config: LlamaConfig, folder: Path, budget: str, *, fresh: bool = False, **options: Any
) -> tuple[PeftModel, Any, Trainer]:
    """A run that begins with the adapter."""
    model = PeftModel.from_pretrained(new_base(config), str(stage_1), is_trainable=True)
    schedule = DecisionSchedule(probe_steps=3, fractions=options.pop("fractions", (0.0, 0.5)))
    trainer = trainer_of(model, folder / "run", **options)
    callback = attach(trainer, "signal-mean", budget, schedule=schedule, fresh=fresh, exact_savers=False)
    trainer.train()
    return model, callback, trainer


@pytest.fixture
def continued(stage_1: Path, llama_config: LlamaConfig, tmp_path: Path) -> Callable[..., Any]:
    return partial(go_on, stage_1, llama_config, tmp_path)


@pytest.fixture(scope="module")
def grown(stage_1: Path, llama_config: LlamaConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model, the callback and the folder of a run in which ranks rise, and weights are not trained."""
    folder = tmp_path_factory.mktemp("grown")
    model, callback, _ = go_on(stage_1, llama_config, folder, "150%")
    return model, callback, folder / "run"


def test_growing_leaves_the_function_as_it_is(
    grown: tuple[PeftModel, Any, Path], stage_1: Path, llama_config: LlamaConfig
) -> None:
    first = logits(PeftModel.from_pretrained(new_base(llama_config), str(stage_1)))
    model, callback, folder = grown
    assert (callback.applier.ranks >= 4).all()
    assert (callback.applier.ranks > 4).any()
    assert (first - logits(new_base(llama_config))).abs().max() > 0.1, "the first stage changed the model"
    assert (logits(model) - first).abs().max() <= 1e-5
    table = DecisionLog(folder / "decisions").to_pandas()
    read = table.iloc[: len(table) // 2]
    assert set(read["rank_before"].tolist()) == {4}, "signals are read at the ranks that are there"
    assert not np.isnan(read["feature.snr"].to_numpy()).any()


def test_nothing_is_lost_where_the_ranks_fit(
    continued: Callable[..., Any], stage_1: Path, llama_config: LlamaConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 4 on all modules fits 60 % of what rank 8 takes; the rule alone would drop modules there."""
    first = logits(PeftModel.from_pretrained(new_base(llama_config), str(stage_1)))
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        model, callback, _ = continued("100%", fractions=(0.0,))
    (line,) = messages_of(caplog, "already trained")
    assert "lowers ranks only where bounds require it. fresh=True starts" in line
    assert (callback.applier.ranks >= 4).all()
    assert (logits(model) - first).abs().max() <= 1e-5


@pytest.mark.parametrize(("rank", "kept"), [(24, 24), (20, 24)])
def test_all_of_an_adapter_above_rank_8_fits_the_whole_of_it(
    rank: int, kept: int, llama_config: LlamaConfig, tmp_path: Path
) -> None:
    """What a share is of is no less than what the trained adapter takes, on the rung that holds its ranks."""
    model = adapted(llama_config, r=rank, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    trainer_of(model, tmp_path / "first", learning_rate=1e-2).train()
    before = logits(model)
    trainer = trainer_of(model, tmp_path / "second")
    schedule = DecisionSchedule(probe_steps=3, fractions=(0.0,))
    callback = attach(trainer, "signal-mean", "100%", schedule=schedule, exact_savers=False, parts="off")
    trainer.train()
    assert callback.applier is not None
    assert callback.applier.ranks.tolist() == [kept] * 2
    assert (logits(model) - before).abs().max() <= 1e-5


def test_bounds_of_the_user_count_more(stage_1: Path, llama_config: LlamaConfig, tmp_path: Path) -> None:
    """A module that is to have less than it has shrinks; one whose rank is on no rung of the ladder grows."""
    model = PeftModel.from_pretrained(new_base(llama_config), str(stage_1), is_trainable=True)
    targets = find_target_modules(model)
    set_ranks(targets, {target.name: 5 for target in targets})
    bounds = {"q_proj": 2, "k_proj": (0, 1)}
    trainer = trainer_of(model, tmp_path / "run")
    attach(trainer, "signal-mean", "150%", schedule=DecisionSchedule(probe_steps=3), bounds=bounds)
    trainer.train()
    for target in targets:
        bound = {"q_proj": (2, 2), "k_proj": (1, 1)}.get(target.name.rsplit(".", 1)[1], (8, 256))
        assert bound[0] <= target.rank <= bound[1], target.name


def test_what_a_smaller_budget_takes_away_is_told(
    continued: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="rankpilot"):
        _, callback, _ = continued("300 params", fractions=(0.0,))
    assert (callback.applier.ranks < 4).any()
    (line,) = messages_of(caplog, "already trained")
    assert "and their ranks (28 in total) do not fit the budget" in line
    before, after = (float(part.split()[0]) for part in (line.split("rows was ")[1], line.split("plan and is ")[1]))
    assert before < after


def test_shrinking_keeps_most_of_it(continued: Callable[..., Any], stage_1: Path, llama_config: LlamaConfig) -> None:
    base = new_base(llama_config)
    adapter = PeftModel.from_pretrained(base, str(stage_1))
    before = {t.name: t.scaling * t.weight_b.detach() @ t.weight_a.detach() for t in find_target_modules(adapter)}
    model, callback, _ = continued("1500 params", fractions=(0.0,))
    for target in find_target_modules(model):
        left = target.scaling * target.weight_b.detach() @ target.weight_a.detach()
        singular = torch.linalg.svdvals(before[target.name])
        expected = singular[target.rank :].square().sum().sqrt()
        assert (before[target.name] - left).norm() == pytest.approx(float(expected), abs=1e-5), target.name
    assert any(target.rank < 4 for target in find_target_modules(model))
    assert callback.limit == 1500


def test_a_second_call_of_train_goes_on(continued: Callable[..., Any], llama_config: LlamaConfig) -> None:
    model, callback, trainer = continued("150%", learning_rate=1e-2)
    before = logits(model)
    trainer.args.learning_rate = 0.0
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    change = (logits(model) - before).abs().max()
    assert change < 0.01, "some modules have shrunk and grown again"
    assert (before - logits(new_base(llama_config))).abs().max() > 30 * change
    assert [step for step, _ in callback.predictions] == [0, 3]


def test_fresh_starts_over(continued: Callable[..., Any], llama_config: LlamaConfig) -> None:
    model, _, _ = continued("150%", fresh=True)
    assert torch.equal(logits(model), logits(new_base(llama_config)))


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_what_peft_begins_with_is_not_trained(llama_config: LlamaConfig, start: Any) -> None:
    model = adapted(llama_config, r=4, init_lora_weights=start)
    targets = find_target_modules(model)
    assert not any(map(is_trained, targets))
    with torch.no_grad():
        targets[0].weight_a.fill_(0.01)
        targets[0].weight_b.fill_(0.01)
    assert is_trained(targets[0])
