"""`rankpilot memory --lengths`: steps of rows of known lengths, in parts and padded, before any of them runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rankpilot.cli import main as cli
from rankpilot.common.errors import AssetError, DataError, RankPilotError
from rankpilot.common.files import read_json
from rankpilot.cost.forecast.memory_of import memory_of
from rankpilot.cost.forecast.outlook import Outlook
from rankpilot.report.lengths import lengths_figures, lengths_of, read_lengths, steps_of_lengths
from transformers import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    architectures=["LlamaForCausalLM"],
)


@pytest.fixture(scope="module")
def outlook() -> Outlook:
    return memory_of(CONFIG, "2GiB", batch_size=8, max_length=2048)


@pytest.mark.parametrize("text", ["3 5 9", "3\n5\n9\n", "3,5, 9", "[3, 5, 9]"])
def test_lengths_are_read_as_people_write_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    assert read_lengths(path).tolist() == [3, 5, 9]
    assert lengths_of(str(path), "no model", 6).tolist() == [3, 5, 6]


@pytest.mark.parametrize(
    ("text", "named"), [("", "nothing"), ("3 x", "'x'"), ("3 0", "'0'"), ("[3", r"'\[3'"), ("4.5", "'4.5'")]
)
def test_what_is_no_length_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=f"contains {named};"):
        read_lengths(path)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    values = [{"text": "a b " * size, "ids": [1] * size, "number": size} for size in (1, 4, 40)]
    path.write_text("\n".join(map(json.dumps, values)))
    return path


def test_a_column_is_counted_in_tokens(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankpilot.data.models.load_tokenizer", lambda model: lambda texts, **_: Split(texts))
    assert lengths_of(f"{rows}:text", "a model").tolist() == [2, 8, 80]
    assert lengths_of(f"{rows}:text", "a model", 32).tolist() == [2, 8, 32]
    assert lengths_of(f"{rows}:ids", "no model").tolist() == [1, 4, 40]


class Split(dict[str, list[list[str]]]):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(input_ids=[text.split() for text in texts])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("{rows}:txt", "Unknown column 'txt'"),
        ("{rows}:number", "--lengths .*:number requires texts"),
        ("{rows}.gone:text", "Data file or folder .* does not exist|Unknown data set"),
        ("gone.txt", "gone.txt"),
    ],
)
def test_a_column_that_cannot_be_counted_is_named(rows: Path, given: str, named: str) -> None:
    with pytest.raises(RankPilotError, match=named):
        lengths_of(given.format(rows=rows), "a model")


def test_a_model_without_a_tokenizer_is_named(rows: Path) -> None:
    with pytest.raises(AssetError, match="tokenizer of /no/such/model"):
        lengths_of(f"{rows}:text", "/no/such/model")


def test_parts_take_less_time_and_no_step_above_the_limit(outlook: Outlook) -> None:
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(5, 1, 400)), 8, 2048).astype(int)
    found = steps_of_lengths(outlook, lengths)
    assert found.steps == 50
    assert found.too_long == 0
    assert np.nanmax(found.parts_bytes) <= found.limit
    assert found.time <= 1.0
    assert found.fits == found.longest == lengths.max()
    assert lengths_figures(found)["rows"] == 8
    same = steps_of_lengths(outlook, np.full(64, 100))
    assert (same.padding_saved, same.parts) == (0.0, 1.0), "rows of one length have no padding, and fill the card badly"


def test_rows_that_fit_nothing_are_counted(outlook: Outlook) -> None:
    found = steps_of_lengths(outlook, np.array([50_000_000] + [64] * 15))
    assert (found.steps, found.too_long) == (2, 1)
    assert 64 < found.fits < 50_000_000


def test_the_command_shows_lengths_beside_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIG.save_pretrained(tmp_path / "model")
    (tmp_path / "lengths.txt").write_text(" ".join(map(str, [10, 300] * 20)))
    arguments = [
        "memory",
        str(tmp_path / "model"),
        "--device-memory",
        "2GiB",
        "--batch-size",
        "8",
        "--max-length",
        "300",
    ]
    assert cli.run([*arguments, "--lengths", str(tmp_path / "lengths.txt"), "--output", str(tmp_path / "out")]) == 0
    assert "padded rectangle" in capsys.readouterr().out
    assert read_json(tmp_path / "out" / "memory.json")["lengths"]["steps"] == 5
    assert (tmp_path / "out" / "lengths.png").stat().st_size > 5_000
