"""Conversations and instructions: every form that people have, as SFTTrainer reads it and as it tokenises it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rankpilot.common.errors import ConfigError, DataError
from rankpilot.data.batches import IGNORED
from rankpilot.data.workload import Workload, load_workload

from . import small_models
from .conftest import ModelFolder, WorkloadOf
from .small_models import WORDS, build, write_rows

USER, ASSISTANT = {"role": "user", "content": "good film"}, {"role": "assistant", "content": "bad plot"}
SHARED = [{"from": "human", "value": "good film"}, {"from": "gpt", "value": "bad plot"}]
ASKED = {"instruction": "good", "output": "bad plot"}
TEXT = {"prompt": "good film", "completion": " bad"}
CHAT = {"prompt": [USER], "completion": [ASSISTANT]}


def tool(name: str) -> dict[str, Any]:
    """The description of a tool; each has other parameters."""
    parameters = {"type": "object", "properties": {name: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calling(name: str) -> list[dict[str, Any]]:
    """A conversation in which a tool is called; each has other arguments."""
    call = {"type": "function", "function": {"name": name, "arguments": {name: "dull"}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    return [USER, calls, {"role": "tool", "name": name, "content": "plot"}, ASSISTANT]


FORMS: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    "messages": ({"messages": [USER, ASSISTANT], "id": 3}, True, {"messages": [USER, ASSISTANT]}),
    "sharegpt": ({"conversations": SHARED}, True, {"messages": [USER, ASSISTANT]}),
    "conversations": ({"conversations": [USER, ASSISTANT]}, True, {"messages": [USER, ASSISTANT]}),
    "prompt-messages": (CHAT | {"label": 1}, True, CHAT),
    "prompt-text": (TEXT, False, TEXT),
    "alpaca-chat": (ASKED | {"input": "film"}, True, CHAT | {"prompt": [USER | {"content": "good\n\nfilm"}]}),
    "alpaca-chat-no-input": (ASKED | {"input": ""}, True, CHAT | {"prompt": [USER | {"content": "good"}]}),
}
"""A row as people have it, whether the tokenizer has a chat template, and the row for SFTTrainer."""


def learned(tokens: dict[str, Any], workload: Workload) -> str:
    """The text that counts in the loss."""
    counted = [label for label in tokens["labels"] if label != IGNORED]
    return str(workload.tokenizer.decode(counted))


def trained_by_trl(workload: Workload, folder: Path, length: int) -> Any:
    """An SFTTrainer on the texts of a workload."""
    trl = pytest.importorskip("trl")
    quiet = {"use_cpu": True, "bf16": False, "report_to": []}
    arguments = trl.SFTConfig(output_dir=str(folder / "out"), max_length=length, **quiet)
    rows, tokenizer = workload.texts.train, workload.tokenizer
    return trl.SFTTrainer(build("llama"), arguments, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize(("row", "chat", "expected"), FORMS.values(), ids=FORMS)
def test_each_form_becomes_rows_for_trl(row, chat, expected, tmp_path, workload_of):
    """And their tokens are those of SFTTrainer."""
    workload = workload_of("llama", [row] * 20, chat=chat)
    assert workload.task == "causal-lm"
    assert workload.texts.is_chat
    assert (len(workload.texts.train), len(workload.texts.held_out)) == (18, 2)
    assert workload.texts.train[0] == workload.texts.held_out[0] == expected
    text = learned(workload.train[0], workload)
    assert "bad" in text
    assert ("good" in text) == ("messages" in expected)
    batch = workload.collator([workload.train[index] for index in range(2)])
    assert torch.isfinite(build("llama")(**batch).loss)
    short = workload_of("llama", [row] * 20, chat=chat, max_length=10)
    trainer = trained_by_trl(short, tmp_path, 10)
    theirs = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    ours = short.collator([short.train[index] for index in range(2)])
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(theirs[name], ours[name]), name


@pytest.mark.parametrize(("as_text", "split"), [(False, None), (True, 3)])
def test_tools_reach_the_chat_template(tmp_path, monkeypatch, as_text, split):
    monkeypatch.setattr(small_models, "CHATML", small_models.TOOL_CHATML)
    folder = small_models.save("llama", tmp_path / "tools", chat=True)
    rows: list[dict[str, Any]] = []
    for name in ["film", "plot", "bad"] * 6:
        tools, messages = [tool(name), tool("a")], calling(name)
        chat = {"messages": messages} if split is None else {"prompt": messages[:split], "completion": messages[split:]}
        rows.append(chat | {"tools": json.dumps(tools) if as_text else tools})
    rows.append(rows[0] | {"tools": None})
    workload = load_workload(folder, write_rows(tmp_path / "rows.jsonl", rows), max_length=64)
    texts = [workload.tokenizer.decode(ids) for ids in workload.train["input_ids"]]
    shown = {text[: text.index("user")] for text in texts}
    assert shown >= {
        f"<|im_start|> tool {name} <|im_end|> <|im_start|> tool a <|im_end|> <|im_start|> "
        for name in ("film", "plot", "bad")
    }
    assert {text[text.index("good film") :].split(" <|im_start|>")[1] for text in texts} == {
        f" assistant tool {name} dull <|im_end|>" for name in ("film", "plot", "bad")
    }
    trainer = trained_by_trl(workload, tmp_path, 64)
    assert trainer.train_dataset["input_ids"][:] == workload.train["input_ids"][:]
    assert trainer.train_dataset["labels"][:] == workload.train["labels"][:]


def test_tools_that_a_chat_template_leaves_out(workload_of: WorkloadOf) -> None:
    with pytest.raises(ConfigError, match=r"The conversations have tools, which the chat template .* ignores"):
        workload_of("llama", [{"messages": [USER, ASSISTANT], "tools": [tool("film")]}] * 20, chat=True)
    with pytest.raises(ConfigError, match="The conversations have tool_calls, which"):
        workload_of("llama", [{"messages": calling("film")}] * 20, chat=True)
    nothing = workload_of("llama", [{"messages": [USER, ASSISTANT], "tools": []}] * 20, chat=True)
    assert nothing.texts.train.column_names == ["messages"]
    for value, words in (("{", "not JSON"), ("[1]", "not a list of tools"), (7, "not a list of tools")):
        with pytest.raises(DataError, match=rf"Row 1, column 'tools': .* is {words}\. Tools must be a list"):
            workload_of("llama", [{"messages": [USER, ASSISTANT], "tools": value}] * 20, chat=True)


@pytest.mark.parametrize(
    ("as_text", "split", "with_tools"), [(False, None, False), (True, None, True), (False, 1, True)]
)
def test_variables_reach_the_chat_template(tmp_path, monkeypatch, as_text, split, with_tools):
    """A row without a variable leaves it undefined, whatever other rows have."""
    monkeypatch.setattr(small_models, "CHATML", small_models.VARIABLE_CHATML)
    folder = small_models.save("llama", tmp_path / "variables", chat=True)
    rows: list[dict[str, Any]] = []
    for variables in [{"mood": "dull"}, {"scene": {"place": "film"}}, {"mood": "good"}, None] * 5:
        messages = calling("film") if with_tools else [USER, ASSISTANT]
        chat = {"messages": messages} if split is None else {"prompt": messages[:split], "completion": messages[split:]}
        given = json.dumps(variables) if as_text and variables else variables
        rows.append(chat | {"chat_template_kwargs": given} | ({"tools": [tool("a")]} if with_tools else {}))
    workload = load_workload(folder, write_rows(tmp_path / "rows.jsonl", rows), max_length=64)
    texts = [workload.tokenizer.decode(ids) for ids in workload.train["input_ids"]]
    assert {text[: text.index("<|im_start|>")].strip() for text in texts} == {"dull", "film", "good", ""}
    trainer = trained_by_trl(workload, tmp_path, 64)
    assert trainer.train_dataset["input_ids"][:] == workload.train["input_ids"][:]


def test_variables_that_are_no_dictionary(workload_of: WorkloadOf) -> None:
    for value, words in (("{", "not JSON"), ("[1]", "not a dictionary"), (7, "not a dictionary")):
        match = rf"Row 1, column 'chat_template_kwargs': .* is {words}\. Chat template variables must be"
        with pytest.raises(DataError, match=match):
            workload_of("llama", [{"messages": [USER, ASSISTANT], "chat_template_kwargs": value}] * 20, chat=True)
    nothing = workload_of("llama", [{"messages": [USER, ASSISTANT], "chat_template_kwargs": {}}] * 20, chat=True)
    assert nothing.texts.train.column_names == ["messages"]
    named = {"messages": [USER | {"name": "bob"}, ASSISTANT], "chat_template_kwargs": {"x": 1}}
    texts = workload_of("llama", [named, named | {"messages": [USER, ASSISTANT]}] * 10, chat=True).texts
    assert {message.get("name") for row in texts.train["messages"] for message in row} == {"bob", None}


def test_instructions_without_a_chat_template_stand_under_headings(workload_of: WorkloadOf) -> None:
    workload = workload_of("llama", [ASKED | {"input": "film"}] * 20, max_length=64)
    row = workload.texts.train[0]
    assert row["prompt"].endswith("\n\n### Instruction:\ngood\n\n### Input:\nfilm\n\n### Response:\n")
    assert learned(workload.train[0], workload) == "bad plot [EOS]"
    bare = workload_of("llama", [ASKED] * 20, max_length=64)
    assert "Input" not in bare.texts.train[0]["prompt"]


def test_plain_text(workload_of: WorkloadOf) -> None:
    workload = workload_of("llama", [{"body": " ".join(WORDS)}] * 20, text_column="body", max_length=8)
    assert not workload.texts.is_chat
    assert workload.texts.train.column_names == ["text"]
    assert workload.texts.train[0]["text"] == " ".join(WORDS)
    assert {len(ids) for ids in workload.train["input_ids"]} == {8}


def test_conversations_need_a_chat_template(workload_of: WorkloadOf) -> None:
    with pytest.raises(ConfigError, match=r"no chat template.*instruct version.*trl.clone_chat_template\(model, tok"):
        workload_of("llama", [{"messages": [USER, ASSISTANT]}] * 20)
    # Text beside the conversations serves such a tokenizer.
    both = {"messages": [USER, ASSISTANT], "text": " ".join(WORDS)}
    workload = workload_of("llama", [both] * 20, max_length=8)
    assert workload.texts.train.column_names == ["text"]


def test_prompts_that_leave_no_room_are_left_out(caplog: pytest.LogCaptureFixture, workload_of: WorkloadOf) -> None:
    rows = [{"prompt": "good " * (20 if row % 2 else 2), "completion": "bad"} for row in range(40)]
    workload = workload_of("llama", rows, max_length=8)
    assert len(workload.train) == len(workload.texts.train) < 36
    assert {len(row["prompt"]) for row in workload.texts.train} == {10}
    assert "rows were dropped: their prompts alone take 8 tokens" in caplog.text
    with pytest.raises(DataError, match="No prompt leaves room for its completion within 2 tokens"):
        workload_of("llama", rows, max_length=2)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "Row 3, column 'messages': [] is an empty list"),
        ({"messages": None}, "'messages' has no value in 1 of 21 rows, first in row 3"),
        ({"messages": [{"role": "user", "content": None}]}, "a list with the message {'role': 'user'}"),
        ({"messages": [{"role": None, "content": "good"}]}, "a list with the message {'content': 'good'}"),
        ({"conversations": [{"from": "human", "value": None}]}, "column 'conversations'"),
        ({"prompt": "good", "completion": None}, "'completion' has no value in 1 of 21 rows"),
    ],
)
def test_a_flaw_in_one_row(row: dict[str, Any], words: str, workload_of: WorkloadOf) -> None:
    good = {"messages": [USER], "conversations": SHARED, "prompt": "good", "completion": "bad"} | ASKED
    rows = [{name: good[name] for name in row} for _ in range(20)]
    rows.insert(2, row)
    with pytest.raises(DataError, match=re.escape(words)):
        workload_of("llama", rows, chat=True)


@pytest.mark.parametrize("name", ["messages", "prompt"])
@pytest.mark.parametrize("value", [3, ["good"]])
def test_columns_that_hold_no_conversations(name: str, value: Any, model_folder: ModelFolder, tmp_path: Path) -> None:
    rows = {name: [value] * 20} | ({"completion": ["bad"] * 20} if name == "prompt" else {})
    Dataset.from_dict(rows).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match=rf"Row 1, column '{name}': .* (is a number, not a list|a list containing)"):
        load_workload(model_folder("llama", chat=True), str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("row", [{"prompt": "good", "completion": ""}, {"instruction": "good", "output": " "}])
def test_nothing_to_answer_in_any_row(row: dict[str, Any], workload_of: WorkloadOf) -> None:
    with pytest.raises(DataError, match=rf"'{[*row][1]}' is blank in all 20 rows, so there is nothing to learn"):
        workload_of("llama", [row] * 20)
