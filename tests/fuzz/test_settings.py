"""Settings as people or files give them: budgets, bounds and schedules; configuration files, and plans."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from rankpilot.cli.options import read_config_file, with_file_settings
from rankpilot.common.errors import BudgetError, ConfigError
from rankpilot.common.files import as_json, from_json
from rankpilot.cost.budget import Budget
from rankpilot.decide.plan.problem import rank_bounds
from rankpilot.decide.rules import PlanFile
from rankpilot.decide.settings import DecisionSchedule
from rankpilot.finetune.options import FinetuneConfig, rank_bounds_of
from rankpilot.finetune.trainer import new_arguments
from rankpilot.lora.spec import ModuleSpec
from rankpilot.report.trainer_file import read_trainer_file

from .damage import NAMES, Files, damaged, damaged_json, edited, folder_of, odd_values
from .running import fuzz

PARTS = [
    *"0123456789.,_ eE-+%", "e9", "1e308", "gib", "ib", "mb", "bytes", " step", "k params", "auto", "ms", "min", "٣",
    "\n",
]  # fmt: skip

words = st.one_of(st.lists(st.sampled_from(PARTS), max_size=9).map("".join), st.text(max_size=20), odd_values)

MODULES = [ModuleSpec(f"layers.{index // 2}.{'qv'[index % 2]}_proj", index // 2, 32, 16) for index in range(6)]

SCHEDULE = {"probe_steps": 40, "probe_batch": 2, "fractions": [0.0, 0.18, 0.34, 0.5], "max_step": 2}


@fuzz(words, examples=150)
def test_budgets(given: Any) -> None:
    budget = Budget.parse(given)
    assert 0 < budget.value < float("inf")
    if budget.kind == "share" or budget.value >= 1e6:  # smaller ones are written as whole numbers
        again = Budget.parse(str(budget))
        assert (again.kind, again.value) == (budget.kind, pytest.approx(budget.value, rel=1e-5))


KEYS = [
    *("adapter", "finetuning_type", "lora_r", "lora_dropout", "sequence_len", "max_length", "optimizer", "optim"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "sample_packing", "attn_implementation", "plugins"),
    *("lora_target_modules", "lora_target_parameters", "quantization_bit", "load_in_4bit", "deepspeed", "fsdp_config"),
]

files = st.builds(
    lambda name, given, adapter: {name: "m", **given, **adapter},
    st.sampled_from(["base_model", "model_name_or_path"]),
    st.dictionaries(st.sampled_from(KEYS), odd_values, max_size=6),
    st.sampled_from([{"use_peft": True, "packing": False}, {"adapter": "lora"}, {"stage": "sft", "do_train": True}]),
)


@fuzz(files, examples=150)
def test_files_of_other_trainers(given: dict[str, Any]) -> None:
    with folder_of({"train.yaml": yaml.safe_dump(given).encode()}) as folder:
        file = read_trainer_file(folder / "train.yaml")
    assert file.settings["model"] == "m"
    assert set(file.unread) <= set(given)


entries = st.builds("{}={}".format, st.sampled_from(["q_proj", "x", ""]), words)


@fuzz(st.lists(st.one_of(words.map(str), entries)), examples=100)
def test_bounds_as_text(given: list[str]) -> None:
    rank_bounds(MODULES, rank_bounds_of(tuple(given)))


pairs = st.one_of(odd_values, st.tuples(odd_values, odd_values))


@fuzz(st.dictionaries(st.sampled_from(["q_proj", "0.v_proj", "x"]), pairs), examples=100)
def test_bounds_as_values(given: dict[str, Any]) -> None:
    low, high = rank_bounds(MODULES, given)
    assert low.min() >= 0
    assert high.min() >= 0


@fuzz(edited(SCHEDULE), examples=100)
def test_schedules(given: Any) -> None:
    steps = from_json(DecisionSchedule, given, complete=True).steps(200)
    assert steps[0] == 0
    assert len(steps) <= 200


YAML_PARTS = [
    *"-:?[]{},&*#|>!%@`'\" \n",
    "- ", ": ", "\n  ", "a", "model: x", "&a", "*a", "<<: *a", "!!int ''", "!!float", "!!bool x", "!!timestamp x",
    "!!binary x", "!!set", "!!omap", "!!python/object/apply:os.system [ls]", "2001-13-45", "1:99:99", "0o9", "0x",
    "1_000", "...", "---", "%YAML 9.9", "\t", "\x00", "\ud83d", "[" * 60, "{" * 60, "null", "steps: 5",
]  # fmt: skip

yaml_texts = st.lists(st.sampled_from(YAML_PARTS), max_size=25).map(
    lambda parts: "".join(parts).encode("utf-8", "replace")
)

FINETUNE = FinetuneConfig(model="m", data="d", bounds=("q_proj=0:16",), trainer=("warmup_steps=0.1",))


@st.composite
def config_files(draw: st.DrawFn) -> tuple[FinetuneConfig, Files]:
    """The settings of a command, and its configuration file."""
    base = FINETUNE
    values = as_json(type(base), base)
    form = draw(st.sampled_from(["json", "json", "yaml", "parts"]))
    if form == "json":
        return base, {"config.json": draw(damaged_json(values))}
    if form == "parts":
        return base, {"c.yaml": draw(yaml_texts)}
    text = yaml.safe_dump(json.loads(json.dumps(draw(edited(values)))), allow_unicode=True)
    return base, {"c.yml": draw(damaged(text.encode("utf-8", "replace")))}


@fuzz(config_files(), examples=100)
def test_config_files(given: tuple[FinetuneConfig, Files]) -> None:
    base, files = given
    with folder_of(files) as folder:
        path = str(folder / next(iter(files)))
        settings = with_file_settings(base, read_config_file(path), path)
        assert type(settings) is type(base)
        rank_bounds_of(settings.bounds)


@fuzz(yaml_texts, examples=100)
def test_files_of_plans(text: bytes) -> None:
    with folder_of({"plan.yaml": text}) as folder:
        assert PlanFile(folder / "plan.yaml").schedule.fractions[0] == 0


options = st.builds(
    "{}={}".format,
    st.sampled_from(["optim", "warmup_steps", "lr_scheduler_type", "fsdp", "x"]),
    st.sampled_from(["1", "null", "[]", "{}", "1e999", "[" * 9999, *NAMES]),
)


@fuzz(st.lists(options, max_size=3), examples=40)
def test_settings_of_the_trainer(given: list[str]) -> None:
    config = FinetuneConfig(model="m", data="d", trainer=tuple(given))
    with folder_of({}) as folder:
        new_arguments(config, "classification", folder)


# What was found -------------------------------------------------------------------------------------------------------


HUGE = pytest.param(10**5000, id="huge")


@pytest.mark.parametrize("given", ["5ib", HUGE, "9" * 5000, "1e308 tib", "1e-320%", "1" * 61, "1.5.2 MB"])
def test_budgets_that_were_once_read_or_fell_over(given: Any) -> None:
    with pytest.raises(BudgetError, match="Cannot read the budget"):
        Budget.parse(given)


def test_bounds_that_fell_over() -> None:
    for entry in ("q_proj=" + "9" * 5000, "q_proj=99999999999"):
        with pytest.raises(ConfigError, match="A bound must have the form"):
            rank_bounds_of((entry,))
    with pytest.raises(ConfigError, match="from 0 to 2,147,483,647"):
        rank_bounds(MODULES, {"q_proj": 2**63})


def test_an_error_shows_a_part_of_long_values() -> None:
    with pytest.raises(ConfigError) as caught:
        with_file_settings(FINETUNE, {"steps": "x" * 10**6}, "config.json")
    assert len(str(caught.value)) < 500
