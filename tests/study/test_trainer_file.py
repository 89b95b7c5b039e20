"""Files of axolotl, TRL and LLaMA-Factory, read as they are."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from importlib import metadata
from pathlib import Path

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
    kernels = "lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel (on by default)"
    assert (file.program, file.unread, file.unpriced) == ("axolotl", (), (kernels,))
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
        ("bnb_config_kwargs: {bnb_4bit_use_double_quant: false}", "double_quantization", False),
        ("{gradient_checkpointing: off, fsdp_config: {activation_checkpointing: on}}", "gradient_checkpointing", True),
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
    assert settings["dtype"] == "fp32", "TRL 1.16 loads in fp32 unless told"


def test_llama_factory(tmp_path):
    file = read_trainer_file(read(tmp_path, LLAMA_FACTORY))
    assert file.program == "LLaMA-Factory"
    assert (file.settings["target_modules"], file.settings["quantization"]) == ("all-linear", "nf4")
    assert (file.settings["attention"], file.settings["reentrant"]) == ("flash", True)


def test_llama_factory_without_a_precision_is_loaded_as_the_card_has_it(tmp_path):
    file = read_trainer_file(read(tmp_path, LLAMA_FACTORY.replace("bf16: true", "")))
    assert "dtype" not in file.settings


def test_modules_in_one_text_are_several(tmp_path):
    values = yaml.safe_load(LLAMA_FACTORY) | {"additional_target": "embed_tokens,lm_head"}
    file = read_trainer_file(read(tmp_path, yaml.safe_dump(values)))
    assert file.settings["adapter"] == {"modules_to_save": ["embed_tokens", "lm_head"]}


def test_what_is_not_understood_is_named_and_the_rest_is_priced(tmp_path, capsys):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaConfig(vocab_size=256, **sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    values = yaml.safe_load(TRL) | {"flux_capacitor": 1, "torch_dtype": "bfloat16"}
    values["model_name_or_path"] = str(tmp_path / "model")
    path = read(tmp_path, yaml.safe_dump(values | {"load_in_4bit": False, "fsdp": "full_shard"}))
    command = ["memory", "--config", str(path), "--device", "T4"]
    assert cli.run(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 x 512 tokens, rank 16" in printed
    assert "loaded in fp32" in printed
    assert "flux_capacitor" in printed
    assert "did you mean dtype?" in printed
    assert cli.run([*command, "--batch-size", "2", "--json"]) == 0, "options go before the file"
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["unread"]) == (2, ["flux_capacitor", "torch_dtype"])
    assert "fsdp2" in figures["unpriced"][0], "one GPU shards nothing"
    assert cli.run([*command, "--os", "windows"]) == 0
    assert "Sysmem Fallback" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "is not a config of axolotl"),
        ("[1, 2]", "must be a mapping of setting names"),
        ("a: [", "Cannot read"),
        ("base_model: m", "trains all weights"),
        ("base_model: m\nadapter: lora\nrl: dpo", "trains with rl: .dpo"),
        ("base_model: m\nadapter: lora\noptimizer: adamw_8bits", "Did you mean 'adamw_8bit'"),
        ("base_model: m\nadapter: lora\nlora_r: many", "lora_r must be a whole number"),
        ("base_model: m\nadapter: lora\nload_in_4bit: true\nload_in_8bit: true", "Set only one"),
        ("model_name_or_path: m\nfinetuning_type: full", "finetuning_type: .full"),
        ("model_name_or_path: m\nuse_peft: false", "use_peft"),
        ("model_name_or_path: m\nlora_r: 8", "use_peft: true"),
        ("model_name_or_path: m\nuse_peft: true\nnum_generations: 8\nnormalize_advantages: true", "RLOO"),
        ("model_name_or_path: m\nuse_peft: true\nnum_generations: 8\nrankpilot: {budget: 80%}", "under GRPO"),
        ("model_name_or_path: m\nuse_peft: true\nuse_vllm: true\nvllm_gpu_memory_utilization: 2", "at most 1"),
        ("model_name_or_path: m\nuse_peft: true\nprecompute_ref_log_probs: true\nbeta: 0.0", "DPO or KTO"),
        ("model_name_or_path: m\nuse_peft: true\nloss_type: [sigmoid]", "not an SFT loss"),
        ("model_name_or_path: m\nuse_peft: true\ncenter_rewards_coefficient: 0.01", "reward"),
        ("model_name_or_path: m\nuse_peft: true\nreward_model_path: r", "online DPO"),
        ("base_model: m\nadapter: lora\nreward_model: true", "a reward model"),
        ("model_name_or_path: m\nstage: dpo\nfinetuning_type: lora", "stage: .dpo"),
        ("model_name_or_path: m\nstage: sft\nfinetuning_type: freeze", "finetuning_type: .freeze"),
        ("model_name_or_path: m\nlora_rank: 8\nquantization_bit: 3", "Use 4 or 8"),
        ("base_model: m\nadapter: lora\nmicro_batch_size: 0", "micro_batch_size .* of at least 1"),
        ("base_model: m\nadapter: lora\nlora_r: 2.9", "lora_r .* got 2.9"),
        ("base_model: m\nadapter: lora\nlora_modules_to_save: [1, 2]", "lora_modules_to_save .* a list of names"),
        ("base_model: m\nadapter: lora\nlora_target_modules: {a: 1}", "lora_target_modules .* a list of names"),
        ("base_model: m\nadapter: lora\nlora_r: 8\nlora_r: 9", "lora_r. appears twice"),
        ("base_model: m\nadapter: lora\nload_in_4bit: flase", "load_in_4bit must be one of true, false; got .flase"),
        ("base_model: m\nadapter: lora\nbf16: true\nfp16: 7", "fp16 must be one of true, false; got 7"),
        (
            "base_model: m\nadapter: lora\ngradient_checkpointing_kwargs: {use_reentrant: x}",
            "use_reentrant must be one of true",
        ),
        ("base_model: m\nadapter: lora\nattn_implementation: 5", "attn_implementation must be a string"),
        ("base_model: m\nadapter: lora\nfsdp: 5", "fsdp must be a name"),
        ("base_model: m\nadapter: lora\nbnb_config_kwargs: [1]", "bnb_config_kwargs must be a mapping"),
        ("model: m\ntuner_type: lora", "config of ms-swift"),
        ("base_model: m\nadapter: lora\nplugins: [rankpilot.x.Y]", "no plugin .* rankpilot run"),
        ("model_name_or_path: m\nuse_peft: true\ndtype: bflot16", "dtype must be one of auto, bfloat16"),
    ],
)
def test_bad_files_get_one_line(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        read_trainer_file(read(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "change", "told"),
    [
        (AXOLOTL, "lora_mlp_kernel: true", "lora_mlp_kernel"),
        (AXOLOTL, "{lora_mlp_kernel: false, eval_batch_size: 2, sample_packing: true, eval_sample_packing: true}", ""),
        (AXOLOTL, "bnb_config_kwargs: {llm_int8_skip_modules: [lm_head]}", "llm_int8_skip_modules"),
        (AXOLOTL, "bnb_config_kwargs: {bnb_4bit_use_double_quant: true, bnb_4bit_quant_type: fp4}", ""),
        (AXOLOTL, "{ple_cpu_offload: true, processor_type: AutoProcessor}", "ple_cpu_offload, processor_type"),
        (AXOLOTL, "{lora_model_dir: runs/first, fp8_config: {recipe: rowwise}}", "lora_model_dir"),
        (AXOLOTL, "unfrozen_parameters: [lm_head]", "unfrozen_parameters"),
        (AXOLOTL, "{do_causal_lm_eval: true, is_multimodal: true}", "do_causal_lm_eval, is_multimodal"),
        (AXOLOTL, "image_size: 512", "image_size"),
        (AXOLOTL, "plugins: [a.SpectrumPlugin, b.LigerPlugin]", "a.SpectrumPlugin"),
        (AXOLOTL, "fsdp_config: {offload_params: true}", "FSDP offload"),
        (AXOLOTL, "fsdp: [full_shard, offload]", "FSDP offload"),
        (AXOLOTL, "fsdp_config: {cpu_offload: true, cpu_offload_pin_memory: true}", "FSDP offload"),
        (AXOLOTL, "fsdp_config: {reshard_after_forward: false}", "FSDP that does not shard fully"),
        (AXOLOTL, "fsdp: [shard_grad_op]", "FSDP that does not shard fully"),
        (AXOLOTL, "fsdp_config: {fsdp_sharding_strategy: FULL_SHARD, reshard_after_forward: true}", ""),
        (AXOLOTL, f"deepspeed: '{'x' * 300}'", "ZeRO stage"),
        (AXOLOTL, "deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json", "DeepSpeed offload"),
        (AXOLOTL, "deepspeed: {zero_optimization: {stage: 2, offload_optimizer: {device: none}}}", ""),
        (AXOLOTL, "deepspeed: other.json", "ZeRO stage"),
        (AXOLOTL, "attn_implementation: s2", "attn_implementation: 's2'"),
        (AXOLOTL, "deepspeed: {zero_optimization: {stage: 3.7}}", "ZeRO stage"),
        (TRL, "{neftune_noise_alpha: 5, label_smoothing_factor: 0.0}", "neftune_noise_alpha"),
        (LLAMA_FACTORY, "{image_max_pixels: 262144, freeze_vision_tower: true}", "image_max_pixels"),
        (LLAMA_FACTORY, "freeze_vision_tower: false", "freeze_vision_tower"),
    ],
)
def test_what_is_not_priced_is_named(base, change, told, tmp_path):
    values = yaml.safe_load(base) | yaml.safe_load(change)
    file = read_trainer_file(read(tmp_path, yaml.safe_dump(values)))
    named = [name for name in file.unpriced if "by default" not in name]
    assert (told in ", ".join(named), bool(named), file.unread) == (True, bool(told), ())


GRPO = "{use_vllm: true, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, max_completion_length: 256"


@pytest.mark.parametrize(
    ("change", "length", "rollouts"),
    [
        (GRPO + "}", None, Rollouts(8, Engine(0.3))),
        (GRPO + ", max_prompt_length: 256}", 512, Rollouts(8, Engine(0.3))),
        (
            GRPO + ", vllm_max_model_length: 4096, vllm_gpu_memory_utilization: 0.55}",
            4096,
            Rollouts(8, Engine(0.55, length=4096)),
        ),
        (GRPO + ", vllm_enable_sleep_mode: true}", None, Rollouts(8, Engine(0.3, sleeps=True))),
        (GRPO + ", vllm_tensor_parallel_size: 2}", None, Rollouts(8, Engine(0.3, cards=2))),
        (GRPO + ", steps_per_generation: 16}", None, Rollouts(64, Engine(0.3))),
        (GRPO + ", vllm_mode: server}", None, None),
        ("{num_generations: 4, per_device_train_batch_size: 4}", None, Rollouts(8)),
        ("{num_generations: 4, generation_batch_size: 32}", None, Rollouts(32)),
    ],
)
def test_grpo_is_a_step_of_sft_with_generation_between(change, length, rollouts, tmp_path):
    values = yaml.safe_load(TRL) | yaml.safe_load(change)
    del values["max_length"]
    file = read_trainer_file(read(tmp_path, yaml.safe_dump(values)))
    assert file.settings.get("max_length") == length
    assert file.settings.get("rollouts") == rollouts
    assert (file.settings["eval_batch_size"], file.settings["loss"], file.sums) == ("none", "chunked", rollouts is None)


@pytest.mark.parametrize(
    ("base", "change", "evaluation"),
    [
        (AXOLOTL, "val_set_size: 0", "none"),
        (AXOLOTL, "val_set_size: 0.05", (2, 2048, True)),
        (AXOLOTL, "{val_set_size: 0.05, eval_strategy: 'no'}", "none"),
        (AXOLOTL, "{test_datasets: [{path: a}], eval_batch_size: 8, eval_sample_packing: false}", (8, 2048, False)),
        (AXOLOTL, "{val_set_size: 100, eval_sequence_len: 4096}", (2, 4096, True)),
        (TRL, "per_device_eval_batch_size: 16", "none"),
        (TRL, "eval_strategy: steps", (8, 512, False)),
        (TRL, "{eval_strategy: epoch, attn_implementation: flash_attention_2, packing: true}", (8, 512, True)),
        (
            TRL,
            "{eval_strategy: epoch, attn_implementation: flash_attention_2, packing: true, eval_packing: false}",
            (8, 512, False),
        ),
        (LLAMA_FACTORY, "{val_size: 0.1, eval_strategy: steps, cutoff_len: 1024}", (8, 1024, False)),
        (LLAMA_FACTORY, "val_size: 0.1", "none"),
    ],
)
def test_evaluation_is_read(base, change, evaluation, tmp_path):
    values = yaml.safe_load(base) | yaml.safe_load(change)
    settings = read_trainer_file(read(tmp_path, yaml.safe_dump(values))).settings
    if evaluation == "none":
        assert settings["eval_batch_size"] == "none"
    else:
        assert (settings["eval_batch_size"], settings["eval_length"], settings["eval_packed"]) == evaluation


def test_answers_that_an_evaluation_generates_are_read(tmp_path):
    values = yaml.safe_load(LLAMA_FACTORY) | {"predict_with_generate": True, "cutoff_len": 512, "max_new_tokens": 100}
    assert "rollouts" not in read_trainer_file(read(tmp_path, yaml.safe_dump(values))).settings, "no evaluation"
    held = {"eval_dataset": "a", "eval_strategy": "epoch", "per_device_eval_batch_size": 4}
    file = read_trainer_file(read(tmp_path, yaml.safe_dump(values | held)))
    assert (file.settings["rollouts"], file.settings["eval_batch_size"]) == (Rollouts(4, length=612), "none")
    assert "predict_with_generate" not in file.unpriced


@pytest.mark.parametrize(
    ("deepspeed", "sharding"),
    [("ds.json", "zero3"), ("ds_z3_config.json", "zero3"), ({"zero_optimization": {"stage": 2}}, "zero2")],
)
def test_deepspeed_is_read_where_it_stands(deepspeed, sharding, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    text = yaml.safe_dump(yaml.safe_load(LLAMA_FACTORY) | {"deepspeed": deepspeed})
    assert read_trainer_file(read(tmp_path, text)).settings["sharding"] == sharding


@pytest.mark.parametrize(("key", "note"), [("deepspeed", "DeepSpeed offload"), ("fsdp_config", "FSDP offload")])
def test_a_file_named_in_the_config_is_found_where_the_program_runs(key, note, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    Path("named.json").write_text(json.dumps({"zero_optimization": zero, "offload_params": True}))
    text = yaml.safe_dump(yaml.safe_load(TRL) | {key: "named.json"})
    assert note in read_trainer_file(read(tmp_path, text)).unpriced


@pytest.mark.parametrize("program", KEYS)
def test_priced_keys_are_those_that_are_asked_for(program):
    source = Path(str(trainer_file.__file__)).read_text(encoding="utf-8")
    asked = {*re.findall(r'"(\w+)"', source), *(f"{name}_attention" for name in re.findall(r'"(\w+)"', source))}
    assert set(KEYS[program]["priced"]) - asked - {"fsdp_version"} == set(), "of axolotl, with fsdp_config"
    kinds = [name for kind in ("priced", "unpriced", "harmless", "older", "refused") for name in KEYS[program][kind]]
    assert len(kinds) == len(set(kinds)), "a key is of one kind"


@pytest.mark.parametrize("program", SETTINGS)
def test_every_key_of_an_installed_program_is_known(program):
    """A new key fails here: it belongs in trainer_keys.json, by what it does to memory."""
    try:
        unknown = unknown_keys(program)
    except ImportError as error:
        pytest.skip(f"{program} is not installed: {error}")
    if Version(metadata.version(PACKAGES[program])) < Version(KEYS[program]["version"]):
        pytest.skip(f"the lists are of {program} {KEYS[program]['version']}")
    assert unknown == []


def test_keys_of_other_trainings_are_refused():
    trl = pytest.importorskip("trl")
    table = KEYS["TRL"]
    if trl.__version__ != table["version"]:
        pytest.skip(f"the table is of TRL {table['version']}")
    known = {*SETTINGS["TRL"]()}
    for name, kind in {"GRPO": trl.GRPOConfig, "DPO": trl.DPOConfig, "KTO": trl.KTOConfig}.items():
        assert {each.name for each in fields(kind)} - known <= {
            key for key, of in table["refused"].items() if name in of
        }


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
def test_expressions_without_end_are_refused(pattern, slow):
    assert is_slow_pattern(pattern) == slow


def test_language_model_is_found_where_it_stands_alone(tmp_path):
    text = yaml.safe_dump(
        yaml.safe_load(AXOLOTL) | {"lora_target_modules": r"model.language_model.layers.[\d]+.mlp.up"}
    )
    pattern = read_trainer_file(read(tmp_path, text)).settings["target_modules"]
    assert all(re.fullmatch(pattern, f"model.{part}layers.1.mlp.up") for part in ("", "language_model."))


def test_bad_commands_get_one_line(tmp_path, capsys):
    assert "No such file" in failure(["memory", "--config", str(tmp_path / "none.yaml"), "--device", "T4"], capsys)
    path = read(tmp_path, TRL)
    assert "requires --device" in failure(["memory", "--config", str(path)], capsys)
    uncut = read(tmp_path, TRL.replace("max_length: 512", "max_length: null"))
    assert "Pass --max-length" in failure(["memory", "--config", str(uncut), "--device", "T4"], capsys)
    assert "requires --device" in usage_error(["memory", "qwen3-4b", "--attention", "flash"], capsys)
