"""Batches of evaluations: smaller after one above the budget, as their user chose once the run is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankpilot.finetune.callback import Evaluations
from torch import nn
from transformers import Trainer, TrainingArguments


class Budgeted:
    """Stands for a pilot under whose budget evaluations take these shares, one after another."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)
        self.evaluation_share = 0.0

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        yield
        self.evaluation_share = self.shares.pop(0)


def test_loaders_that_the_trainer_keeps_have_the_smaller_batches_too(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=64,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        report_to=[],
        use_cpu=True,
    )
    rows = [{"labels": number} for number in range(64)]
    trainer = Trainer(nn.Linear(1, 1), arguments, eval_dataset=rows)
    evaluations = Evaluations(trainer, Budgeted(4.0, 2.0, 0.9))  # type: ignore[arg-type]

    def size() -> int | None:
        return evaluations.run(lambda: trainer.get_eval_dataloader().batch_sampler.batch_size)  # type: ignore[union-attr]

    assert [size() for _ in range(4)] == [64, 8, 2, 2]
    evaluations.put_back()
    assert trainer.get_eval_dataloader().batch_sampler.batch_size == 64  # type: ignore[union-attr]
