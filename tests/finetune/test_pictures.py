"""Runs on batches with pictures stay within their budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rankpilot.cost.cost import plan_cost
from rankpilot.cost.forecast.from_config import base_on_meta
from rankpilot.finetune.pilot import RankPilot
from rankpilot.finetune.step.run import TrainingRun
from rankpilot.lora.peft_config import fresh_adapters
from torch.utils.data import DataLoader, IterableDataset

from ..cost.pictures import FAMILIES, PICTURE, Sees
from .tiny_runs import take_step

SIZES = [(56, 56), (112, 168), (168, 56), (168, 168)]


def example(family: Sees, text: int, size: tuple[int, int]) -> dict[str, Any]:
    pixels = family.pixels(1, size)
    ids = torch.tensor([7, *[PICTURE] * family.tokens(pixels), *[7] * text])
    return {"input_ids": ids, "pixels": pixels}


def collated(family: Sees, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = (ids > 0).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (ids == PICTURE), -100)}
    if family.types:
        batch[family.types] = (ids == PICTURE).long()
    for name in rows[0]["pixels"]:
        parts = [row["pixels"][name] for row in rows]
        if family.nested:  # pictures with fewer tiles are padded
            most = max(part.shape[1] for part in parts)
            parts = [torch.cat([part, part.new_zeros(1, most - part.shape[1], *part.shape[2:])], 1) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


class _Rows(IterableDataset[Any]):
    """Rows whose lengths are unknown beforehand."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


@pytest.mark.parametrize("iterable", [False, True])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in ("qwen2.5-vl", "gemma3"))) for name in FAMILIES]
)
def test_a_run_on_pictures_of_all_sizes_stays_within_its_budget(name: str, iterable: bool) -> None:
    family, generator = FAMILIES[name], np.random.default_rng(0)
    base = base_on_meta(family.config(), "AutoModelForImageTextToText", torch.float32)
    options = {"target_modules": "all-linear", "r": 8, "lora_alpha": 16}
    model = fresh_adapters(base, name, "CAUSAL_LM", new_head=False, **options).train()
    rows = [example(family, int(generator.integers(5, 60)), SIZES[number % 4]) for number in range(7)]
    rows.append(example(family, 100, SIZES[1]))
    rows.append(example(family, 5, SIZES[0]))
    rows.append(example(family, 150, SIZES[0]))  # alone in a batch of fewer rows and more tokens than any before
    data: Any = _Rows(rows) if iterable else rows
    loader = DataLoader(data, batch_size=3, collate_fn=lambda rows: collated(family, rows))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    pilot = RankPilot("top-down", "6MiB step", exact_savers=False, gradient_checkpointing=False, measure_every=1)
    pilot.begin(TrainingRun.of_loader(model, optimizer, loader, total_steps=8))
    peaks = []
    for _ in range(2):
        for batch in loader:
            take_step(pilot, optimizer, batch, lambda given: model(**given).loss)
            peaks.append((pilot.peaks[-1][1], plan_cost(pilot.applier.cost_now(), pilot.applier.ranks)))
    pilot.finish()
    assert len(pilot.peaks) == len(peaks) == 8
    assert all(measured <= predicted for measured, predicted in peaks)
    if iterable:  # otherwise plans are priced for a batch of the longest rows, which may never come
        assert max(measured / predicted for measured, predicted in peaks) > 0.98
