"""`rankpilot export`: both formats, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig
from rankpilot.cli import main as cli
from rankpilot.lora.adapter_file import rank_pattern_yaml
from safetensors.torch import load_file, save_file

from .mistakes import failure, usage_error

LONG = "model.language_model.layers.0.some_quite_long_block_name.self_attention.dense_h_to_4h.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A saved adapter with two modules, at ranks 4 and 9."""
    folder = tmp_path / "adapter"
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], rank_pattern={"b.q_proj": 9}).save_pretrained(str(folder))
    tensors = {}
    for name, rank in ((LONG, 4), ("b.q_proj", 9)):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 5)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(3, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(("more", "rank"), [([], 16), (["--rank", "64"], 64)])
def test_padded(more: list[str], rank: int, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "padded"
    assert cli.run(["export", str(adapter), "--output", str(output), *more]) == 0
    assert capsys.readouterr().out == f"Wrote {output}, with all modules at rank {rank}.\n"
    assert json.loads((output / "adapter_config.json").read_text())["r"] == rank
    shapes = [t.shape for k, t in load_file(output / "adapter_model.safetensors").items() if "lora_A" in k]
    assert shapes == [(rank, 5), (rank, 5)]


def test_rank_pattern(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(adapter), "--format", "rank-pattern"]
    assert cli.run(arguments) == 0
    printed = capsys.readouterr().out
    assert printed == rank_pattern_yaml(adapter), "not wrapped, not styled"
    assert yaml.safe_load(printed)["lora_target_modules"] == ["b.q_proj", LONG]
    output = tmp_path / "ranks.yaml"
    assert cli.run([*arguments, "--output", str(output)]) == 0
    assert output.read_text() == printed
    assert capsys.readouterr().out == f"Wrote the ranks for axolotl to {output}.\n"


def test_mistakes(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, nowhere = tmp_path / "padded", tmp_path / "nowhere"
    for words, told in {
        f"{adapter}": "pass --output FOLDER",
        f"{adapter} --output {output} --rank 12": "rank 12. Allowed: 1, 8, 16, 32, 64, 128, 256, 320, 512.",
        f"{adapter} --output {output} --rank 8": "rank 9, which exceeds rank 8",
        f"{adapter} --format rank-pattern --rank 16": "--rank applies to padded adapters",
        f"{nowhere} --output {output}": "save_pretrained",
        f"{nowhere} --format rank-pattern": "save_pretrained",
    }.items():
        assert told in failure(f"export {words}", capsys)
    assert not output.exists()
    assert "rank-pattern" in usage_error(f"export {adapter} --format gguf", capsys)


def test_nothing_is_overwritten(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for format_ in ("padded", "rank-pattern"):
        line = failure(["export", str(adapter), "--format", format_, "--output", str(notes)], capsys)
        assert f"{notes} already exists" in line
    assert "already exists" in failure(["export", str(adapter), "--output", str(adapter)], capsys)
    assert notes.read_text() == "mine"
