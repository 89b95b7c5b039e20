"""Data for both tasks: tokens, labels and batches; and one clear error for every flaw of a data set."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from rankpilot.common.errors import AssetError, ConfigError, DataError, UnknownNameError
from rankpilot.data.models import adapt, load_model
from rankpilot.data.workload import Workload, held_out_split, load_workload
from rankpilot.lora.peft_config import absent_targets
from rankpilot.lora.targets import find_target_modules

from .conftest import ModelFolder, WorkloadOf
from .small_models import WORDS

TEXTS = [" ".join(WORDS[(row + shift) % len(WORDS)] for shift in range(1 + row % 5)) for row in range(20)]


def loss(model: str, workload: Workload) -> torch.Tensor:
    """The loss of a batch, with gradients in adapters and head."""
    base = load_model(model, workload.task, workload.labels, workload.tokenizer)
    peft = adapt(base, model, workload.task, target_modules="all-linear", r=2, lora_alpha=4)
    batch = workload.collator([workload.train[row] for row in range(4)])
    value: torch.Tensor = peft(**batch).loss
    value.backward()
    assert find_target_modules(peft)
    for name, parameter in peft.named_parameters():
        inside_head = "modules_to_save" in name and "classifier.dense" not in name
        assert not inside_head or parameter.grad is not None, name
    assert torch.isfinite(value)
    return value


@pytest.mark.parametrize("model", ["bert", "roberta", "distilbert", "llama"])
def test_classification(model: str, model_folder: ModelFolder, workload_of: WorkloadOf) -> None:
    rows = [{"text": text, "label": ("no", "yes")[row % 2]} for row, text in enumerate(TEXTS)]
    workload = workload_of(model, rows, max_length=4)
    assert (workload.task, workload.labels) == ("classification", ("no", "yes"))
    assert (len(workload.train), len(workload.held_out)) == (18, 2)
    assert max(map(len, workload.train["input_ids"])) == 4
    loss(model_folder(model), workload)


@pytest.mark.parametrize(
    ("model", "row", "options"),
    [
        ("bert", {"text": " ".join(WORDS), "label": "a"}, {}),
    ],
)
def test_what_is_cut_is_told(model, row, options, workload_of, caplog):
    rows = [row | ({"label": str(number % 2)} if "label" in row else {}) for number in range(20)]
    workload_of(model, rows, max_length=100, **options)
    assert "cut off" not in caplog.text
    workload_of(model, rows, max_length=4, **options)
    (told,) = [line for line in caplog.messages if "truncated" in line]
    found = re.match(r"(\d+) % of the tokens are truncated: rows have at most 4, .*--max-length (\d+)", told)
    assert found is not None
    share, most = found.groups()
    assert 50 < int(share) < 100
    caplog.clear()
    workload_of(model, rows, max_length=int(most), **options)
    assert "cut off" not in caplog.text


def test_usual_lengths(workload_of: WorkloadOf) -> None:
    texts = [{"text": " ".join(WORDS * 100)}] * 20
    classes = [row | {"label": str(number % 2)} for number, row in enumerate(texts)]
    assert max(map(len, workload_of("bert", classes).train["input_ids"])) == 64
    assert len(workload_of("llama", texts).train["input_ids"][0]) == 64, "as many as the model has positions"
    assert len(workload_of("t5", texts, task="causal-lm").train["input_ids"][0]) == 1024


@pytest.mark.parametrize(
    ("row", "options", "error", "words"),
    [
        ({"text": "good", "label": None}, {}, DataError, "'label' has no value in 1 of 21 rows, first in row 4"),
        ({"text": None, "label": "a"}, {}, DataError, "'text' has no value in 1 of 21 rows, first in row 4"),
        ({"text": "good", "label": "1"}, {"text_column": "txt"}, UnknownNameError, "Did you mean: 'text'"),
        ({"text": "good", "label": "1"}, {"label_column": "lable"}, UnknownNameError, "Set --label-column"),
    ],
)
def test_a_flaw_in_one_row(row, options, error, words, workload_of):
    rows: list[dict[str, Any]] = [{"text": text, "label": str(i % 2)} for i, text in enumerate(TEXTS)]
    rows.insert(3, row)
    if "label_column" in options:
        options = options | {"task": "classification"}
    with pytest.raises(error, match=re.escape(words)):
        workload_of("bert", rows, **options)


@pytest.mark.parametrize(
    ("values", "task", "words"),
    [
        ({"text": 3.5, "label": "a"}, None, "Row 1, column 'text': 3.5 is a number, not text. Set --text-column"),
        ({"text": ["good"], "label": "a"}, None, "['good'] is a list, not text"),
        ({"text": "good", "label": [1, 2]}, None, "contains lists (row 1: [1, 2]) ... rankpilot.attach"),
        ({"text": "good", "label": 0.5}, None, "contains fractions (row 1: 0.5) ... rankpilot.attach"),
        ({"text": "good", "label": "a"}, None, "single class"),
        ({"text": " ", "label": "a"}, None, "'text' is blank in all 20 rows ... Set --text-column"),
    ],
)
def test_a_flaw_in_every_row(values: dict[str, Any], task: Any, words: str, workload_of: WorkloadOf) -> None:
    with pytest.raises(DataError) as caught:
        workload_of("bert", [values] * 20, task=task)
    assert all(part in str(caught.value) for part in words.split(" ... "))


def test_an_empty_cell_of_a_csv_file_is_named_before_the_fractions_that_it_makes(model_folder, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "good,1\nbad,0\n" * 5 + "dull,\n")
    with pytest.raises(DataError, match="'label' has no value in 1 of 11 rows, first in row 11"):
        load_workload(model_folder("bert"), str(path))


def test_fractions_are_classes_if_the_task_says_so(workload_of: WorkloadOf) -> None:
    rows = [{"text": text, "label": row % 2 + 0.5} for row, text in enumerate(TEXTS)]
    assert workload_of("bert", rows, task="classification").labels == ("0.5", "1.5")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.csv", "text,label\na,1\nb,2,3,4\n", "Expected 2 fields in line 3, saw 4"),
        ("rows.jsonl", '{"text": "a"}\n{"text": b}\n', "line 2 is not JSON: Expecting value"),
        ("rows.json", '[{"text": "a"},\n {"text" "b"}]', "at position"),
        ("rows.parquet", "x", "Parquet file size is 1 bytes"),
    ],
)
def test_a_broken_file(name: str, content: str, words: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"Cannot read the data .*{re.escape(name)}: .*{re.escape(words)}") as caught:
        load_workload(model_folder("bert"), str(tmp_path / name))
    assert "network" not in str(caught.value)


def test_texts_teach_the_end_token_where_it_is_that_of_padding(workload_of: WorkloadOf) -> None:
    workload = workload_of("llama", [{"text": "good film"}] * 40, task="causal-lm", max_length=6)
    workload.tokenizer.pad_token = workload.tokenizer.eos_token
    batch = workload.collator([workload.train[0]])
    assert workload.tokenizer.eos_token_id in batch["labels"]
    assert batch["labels"].tolist() == batch["input_ids"].tolist()


def test_a_test_split_without_labels_is_none_to_hold_out() -> None:
    train, valid = (Dataset.from_dict({"text": ["a"] * 3, "label": [0, 1, 0]}) for _ in range(2))
    for hidden in ({"text": ["a"]}, {"text": ["a"], "label": [None]}, {"text": ["a"], "label": [-1]}):
        splits = DatasetDict(train=train, test=Dataset.from_dict(hidden), validation=valid)
        assert held_out_split(splits, train, "label") is valid


@pytest.mark.parametrize("name", ["missing.csv", "./missing", "missing/rows.jsonl"])
def test_a_missing_file(name: str, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssetError, match=r"Data file or folder missing.* does not exist"):
        load_workload(model_folder("bert"), name)


def test_a_saved_head_of_another_size_is_made_anew(model_folder, caplog, workload_of):
    rows = [{"text": text, "label": row % 2} for row, text in enumerate(TEXTS)]
    workload = workload_of("bert", rows)
    model = load_model(model_folder("bert"), workload.task, workload.labels, workload.tokenizer)
    assert model.classifier.out_features == 2
    assert [record.message for record in caplog.records if record.name == "rankpilot.data.models"] == [
        f"The head of {model_folder('bert')!r} does not have 2 outputs, so a new one is trained."
    ]
    caplog.clear()
    load_model(model_folder("bert"), workload.task, ("a", "b", "c"), workload.tokenizer)
    assert not [record for record in caplog.records if record.name == "rankpilot.data.models"]


def test_other_weights_of_another_shape_are_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("bert"), tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ConfigError, match=r"do not match its config.json: bert.encoder.layer.0.* has another shape"):
        load_model(str(folder), "classification", ("a", "b"), None)


def test_names_that_the_model_has_not_are_passed_over_unless_it_has_none(model_folder: ModelFolder) -> None:
    def targets(names: str) -> tuple[set[str], list[str]]:
        base = load_model(model_folder("llama"), "causal-lm", (), None)
        model = adapt(base, "llama", "causal-lm", target_modules=names, r=2, lora_alpha=4)
        return {target.name.rpartition(".")[2] for target in find_target_modules(model)}, absent_targets(model)

    assert targets("v_proj,q_porj, query") == ({"v_proj"}, ["q_porj", "query"])
    assert targets("v_proj,self_attn.q_proj") == ({"v_proj", "q_proj"}, [])
    with pytest.raises(UnknownNameError, match=r"Unknown target module 'q_porj'. Did you mean: 'q_proj'"):
        targets("q_porj,query")


@pytest.mark.parametrize("row", [{"tokens": ["good"], "tags": ["a"]}, {"input": "good", "target": "bad"}])
def test_data_of_other_tasks(row: dict[str, Any], workload_of: WorkloadOf) -> None:
    with pytest.raises(UnknownNameError, match=r"text column 'text'.* For other tasks, call rankpilot\.attach"):
        workload_of("t5", [row] * 20)


def test_a_model_for_another_task(model_folder: ModelFolder, workload_of: WorkloadOf) -> None:
    workload = workload_of("bert", [{"text": "good film"}] * 40, task="causal-lm", max_length=6)
    with pytest.raises(ConfigError, match=r"\(t5\) does not support causal-lm\. Supported: classification\. For other"):
        load_model(model_folder("t5"), workload.task, (), workload.tokenizer)
