"""Conversations, and prompts with completions: TRL's SFTTrainer reads them itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rankpilot.common.errors import DataError
from rankpilot.data.batches import IGNORED
from rankpilot.data.workload import Workload
from rankpilot.finetune.options import FinetuneConfig
from rankpilot.finetune.trainer import new_model, new_trainer, read_workload

from . import small_models
from .conftest import WorkloadOf
from .small_models import WORDS, write_rows

pytest.importorskip("trl")
USER, ASSISTANT = {"role": "user", "content": "good film"}, {"role": "assistant", "content": "bad plot"}
SHARED = [{"from": "human", "value": "good film"}, {"from": "gpt", "value": "bad plot"}]
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ASSISTANT], "id": 3},
    "sharegpt": {"conversations": SHARED},
    "prompt-messages": {"prompt": [USER], "completion": [ASSISTANT], "label": 1},
    "prompt-text": {"prompt": "good film", "completion": " bad plot"},
}


def learned(rows: list[dict[str, Any]], folder: Path, *settings: str) -> tuple[str, str]:
    """What SFTTrainer makes of the first row: its text, and what counts in the loss."""
    model = small_models.save("llama", folder / "model", chat=True)
    data = write_rows(folder / "rows.jsonl", rows)
    config, workload = read_workload(
        FinetuneConfig(model, data, max_length=64, batch_size=2, trainer=settings), lambda _: None
    )
    trainer = new_trainer(config, workload, new_model(config, workload), folder / "run", [])
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    decode = workload.tokenizer.decode
    return str(decode(ids)), str(decode(labels[labels != IGNORED]))


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_learned(form: str, tmp_path: Path) -> None:
    text, counted = learned([FORMS[form]] * 20, tmp_path)
    assert text.index("good film") < text.index("bad plot")
    assert "bad plot" in counted
    assert ("good film" in counted) is not form.startswith("prompt")


def test_tools_reach_the_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_models, "CHATML", small_models.TOOL_CHATML)
    parameters = {"type": "object", "properties": {"film": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "film", "parameters": parameters}}]
    text, _ = learned([{"messages": [USER, ASSISTANT], "tools": json.dumps(tools)}] * 20, tmp_path)
    assert "tool film" in text


def test_variables_reach_the_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_models, "CHATML", small_models.VARIABLE_CHATML)
    rows = [{"messages": [USER, ASSISTANT], "chat_template_kwargs": {"mood": "dull"}}] * 20
    assert learned(rows, tmp_path)[0].startswith("dull")


def test_a_flaw_in_one_row(tmp_path: Path, workload_of: WorkloadOf) -> None:
    rows: list[dict[str, Any]] = [{"messages": [USER, ASSISTANT]}] * 20
    with pytest.raises(DataError, match=r"'messages' has no value in 1 of 21 rows, first in row 21"):
        workload_of("llama", [*rows, {"messages": None}], chat=True)
    with pytest.raises(DataError, match="leaves out 18 of 18 rows: nothing to learn is left"):
        learned([{"messages": "good"}] * 20, tmp_path)


def test_plain_text_beside_conversations_serves_a_tokenizer_without_a_template(workload_of: WorkloadOf) -> None:
    rows = [{"messages": [USER, ASSISTANT], "text": " ".join(WORDS)}] * 20
    blocks = workload_of("llama", rows, max_length=8)
    assert {len(ids) for ids in blocks.train["input_ids"]} == {8}
    body = workload_of("llama", [{"body": " ".join(WORDS)}] * 20, text_column="body", max_length=8)
    assert body.train["input_ids"][:] == blocks.train["input_ids"][:]
    chats: Workload = workload_of("llama", rows, chat=True, max_length=8)
    assert chats.train.column_names == ["messages"]


def test_prompts_that_leave_no_room_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learned([{"prompt": "good " * (100 if row % 2 else 2), "completion": "bad"} for row in range(40)], tmp_path)
    assert "of 36 rows: nothing to learn is left within max_length" in caplog.text
