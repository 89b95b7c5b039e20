"""A merged model equals PEFT's own merge, and takes the memory of one weight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rankpilot.cli.main import run
from rankpilot.common.errors import NonFiniteError, RunFolderError, UnsupportedError
from rankpilot.lora.merged_file import export_merged
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from .test_export import save_mixed

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
}


def saved(folder: Path, config: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Path, Path]:
    """A base of several files and an adapter of mixed ranks on it."""
    torch.manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(str(base), max_shard_size="20KB")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    save_mixed(get_peft_model(AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype), config), adapter)
    return base, adapter


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_merge_of_peft(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    base, adapter = saved(tmp_path, CONFIGS[family], dtype)
    run(["export", str(adapter), "--format", "merged", "--output", str(tmp_path / "merged")])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype), str(adapter))
    wanted = model.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype="auto").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in wanted.items())
    before = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto").state_dict()
    assert any(not torch.equal(tensor, found[key]) for key, tensor in before.items())
    assert len([*(tmp_path / "merged").glob("*.safetensors")]) == len([*base.glob("*.safetensors")]) > 1


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="use_dora"):
        export_merged(saved(tmp_path, CONFIGS["llama"], use_dora=True)[1], tmp_path / "merged")
    (tmp_path / "plain").mkdir()
    base, adapter = saved(tmp_path / "plain", CONFIGS["llama"])
    with pytest.raises(RunFolderError, match="Pass --base"):
        export_merged(adapter, tmp_path / "merged", tmp_path / "nowhere")
    path = next(path for path in base.glob("*.safetensors") if any("q_proj" in key for key in load_file(path)))
    tensors = load_file(path)
    key = next(key for key in tensors if "q_proj" in key)
    for wrong, error in (
        (tensors | {key: torch.full_like(tensors[key], torch.inf)}, NonFiniteError),
        (tensors | {key: tensors[key].to(torch.int8)}, UnsupportedError),
        ({name: tensor for name, tensor in tensors.items() if name != key} | {"x": torch.zeros(1)}, UnsupportedError),
    ):
        save_file(wrong, path, metadata={"format": "pt"})
        with pytest.raises(error):
            export_merged(adapter, tmp_path / "merged", base)
        assert not (tmp_path / "merged").exists()


MEASURED = """
import re, sys
from pathlib import Path
from rankpilot.lora.merged_file import export_merged
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
export_merged(*sys.argv[1:])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak of Linux")
def test_it_holds_one_weight_at_a_time(tmp_path: Path) -> None:
    large = LlamaConfig(**SIZES | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16})
    base, adapter = saved(tmp_path, large)
    whole = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    measured = [sys.executable, "-c", MEASURED, str(adapter), str(tmp_path / "merged")]
    grown = int(subprocess.run(measured, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert grown < whole / 4, f"{grown / 2**20:.0f} MiB for a model of {whole / 2**20:.0f} MiB"
