"""A run's first plan, told from a trainer's file, and that of the run itself: the same reference, limit and plan."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import rankpilot
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rankpilot.cli import main as cli
from rankpilot.common.errors import BudgetError, ConfigError
from rankpilot.cost.forecast.configured_step import LoadedAs
from rankpilot.cost.forecast.memory_of import AskedStep, memory_of
from rankpilot.cost.forecast.outlook import Outlook
from rankpilot.cost.step_config import StepConfig
from rankpilot.finetune.options import OptionsInFile
from rankpilot.report.run_plan import plan_of_run
from rankpilot.report.trainer_file import read_trainer_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

ROWS, LENGTH, WORDS = 4, 64, 64
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 4}
KERNELS = 0.02
"""Share by which TRL's loss differs: a forecast knows its CUDA kernel, which holds fewer temporary tensors than the
one that a CPU runs.
"""

SCALARS = 8
"""Bytes by which a loop may differ: a number that it holds."""

exactly, closely = partial(pytest.approx, abs=SCALARS), partial(pytest.approx, rel=KERNELS)

FACTORY = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "lora_rank": 6,
    "cutoff_len": LENGTH,
    "per_device_train_batch_size": ROWS,
    "disable_gradient_checkpointing": True,
}
TRL = {
    "use_peft": True,
    "packing": False,
    "lora_target_modules": "all-linear",
    "lora_r": 6,
    "lora_dropout": 0.0,
    "max_length": LENGTH,
    "per_device_train_batch_size": ROWS,
    "gradient_checkpointing": False,
    "bf16": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(vocab_size=WORDS, **SIZES, num_key_value_heads=2, architectures=["LlamaForCausalLM"])
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, WORDS)}}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Recorded steps are kept for the tests of this file alone."""
    monkeypatch.setenv("RANKPILOT_CACHE", str(tmp_path_factory.getbasetemp() / "recorded"))


def told(folder, values, options, **loaded):
    """What a file says of a run on a CPU."""
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(values | {"rankpilot": options}))
    file = read_trainer_file(path)
    settings = file.settings
    names = {each.name for each in fields(LoadedAs)} - {"attention", "adapter", "dtype"}
    adapter = settings["adapter"] | ({"lora_dropout": rate} if (rate := settings.get("lora_dropout")) else {})
    kept = {name: value for name, value in settings.items() if name in names}
    given = LoadedAs(device="cpu", dtype="fp32", adapter=adapter, **kept | loaded)
    step = StepConfig(**{each.name: settings[each.name] for each in fields(StepConfig) if each.name in settings})
    configured, step = AskedStep(settings["model"], step, given).configured()
    return plan_of_run(Outlook(configured, settings["rank"], step), file.run, sums=file.sums)


def rows():
    generator = np.random.default_rng(0)
    return [{"input_ids": generator.integers(2, WORDS, LENGTH).tolist()} for _ in range(3 * ROWS)]


def factory_trainer(model, output, checkpoints):
    """A Trainer with the settings of `FACTORY`."""
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.config.use_cache = False  # as LLaMA-Factory has it
    adapted = get_peft_model(base, LoraConfig(r=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    data = Dataset.from_list([row | {"labels": row["input_ids"], "attention_mask": [1] * LENGTH} for row in rows()])
    arguments = TrainingArguments(
        output, max_steps=1, per_device_train_batch_size=ROWS, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=checkpoints, gradient_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    return Trainer(adapted, arguments, train_dataset=data)


def trl_trainer(model, output):
    """TRL's own trainer with the settings of `TRL`."""
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(
        output, max_steps=1, per_device_train_batch_size=ROWS, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, bf16=False, max_length=LENGTH,
    )  # fmt: skip
    return trl.SFTTrainer(
        LlamaForCausalLM.from_pretrained(model, dtype=torch.float32),
        arguments,
        train_dataset=Dataset.from_list(rows()),
        peft_config=LoraConfig(r=6, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model),
    )


def check_same(plan, trainer, options, close):
    """The plan of a run that the file tells of is that of the run, with bytes as close as this."""
    callback = rankpilot.attach(trainer, **options)
    if plan.problem:
        with pytest.raises(BudgetError, match="too small for any adapter"):
            trainer.train()
        return
    trainer.train()
    keeper = callback.pilot.guard.plan
    assert callback.limit == close(plan.limit.value)
    assert np.array_equal(callback.applier.ranks, plan.ranks)
    if callback.pilot.options.chooses_layers and keeper.checkpointing:
        assert len(keeper.checkpointed) == plan.checkpointed
    if plan.limit.unit == "bytes":
        assert callback.predictions[0][1] == close(plan.step_bytes)


@pytest.mark.parametrize(
    ("budget", "parts"),
    [
        ("100%", "on"),
        ("30%", "on"),
        ("60%", "off"),
        ("18%", "off"),
        ("4MB step", "off"),
        ("5k params", "off"),
    ],
)
def test_a_file_and_a_run_of_a_trainer_are_one(model, tmp_path, budget, parts):
    """But for `SCALARS`, from layers that need none up to ranks that shrink."""
    options = {"budget": budget, "parts": parts}
    plan = told(tmp_path, FACTORY | {"model_name_or_path": str(model)}, options, padded=True)
    check_same(plan, factory_trainer(model, tmp_path, False), options, exactly)


@pytest.mark.parametrize("switch", [True, "auto"])
def test_checkpointing_of_a_trainer_is_left_alone(model, tmp_path, switch):
    options = {"budget": "95%", "parts": "off", "gradient_checkpointing": switch}
    values = FACTORY | {"model_name_or_path": str(model), "disable_gradient_checkpointing": switch is True}
    plan = told(tmp_path, values, options, padded=True)
    assert plan.checkpointed == plan.layers == SIZES["num_hidden_layers"]
    check_same(
        plan,
        factory_trainer(model, tmp_path, switch == "auto"),
        options,
        exactly,
    )


@pytest.mark.parametrize("options", [{"budget": "100%"}, {"budget": "60%", "parts": "off"}, {"budget": "9MB step"}])
def test_a_file_and_a_run_of_trl_are_one(model, tmp_path, options):
    plan = told(tmp_path, TRL | {"model_name_or_path": str(model)}, options)
    assert plan.in_parts == ("parts" not in options), "the loss of SFTTrainer is a sum"
    check_same(plan, trl_trainer(model, tmp_path), options, closely)


def card_plan(budget="100%", **options):
    small = {"batch_size": 4, "max_length": 512, "gradient_checkpointing": False}
    outlook = memory_of("smollm2-135m", "T4", exact_savers=False, **small)
    return plan_of_run(outlook, OptionsInFile.of({"budget": budget} | options, "x"), sums=False)


def test_what_loses_nothing_comes_before_ranks():
    plans = [card_plan(budget) for budget in ("12GiB", "900MB", "550MB", "450MB")]
    assert [plan.keeps_ranks for plan in plans] == [True, True, True, False]
    assert [plan.checkpointed > 0 for plan in plans] == [False, True, True, True]
    assert [plan.streamed > 0 for plan in plans] == [False, False, True, True]
    assert all(plan.fits and plan.step_bytes <= plan.limit.value for plan in plans)
    assert "too small for any adapter" in card_plan("550MB", stream="off").text()
    assert card_plan("auto").limit.value > plans[0].limit.value


def test_chosen_ranks_are_not_foretold():
    plan = card_plan(goal="time")
    assert (plan.ranks, plan.keeps_ranks, plan.fits) == (None, None, True)
    assert "not known yet" in plan.text()
    assert plan.limit.whole > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "80 apples"}, "Cannot read the budget"),
        ({"budgt": "80%"}, "budgt"),
        ({"budget": ["80%"]}, "budget must be a text"),
        ({"parts": "maybe"}, "parts must be"),
        ({"stream": True}, "stream is"),
        ({"policy": 5}, "policy must be"),
        ({"schedule": {"at": [1]}}, "schedule is an object"),
        ({"bounds": {"q_proj": [4, 2]}}, "Bounds must be"),
        ({1: 2}, "names of options"),
        (["80%"], "budget must be a text"),
    ],
)
def test_wrong_options_in_a_file_get_one_line(tmp_path, options, message):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(TRL | {"model_name_or_path": "m", "rankpilot": options}))
    with pytest.raises(ConfigError, match=message) as error:
        read_trainer_file(path)
    assert str(error.value).startswith(f"{path}: rankpilot: ")
    assert "\n" not in str(error.value)


def test_options_are_read_as_yaml_has_them(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(TRL | {"model_name_or_path": "m"}) + "rankpilot: {parts: off, stream: off}")
    file = read_trainer_file(path)
    assert (file.run.options.parts, file.run.options.stream, file.unread) == ("off", "off", ())
    assert OptionsInFile.of({"learning_rate": ["1e-4", 2e-4]}, "x").options.learning_rate == [1e-4, 2e-4]
    bounded = OptionsInFile.of({"bounds": {"q_proj": [0, 4]}}, "x")
    assert bounded.options.bounds == {"q_proj": (0, 4)}
    assert not bounded.keeps_ranks
    assert OptionsInFile.of(0.8, "x").options.budget_read == OptionsInFile.of("80%", "x").options.budget_read


def test_the_command_tells_the_plan(tmp_path, capsys):
    path = tmp_path / "train.yaml"
    values = FACTORY | {"model_name_or_path": "HuggingFaceTB/SmolLM2-135M", "rankpilot": {"budget": "40%"}}
    path.write_text(yaml.safe_dump(values | {"cutoff_len": 512, "bf16": True}))
    command = ["memory", "--config", str(path), "--device", "T4"]
    assert cli.run(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Under rankpilot: The budget is" in printed
    assert "40% of the" in printed
    assert "The LoRA stays as configured: rank 6." in printed
    assert "Without rankpilot: Fits" in printed
    assert cli.run([*command, "--json", "--output", str(tmp_path / "out")]) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert run == json.loads((tmp_path / "out" / "memory.json").read_text())["run"]
    assert run["limit"] == pytest.approx(0.4 * run["reference"])
    assert run["step_bytes"] <= run["limit"]
    assert (run["keeps_ranks"], run["fits"], run["in_parts"], run["unit"]) == (True, True, False, "bytes")
    path.write_text(yaml.safe_dump(values | {"cutoff_len": 512, "rankpilot": "1MB step"}))
    assert cli.run(command) == 3, "no plan fits"
    assert "too small for any adapter" in " ".join(capsys.readouterr().out.split())
