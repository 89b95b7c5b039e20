"""Folders of saved adapters, as far as rankpilot reads them."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig
from rankpilot.errors import ConfigError, RunFolderError
from rankpilot.lora.adapter_file import export_padded, export_rank_pattern, rank_pattern_yaml, read_adapter
from safetensors.torch import save_file

from .damage import as_text, damaged_json, damaged_tensors
from .running import fuzz

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """The content of an adapter's folder."""

    config: bytes
    weights: bytes


@cache
def small_adapter() -> AdapterFiles:
    """Two modules, at ranks 2 and 4."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.0.v_proj": 4},
            alpha_pattern={"layers.0.v_proj": 8}, base_model_name_or_path="base", task_type="CAUSAL_LM",
        ).save_pretrained(str(folder))  # fmt: skip
        sizes = {"q_proj": 2, "v_proj": 4}
        tensors = {
            f"base_model.model.layers.0.{name}.lora_{side}.weight": torch.ones((rank, 6) if side == "A" else (6, rank))
            for name, rank in sizes.items()
            for side in "AB"
        }
        save_file(tensors, folder / WEIGHTS)
        return AdapterFiles((folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes())


@st.composite
def adapters(draw: st.DrawFn) -> AdapterFiles:
    """An adapter with a damaged configuration, damaged weights, or both."""
    whole, which = small_adapter(), draw(st.sampled_from(["config", "weights", "both"]))
    config = draw(damaged_json(json.loads(whole.config))) if which != "weights" else whole.config
    weights = draw(damaged_tensors(whole.weights)) if which != "config" else whole.weights
    return AdapterFiles(config, weights)


def write(files: AdapterFiles, folder: Path) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_bytes(files.config)
    (folder / WEIGHTS).write_bytes(files.weights)
    return folder


@fuzz(adapters(), examples=120)
def test_adapters(files: AdapterFiles) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write(files, Path(name) / "adapter")
        adapter = read_adapter(folder)
        for module in adapter.ranks:
            adapter.scale(module)
        rank_pattern_yaml(folder)
        export_rank_pattern(folder)
        export_padded(folder, Path(name) / "padded")
        assert {path.name for path in Path(name).iterdir()} == {"adapter", "padded"}


# What was found -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora_dropout", "r", "lora_alpha", "use_dora", "modules_to_save", "target_modules"])
def test_a_setting_does_not_become_lines_of_yaml(tmp_path: Path, name: str) -> None:
    folder = with_config(tmp_path / "adapter", **{name: {"0\ntrust_remote_code: true": 1}})
    with pytest.raises(RunFolderError, match=f"is corrupt or foreign: {name} is"):
        rank_pattern_yaml(folder)


def test_a_pair_of_rank_0_that_claims_a_huge_width(tmp_path: Path) -> None:
    folder = write(small_adapter(), tmp_path / "adapter")
    tensors = {
        f"base_model.model.layers.0.q_proj.lora_{side}.weight": torch.ones((0, 2**40) if side == "A" else (2**40, 0))
        for side in "AB"
    }
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ConfigError, match="At rank 1 the adapter would take 8,796,093,022,208 bytes"):
        export_padded(folder, tmp_path / "padded")


def with_config(folder: Path, **changes: Any) -> Path:
    files = small_adapter()
    return write(AdapterFiles(as_text(json.loads(files.config) | changes), files.weights), folder)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*x", "([a-z]+\\.?){9}", ".*.*.*x", "x" * 1001, "(a|a)*$", "(?:a{1,}){2,}"]
)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_may_take_for_ever(tmp_path: Path, pattern: str, name: str) -> None:
    with pytest.raises(RunFolderError, match="may take very long to match"):
        read_adapter(with_config(tmp_path / "adapter", **{name: {pattern: 4}}))


@pytest.mark.parametrize("pattern", ["layers.0.v_proj", r"^layers\.\d+\.v_proj$", ".*v_proj", r"layers\.(0|1)\.v_proj"])
def test_patterns_that_people_write(tmp_path: Path, pattern: str) -> None:
    adapter = read_adapter(with_config(tmp_path / "adapter", rank_pattern={pattern: 4}))
    assert adapter.ranks == {"layers.0.q_proj": 2, "layers.0.v_proj": 4}


@pytest.mark.parametrize("kind", [None, "", "LORA ", ["LORA"], {}, "../x"])
def test_a_kind_of_adapter_that_peft_does_not_know(tmp_path: Path, kind: object) -> None:
    """Without a kind, PEFT's own reader calls itself for ever."""
    with pytest.raises(RunFolderError, match="is corrupt or foreign: peft_type is"):
        read_adapter(with_config(tmp_path / "adapter", peft_type=kind))


@pytest.mark.parametrize("changes", [{"rank_pattern": [1]}, {"rank_pattern": "x"}, {"alpha_pattern": 5}])
def test_patterns_that_are_no_mapping(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(RunFolderError, match="no values by module"):
        read_adapter(with_config(tmp_path / "adapter", **changes))


@pytest.mark.skipif("monteclora_config" not in LoraConfig.__dataclass_fields__, reason="this PEFT does not know it")
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_settings_inside_a_setting(tmp_path: Path) -> None:
    """PEFT's own reader leaves out a setting that it does not know, by name, and tries again: here for ever."""
    with pytest.raises(RunFolderError, match="is corrupt or foreign: it holds settings inside a setting"):
        read_adapter(with_config(tmp_path / "adapter", monteclora_config={"m;Ea": 1}))
