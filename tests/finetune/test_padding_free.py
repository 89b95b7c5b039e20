"""Batches without padding: texts side by side in one row, told apart by their positions or by limits beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rankpilot
import torch
from transformers import AttentionInterface, DataCollatorWithFlattening, LlamaConfig

from .tiny_runs import Run

LENGTHS = (7, 12, 23, 30)
SCHEDULE = rankpilot.DecisionSchedule(probe_steps=2, fractions=(0.0, 0.5))


def texts(*lengths: int) -> list[dict[str, list[int]]]:
    rows = [[stride * place % 61 for place in range(length)] for stride, length in enumerate(lengths, 1)]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]


def with_padding(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The same texts, each in a row of its own."""
    filled = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [fill] * (max(LENGTHS) - len(row[name])) for row in rows])
        for name, fill in filled.items()
    }
    masks = [[1] * len(row["labels"]) + [0] * (max(LENGTHS) - len(row["labels"])) for row in rows]
    return batch | {"attention_mask": torch.tensor(masks)}


def of_limits(module: Any, query: Any, key: Any, value: Any, mask: Any, cu_seq_lens_q: Any = None, **rest: Any) -> Any:
    """Attention as flash attention has it: limits alone tell the texts, and tokens up to the last one are read."""
    rows, heads, length, width = query.shape
    assert mask is None
    assert int(cu_seq_lens_q[-1]) == rows * length, "else it reads what is not there"
    text = torch.bucketize(torch.arange(rows * length), cu_seq_lens_q[1:].long(), right=True)
    key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
    flat = (each.transpose(0, 1).reshape(1, heads, rows * length, width) for each in (query, key, value))
    seen = (text[:, None] == text).tril()
    result = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=seen)
    return result.view(heads, rows, length, width).permute(1, 2, 0, 3).contiguous(), None


@pytest.mark.parametrize("attention", ["sdpa", "eager", "of_limits"])
def test_texts_in_one_row(attention: str, llama_config: LlamaConfig, tmp_path: Path) -> None:
    """All steps have the same texts in another order, so the peak is known to the byte."""
    AttentionInterface.register("of_limits", of_limits)
    config = LlamaConfig(**llama_config.to_dict() | {"attn_implementation": attention, "num_hidden_layers": 1})
    plain = LlamaConfig(**llama_config.to_dict() | {"num_hidden_layers": 1})
    common: dict[str, Any] = {"data": texts(*LENGTHS), "plain": True}
    padded = Run(tmp_path / "padded", plain, budget=None, collate=with_padding, **common).train()
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    run = Run(tmp_path / "run", config, collate=collate, schedule=SCHEDULE, measure_every=1, **common).train()
    assert run.model.config._attn_implementation == attention
    assert run.recorder.losses[0] == pytest.approx(padded.recorder.losses[0], rel=1e-5), "texts see themselves alone"
    assert run.recorder.ranks[0] != run.recorder.ranks[-1]
    assert run.highest <= run.pilot.limit
    assert len(run.pilot.pilot.checks) >= 2
    for _, predicted, peak in run.pilot.pilot.checks:
        assert 1 <= predicted / peak <= 1.01


def packed(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows that hold several texts, as TRL packs them."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    places = [[place for length in row["seq_lengths"] for place in range(length)] for row in rows]
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.tensor(places)}


def test_a_row_of_one_text_is_planned_as_one_of_several(llama_config: LlamaConfig, tmp_path: Path) -> None:
    """The longest row may hold one text, for which SDPA needs no mask; the others need one."""
    row, several = texts(32)[0], {"seq_lengths": [20, 12]}
    data = [row | {"seq_lengths": [32]}, *[row | several] * 15]
    common: dict[str, Any] = {"data": data, "collate": packed, "per_device_train_batch_size": 1, "measure_every": 1}
    common |= {"remove_unused_columns": False}
    run = Run(tmp_path, llama_config, schedule=SCHEDULE, budget="100%", **common).train()
    assert run.highest <= run.pilot.limit
    assert max(peak / predicted for _, predicted, peak in run.pilot.pilot.checks) <= 1
