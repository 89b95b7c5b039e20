"""The report of a script with a Trainer and the callback, from what they themselves wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rankpilot.finetune.callback import attach
from rankpilot.study.run.report import write_report
from transformers import Trainer, TrainingArguments


def test_report_of_a_trainer_with_the_callback(make_llama: Callable[..., Any], tmp_path: Path) -> None:
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
    report = write_report(tmp_path / "out")
    assert not report.run.missing
    assert [step for step, _ in report.run.points("rankpilot", "loss")] == [2, 4, 6, 8]
    assert [step for step, _ in report.run.points("rankpilot", "eval_loss")] == [4, 8]
    assert {limit for _, limit in report.run.limits} == {callback.limit}
    assert report.run.peaks()["rankpilot"]
    assert report.run.steps == 8
    text = report.path.read_text()
    for name in ("ranks", "loss", "memory"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").is_file()
    assert f"The adapter is in `{tmp_path / 'out' / 'checkpoint-8'}`" in text
    assert text.count("\nstep ") == len(callback.predictions)
