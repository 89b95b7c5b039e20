"""Fine-tunes for every task from data to the reloaded adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankpilot.errors import ConfigError
from rankpilot.finetune.experiment import finetune
from rankpilot.finetune.options import FinetuneConfig

from ..cases import first_cases
from ..data.small_models import WORDS, save, write_rows

TEXTS = [" ".join(WORDS[(row + shift) % len(WORDS)] for shift in range(2 + row % 4)) for row in range(60)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "regression": [{"text": text, "label": len(text) / 10} for text in TEXTS],
    "token-classification": [{"tokens": text.split(), "tags": [word[0] for word in text.split()]} for text in TEXTS],
    "seq2seq": [{"input": text, "target": text} for text in TEXTS],
    "causal-lm": [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in TEXTS
    ],
}


@pytest.mark.parametrize(
    ("task", "model"),
    first_cases(
        2, [("token-classification", "distilbert"), ("seq2seq", "t5"), ("regression", "bert"), ("causal-lm", "llama")]
    ),
)
def test_a_run(task: Any, model: str, tmp_path: Path, reloads: list[dict[str, Any]]) -> None:
    folder = save(model, tmp_path / "model", chat=True)
    data = write_rows(tmp_path / "rows.jsonl", ROWS[task])
    asked = task if task == "regression" else None
    config = FinetuneConfig(folder, data, task=asked, steps=2, eval_every=2, batch_size=4, max_length=16)
    summary = finetune(config, tmp_path / "run")
    run = summary["runs"]["rankpilot"]
    assert [found["max_abs_difference"] for found in reloads] == [0.0]
    assert np.isfinite(run["held_out_loss"])
    assert 0 < run["peak_bytes"] <= run["budget_bytes"]
    assert (run["held_out_accuracy"] is not None) == (task == "token-classification")


def test_modules_that_trl_refuses_are_one_error(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", chat=True)
    data = write_rows(tmp_path / "rows.jsonl", ROWS["causal-lm"])
    config = FinetuneConfig(folder, data, target_modules="q_proj,lm_head", batch_size=4, max_length=16)
    with pytest.raises(ConfigError, match=r"TRL's SFTTrainer cannot train this: .*lm_head"):
        finetune(config, tmp_path / "run")
