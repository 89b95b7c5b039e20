"""`rankpilot memory` looks at the step that `rankpilot finetune` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rankpilot.finetune.experiment import plan_ahead
from rankpilot.finetune.options import FinetuneConfig
from rankpilot.report.config import MemoryConfig
from rankpilot.report.here import memory_here

from ..data.small_models import WORDS, save, write_rows


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, str]:
    """Files with data of each kind."""
    texts = [" ".join(WORDS[(row + place) % len(WORDS)] for place in range(4 + row % 9)) for row in range(60)]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts]
    return {
        "classes": write_rows(tmp_path / "classes.jsonl", [{"text": t, "label": i % 3} for i, t in enumerate(texts)]),
        "text": write_rows(tmp_path / "text.jsonl", [{"text": text} for text in texts]),
        "chats": write_rows(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats]),
    }


@pytest.mark.parametrize(
    ("name", "data", "settings"),
    [
        ("bert", "classes", {"trainer": ("label_smoothing_factor=0.1", "optim=sgd"), "exact_savers": False}),
        ("llama", "text", {"gradient_checkpointing": True, "accumulation": 2, "optimizer": "adafactor"}),
        ("llama", "chats", {"trainer": ("packing=true",)}),
    ],
)
def test_both_commands_name_the_same_peak(
    tmp_path: Path, rows: dict[str, str], name: str, data: str, settings: dict[str, Any]
) -> None:
    step = {"batch_size": 4, "max_length": 16, **settings}
    model = save(name, tmp_path / name, chat=data == "chats")
    planned = plan_ahead(
        FinetuneConfig(model, rows[data], policy="signal-mean", budget="100%", steps=4, learning_rate=1e-3, **step)
    )
    outlook = memory_here(MemoryConfig(model, rows[data], measure=True, **step), lambda text: None)
    asked = outlook.choices[0]
    assert outlook.reference_bytes == pytest.approx(planned.limit, rel=1e-4)
    assert outlook.breakdown(asked).total == asked.step_bytes <= planned.limit
    assert 0.97 * asked.step_bytes <= outlook.measured.peak_bytes <= asked.step_bytes
