"""Every example runs, at the size of a tiny model."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftConfig, get_peft_model
from rankpilot.data import packaged_data
from rankpilot.lora.targets import find_target_modules
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .finetune.several import in_processes
from .finetune.trainer_kinds import reviews
from .small_bases import bert as bert
from .small_bases import chat_model as chat_model

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The examples leave TrainingArguments as they are, for machines with a GPU.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example in a folder of its own, on a few short reviews; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packaged_data, "load_packaged_dataset", lambda name: reviews())

    def start(name: str, *arguments: object) -> str:
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(path), *map(str, arguments), "--output", "out"])
        runpy.run_path(str(path), run_name="__main__")
        out = tmp_path / "out"
        if os.environ.get("RANK", "0") == "0":  # of several processes the first one saves
            files = ("card.json", "adapter_config.json")
            assert out.is_file() or any((out / name).exists() for name in files) or has_ranks(out / "adapter")
        return capsys.readouterr().out

    return start


def has_ranks(adapter: Path) -> bool:
    """Whether some module of a saved adapter has learned something."""
    weights = load_file(adapter / "adapter_model.safetensors")
    return any(value.any() for name, value in weights.items() if "lora_B" in name)


def test_examples_are_short() -> None:
    lines = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lines) == 11
    assert max(lines.values()) <= 44, lines


def test_a_plan_for_axolotl(run: Callable[..., str], chat_model: Path, tmp_path: Path) -> None:
    printed = run("allocate_for_axolotl", "--model", chat_model, "--budget", "120%", "--batch-size", 2)
    lines = yaml.safe_load((tmp_path / "out").read_text())
    assert lines["lora_rank_pattern"]
    assert len(lines["lora_target_modules"]) == len(lines["lora_rank_pattern"])
    assert "modules adapted" in printed
    assert not (tmp_path / "runs" / "plan" / "decisions").exists()


def test_an_experiment_for_peft(run: Callable[..., str], chat_model: Path, tmp_path: Path) -> None:
    rows = [{"query": f"What is {n} plus {n}?", "response": f" It is {2 * n}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run("peft_experiment", "--model", chat_model, "--data", "rows.jsonl", "--budget", "80%", "--length", 24)
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert config.base_model_name_or_path is None
    assert json.loads((tmp_path / "out" / "training_params.json").read_text())["optimizer_kwargs"]["lr"] == 1e-4
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(chat_model), config)
    ranks = {target.rank for target in find_target_modules(model)}
    assert ranks <= {*config.rank_pattern.values(), config.r}
    assert str(sorted({*config.rank_pattern.values(), config.r})) in printed


def test_trainer_and_going_on_from_its_adapter(run: Callable[..., str], bert: Path, tmp_path: Path) -> None:
    assert "held-out loss" in run("trainer", "--model", bert, "--steps", 4)
    adapter = shutil.copytree(tmp_path / "out" / "adapter", tmp_path / "first")
    printed = run("continue_adapter", adapter, "--steps", 2)
    assert "held-out loss before" in printed
    assert "held-out loss after" in printed


def test_a_plain_loop(run: Callable[..., str], bert: Path) -> None:
    assert "step 0" in run("plain_loop", "--model", bert, "--steps", 4)
    assert "step 0" not in run("plain_loop", "--model", bert, "--steps", 4, "--resume")


def test_resuming(run: Callable[..., str], bert: Path, tmp_path: Path) -> None:
    arguments = ("--model", bert, "--steps", 6, "--save-steps", 2)
    assert "began and trained 6 steps" in run("resume", *arguments)
    whole = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")  # as if it had been killed after step 4
    assert "checkpoint-4 and trained 6 steps" in run("resume", *arguments)
    resumed = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_several_processes(run: Callable[..., str], bert: Path, tmp_path: Path) -> None:
    """As torchrun starts it; then again, from the checkpoint before the last."""

    def both() -> list[str]:
        return in_processes(2, run, "several_processes", "--model", bert, "--steps", 6, "--save-steps", 2)

    first, second = both()
    assert "2 processes, highest peak" in first
    assert "highest peak" not in second
    whole = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    both()
    again = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.parametrize("name", ["trl_sft", "trl_dpo", "qlora"])
def test_trl(run: Callable[..., str], chat_model: Path, name: str) -> None:
    assert "highest peak" in run(name, "--model", chat_model, "--steps", 3, "--batch-size", 2, "--budget", "100%")
