"""Folders of strangers: nothing that comes with a model runs, and a configuration that makes no model is one error."""

from __future__ import annotations

import ast
import io
import json
import shlex
import time
from pathlib import Path

import pytest
from rankpilot import memory_of
from rankpilot.cli.main import run
from rankpilot.common.errors import ConfigError

from ..cli.mistakes import failure
from .small_models import save, write_rows

WHEEL = Path(__file__).parents[2]
NO_WHEEL = {"tests", "benchmarks", "tools", "docs", "examples", "scripts", ".venv", "build"}
SMALL = "--batch-size 2 --max-length 16"
NO_CODE_IN = {"LoraConfig", "AutoHfQuantizer"}
"""Classes that read settings alone, and have no argument for trust."""


def readers(tree: ast.AST) -> list[ast.Attribute]:
    """Every mention of a method by which transformers reads or makes a model, a tokenizer or a configuration."""
    found = [each for each in ast.walk(tree) if isinstance(each, ast.Attribute)]
    found = [each for each in found if each.attr in ("from_pretrained", "from_config")]
    return [each for each in found if not (isinstance(each.value, ast.Name) and each.value.id in NO_CODE_IN)]


def test_each_call_of_transformers_says_that_no_code_is_trusted():
    files = [path for path in WHEEL.rglob("*.py") if not NO_WHEEL & set(path.relative_to(WHEEL).parts)]
    count = 0
    for path in files:
        tree = ast.parse(path.read_text())
        calls = {id(each.func): each for each in ast.walk(tree) if isinstance(each, ast.Call)}
        for reader in readers(tree):
            where = f"{path.relative_to(WHEEL)}:{reader.lineno}"
            assert id(reader) in calls, f"{where} hands the method on, so that nobody sees how it is called"
            given = {word.arg: ast.unparse(word.value) for word in calls[id(reader)].keywords}
            assert given.get("trust_remote_code") == "False", where
            count += 1
    assert count >= 8


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input that says yes to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))


def with_code(folder: Path, model_type: str) -> Path:
    """A saved model that brings classes of its own, which leave a file behind when they are loaded."""
    save("bert", folder)
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n"
        "from transformers import BertConfig as C, BertForSequenceClassification as M, BertTokenizer as T\n"
    )
    classes = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M", "AutoTokenizer": "evil.T"}
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        settings = json.loads(path.read_text()) | {"auto_map": classes}
        path.write_text(json.dumps(settings | ({"model_type": model_type} if name == "config.json" else {})))
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "evil.py"}))
    return folder


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("words", ["memory {} --device T4", "finetune {} {rows} --budget 100%"])
def test_code_of_an_unknown_model_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    model = with_code(tmp_path / "model", "stranger")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "good film", "label": row % 2} for row in range(40)])
    assert run(shlex.split(words.format(model, rows=rows) + f" {SMALL} --output {tmp_path / 'run'}")) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "requires its own Python code (`auto_map`), which rankpilot never runs" in line
    with pytest.raises(ConfigError, match="rankpilot never runs"):
        memory_of(str(model), "T4")
    assert not (model / "ran").exists()


@pytest.mark.usefixtures("answers")
def test_a_model_that_transformers_has_is_read_without_the_code_that_comes_with_it(tmp_path: Path) -> None:
    model = with_code(tmp_path / "model", "bert")
    assert run(shlex.split(f"memory {model} --device T4 {SMALL} --output {tmp_path / 'run'}")) == 0
    assert not (model / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"vocab_size": 0}, "vocab_size=0. It must be a whole number from 1 to 16,777,216"),
        ({"vocab_size": 10**15}, "vocab_size=1000000000000000. It must be a whole number from 1 to 16,777,216"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_attention_heads": 0}, "is not usable: integer modulo by zero"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers=100000. It must be a whole number from 1 to 512"),
        ({"torch_dtype": "evil"}, "is not usable: module 'torch' has no attribute 'evil'"),
        ("[" * 10**5 + "]" * 10**5, "It is nested too deeply."),
    ],
)
def test_a_configuration_that_makes_no_model(tmp_path, capsys, llama_config, fields, told):
    whole = llama_config.to_dict()
    whole.pop("dtype")
    nested = f'{{"model_type": "llama", "x": {fields}}}'
    text = nested if isinstance(fields, str) else json.dumps({**whole, **fields})
    (tmp_path / "config.json").write_text(text)
    begun = time.perf_counter()
    line = failure(f"memory {tmp_path} --device T4 {SMALL}", capsys)
    assert str(tmp_path) in line
    assert told in line
    assert time.perf_counter() - begun < 5
