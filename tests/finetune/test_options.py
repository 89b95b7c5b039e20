"""Fine-tunes for every task, and their options: settings of the Trainer, bounds, chats, early stopping, merging."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rankpilot.cli import main as cli
from rankpilot.common.errors import ConfigError, UnknownNameError
from rankpilot.common.files import read_json, read_json_lines
from rankpilot.decide.log import DecisionLog
from rankpilot.decide.rules import read_plan
from rankpilot.finetune.experiment import finetune, plan_ahead
from rankpilot.finetune.options import FinetuneConfig, rank_bounds_of
from rankpilot.finetune.trainer import arguments_class, further_settings, new_arguments
from transformers import AutoModelForCausalLM, TrainingArguments

from ..data.small_models import WORDS, save, write_rows


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny Llama with a chat template, and conversations in a file."""
    folder = tmp_path_factory.mktemp("chats")
    texts = [" ".join((WORDS * 2)[i % len(WORDS) :][:8]) for i in range(40)]
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": x}]} for x in texts]
    return save("llama", folder / "model", chat=True), write_rows(folder / "chat.jsonl", rows)


def settings(chats: tuple[str, str], **options: Any) -> FinetuneConfig:
    model, data = chats
    usual: dict[str, Any] = {"policy": "top-down", "batch_size": 4, "steps": 12, "eval_every": 6, "learning_rate": 1e-2}
    return FinetuneConfig(model, data, **usual | options)


def test_a_chat_with_every_option(chats: tuple[str, str], tmp_path: Path, reloads: list[dict[str, Any]]) -> None:
    config = settings(
        chats,
        budget="110%",
        epochs=2.0,
        eval_batch_size=2,
        early_stopping=1,
        bounds=("q_proj=0:2", "layers.1.mlp.down_proj=4"),
        merge=True,
        gradient_checkpointing=True,
        stream=1,
        trainer=("warmup_steps=2", "lr_scheduler_type=cosine", "logging_steps=1"),
    )
    summary = finetune(config, tmp_path / "run")
    run = summary["runs"]["rankpilot"]
    assert summary["steps"] == run["steps"] == 18, "40 rows, four of which are held out, in batches of four, twice"
    assert run["peak_bytes"] <= run["budget_bytes"]
    assert [found["identical"] for found in reloads] == [True]
    ranks = run["ranks"]
    assert max(rank for name, rank in ranks.items() if name.endswith("q_proj")) <= 2
    assert ranks["model.layers.1.mlp.down_proj"] == 4
    losses = [row["loss"] for row in read_json_lines(tmp_path / "run" / "metrics-rankpilot.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    assert DecisionLog(tmp_path / "run" / "decisions").to_pandas().shape[0] > 0
    adapter = tmp_path / "run" / "rankpilot" / "adapter"
    assert {"tokenizer.json", "chat_template.jinja", "adapter_model.safetensors"} <= {p.name for p in adapter.iterdir()}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "rankpilot" / "merged")
    base = AutoModelForCausalLM.from_pretrained(chats[0])
    tokens = torch.arange(10).view(1, 10)
    with torch.no_grad():
        assert (merged(tokens).logits - base(tokens).logits).abs().max() > 1e-3
    assert read_json(tmp_path / "run" / "config.json")["trainer"] == list(config.trainer)


def test_settings_of_the_trainer(tmp_path: Path, chats: tuple[str, str]) -> None:
    given = ("warmup_steps=0.1", "lr_scheduler_type=cosine", 'label_names=["labels"]')
    values = further_settings(given, TrainingArguments)
    assert values == {"warmup_steps": 0.1, "lr_scheduler_type": "cosine", "label_names": ["labels"]}
    arguments = new_arguments(settings(chats, trainer=("assistant_only_loss=true",)), "causal-lm", tmp_path)
    assert type(arguments) is arguments_class("causal-lm")
    assert arguments.assistant_only_loss
    assert arguments.per_device_eval_batch_size == 4, "the training batch"
    assert not arguments.gradient_checkpointing, "TRL's own default would be on"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trainer": ("warmup_step=3",)}, UnknownNameError, "warmup_steps"),
        ({"trainer": ("warmup_steps",)}, ConfigError, "NAME=VALUE; got 'warmup_steps'"),
        ({"trainer": ("save_steps=3",)}, ConfigError, "save_steps is set by --eval-steps"),
        ({"trainer": ("lr_scheduler_type=nope",)}, ConfigError, "The Trainer rejects these settings: .*nope"),
        ({"report_to": ("tensorbord",)}, UnknownNameError, r"tracker 'tensorbord'\. Did you mean: 'tensorboard'"),
        ({"report_to": ("comet_ml",)}, ConfigError, r"Cannot use tracker 'comet_ml': .*comet"),
        ({"target_modules": "q_proj,lm_head"}, ConfigError, r"TRL's SFTTrainer cannot train with this: .*lm_head"),
    ],
)
def test_settings_that_are_refused(
    chats: tuple[str, str], tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finetune(settings(chats, **options), tmp_path / "run")
    assert "target_modules" in options or not (tmp_path / "run").exists(), "before anything is written"


def test_bounds() -> None:
    assert rank_bounds_of(("q_proj=8", "down_proj=0:4")) == {"q_proj": 8, "down_proj": (0, 4)}
    for wrong in ("q_proj", "q_proj=-1", "=4", "q_proj=1:2:3", "q_proj=x"):
        with pytest.raises(ConfigError, match="MODULE=LEAST:MOST"):
            rank_bounds_of((wrong,))
    with pytest.raises(ConfigError, match="early_stopping must be above 0"):
        FinetuneConfig("a", "b", early_stopping=0)
    with pytest.raises(ConfigError, match="tolerance applies only to goal"):
        FinetuneConfig("m", "d", tolerance=0.02)
    with pytest.raises(ConfigError, match="requires a budget in bytes"):
        FinetuneConfig("m", "d", goal="bytes", budget="3k params")


@pytest.mark.long
def test_a_plan_that_a_person_edited_decides_a_run(
    chats: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rankpilot plan --output plan.yaml`, an edit, and `--policy plan.yaml`, and a plan that is too large."""
    path, run = tmp_path / "plan.yaml", tmp_path / "run"
    small = ["--batch-size=4", "--budget=110%", "--parts=off"]
    assert cli.run(["plan", *chats, "--policy=signal-mean", *small, "--output", str(path)]) == 0
    assert f"pass it to rankpilot finetune with --policy {path}" in " ".join(capsys.readouterr().out.split())
    text = path.read_text()
    planned = read_plan(path)
    assert sum("{" in line for line in text.splitlines()) == 2, "a line for each layer"
    name = max(planned, key=lambda module: planned[module])
    edited = planned | {name: 1}
    assert planned[name] > 1
    path.write_text(yaml.safe_dump({"read_at": [0, 0.5], "modules": edited}))
    command = ["finetune", *chats, f"--policy={path}", *small, "--steps=2", "--learning-rate=0.01"]
    assert cli.run([*command, "--output", str(run)]) == 0
    assert DecisionLog(run / "decisions").logged(0).plan() == edited
    assert len(DecisionLog(run / "decisions")) == 2
    assert read_json(run / "summary.json")["runs"]["rankpilot"]["ranks"] == edited

    path.write_text(yaml.safe_dump({"modules": dict.fromkeys(planned, 16)}))
    tight = ["--budget=100%" if option == "--budget=110%" else option for option in command]
    assert cli.run([*tight, "--output", str(tmp_path / "larger")]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert re.search(
        r"plan\.yaml is predicted to take .* above the budget of .*Lower some ranks, or raise the bud", line
    )


@pytest.mark.long
def test_a_plan_ahead_is_the_first_of_the_run(chats: tuple[str, str], tmp_path: Path) -> None:
    config = settings(chats, policy="signal-mean", budget="110%", steps=1, bounds=("q_proj=0:2",), parts="off")
    plan = plan_ahead(config)
    finetune(config, tmp_path / "run")
    first = DecisionLog(tmp_path / "run" / "decisions").to_pandas().iloc[: len(plan.ranks)]
    assert dict(zip(first["module"].tolist(), first["rank_after"].tolist(), strict=True)) == plan.ranks
    assert first["predicted_cost"][0] == plan.cost


# Every task ----------------------------------------------------------------------------------------------------------

TEXTS = [" ".join(WORDS[(row + shift) % len(WORDS)] for shift in range(2 + row % 4)) for row in range(60)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": text, "label": text[0]} for text in TEXTS],
    "causal-lm": [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in TEXTS
    ],
}


@pytest.mark.parametrize(("task", "model"), [("classification", "distilbert"), ("causal-lm", "llama")])
def test_a_run(task: Any, model: str, tmp_path: Path, reloads: list[dict[str, Any]]) -> None:
    folder = save(model, tmp_path / "model", chat=True)
    data = write_rows(tmp_path / "rows.jsonl", ROWS[task])
    config = FinetuneConfig(folder, data, steps=2, eval_every=2, batch_size=4, max_length=16)
    summary = finetune(config, tmp_path / "run")
    run = summary["runs"]["rankpilot"]
    assert [found["max_abs_difference"] for found in reloads] == [0.0]
    assert np.isfinite(run["held_out_loss"])
    assert 0 < run["peak_bytes"] <= run["budget_bytes"]
    assert (run["held_out_accuracy"] is not None) == (task == "classification")
