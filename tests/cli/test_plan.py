"""`rankpilot plan`: what it prints for each program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from rankpilot.cli import plan as module
from rankpilot.common.errors import ConfigError
from rankpilot.decide.rules import read_plan
from rankpilot.finetune import experiment
from rankpilot.finetune.allocate import StaticPlan
from rankpilot.finetune.options import FinetuneConfig

from .mistakes import OLD_TYRO, usage_error

RANKS = {"model.layers.0.q_proj": 0, "model.layers.0.v_proj": 4, "model.layers.1.q_proj": 8}


@pytest.fixture(autouse=True)
def plan(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneConfig]:
    """A plan for whatever is asked; the settings that it was asked with."""
    asked: list[FinetuneConfig] = []
    pattern = {f"^{name}".replace(".", r"\."): rank for name, rank in RANKS.items() if rank}
    head: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    modules: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": r"model\.layers\.0\.q_proj"}
    config = LoraConfig(r=8, lora_alpha=16, **head, **modules, rank_pattern=pattern)

    def plan_ahead(options: FinetuneConfig, tell: object, log: Path | None) -> StaticPlan:
        asked.append(options)
        print("a line that the run tells")
        alphas = dict.fromkeys(RANKS, 16.0)
        return StaticPlan(config, RANKS, alphas, 900.0, 1000.0, "parameters", learning_rate=1 / 700)

    monkeypatch.setattr(experiment, "plan_ahead", plan_ahead)
    return asked


def test_options_of_a_training_are_not_taken(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if not OLD_TYRO:
        assert "Unrecognized options: --merge" in usage_error(["plan", "m", "d", "--merge"], capsys)
    (tmp_path / "config.json").write_text('{"merge": true, "budget": "50%"}')
    module.main(["a/m", "d", "--config", str(tmp_path / "config.json")])
    out, err = capsys.readouterr()
    assert "900 of 1,000 parameters" in err
    assert json.loads(out)["r"] == 8, "nothing beside the plan"


def test_lines_for_peft(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    module.main(["a/m", "d", "--output", str(tmp_path / "plan.json"), "--budget", "1k params"])
    values = json.loads((tmp_path / "plan.json").read_text())
    config = LoraConfig(**values)
    assert config.rank_pattern == {r"^model\.layers\.0\.v_proj": 4, r"^model\.layers\.1\.q_proj": 8}
    assert config.exclude_modules == r"model\.layers\.0\.q_proj"
    assert (config.task_type, config.modules_to_save) == ("SEQ_CLS", ["classifier"])
    printed = capsys.readouterr().out
    assert "900 of 1,000 parameters, mean rank 4.0" in printed
    assert "Learning rate for this plan: 0.00143\n" in printed
    with pytest.raises(ConfigError, match=r"plan\.json already exists"):
        module.main(["a/m", "d", "--output", str(tmp_path / "plan.json")])
    with pytest.raises(ConfigError, match=r"already exists\. Choose a new folder"):
        module.main(["a/m", "d", "--log", str(tmp_path)])


def test_a_plan_to_edit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    module.main(["a/m", "d", "--output", str(path)])
    assert read_plan(path) == RANKS
    text = path.read_text()
    assert "model.layers.0: {q_proj: 0, v_proj: 4}\n" in text
    assert "predicted to take 900 parameters; the budget is 1,000 parameters" in text
    assert "--policy mine.yaml" in text
    assert "pass it to rankpilot finetune with --policy" in capsys.readouterr().out
    module.main(["a/m", "d", "--for", "plan"])
    assert 'or policy="plan.yaml"' in capsys.readouterr().out
    module.main(["a/m", "d", "--for", "peft", "--output", str(tmp_path / "peft.yaml")])
    assert LoraConfig(**json.loads((tmp_path / "peft.yaml").read_text())).r == 8


def test_lines_for_axolotl(tmp_path: Path) -> None:
    module.main(["a/m", "d", "--for", "axolotl", "--output", str(tmp_path / "plan.yaml")])
    values = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert values["lora_target_modules"] == ["model.layers.0.v_proj", "model.layers.1.q_proj"]
    assert values["lora_rank_pattern"] == {r"^model\.layers\.0\.v_proj": 4, r"^model\.layers\.1\.q_proj": 8}
    assert values["lora_alpha"] == 16
    assert "lora_alpha_pattern" not in values, "one alpha for all"
    assert values["learning_rate"] == 0.00143


def test_settings_in_a_yaml_file(tmp_path: Path, plan: list[FinetuneConfig]) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: m\ndata: d\nbudget: 60%\nlearning_rate: 0.0002\nbf16: true\nbounds: [q_proj=0:8]\n"
        "trainer:\n  warmup_steps: 0.1\n  lr_scheduler_type: cosine\n  packing: true\n"
    )
    module.main(["a/m", "d", "--config", str(tmp_path / "run.yaml"), "--budget", "50%"])
    (options,) = plan
    assert (options.budget, options.learning_rate, options.bf16) == ("50%", 0.0002, True)
    assert options.bounds == ("q_proj=0:8",)
    assert options.trainer == ("warmup_steps=0.1", "lr_scheduler_type=cosine", "packing=true")
    (tmp_path / "run.yaml").write_text("model: [\n")
    with pytest.raises(ConfigError, match=r"Cannot read the config file .*run\.yaml"):
        module.main(["a/m", "d", "--config", str(tmp_path / "run.yaml")])
