"""What a run says of a measured peak that is not the predicted one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rankpilot import RankPilot, TrainingRun, attach
from rankpilot.cost.peak_meter import StepBatches, likely_cause
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

IDS = torch.arange(16 * 32).view(16, 32) % 64
ROWS = [{"input_ids": row, "attention_mask": [1] * 32, "labels": row} for row in IDS.tolist()]
PADDED = {"input_ids": IDS, "attention_mask": (IDS > 3).long()}
WHOLE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def new_model(config: LlamaConfig) -> Any:
    torch.manual_seed(0)
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("peak", "batches", "words"),
    [
        (1020, [WHOLE], None),
        (900, [PADDED], "computes less than"),
        (900, [{"input_ids": IDS}], "computes less than"),
        (1100, [WHOLE], "computes more than"),
        (900, [], "computes less than"),
        (900, [WHOLE], "no row of the step is padded"),
        (900, [WHOLE, PADDED], "took 2 batches, and the run was told accumulation=1"),
    ],
)
def test_causes(peak: int, batches: list[Any], words: str | None) -> None:
    text = likely_cause(peak, 1000.0, StepBatches.of(batches), 1)
    assert words in text if words else not text


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows of one length, which nothing tells before."""

    def __iter__(self) -> Iterator[Any]:
        yield from ROWS


def test_rows_without_padding_are_no_other_step(
    llama_config: LlamaConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True
    )
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        trainer = Trainer(new_model(llama_config), arguments, train_dataset=Stream())
        attach(trainer, "signal-mean", budget="80%")
        trainer.train()
    messages = [record.message for record in caplog.records if "were predicted" in record.message]
    assert messages
    assert all("no row of the step is padded" in message and "no danger" in message for message in messages)


def test_a_loop_of_other_accumulation_than_it_said(llama_config: LlamaConfig, caplog: pytest.LogCaptureFixture) -> None:
    model = new_model(llama_config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader: DataLoader[Any] = DataLoader(ROWS, 4, collate_fn=default_data_collator)  # type: ignore[arg-type]
    pilot = RankPilot("signal-mean", "80%")
    with caplog.at_level(logging.WARNING, logger="rankpilot"):
        pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=4, accumulation=4))
        for batch in islice(loader, 2):
            pilot.before_step(batch)
            loss = model(**batch).loss
            loss.backward()
            pilot.before_optimizer_step(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            pilot.after_step()
    message = next(record.message for record in caplog.records if "were predicted" in record.message)
    assert "took 1 batch, and the run was told accumulation=4" in message
