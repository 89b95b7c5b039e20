"""Files of axolotl, TRL and LLaMA-Factory, read as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from rankpilot.cli import main as cli
from rankpilot.errors import ConfigError
from rankpilot.study.trainer_file import read_trainer_file
from transformers import LlamaConfig

from ..cli.mistakes import failure, usage_error

AXOLOTL = """
base_model: Qwen/Qwen3-4B
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
load_in_4bit: true
quantize_moe_experts: true
datasets: [{path: some/data, type: chat_template}]
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
gradient_accumulation_steps: 4
micro_batch_size: 2
optimizer: adamw_bnb_8bit
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
attn_implementation: flash_attention_2
wandb_project:
"""
TRL = """
model_name_or_path: Qwen/Qwen3-4B
use_peft: true
lora_r: 16
lora_target_modules: all-linear
load_in_4bit: true
per_device_train_batch_size: 4
max_length: 512
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
"""
LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen3-4B
stage: sft
finetuning_type: lora
lora_target: all
lora_rank: 8
quantization_bit: 4
cutoff_len: 1024
per_device_train_batch_size: 2
flash_attn: fa2
bf16: true
"""


def read(folder: Path, text: str) -> Path:
    path = folder / "train.yaml"
    path.write_text(text)
    return path


def test_axolotl(tmp_path):
    file = read_trainer_file(read(tmp_path, AXOLOTL))
    assert (file.program, file.unread) == ("axolotl", ())
    wanted = {
        "model": "Qwen/Qwen3-4B",
        "rank": 32,
        "lora_dropout": 0.05,
        "target_modules": "q_proj,v_proj",
        "quantization": "nf4",
        "prepare_kbit": False,
        "experts": "axolotl",
        "optimizer": "adamw8bit",
        "dtype": "bf16",
        "attention": "flash",
        "loss": "cut",
        "batch_size": 1,  # packed rows of a batch are one
        "max_length": 4096,
        "packed": True,
        "accumulation": 4,
        "gradient_checkpointing": True,
        "reentrant": True,
        "exact_savers": False,
    }
    assert {name: file.settings[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("change", "setting", "value"),
    [
        ("sample_packing: false", "batch_size", 2),
        ("attn_implementation: sdpa", "attention", "sdpa"),
        ("flex_attention: true\nattn_implementation:", "attention", "flex"),
        ("gradient_checkpointing_kwargs: {use_reentrant: false}", "reentrant", False),
        ("cut_cross_entropy: false", "loss", None),
        ("lora_target_linear: true", "target_modules", "all-linear"),
        ("activation_offloading: true", "offload", True),
        ("lora_target_parameters: [mlp.experts.down_proj]", "target_parameters", "mlp.experts.down_proj"),
        ("fsdp_config: {fsdp_version: 2}", "sharding", "fsdp2"),
        ("deepspeed: deepspeed_configs/zero3.json", "sharding", "zero3"),
        ("deepspeed: deepspeed_configs/zero2.json", "sharding", "zero2"),
        ("optimizer: adamw_torch_4bit", "optimizer", "adamw4bit"),
    ],
)
def test_what_axolotl_can_set_otherwise(change, setting, value, tmp_path):
    values = yaml.safe_load(AXOLOTL) | yaml.safe_load(change)
    file = read_trainer_file(read(tmp_path, yaml.safe_dump(values)))
    assert file.settings.get(setting) == value
    assert file.unread == ()


def test_trl(tmp_path):
    settings = read_trainer_file(read(tmp_path, TRL)).settings
    assert (settings["batch_size"], settings["max_length"], settings["accumulation"]) == (4, 512, 2)
    assert (settings["loss"], settings["gradient_checkpointing"], settings["reentrant"]) == ("chunked", True, False)
    assert (settings["lora_dropout"], settings["double_quantization"]) == (0.05, False)


def test_llama_factory(tmp_path):
    file = read_trainer_file(read(tmp_path, LLAMA_FACTORY))
    assert file.program == "LLaMA-Factory"
    assert (file.settings["target_modules"], file.settings["quantization"]) == ("all-linear", "nf4")
    assert (file.settings["attention"], file.settings["reentrant"]) == ("flash", True)


def test_modules_in_one_text_are_several(tmp_path):
    values = yaml.safe_load(LLAMA_FACTORY) | {"additional_target": "embed_tokens,lm_head"}
    file = read_trainer_file(read(tmp_path, yaml.safe_dump(values)))
    assert file.settings["adapter"] == {"modules_to_save": ["embed_tokens", "lm_head"]}


def test_what_is_not_understood_is_named_and_the_rest_is_priced(tmp_path, capsys):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaConfig(vocab_size=256, **sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    values = yaml.safe_load(TRL) | {"model_name_or_path": str(tmp_path / "model"), "flux_capacitor": 1}
    path = read(tmp_path, yaml.safe_dump(values | {"load_in_4bit": False}))
    command = ["memory", "--config", str(path), "--device", "T4"]
    assert cli.run(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 x 512 tokens, rank 16" in printed
    assert "flux_capacitor" in printed
    assert cli.run([*command, "--batch-size", "2", "--json"]) == 0, "options go before the file"
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["unread"]) == (2, ["flux_capacitor"])
    assert cli.run([*command, "--os", "windows"]) == 0
    assert "Sysmem Fallback" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "is no file of axolotl"),
        ("[1, 2]", "holds no settings by name"),
        ("a: [", "Cannot read"),
        ("base_model: m", "trains everything"),
        ("base_model: m\nadapter: lora\nrl: dpo", "trains by rl: .dpo"),
        ("base_model: m\nadapter: lora\noptimizer: adamw_8bits", "Did you mean 'adamw_8bit'"),
        ("base_model: m\nadapter: lora\nlora_r: many", "lora_r is a number"),
        ("base_model: m\nadapter: lora\nload_in_4bit: true\nload_in_8bit: true", "set one of them"),
        ("model_name_or_path: m\nfinetuning_type: full", "finetuning_type: .full"),
        ("model_name_or_path: m\nuse_peft: false", "use_peft: false"),
    ],
)
def test_bad_files_get_one_line(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        read_trainer_file(read(tmp_path, text))
    assert "\n" not in str(error.value)


def test_bad_commands_get_one_line(tmp_path, capsys):
    assert "No such file" in failure(["memory", "--config", str(tmp_path / "none.yaml"), "--device", "T4"], capsys)
    path = read(tmp_path, TRL)
    assert "give --device" in failure(["memory", "--config", str(path)], capsys)
    assert "of a card" in usage_error(["memory", "qwen3-4b", "--attention", "flash"], capsys)
