"""Files of axolotl, TRL and LLaMA-Factory, read as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version
from rankpilot.cli import main as cli
from rankpilot.common.errors import ConfigError
from rankpilot.cost.rollouts import Engine, Rollouts
from rankpilot.lora.spec import is_slow_pattern
from rankpilot.report import trainer_file
from rankpilot.report.trainer_file import KEYS, read_trainer_file
from transformers import LlamaConfig

from tools.trainer_keys import SETTINGS, unknown_keys

from ..cli.mistakes import failure, usage_error

PACKAGES = {"axolotl": "axolotl", "TRL": "trl", "LLaMA-Factory": "llamafactory"}

AXOLOTL: dict[str, Any] = yaml.safe_load("""
base_model: Qwen/Qwen3-4B
plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]
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
""")
TRL: dict[str, Any] = yaml.safe_load("""
model_name_or_path: Qwen/Qwen3-4B
use_peft: true
lora_r: 16
lora_target_modules: all-linear
load_in_4bit: true
per_device_train_batch_size: 4
packing: false
max_length: 512
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
""")
FACTORY: dict[str, Any] = yaml.safe_load("""
model_name_or_path: Qwen/Qwen3-4B
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
lora_rank: 8
quantization_bit: 4
cutoff_len: 1024
per_device_train_batch_size: 2
flash_attn: fa2
bf16: true
""")
GRPO = {key: value for key, value in TRL.items() if key not in ("packing", "max_length")} | {"num_generations": 4}

Read = Callable[..., trainer_file.TrainerFile]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Writes settings into a file, given by name and as flow YAML, and reads it."""

    def read(base: dict[str, Any], change: str = "{}", **options: Any) -> trainer_file.TrainerFile:
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(base | yaml.safe_load(change)))
        return read_trainer_file(path, **options)

    return read


L, F = "model_name_or_path: m, ", "model_name_or_path: m, template: qwen3, cutoff_len: 2048, dataset: d, "
A, LORA = "base_model: m, datasets: [{path: d}], sequence_len: 2048, ", "use_peft: true, lora_r: 16, "
BATCH = "per_device_train_batch_size: 4, learning_rate: 1e-5, gradient_checkpointing: true, bf16: true, "
V1 = "model: m, model_class: llm, peft_config: {name: lora, r: 16}, dist_config: {name: fsdp2}, micro_batch_size: 1"
SWIFT = "model: m, tuner_type: lora, dataset: [d], max_length: 2048, "
RECIPES = {
    f"{L}{LORA}{BATCH}load_in_4bit: true, beta: 0.01, max_length: 1024, max_prompt_length: 512": "DPO or KTO",
    f"{L}{LORA}{BATCH}beta: 0.05, max_length: 2048, max_prompt_length: 1792, optim: adamw_bnb_8bit": "ORPO",
    f"{L}{LORA}{BATCH}beta: 0.1, max_prompt_length: 512, disable_dropout: true, sync_ref_model: true": "--trainer",
    f"{L}{LORA}{BATCH}max_seq_length: 2048, eval_strategy: epoch, torch_dtype: bfloat16": "SFT",
    f"{L}{LORA}{BATCH}max_length: 4096, packing: true, use_liger_kernel: true, eos_token: x": "SFT",
    f"{L}{LORA}assistant_only_loss: true, dataset_name: d, max_length: 2048": "SFT",
    f"{L}{LORA}loss_type: dft, max_length: 2048, dataset_name: d": "SFT",
    f"{L}{LORA}dataset_name: d, output_dir: o, num_train_epochs: 1": "--trainer sft or dpo or kto or reward or grpo",
    f"{L}{LORA}{BATCH}dataset_name: d, max_length: 1024": "--trainer sft or dpo or kto or reward.",
    f"{L}{BATCH}beta: 0.01, max_length: 1024, max_prompt_length: 512": "use_peft: true",
    f"{L}{BATCH}packing: true, max_length: 2048, use_peft: false": "use_peft: true",
    f"{L}{LORA}{BATCH}beta: 0.05, loss_type: apo_zero, padding_free: true, max_length: 24576": "DPO",
    f"{L}{LORA}loss_type: [sigmoid, bco_pair, sft], loss_weights: [1, 1, 1], max_length: 1024": "DPO",
    f"{L}{LORA}precompute_ref_log_probs: true, beta: 0.0, max_length: 1024": "DPO or KTO",
    f"{L}{LORA}desirable_weight: 1.0, undesirable_weight: 1.0, max_length: 1024": "KTO",
    f"{L}{LORA}center_rewards_coefficient: 0.01, max_length: 2048": "reward",
    f"{L}{LORA}reward_funcs: [accuracy_reward], dataset_name: d": "GRPO or RLOO",
    f"{L}{LORA}{BATCH}num_generations: 16, temperature: 0.7, max_prompt_length: 512": "GRPO or RLOO",
    f"{L}{LORA}use_vllm: true, vllm_mode: colocate, loss_type: dr_grpo, max_completion_length: 2048": "GRPO",
    f"{L}{LORA}normalize_advantages: true, num_generations: 2": "RLOO",
    f"{L}{LORA}reward_funcs: [f], packing: true": "different kinds of training",
    f"{L}{LORA}simpo_gamma: 0.5, cpo_alpha: 0.0, loss_type: simpo, max_length: 1024": "CPO",
    f"{L}{LORA}teacher_model_name_or_path: t, lmbda: 0.5, max_length: 1024": "GKD",
    f"{L}{LORA}reward_model_path: r, max_new_tokens: 64, missing_eos_penalty: 1.0": "online-DPO",
    f"{A}adapter: qlora, load_in_4bit: true, sample_packing: true, micro_batch_size: 2": "SFT",
    f"{A}adapter: lora, rl: null, reward_model: false": "SFT",
    f"{A}adapter: lora, pretraining_dataset: [{{path: d}}]": "pretraining",
    f"{A}adapter: qlora, rl: dpo, dpo_beta: 0.1, micro_batch_size: 16": "DPO",
    f"{A}adapter: qlora, rl: kto, rl_beta: 0.5, kto_desirable_weight: 0.2": "KTO",
    f"{A}adapter: qlora, rl: orpo, orpo_alpha: 0.1": "ORPO",
    f"{A}adapter: lora, rl: grpo, trl: {{num_generations: 4, use_vllm: true}}": "another kind of training, GRPO",
    f"{A}adapter: lora, reward_model: true, num_labels: 1": "reward",
    f"{A}adapter: lora, process_reward_model: true, num_labels: 2": "PRM",
    f"{A}adapter: lora, kd_trainer: true, kd_alpha: 0.9": "distillation",
    f"{A}micro_batch_size: 1, optimizer: adamw_torch": "adapter: lora or qlora",
    f"{F}stage: sft, do_train: true, finetuning_type: lora, lora_rank: 8, lora_target: all": "SFT",
    f"{F}stage: pt, do_train: true, finetuning_type: lora": "pretraining",
    f"{F}stage: dpo, do_train: true, finetuning_type: lora, pref_beta: 0.1, pref_loss: sigmoid": "DPO",
    f"{F}stage: kto, do_train: true, finetuning_type: lora, pref_beta: 0.1": "KTO",
    f"{F}stage: rm, do_train: true, finetuning_type: lora": "reward",
    f"{F}stage: ppo, do_train: true, finetuning_type: lora, reward_model: r": "PPO",
    f"{F}stage: sft, do_train: true, finetuning_type: full, deepspeed: ds_z3.json": "finetuning_type: lora",
    f"{F}stage: sft, do_train: true, finetuning_type: oft": "finetuning_type: lora",
    f"{F}stage: sft, do_predict: true, predict_with_generate: true": "do_predict without do_train",
    f"{F}stage: sft, do_eval: true, finetuning_type: lora": "do_eval without do_train",
    f"{L}template: qwen3, infer_backend: huggingface, trust_remote_code: true": "infer_backend without do_train",
    f"{L}template: qwen3, adapter_name_or_path: a, export_dir: o": "export_dir without do_train",
    f"{F}stage: sft, do_train: true, finetuning_type: lora, tensor_model_parallel_size: 1": "Megatron",
    f"{{{V1}, train_dataset: d.yaml, cutoff_len: 2048}}": "LLaMA-Factory v1",
    f"{{{V1}, train_dataset: d.yaml, quant_config: {{name: bnb}}, sample_backend: hf}}": "LLaMA-Factory v1",
    "model: m, peft_config: {name: lora, export_dir: o}": "LLaMA-Factory v1",
    f"{SWIFT}torch_dtype: bfloat16, lora_rank: 8": "ms-swift",
    f"{SWIFT}micro_batch_size: 1, global_batch_size: 4, expert_model_parallel_size: 4": "ms-swift",
    "model: m, rlhf_type: grpo, num_generations: 8, train: {tuner_type: lora}": "ms-swift",
    "max_new_tokens: 1024, temperature: 0, stream: true": "is not a config",
}
"""Settings of recipes of the four programs, and their kind, or what the refusal names."""


def test_the_kind_of_every_recipe_is_told_or_named_in_a_refusal(read: Read) -> None:
    found = {}
    for text in RECIPES:
        try:
            found[text] = read({}, text if text.startswith("{") else f"{{{text}}}").kind
        except ConfigError as error:
            found[text] = f"refused: {error}"
    wrong = {
        text: found[text]
        for text, kind in RECIPES.items()
        if found[text] != kind and not (found[text].startswith("refused") and kind in found[text])
    }
    assert wrong == {}
    assert sum(each.startswith("refused") for each in found.values()) == 42
    assert not any("\n" in each for each in found.values())


def test_one_word_decides_between_kinds(read: Read) -> None:
    plain = {key: value for key, value in TRL.items() if key != "packing"}
    assert (read(plain, trainer="sft").settings, read(TRL).kind) == (read(TRL).settings, "SFT")
    for word, kind in {"dpo": "DPO", "reward": "reward"}.items():
        with pytest.raises(ConfigError, match=f"another kind of training, {kind} "):
            read(plain, trainer=word)
    grpo = read(plain, "max_prompt_length: 256", trainer="grpo")
    assert (grpo.kind, grpo.unread, grpo.settings["max_length"]) == ("GRPO", ("max_length",), 768)
    assert read(plain, "beta: 0.1", trainer="sft").unread == ("beta",)
    with pytest.raises(ConfigError, match=r"SFT .*, not dpo"):
        read(FACTORY, trainer="dpo")


SHIPPED = {"rank": 32, "lora_dropout": 0.05, "quantization": "nf4", "prepare_kbit": False, "dtype": "bf16"}
FLAT = "attn_implementation: flash_attention_2, packing: true"
NEEDS = "{use_vllm: true, gradient_accumulation_steps: 2, max_completion_length: 256"
READ: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (AXOLOTL, "{}", SHIPPED | {"model": "Qwen/Qwen3-4B", "target_modules": "q_proj,v_proj", "experts": "axolotl"}),
    (AXOLOTL, "{}", {"optimizer": "adamw8bit", "attention": "flash", "loss": "cut", "exact_savers": False}),
    (AXOLOTL, "{}", {"batch_size": 1, "max_length": 4096, "packed": True, "accumulation": 4}),
    (AXOLOTL, "{}", {"gradient_checkpointing": True, "reentrant": True}),
    (AXOLOTL, "sample_packing: false", {"batch_size": 2}),
    (AXOLOTL, "attn_implementation: sdpa", {"attention": "sdpa"}),
    (AXOLOTL, "{flex_attention: true, attn_implementation: null}", {"attention": "flex"}),
    (AXOLOTL, "gradient_checkpointing_kwargs: {use_reentrant: false}", {"reentrant": False}),
    (AXOLOTL, "cut_cross_entropy: false", {"loss": None}),
    (AXOLOTL, "lora_target_linear: true", {"target_modules": "all-linear"}),
    (AXOLOTL, "activation_offloading: true", {"offload": True}),
    (AXOLOTL, "lora_target_parameters: [mlp.experts.down_proj]", {"target_parameters": "mlp.experts.down_proj"}),
    (AXOLOTL, "fsdp_config: {fsdp_version: 2}", {"sharding": "fsdp2"}),
    (AXOLOTL, "deepspeed: deepspeed_configs/zero3.json", {"sharding": "zero3"}),
    (AXOLOTL, "deepspeed: deepspeed_configs/zero2.json", {"sharding": "zero2"}),
    (AXOLOTL, "optimizer: adamw_torch_4bit", {"optimizer": "adamw4bit"}),
    (AXOLOTL, "bnb_config_kwargs: {bnb_4bit_use_double_quant: false}", {"double_quantization": False}),
    (
        AXOLOTL,
        "{gradient_checkpointing: off, fsdp_config: {activation_checkpointing: on}}",
        {"gradient_checkpointing": True},
    ),
    (TRL, "{}", {"batch_size": 4, "max_length": 512, "accumulation": 2, "loss": "chunked", "reentrant": False}),
    (TRL, "{}", {"gradient_checkpointing": True, "lora_dropout": 0.05, "double_quantization": False, "dtype": "fp32"}),
    (TRL, "max_length: null", {"max_length": None}),
    (TRL, f"{{{FLAT}}}", {"batch_size": 1, "max_length": 2048, "packed": True}),
    (FACTORY, "{}", {"target_modules": "all-linear", "quantization": "nf4", "attention": "flash", "reentrant": True}),
    (FACTORY, "bf16: null", {"dtype": None}),
    (FACTORY, "additional_target: 'a,b'", {"adapter": {"modules_to_save": ["a", "b"]}}),
    (AXOLOTL, "val_set_size: 0", {"eval_batch_size": "none"}),
    (AXOLOTL, "val_set_size: 0.05", {"eval_batch_size": 2, "eval_length": 2048, "eval_packed": True}),
    (AXOLOTL, "{val_set_size: 0.05, eval_strategy: 'no'}", {"eval_batch_size": "none"}),
    (
        AXOLOTL,
        "{test_datasets: [{path: a}], eval_batch_size: 8, eval_sample_packing: false}",
        {"eval_batch_size": 8, "eval_packed": False},
    ),
    (AXOLOTL, "{val_set_size: 100, eval_sequence_len: 4096}", {"eval_length": 4096}),
    (TRL, "per_device_eval_batch_size: 16", {"eval_batch_size": "none"}),
    (TRL, "eval_strategy: steps", {"eval_batch_size": 8, "eval_length": 512, "eval_packed": False}),
    (TRL, f"{{eval_strategy: epoch, {FLAT}}}", {"eval_packed": True}),
    (TRL, f"{{eval_strategy: epoch, {FLAT}, eval_packing: false}}", {"eval_packed": False}),
    (FACTORY, "{val_size: 0.1, eval_strategy: steps}", {"eval_batch_size": 8, "eval_length": 1024}),
    (FACTORY, "val_size: 0.1", {"eval_batch_size": "none", "rollouts": None}),
    (FACTORY, "{predict_with_generate: true}", {"eval_batch_size": "none", "rollouts": None}),
    (
        FACTORY,
        "{predict_with_generate: true, max_new_tokens: 100, eval_dataset: a, eval_strategy: epoch}",
        {"eval_batch_size": "none", "rollouts": Rollouts(8, length=1124)},
    ),
    (GRPO, "{}", {"max_length": None, "rollouts": Rollouts(8), "eval_batch_size": "none", "loss": "chunked"}),
    (GRPO, "generation_batch_size: 32", {"rollouts": Rollouts(32)}),
    (GRPO, NEEDS + "}", {"max_length": None, "rollouts": Rollouts(8, Engine(0.3)), "batch_size": 4}),
    (GRPO, NEEDS + ", max_prompt_length: 256}", {"max_length": 512, "rollouts": Rollouts(8, Engine(0.3))}),
    (
        GRPO,
        NEEDS + ", vllm_max_model_length: 4096, vllm_gpu_memory_utilization: 0.55}",
        {"max_length": 4096, "rollouts": Rollouts(8, Engine(0.55, length=4096))},
    ),
    (GRPO, NEEDS + ", vllm_enable_sleep_mode: true}", {"rollouts": Rollouts(8, Engine(0.3, sleeps=True))}),
    (GRPO, NEEDS + ", vllm_tensor_parallel_size: 2}", {"rollouts": Rollouts(8, Engine(0.3, cards=2))}),
    (GRPO, NEEDS + ", steps_per_generation: 16}", {"rollouts": Rollouts(64, Engine(0.3))}),
    (GRPO, NEEDS + ", vllm_mode: server}", {"rollouts": None}),
]


def test_settings_are_read(read: Read) -> None:
    wrong = []
    for base, change, wanted in READ:
        file = read(base, change)
        found = {name: file.settings.get(name) for name in wanted}
        wrong += [(base.get("base_model"), change, found, file.unread)] if found != wanted or file.unread else []
    assert wrong == []


KERNELS = "lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel (on by default)"
UNPRICED = [
    (AXOLOTL, "{}", {KERNELS}),
    (AXOLOTL, "lora_mlp_kernel: true", {"lora_mlp_kernel"}),
    (AXOLOTL, "{lora_mlp_kernel: false, eval_batch_size: 2, eval_sample_packing: true}", set[str]()),
    (AXOLOTL, "bnb_config_kwargs: {llm_int8_skip_modules: [lm_head]}", {"'llm_int8_skip_modules'"}),
    (AXOLOTL, "bnb_config_kwargs: {bnb_4bit_use_double_quant: true, bnb_4bit_quant_type: fp4}", set[str]()),
    (AXOLOTL, "{ple_cpu_offload: true, processor_type: AutoProcessor}", {"ple_cpu_offload", "processor_type"}),
    (AXOLOTL, "{lora_model_dir: runs/first, fp8_config: {recipe: rowwise}}", {"lora_model_dir"}),
    (AXOLOTL, "{do_causal_lm_eval: true, is_multimodal: true}", {"do_causal_lm_eval", "is_multimodal"}),
    (AXOLOTL, "{image_size: 512, unfrozen_parameters: [lm_head]}", {"image_size", "unfrozen_parameters"}),
    (AXOLOTL, "plugins: [a.SpectrumPlugin, b.LigerPlugin]", {"a.SpectrumPlugin"}),
    (AXOLOTL, "fsdp_config: {offload_params: true}", {"FSDP offload"}),
    (AXOLOTL, "fsdp: [full_shard, offload]", {"FSDP offload"}),
    (AXOLOTL, "fsdp_config: {cpu_offload: true, cpu_offload_pin_memory: true}", {"FSDP offload"}),
    (AXOLOTL, "fsdp_config: {reshard_after_forward: false}", {"FSDP that does not shard fully"}),
    (AXOLOTL, "fsdp: [shard_grad_op]", {"FSDP that does not shard fully"}),
    (AXOLOTL, "fsdp_config: {fsdp_sharding_strategy: FULL_SHARD, reshard_after_forward: true}", set[str]()),
    (AXOLOTL, f"deepspeed: '{'x' * 300}'", {"deepspeed (unknown ZeRO stage)"}),
    (AXOLOTL, "deepspeed: other.json", {"deepspeed (unknown ZeRO stage)"}),
    (AXOLOTL, "deepspeed: {zero_optimization: {stage: 3.7}}", {"deepspeed (unknown ZeRO stage)"}),
    (AXOLOTL, "deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json", {"DeepSpeed offload"}),
    (AXOLOTL, "deepspeed: {zero_optimization: {stage: 2, offload_optimizer: {device: none}}}", set[str]()),
    (AXOLOTL, "attn_implementation: s2", {"attn_implementation: 's2'"}),
    (TRL, "{neftune_noise_alpha: 5, label_smoothing_factor: 0.0}", {"neftune_noise_alpha"}),
    (GRPO, "{sync_ref_model: true, eval_strategy: steps}", {"sync_ref_model", "eval_strategy"}),
    (FACTORY, "{image_max_pixels: 262144, freeze_vision_tower: true}", {"image_max_pixels"}),
    (FACTORY, "{freeze_vision_tower: false, predict_with_generate: true}", {"freeze_vision_tower"}),
]


def test_what_is_not_priced_is_named(read: Read) -> None:
    wrong = []
    for base, change, wanted in UNPRICED:
        file = read(base, change)
        found = {name.removeprefix("bnb_config_kwargs: ") for name in file.unpriced} - ({KERNELS} - wanted)
        wrong += [(change, found, file.unread)] if found != wanted or file.unread else []
    assert wrong == []


SMALL = {"axolotl": {"base_model": "m", "adapter": "lora"}, "TRL": {**GRPO, "model_name_or_path": "m"}}
BAD = {
    ("axolotl", "optimizer: adamw_8bits"): "'adamw_8bit'",
    ("axolotl", "lora_r: many"): "lora_r .* whole number",
    ("axolotl", "lora_r: 2.9"): "lora_r .* 2.9",
    ("axolotl", "{load_in_4bit: true, load_in_8bit: true}"): "load_in_8bit",
    ("axolotl", "micro_batch_size: 0"): "micro_batch_size",
    ("axolotl", "lora_modules_to_save: [1, 2]"): "lora_modules_to_save",
    ("axolotl", "lora_target_modules: {a: 1}"): "lora_target_modules",
    ("axolotl", "load_in_4bit: flase"): "load_in_4bit .* 'flase'",
    ("axolotl", "{bf16: true, fp16: 7}"): "fp16",
    ("axolotl", "gradient_checkpointing_kwargs: {use_reentrant: x}"): "use_reentrant",
    ("axolotl", "attn_implementation: 5"): "attn_implementation",
    ("axolotl", "fsdp: 5"): "fsdp",
    ("axolotl", "bnb_config_kwargs: [1]"): "bnb_config_kwargs",
    ("axolotl", "plugins: [rankpilot.x.Y]"): "rankpilot run",
    ("TRL", "dtype: bflot16"): "dtype",
    ("TRL", "{use_vllm: true, vllm_gpu_memory_utilization: 2}"): "at most 1",
    ("TRL", "{use_vllm: true, load_in_4bit: false, load_in_8bit: true}"): "8 bits",
}


def test_bad_values_get_one_line(read: Read, tmp_path: Path) -> None:
    asked: list[tuple[str, Callable[[], object]]] = [
        (message, lambda program=program, change=change: read(SMALL[program], change))  # type: ignore[misc]
        for (program, change), message in BAD.items()
    ]
    texts = {"[1, 2]": "mapping", "a: [": "Cannot read", "base_model: m\nlora_r: 8\nlora_r: 9": "lora_r. appears twice"}
    for number, (text, message) in enumerate(texts.items()):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        asked.append((message, lambda path=path: read_trainer_file(path)))  # type: ignore[misc]
    wrong = []
    for message, ask in asked:
        with pytest.raises(ConfigError) as error:
            ask()
        told = str(error.value)
        wrong += [(message, told)] if not re.search(message, told) or "\n" in told else []
    assert wrong == []


def test_what_was_understood_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaConfig(vocab_size=256, **sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    values = {key: value for key, value in TRL.items() if key != "packing"} | {"torch_dtype": "bfloat16"}
    values |= {"model_name_or_path": str(tmp_path / "model"), "load_in_4bit": False, "fsdp": "full_shard", "flux": 1}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    command = ["memory", "--config", str(path), "--device", "T4"]
    assert "--trainer sft or dpo" in failure(command, capsys)
    command += ["--trainer", "sft"]
    assert cli.run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "TRL's SFT" in " ".join(lines[:2])
    printed = " ".join(" ".join(lines).split())
    assert all(word in printed for word in ("4 x 512 tokens", "loaded in fp32", "flux", "did you mean dtype?"))
    assert cli.run([*command, "--batch-size", "2", "--json"]) == 0, "options go before the file"
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["unread"]) == (2, ["flux", "torch_dtype"])
    assert (figures["program"], figures["kind"]) == ("TRL", "SFT")
    assert "fsdp2" in figures["unpriced"][0], "one GPU shards nothing"
    assert cli.run([*command, "--os", "windows"]) == 0
    assert "Sysmem Fallback" in " ".join(capsys.readouterr().out.split())


def test_deepspeed_and_fsdp_are_read_where_they_stand(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    for change, sharding in {
        "deepspeed: ds.json": "zero3",
        "deepspeed: ds_z3_config.json": "zero3",
        "deepspeed: {zero_optimization: {stage: 2}}": "zero2",
    }.items():
        assert read(FACTORY, change).settings["sharding"] == sharding
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    Path("named.json").write_text(json.dumps({"zero_optimization": zero, "offload_params": True}))
    assert "DeepSpeed offload" in read(TRL, "deepspeed: named.json").unpriced
    assert "FSDP offload" in read(TRL, "fsdp_config: named.json").unpriced


def test_tables_of_keys_are_consistent() -> None:
    source = Path(str(trainer_file.__file__)).read_text(encoding="utf-8")
    asked = {*re.findall(r'"(\w+)"', source), *(f"{name}_attention" for name in re.findall(r'"(\w+)"', source))}
    for program, table in KEYS.items():
        assert set(table["priced"]) - asked - {"fsdp_version"} == set(), f"of {program}; fsdp_version is of fsdp_config"
        for kinds in (("priced", "unpriced", "harmless", "older"), ("kinds",)):
            names = [name for kind in kinds for name in table[kind]]
            names = [name for of in table["kinds"].values() for name in of] if kinds == ("kinds",) else names
            assert len(names) == len(set(names)), f"a key of {program} is in one list"


@pytest.mark.parametrize("program", SETTINGS)
def test_every_key_of_an_installed_program_is_known(program: str) -> None:
    """A new key fails here: it belongs in trainer_keys.json, by what it does to memory."""
    try:
        unknown = unknown_keys(program)
    except ImportError as error:
        pytest.skip(f"{program} is not installed: {error}")
    if Version(metadata.version(PACKAGES[program])) < Version(KEYS[program]["version"]):
        pytest.skip(f"the lists are of {program} {KEYS[program]['version']}")
    assert unknown == []


def test_each_kind_of_trl_has_its_keys() -> None:
    trl = pytest.importorskip("trl")
    table = KEYS["TRL"]
    if trl.__version__ != table["version"]:
        pytest.skip(f"the table is of TRL {table['version']}")
    kinds = {"SFT": "SFT", "DPO": "DPO", "KTO": "KTO", "reward": "Reward", "GRPO": "GRPO", "RLOO": "RLOO"}
    has = {kind: {each.name for each in fields(getattr(trl, f"{name}Config"))} for kind, name in kinds.items()}
    told = {key: set(of.split()) for of, names in table["kinds"].items() for key in names}
    usual = {*SETTINGS["TRL"]()}
    for kind, names in has.items():
        assert {key for key in names if kind not in told.get(key, {kind})} == set(), f"a key of {kind} is said to tell"
        assert {key for key in names - usual if key not in told} == set(), f"a key of {kind} is unknown"


@pytest.mark.parametrize(
    ("pattern", "slow"),
    [
        ("(([a-z_.0-9])+)+X", True),
        ("(a|a)*b", True),
        (".*.*.*.*.*X", True),
        ("a?" * 30, True),
        (r"model.layers.[\d]+.(_checkpoint_wrapped_module.)?(mlp|self_attn).(up|down|q|k)_proj", False),
        (r".*\.layers\.(3|7)\.self_attn\.q_proj|.*\.mlp\.up_proj|.*k_proj|.*o_proj|.*\.mlp\.(?:gate|down)_proj", False),
    ],
)
def test_expressions_without_end_are_refused(pattern: str, slow: bool) -> None:
    assert is_slow_pattern(pattern) == slow


def test_language_model_is_found_where_it_stands_alone(read: Read) -> None:
    pattern = read(AXOLOTL | {"lora_target_modules": r"model.language_model.layers.[\d]+.mlp.up"}).settings
    for part in ("", "language_model."):
        assert re.fullmatch(pattern["target_modules"], f"model.{part}layers.1.mlp.up")


def test_bad_commands_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(TRL))
    device = ["--device", "T4"]
    assert "No such file" in failure(["memory", "--config", str(tmp_path / "none.yaml"), *device], capsys)
    assert "--device" in failure(["memory", "--config", str(path)], capsys)
    assert "Unknown trainer" in failure(["memory", "--config", str(path), "--trainer", "ppo", *device], capsys)
    for base in (TRL | {"max_length": None}, GRPO):
        path.write_text(yaml.safe_dump(base))
        assert "Pass --max-length" in failure(["memory", "--config", str(path), *device], capsys)
    assert "requires --config" in usage_error(["memory", "qwen3-4b", "--trainer", "sft", *device], capsys)
