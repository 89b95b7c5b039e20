"""The page of a script with a Trainer and the callback, from what they themselves wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rankpilot.finetune.callback import attach
from rankpilot.study.page import page_data
from rankpilot.study.pictures import write_rank_picture
from rankpilot.study.run_data import read_run
from transformers import Trainer, TrainingArguments


def test_page_of_a_trainer_with_the_callback(make_llama: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"input_ids": (row := torch.randint(0, 64, (8,))), "labels": row} for _ in range(16)]
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=8,
        per_device_train_batch_size=2,
        logging_steps=2,
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=make_llama(task_type="CAUSAL_LM"),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
    )
    callback = attach(trainer, "signal-mean", budget="90%")
    trainer.train()
    run = read_run(tmp_path / "out")
    assert not run.missing
    assert [step for step, _ in run.points("rankpilot", "loss")] == [2, 4, 6, 8]
    assert [step for step, _ in run.points("rankpilot", "eval_loss")] == [4, 8]
    assert {limit for _, limit in run.limits} == {callback.limit}
    assert run.peaks()["rankpilot"]
    assert run.steps == 8
    assert write_rank_picture(run) == tmp_path / "out" / "ranks.png"
    (page,) = page_data([run], [None])["runs"]
    assert page["adapter"]["folder"] == str(tmp_path / "out" / "checkpoint-8")
    assert len(page["decisions"]) == len(callback.predictions)
    assert set(page["sentences"]) == {"costs", "ranks", "losses"}
